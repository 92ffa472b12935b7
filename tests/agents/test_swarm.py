"""An orchestrator and its sub-agents: what runs when, what comes back, what it counts as."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from moonbase.agents.budget import Limits
from moonbase.agents.journal import Journal
from moonbase.agents.models.base import CallOptions, ModelError
from moonbase.agents.models.pool import Pool
from moonbase.agents.models.scripted import Latency, ScriptedModel
from moonbase.agents.simulation import simulate
from moonbase.agents.swarm import Swarm, SwarmResult
from moonbase.agents.tools.tool import Toolset, tool
from tests.agents.scripts import asks, call, says

CREATE = call("create_subagent", name="helper", system_prompt="You help.")


@tool(inline=True)
def look(number: int) -> str:
    """Look."""
    return f"saw {number}"


def leads(*turns: Any, helper: Any = lambda task, step: says(f"done: {task}")) -> Any:
    """A policy: the orchestrator takes these turns, a sub-agent replies as `helper` says."""
    def policy(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Any:
        step = sum(message["role"] == "assistant" for message in messages)
        if messages[0]["content"] == "You help.":
            return helper(messages[1]["content"], step)
        turn = turns[min(step, len(turns) - 1)]
        return turn(messages) if callable(turn) else turn

    return policy


def run(policy: Any, journal: Journal | None = None, pool: Pool | None = None, **settings: Any) -> SwarmResult:
    settings.setdefault("limits", Limits(steps=20, subagents=100))
    model = pool or ScriptedModel(policy, Latency(per_call=1.0))
    return simulate(Swarm(model, Toolset([look]), journal=journal, **settings).run("The task."))


def results(result: SwarmResult, agent: int = 0) -> list[str]:
    return [message["content"] for message in result.episode.agents[agent].messages if message["role"] == "tool"]


def assign(prompt: str, agent: str = "helper") -> dict[str, Any]:
    return call("assign_task", agent=agent, prompt=prompt)


def test_tasks_of_one_turn_run_at_the_same_time_and_only_results_come_back() -> None:
    def helper(task: str, step: int) -> Any:
        return asks(call("look", number=step)) if step < int(task) else says(f"done {task}")

    result = run(leads(asks(CREATE), asks(*map(assign, "142")), says("Answer."), helper=helper))
    assert (result.text, result.status) == ("Answer.", "finished")
    assert results(result) == ["Created sub-agent 'helper'.", "done 1", "done 4", "done 2"]
    # Seconds: two turns, the longest sub-agent (4 looks and an answer), the answer. So are the critical steps.
    assert (result.episode.seconds, result.episode.critical.steps) == (2 + 5 + 1, 2 + 5 + 1)
    assert [agent.id for agent in result.episode.agents] == ["main", "main/2.0", "main/2.1", "main/2.2"]
    assert [agent.trainable for agent in result.episode.agents] == [True, False, False, False]
    assert result.episode.spent.subagents == 3
    # What each budget had spent after each call: own steps and seconds since the agent began, at a second a step.
    for agent in result.episode.agents[1:]:
        spent = [call.budget.spent for call in agent.calls if call.kind == "model"]
        counted = list(range(1, int(agent.task) + 2))
        assert [one.steps for one in spent] == [one.seconds for one in spent] == counted
    assert [call.budget.spent.seconds for call in result.episode.agents[0].calls if call.kind == "model"] == [1, 2, 8]
    assert all(len(agent.messages) == 2 + 2 * int(agent.task) + 1 for agent in result.episode.agents[1:])


def test_the_bulk_form_is_one_agent_for_each_item() -> None:
    items = ["x", "y {item}", "ü"]
    bulk = call("assign_tasks", agent="helper", template="Do {item}, {item}!", items=items)
    result = run(leads(asks(CREATE), asks(bulk), says("Answer.")))
    assert [json.loads(line) for line in results(result)[1].splitlines()] == [
        {"item": item, "result": f"done: Do {item}, {item}!"} for item in items]
    assert [agent.id for agent in result.episode.agents[1:]] == [f"main/2.0.{number}" for number in range(3)]


def test_more_than_fits_at_once_waits() -> None:
    """A hundred at ten at a time: ten rounds of a second, none lost."""
    policy = leads(asks(CREATE), asks(call("assign_tasks", agent="helper", template="{item}",
                                           items=[str(number) for number in range(100)])), says("Answer."))
    pool = Pool(ScriptedModel(policy, Latency(per_call=1.0)), concurrency=10, most=10)
    result = run(policy, pool=pool)
    assert result.status == "finished" and result.episode.seconds == 2 + 10 + 1
    assert len(results(result)[1].splitlines()) == 100


@pytest.mark.parametrize(("helper", "limits", "words"), [
    (lambda task, step: ModelError("auth", "no key"), {}, "[The sub-agent failed after 1 steps: auth: no key.]"),
    (lambda task, step: asks(call("look", number=1)), {},
     "[The sub-agent went round in circles and was stopped after 4 steps"),
    (lambda task, step: {"content": "I will look.", "tool_calls": [call("look", number=step)]}, {"seconds": 2.5},
     "[The sub-agent stopped because its budget was used up after 3 steps: the budget of seconds is used up: 2.5 of "
     "2.5 spent, 0 more wanted.] Its last words: I will look."),
    (lambda task, step: {}["bug"], {}, "[The sub-agent broke: KeyError: 'bug'.]"),
])
def test_a_sub_agent_that_comes_to_nothing_says_so_and_the_episode_goes_on(
    helper: Any, limits: dict[str, Any], words: str
) -> None:
    result = run(leads(asks(CREATE), asks(assign("it")), says("Answer."), helper=helper), sub_limits=Limits(**limits))
    assert (result.status, result.text) == ("finished", "Answer.")
    assert results(result)[1].startswith(words)
    assert result.episode.agents[1].ended is not None and result.episode.agents[1].status != "unfinished"


def test_mistakes_of_the_orchestrator_are_observations() -> None:
    again = call("create_subagent", name="helper", system_prompt="Again.")
    nameless = call("create_subagent", name=" ", system_prompt="x")
    result = run(leads(
        asks(assign("too early")), asks(CREATE, again, nameless), asks(assign("it", "helpers"), call(
            "assign_tasks", agent="helper", template="no place", items=["x"])), says("Answer.")))
    said = results(result)
    assert "no sub-agent is named 'helper'. Create it first. Sub-agents: none yet" in said[0]
    assert said[2].startswith("Error: there is a sub-agent named 'helper' already; assign tasks to it, or choose")
    assert said[3] == "Error: a sub-agent needs a name."
    assert "Sub-agents: helper." in said[4] and "must contain {item}" in said[5]
    assert result.episode.spent.subagents == 0


def test_the_number_of_sub_agents_is_bounded() -> None:
    result = run(leads(asks(CREATE), asks(*map(assign, "abcde")), says("Answer.")), limits=Limits(subagents=3))
    assert [text.startswith("done") for text in results(result)[1:]] == [True] * 3 + [False] * 2
    assert "not started: the budget of sub-agents is used up: 3 of 3 spent" in results(result)[5]


def test_the_budget_of_critical_steps_holds_over_stages() -> None:
    """Of ten: one to create, one to assign; seven are left for the sub-agents, and one for the answer."""
    forever = leads(asks(CREATE), asks(assign("a"), assign("b")), says("Answer."),
                    helper=lambda task, step: asks(call("look", number=step)))
    result = run(forever, limits=Limits(critical_steps=10))
    assert result.status == "finished" and result.episode.critical.steps == 10
    assert [agent.spent.steps for agent in result.episode.agents] == [3, 7, 7]


def test_tokens_of_all_are_one_purse() -> None:
    """Sub-agents that would talk for ever stop at nine tenths; the orchestrator can still answer."""
    forever = leads(asks(CREATE), asks(*map(assign, "abcdef")), says("Answer."),
                    helper=lambda task, step: asks(call("look", number=step)))
    result = run(forever, limits=Limits(tokens=20_000))
    assert (result.status, result.text) == ("finished", "Answer.") and result.episode.spent.tokens <= 20_000
    assert all("the budget of tokens is used up" in text for text in results(result)[1:])
    before = sum(call.usage.input_tokens + call.usage.output_tokens for agent in result.episode.agents
                 for call in agent.calls if call.kind == "model") - 2000
    assert before <= 18_000


def test_sub_agents_of_sub_agents() -> None:
    def policy(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Any:
        names, step = [one["function"]["name"] for one in tools], sum(one["role"] == "assistant" for one in messages)
        if "assign_task" not in names:
            return says("deep")
        return [asks(CREATE), asks(assign("1"), assign("2")), says("shallow")][step]

    result = run(policy, depth=2)
    assert [agent.id for agent in result.episode.agents] == [
        "main", "main/2.0", "main/2.1", "main/2.0/2.0", "main/2.0/2.1", "main/2.1/2.0", "main/2.1/2.1"]
    assert {agent.text for agent in result.episode.agents[3:]} == {"deep"}
    assert result.episode.critical.steps == 3 + 3 + 1 and result.episode.spent.subagents == 6
    assert run(policy, depth=1).episode.spent.subagents == 2
    assert run(lambda messages, tools: says(str(len(tools))), delegate=False).text == "1"


def test_cancelling_the_run_ends_everyone() -> None:
    async def program() -> None:
        swarm = Swarm(pool, Toolset([look]), journal=journal, limits=Limits(tokens=10**6, steps=10))
        running = asyncio.ensure_future(swarm.run("The task."))
        await asyncio.sleep(2.5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert swarm._agents["main"].budget.in_flight == 0 == pool.running == pool.waiting

    policy = leads(asks(CREATE), asks(*map(assign, "abcde")), says("Answer."))
    journal, pool = Journal(), Pool(ScriptedModel(policy, Latency(per_call=1.0)), concurrency=2, most=2)
    simulate(program())
    ends = {event["agent"]: event["status"] for event in journal.events if event["type"] == "agent_finished"}
    assert ends == dict.fromkeys(["main", *(f"main/2.{number}" for number in range(5))], "cancelled")
    assert journal.events[-1]["type"] == "episode_finished" and journal.events[-1]["status"] == "cancelled"


def waits(result: SwarmResult) -> dict[str, float]:
    return {call.id: call.waited for agent in result.episode.agents for call in agent.calls if call.kind == "model"}


def test_time_in_line_is_told_call_by_call_and_again_after_a_crash(tmp_path: Path) -> None:
    """Two calls of a second at a time: the fifth of five waits two seconds."""
    policy = leads(asks(CREATE), asks(*map(assign, "abcde")), says("Answer."))
    expected = {"main#1": 0, "main#2": 0, "main/2.0#1": 0, "main/2.1#1": 0, "main/2.2#1": 1, "main/2.3#1": 1,
                "main/2.4#1": 2, "main#3": 0}

    def live(resume: bool) -> SwarmResult:
        journal = Journal.open(tmp_path, resume=resume)
        try:
            return run(policy, journal, Pool(ScriptedModel(policy, Latency(per_call=1.0)), concurrency=2, most=2))
        finally:
            journal.close()

    assert waits(live(resume=False)) == expected
    path = tmp_path / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:cut]))
        known = {event["call"] for event in map(json.loads, lines[:cut]) if event["type"] == "model_call"}
        assert {call: waited for call, waited in waits(live(resume=True)).items() if call in known} == {
            call: waited for call, waited in expected.items() if call in known}


def test_time_in_line_counts_attempts_that_failed_and_what_others_have_reserved() -> None:
    failures = iter([ModelError("server", "no", 500), ModelError("rate_limit", "no", 429, retry_after=7.0)])
    pool = Pool(ScriptedModel(lambda messages, tools: next(failures, says("Answer.")), Latency(per_call=1.0)),
                base_delay=2.0)
    (call,) = (call for call in run(None, pool=pool).episode.agents[0].calls if call.kind == "model")
    # A second, a pause of one to two, a second, seven that were asked for; then the second that is served.
    assert call.attempts == 3 and 10 <= call.waited <= 11 and call.ended - call.started == pytest.approx(
        call.waited + 1)

    def broken(kind: str) -> Any:
        pool = Pool(ScriptedModel(lambda messages, tools: ModelError(kind, "no"), Latency(per_call=1.0)), attempts=2)
        (call,) = run(None, pool=pool).episode.agents[0].calls
        return call

    assert broken("auth").waited == 0.0 and 1.5 <= broken("server").waited <= 2.0

    # A minute that was asked for is longer than the time there is: all but the first second was waiting.
    pool = Pool(ScriptedModel(lambda messages, tools: ModelError("rate_limit", "no", 429, 60.0), Latency(per_call=1.0)))
    late = run(None, pool=pool, limits=Limits(seconds=8.5)).episode.agents[0]
    assert (late.status, [(call.ended, call.waited) for call in late.calls]) == ("over_budget", [(8.5, 8.5)])
    pool = Pool(ScriptedModel(lambda messages, tools: says("Answer."), Latency(per_call=9.0)))
    late = run(None, pool=pool, limits=Limits(seconds=8.5)).episode.agents[0]
    assert [(call.ended, call.waited) for call in late.calls] == [(8.5, 0.0)]

    # Each may take all that is left for its reply, so the budget lets in one after the other.
    policy = leads(asks(CREATE), asks(*map(assign, "abc")), says("Answer."))
    one_by_one = run(policy, limits=Limits(steps=20, tokens=9000), options=CallOptions(max_tokens=7000))
    assert [waits(one_by_one)[f"main/2.{number}#1"] for number in range(3)] == [0, 1, 2]


def test_resources_of_both_toolsets_are_open_while_it_runs() -> None:
    class Resource:
        def __init__(self) -> None:
            self.log: list[str] = []

        async def __aenter__(self) -> None:
            self.log.append("open")

        async def __aexit__(self, *error: Any) -> None:
            self.log.append("closed")

    both, of_sub = Resource(), Resource()
    tools = Toolset([look], resources=[both])
    swarm = Swarm(ScriptedModel(lambda messages, tools: says("Answer.")), tools,
                  sub_tools=Toolset([look], resources=[both, of_sub]))
    simulate(swarm.run("The task."))
    assert both.log == of_sub.log == ["open", "closed"]


def test_the_tools_of_the_task_keep_their_time_limit_beside_those_of_the_swarm() -> None:
    @tool
    async def hang() -> str:
        """Hang."""
        await asyncio.sleep(10**6)
        return ""

    policy = leads(asks(call("hang")), says("Answer."))
    result = simulate(Swarm(ScriptedModel(policy), Toolset([hang], timeout=30)).run("The task."))
    assert results(result) == ["Error: hang did not answer within 30 seconds."] and result.episode.seconds == 30


def test_more_sub_agents_than_work_at_once_wait_and_none_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moonbase.agents.swarm.MAX_SUBAGENTS", 4)
    items = [str(number) for number in range(30)]
    bulk = call("assign_tasks", agent="helper", template="Do {item}.", items=items)
    result = run(leads(asks(CREATE), asks(bulk), says("Answer.")), limits=Limits())
    subs = [agent for agent in result.episode.agents if agent.parent]
    assert len(subs) == 30 and {agent.status for agent in subs} == {"finished"}
    moments = [agent.started for agent in subs]
    assert max(sum(one.started <= moment < one.ended for one in subs) for moment in moments) == 4


def test_one_that_breaks_takes_no_other_with_it() -> None:
    def helper(task: str, step: int) -> Any:
        return {}["a bug of the model's program"] if task == "Do 1." else says("Done.")

    bulk = call("assign_tasks", agent="helper", template="Do {item}.", items=["0", "1", "2"])
    result = run(leads(asks(CREATE), asks(bulk), says("Answer."), helper=helper), limits=Limits())
    told = results(result)[-1]
    assert result.status == "finished" and told.count("Done.") == 2 and "KeyError" in told


def test_rewards_are_noted_in_the_trace() -> None:
    result = run(leads(says("four letters")), grade=lambda answer: {"words": float(len(answer.split()))})
    assert result.episode.rewards == {"words": 2.0}
