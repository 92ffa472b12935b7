"""The critical path of an episode: the longest chain of calls of which each waits for the one before.

An agent is sequential: a model call, then the tool calls of its reply side by side, then the next model call. So its
chain takes every model call, and of each step one tool call; a tool call that started sub-agents counts what the
longest of them counts. In steps this is the swarm's own metric (Kimi K2.5, Agent Swarm),

    CriticalSteps = Σ_t (S_main^(t) + max_i S_sub,i^(t)),

with S_sub,i itself a critical path where a sub-agent has sub-agents. In tokens a model call counts its input and
output. In seconds the chain goes through whatever ended last, since that is what the next call waited for: waiting for
a free place counts, and the length is the time from the first agent's start to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moonbase.agents.trace import MEASURES, AgentRecord, Episode, Measure, ModelCall, ToolCall


@dataclass(frozen=True)
class Critical:
    """How long, and through which calls."""

    steps: int
    tokens: int
    seconds: float
    chains: dict[Measure, list[str]]
    """For each measure the ids of the calls, in the order in which one waits for the other."""
    steps_of: dict[str, int]
    """Agent id -> critical steps of the agent and what is below it."""

    @property
    def calls(self) -> list[str]:
        """The chain in seconds."""
        return self.chains["seconds"]


def critical(episode: Episode) -> Critical:
    """The critical path in steps, tokens and seconds; what is unfinished lasts until the last event."""
    if not episode.agents:
        return Critical(0, 0, 0.0, {"steps": [], "tokens": [], "seconds": []}, {})
    agents = {agent.id: agent for agent in episode.agents}
    order = _parents_first(episode.agents[0], agents)
    root, chains, lengths = order[0], {}, {}
    for measure in MEASURES:
        longest = _Longest(measure, agents, episode.seconds)
        for agent in reversed(order):
            longest.measure_agent(agent)
        lengths[measure] = longest.length
        chains[measure] = list(longest.chain(root))
    return Critical(int(lengths["steps"][root.id]), int(lengths["tokens"][root.id]), lengths["seconds"][root.id],
                    chains, {name: int(steps) for name, steps in lengths["steps"].items()})


def _parents_first(root: AgentRecord, agents: dict[str, AgentRecord]) -> list[AgentRecord]:
    """The root and all that is below it."""
    order, waiting, seen = [], [root], {root.id}
    while waiting:
        agent = waiting.pop()
        order.append(agent)
        for call in agent.calls:
            for name in call.children if call.kind == "tool" else ():
                if name in agents and name not in seen:
                    seen.add(name)
                    waiting.append(agents[name])
    return order


class _Longest:
    """The longest chains in one measure; agents are measured children first."""

    def __init__(self, measure: Measure, agents: dict[str, AgentRecord], horizon: float) -> None:
        self.in_seconds, self.in_steps = measure == "seconds", measure == "steps"
        self.agents, self.horizon = agents, horizon
        self.length: dict[str, float] = {}
        self.through: dict[str, list[tuple[ModelCall | ToolCall, str | None]]] = {}
        """Agent id -> its calls on the chain, each with the sub-agent it goes through."""

    def measure_agent(self, agent: AgentRecord) -> None:
        """Set `length` and `through` of an agent whose sub-agents have theirs."""
        total, through = 0.0, []
        tools: dict[int, list[ToolCall]] = {}
        for call in agent.calls:
            if call.kind == "tool":
                tools.setdefault(call.step, []).append(call)
        models = [call for call in agent.calls if call.kind == "model"]
        for number, call in enumerate(models):
            through.append((call, None))
            total += 1 if self.in_steps else call.usage.input_tokens + call.usage.output_tokens
            last_of_step = number + 1 == len(models) or models[number + 1].step != call.step
            if last_of_step and call.step in tools:
                chosen = max(tools[call.step], key=self._tool_length)
                child = max(self._children(chosen), key=self._agent_length, default=None)
                through.append((chosen, child))
                total += 0 if child is None else self.length[child]
        self.length[agent.id] = self._end(agent.ended) - agent.started if self.in_seconds else total
        self.through[agent.id] = through

    def chain(self, root: AgentRecord) -> Iterator[str]:
        """Ids of the calls on the longest chain through `root`."""
        waiting = [iter(self.through[root.id])]
        while waiting:
            for call, child in waiting[-1]:
                yield call.id
                if child is not None:
                    waiting.append(iter(self.through[child]))
                    break
            else:
                waiting.pop()

    def _children(self, call: ToolCall) -> list[str]:
        return [name for name in call.children if name in self.length]

    def _end(self, ended: float | None) -> float:
        return self.horizon if ended is None else ended

    # Among equals the one that ended last: the chain that one sees is then the chain that was waited for.

    def _tool_length(self, call: ToolCall) -> tuple[float, float]:
        own = self._end(call.ended)
        return own if self.in_seconds else max((self.length[name] for name in self._children(call)), default=0), own

    def _agent_length(self, name: str) -> tuple[float, float]:
        own = self._end(self.agents[name].ended)
        return own if self.in_seconds else self.length[name], own
