"""Plausible event streams of swarms that never ran, and what is true of them: for the tests of traces.

`Story(seed)` lives through a random tree of agents on a clock of its own and writes the events down as the runtime
does; beside them it keeps what the fold must find, so that nothing is compared with itself.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

ROLES = ("Fact checker", "Price hunter", "Archivist", "Translator", "Table builder", "Geographer")
PLACES = ("Valdoria", "Kestrel Bay", "Umber", "Northreach", "Lissom", "Tavarre", "Ostend Hollow", "Mirefall")
LIMITS = {"steps": 40, "tokens": 4_000_000, "seconds": 3600.0, "money": 20.0, "critical_steps": 200, "subagents": 100}
WORDS = ("harbour council budget archive ferry granite ledger census orchard signal winter market bridge figure "
         "founded population recorded survey district annual report shows steady growth since early decades").split()


@dataclass
class Truth:
    """What happened to one agent."""

    parent_call: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    sees: list[list[int]] = field(default_factory=list)
    """Indices of the messages that each model call was shown."""
    waited: list[float] = field(default_factory=list)
    """Of each model call."""
    results: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    money: float = 0.0
    steps: int = 0
    span: tuple[float, float] = (0.0, 0.0)
    status: str = ""


class Story:
    """One episode. `depth`: how far sub-agents may have sub-agents; `words`: about how long a tool's result is."""

    def __init__(self, seed: int, steps: int = 4, fan: int = 3, depth: int = 2, words: int = 30,
                 plain: bool = False) -> None:
        self.random = random.Random(seed)
        self.most_steps, self.fan, self.depth, self.words, self.plain = steps, fan, depth, words, plain
        self.truth: dict[str, Truth] = {}
        self.timed: list[tuple[float, int, dict[str, Any]]] = []
        task = f"List every town of {self.place()} with its population, its founding year and the ferry that serves it."
        self.write(0.0, type="episode_started", schema="moonbase.trace/1", episode=f"episode-{seed}", task=task,
                   model="scripted", limits=LIMITS, sub_limits={"steps": 12}, seed=seed, agent="main",
                   tools=["search", "open", "assign_task"], started_at="2026-02-03T09:30:00+00:00")
        end = self.agent("main", None, None, 0.0, 0, task, 0)
        truth = self.truth["main"]
        self.write(end, type="episode_finished", agent="main", status=truth.status, rewards={"item_f1": 0.875},
                   text=truth.messages[-1].get("content") or "", critical={"steps": 0, "tokens": 0, "seconds": 0})
        self.timed.sort(key=lambda item: item[:2])
        self.events = [event for _, _, event in self.timed]

    def write(self, time: float, **event: Any) -> None:
        self.timed.append((time, len(self.timed), {"time": time, **event}))

    def place(self) -> str:
        return self.random.choice(PLACES)

    def prose(self, count: int) -> str:
        return " ".join(self.random.choice(WORDS) for _ in range(count)).capitalize() + "."

    def table(self, rows: int) -> str:
        lines = [f"| {self.place()} | {self.random.randrange(900, 90000):,} | {self.random.randrange(1200, 1990)} "
                 f"| {self.random.choice(('yes', 'no'))} |" for _ in range(rows)]
        return "\n".join(["| Town | Population | Founded | Ferry |", "|---|---:|---:|---|", *lines])

    def agent(self, name: str, parent: str | None, parent_call: str | None, now: float, level: int, task: str,
              stage: int) -> float:
        """Live through an agent that starts at `now`; when it ended."""
        truth = self.truth[name] = Truth(parent_call)
        role = "Orchestrator" if parent is None else self.random.choice(ROLES)
        start, system = now, f"You are the {role.lower()}. Answer in a table; say where each figure comes from."
        self.write(now, type="agent_started", agent=name, name=role, parent=parent, parent_call=parent_call,
                   system=system, task=task, tools=["search", "open"], limits={"steps": self.most_steps},
                   trainable=parent is None, model="scripted")
        pending = [{"role": "system", "content": system}, {"role": "user", "content": task}]
        hidden: list[list[int]] = []
        steps = self.most_steps if parent is None else self.random.randint(1, self.most_steps)
        truth.status = "finished"
        for step in range(1, steps + 1):
            truth.messages += pending
            if level and not self.plain and step == 3 and self.random.random() < 0.3:
                hidden = [[2, len(truth.messages) - 1]] if len(truth.messages) > 4 else []
            truth.sees.append([at for at in range(len(truth.messages))
                               if not any(first <= at < stop for first, stop in hidden)])
            failed = level and not self.plain and self.random.random() < 0.04
            reply = None if failed else self.reply(name, step, step == steps, level)
            began, now = now, now + self.random.uniform(0.4, 3.0)
            now = self.model_call(name, step, step if level == 0 else stage, began, now, pending, hidden, reply)
            pending = []
            if reply is None:
                truth.status = "failed"
                break
            now, pending = self.tools(name, step, step if level == 0 else stage, now, reply, level)
            now += self.random.uniform(0.0, 0.02)
        truth.messages += pending
        truth.span = (start, now)
        text = truth.messages[-1].get("content") or "" if truth.status == "finished" else ""
        self.write(now, type="agent_finished", agent=name, status=truth.status, text=text, steps=truth.steps,
                   reason="the model is overloaded" if truth.status == "failed" else "", usage={})
        return now

    def model_call(self, name: str, step: int, stage: int, began: float, now: float, pending: list[dict[str, Any]],
                   hidden: list[list[int]], reply: dict[str, Any] | None) -> float:
        truth = self.truth[name]
        usage = {"input_tokens": 200 * step + sum(len(str(m)) for m in pending) // 4, "output_tokens": 0,
                 "cached_tokens": 150 * (step - 1)}
        usage["output_tokens"] = 0 if reply is None else len(str(reply)) // 4
        attempts = self.random.choice((1,) * 14 + (2, 3)) if reply else 6
        money = (usage["input_tokens"] * 0.6 + usage["output_tokens"] * 2.5) / 1e6
        if reply is not None:
            truth.messages.append(reply)
        truth.tokens += usage["input_tokens"] + usage["output_tokens"]
        truth.money += money
        truth.steps += 1
        truth.waited.append((now - began) / 4 if step % 2 else 0.0)
        self.write(now, type="model_call", agent=name, call=f"{name}#{step}", step=step, stage=stage,
                   waited=truth.waited[-1],
                   messages_added=list(pending), context_dropped=hidden, started=began, ended=now, usage=usage,
                   options={"temperature": 1.0, "top_p": 0.95, "max_tokens": 4096}, price_paid=money, completion=reply,
                   finish_reason=None if reply is None else "tool_calls" if "tool_calls" in reply else "stop",
                   model="scripted-1", attempts=attempts,
                   error=None if reply else {"kind": "overloaded", "message": "529: try again later"},
                   budget={"spent": {"steps": truth.steps, "tokens": truth.tokens, "seconds": now,
                                     "money": truth.money, "critical_steps": truth.steps, "subagents": 0},
                           "limits": {"steps": self.most_steps}})
        return now

    def reply(self, name: str, step: int, last: bool, level: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": None,
                                   "reasoning_content": f"Step {step}. {self.prose(25)}\n\n{self.prose(18)}"}
        if last:
            message["content"] = f"**{self.place()}**: what I found.\n\n{self.table(6)}\n\n{self.prose(12)}"
            return message
        calls = []
        for index in range(self.random.randint(1, self.fan)):
            delegate = level < self.depth and self.random.random() < (0.7 if level == 0 else 0.15)
            tool = "assign_task" if delegate else self.random.choice(("search", "search", "open"))
            arguments = {"assign_task": {"agent": "helper", "prompt": f"Find the ferries of {self.place()}."},
                         "search": {"query": f"{self.place()} population {self.random.randrange(1900, 2020)}", "k": 10},
                         "open": {"url": f"https://{self.place().lower().replace(' ', '-')}.example/town"}}[tool]
            # Models repeat ids from step to step.
            calls.append({"id": f"call_{index}", "type": "function",
                          "function": {"name": tool, "arguments": json.dumps(arguments)}})
        return {**message, "tool_calls": calls}

    def tools(self, name: str, step: int, stage: int, now: float, reply: dict[str, Any], level: int
              ) -> tuple[float, list[dict[str, Any]]]:
        """Run the calls of a reply side by side; when the last had ended, and the result messages."""
        results, end = [], now
        for index, one in enumerate(reply.get("tool_calls", ())):
            call, tool, error = f"{name}#{step}.{index}", one["function"]["name"], False
            began = now + self.random.uniform(0.0, 0.01)
            if tool == "assign_task":
                child = f"{name}/{step}.{index}"
                queued = began + (self.random.uniform(0.0, 2.0) if self.random.random() < 0.3 else 0.0)
                ended = self.agent(child, name, call, queued, level + 1, f"Find the ferries of {self.place()}.", stage)
                result = self.truth[child].messages[-1].get("content") or "It failed."
            else:
                ended, error = began + self.random.uniform(0.05, 0.9), not self.plain and self.random.random() < 0.06
                hits = [{"id": f"page-{self.random.randrange(9999)}", "title": self.place(), "snippet": self.prose(9)}
                        for _ in range(3)]
                result = ("error: no such page: https://nowhere.example" if error else json.dumps(hits)
                          if tool == "search" else f"# {self.place()}\n\n{self.prose(self.words)}\n\n{self.table(5)}")
            self.truth[name].results[call] = result
            self.write(ended, type="tool_call", agent=name, call=call, name=tool, started=began, ended=ended,
                       arguments=one["function"]["arguments"], result=result, error=error)
            results.append({"role": "tool", "tool_call_id": one["id"], "content": result})
            end = max(end, ended)
        return end, results


def big_story(megabytes: float, seed: int = 7) -> Story:
    """One whose events have about so many megabytes."""
    words = 100
    while True:
        story = Story(seed, steps=12, fan=8, depth=1, words=words)
        size = sum(len(json.dumps(event)) for event in story.events) / 1e6
        if 0.9 * megabytes < size < 1.2 * megabytes:
            return story
        words = max(2, int(words * megabytes / size))
