"""One agent against scripted models: limits, what goes back as an observation, and how it ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from moonbase.agents.agent import CUT, EMPTY, LAST_STEP, Agent, AgentResult, side_by_side
from moonbase.agents.budget import Limits
from moonbase.agents.context import STRATEGIES
from moonbase.agents.journal import Journal
from moonbase.agents.models.base import CallOptions, Price, Usage, estimate_tokens
from moonbase.agents.models.pool import Pool
from moonbase.agents.simulation import simulate
from moonbase.agents.tools.tool import Toolset, tool
from tests.agents.scripts import Script, asks, call, error, roles, says


@tool(inline=True)
def double(number: int) -> int:
    """Twice as much."""
    return 2 * number


@tool
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "waited"


TOOLS = Toolset([double, wait])


def work(model: Any, tools: Toolset = TOOLS, **settings: Any) -> tuple[AgentResult, list[dict[str, Any]], float]:
    """(result, events, simulated seconds) of one run."""
    journal = settings.setdefault("journal", Journal())

    async def program() -> tuple[AgentResult, float]:
        result = await Agent("helper", model, tools, **settings).run("The task.")
        return result, asyncio.get_running_loop().time()

    result, seconds = simulate(program())
    return result, journal.events, seconds


def observations(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "tool"]


def test_calls_are_carried_out_and_the_answer_ends_it() -> None:
    model = Script(asks(call("double", number=4), call("double", number=5)), says("8 and 10"))
    result, events, _ = work(model, system="Be brief.")
    assert (result.status, result.text, result.steps, result.reason) == ("finished", "8 and 10", 2, None)
    assert [message["content"] for message in model.shown[0]] == ["Be brief.", "The task."]
    assert roles(model.shown[1]) == "suatt" and observations(model.shown[1]) == ["8", "10"]
    ids = [one["id"] for one in model.shown[1][2]["tool_calls"]]
    assert [message["tool_call_id"] for message in model.shown[1][3:]] == ids
    assert [event["type"] for event in events] == [
        "agent_started", "model_call", "tool_call", "tool_call", "model_call", "agent_finished"]
    assert [event["call"] for event in events if "call" in event] == ["main#1", "main#1.0", "main#1.1", "main#2"]


def test_calls_of_one_reply_run_side_by_side() -> None:
    result, _, seconds = work(Script(asks(*(call("wait", seconds=second) for second in (3, 1, 2))), says("done")))
    assert (result.status, seconds) == ("finished", 3.0)


@pytest.mark.parametrize(("bad", "words"), [
    ({"id": "x", "type": "function", "function": {"name": "duble", "arguments": "{}"}}, "Did you mean double?"),
    ({"id": "x", "type": "function", "function": {"name": "double", "arguments": '{"number": 1'}}, "not JSON"),
    ({"id": "x", "type": "function", "function": {"name": "double", "arguments": "[1]"}}, "must be a JSON object"),
    ({"id": "x", "type": "function", "function": {"name": "double", "arguments": '{"number": "1"}'}}, "$.number"),
    ({"id": "x", "type": "function", "function": {"name": "double", "arguments": {"number": "1"}}}, "$.number"),
    ({"id": 3, "function": None}, "there is no tool ''"),
    ({}, "there is no tool ''"),
    (None, "there is no tool ''"),
])
def test_malformed_calls_go_back_as_observations(bad: Any, words: str) -> None:
    model = Script(asks(bad), says("I see."))
    result, events, _ = work(model)
    assert result.status == "finished" and words in observations(model.shown[1])[0]
    said = model.shown[1][-2]["tool_calls"][0]
    assert isinstance(said["id"], str) and isinstance(said["function"]["arguments"], str)
    assert events[2]["error"] is True


def test_equal_ids_are_told_apart() -> None:
    calls = [call("double", number=number) | {"id": "same"} for number in (1, 2)]
    model = Script(asks(*calls), says("ok"))
    work(model)
    asked, answered = model.shown[1][1]["tool_calls"], model.shown[1][2:]
    assert [one["id"] for one in asked] == [one["tool_call_id"] for one in answered]
    assert len({one["id"] for one in asked}) == 2


def test_the_last_step_has_no_tools_and_says_so() -> None:
    lines = [asks(call("double", number=number)) for number in range(2)]
    model = Script(*lines, says("The best I have."))
    result, *_ = work(model, limits=Limits(steps=3))
    assert (result.status, result.text, result.steps) == ("finished", "The best I have.", 3)
    assert model.tools == [["double", "wait"], ["double", "wait"], []]
    assert model.shown[2][-1] == {"role": "user", "content": LAST_STEP}
    assert LAST_STEP not in str(model.shown[:2])


def test_who_calls_tools_to_the_end_is_told_so_and_loses_nothing_else() -> None:
    model = Script(lambda messages: asks(call("double", number=len(messages))))
    result, *_ = work(model, limits=Limits(steps=3))
    assert (result.status, result.steps, len(model.shown)) == ("failed", 3, 3)
    assert result.reason == "the reply was empty"


def test_no_step_no_call() -> None:
    model = Script(says("?"))
    result, events, _ = work(model, limits=Limits(steps=0))
    assert (result.status, len(model.shown)) == ("over_budget", 0) and "steps" in result.reason
    assert [event["type"] for event in events] == ["agent_started", "agent_finished"]


def test_tokens_are_asked_for_before_the_call_and_the_reply_is_bounded_by_what_is_left() -> None:
    model = Script(lambda messages: asks(call("double", number=len(messages))))
    prompt = estimate_tokens([{"role": "user", "content": "The task."}], TOOLS.schemas())
    result, *_ = work(model, limits=Limits(tokens=2 * prompt + 100), options=CallOptions(max_tokens=1000))
    assert result.status == "over_budget" and "tokens" in result.reason
    assert model.options[0].max_tokens == prompt + 100
    spent = result.usage.input_tokens + result.usage.output_tokens
    assert spent <= 2 * prompt + 100 and result.steps == len(model.shown) == 1 + (len(model.options) > 1)


def test_money_is_asked_for_before_the_call() -> None:
    """A dollar a token in, two a token out: after one call of prompt + 10 tokens the rest does not do for another."""
    price = Price(1e6, 2e6)
    prompt = estimate_tokens([{"role": "user", "content": "The task."}], TOOLS.schemas())
    model = Script(lambda messages: asks(call("double", number=len(messages))), price=price)
    result, events, _ = work(model, limits=Limits(money=prompt + 50.0))
    assert (result.status, len(model.shown), model.options[0].max_tokens) == ("over_budget", 1, 24)
    assert events[1]["price_paid"] == prompt + 20 and "money" in result.reason


def test_time_is_up_in_the_middle_of_a_call() -> None:
    async def slow(messages: Any) -> dict[str, Any]:
        await asyncio.sleep(10)
        return says("late")

    model = Script(asks(call("wait", seconds=3)), lambda messages: slow(messages))
    result, events, seconds = work(model, limits=Limits(seconds=5))
    assert (result.status, seconds) == ("over_budget", 5.0) and "seconds" in result.reason
    assert events[-2]["error"]["kind"] == "budget" and events[-2]["completion"] is None


def test_a_tool_gets_no_more_time_than_is_left() -> None:
    result, events, seconds = work(Script(asks(call("wait", seconds=100)), says("?")), limits=Limits(seconds=5))
    assert (result.status, seconds) == ("over_budget", 5.0)
    assert events[2]["result"] == "Error: wait did not answer within 5 seconds."


def test_going_round_in_circles_is_noticed() -> None:
    result, *_ = work(Script(asks(call("double", number=1))))
    assert (result.status, result.steps) == ("stuck", 4)
    # Other arguments or other results are progress.
    result, *_ = work(Script(lambda messages: asks(call("double", number=len(messages)))), limits=Limits(steps=9))
    assert result.steps == 9


@pytest.mark.parametrize(("line", "words"), [
    (says(""), EMPTY), (says(None), EMPTY), (says(" \n"), EMPTY), ((says("The ans"), "length", None), CUT)])
def test_empty_and_cut_replies_are_asked_for_again(line: Any, words: str) -> None:
    model = Script(line, line, says("The answer."))
    result, *_ = work(model)
    assert (result.status, result.text) == ("finished", "The answer.")
    assert model.shown[1][-1] == {"role": "user", "content": words}
    result, *_ = work(Script(line))
    assert (result.status, result.steps) == ("failed", 3)


def test_only_empty_replies_in_a_row_count() -> None:
    lines = [line for number in range(5) for line in (says(""), asks(call("double", number=number)))]
    assert work(Script(*lines, says("The answer.")))[0].status == "finished"


def test_a_reply_longer_than_asked_for_is_paid_and_ends_it() -> None:
    model = Script((asks(call("double", number=1)), None, Usage(10, 5000)), says("?"))
    result, events, _ = work(model, limits=Limits(tokens=4000))
    assert (result.status, len(model.shown), result.usage.output_tokens) == ("over_budget", 1, 5000)
    assert events[1]["budget"]["spent"]["tokens"] == 5010


def test_a_full_context_ends_it_where_nothing_may_be_hidden() -> None:
    model = Script(asks(call("double", number=10**400)), says("?"), context_tokens=200)
    result, *_ = work(model)
    assert (result.status, len(model.shown)) == ("failed", 1) and "the context is full" in result.reason
    assert model.options[0].max_tokens == 200 - estimate_tokens(model.shown[0], TOOLS.schemas())


def test_a_model_that_knows_better_what_fits_is_believed() -> None:
    """It gives no size of its context; the strategy hides the history, and the call is made once more."""
    def lines() -> list[Any]:
        return [asks(call("double", number=3)), error("context_length"), says("The answer.")]

    model = Script(*lines())
    result, events, _ = work(model, context=STRATEGIES["discard-all"])
    assert (result.status, result.steps) == ("finished", 3)
    assert [roles(messages) for messages in model.shown] == ["u", "uat", "u"]
    assert [event["error"] and event["error"]["kind"] for event in events if event["type"] == "model_call"] == [
        None, "context_length", None]
    result, *_ = work(Script(*lines()))
    assert (result.status, result.steps, result.reason) == ("failed", 2, "context_length: it was context_length")


@pytest.mark.parametrize("kind", ["auth", "bad_request", "refused", "server"])
def test_a_model_that_fails_ends_it(kind: str) -> None:
    result, events, _ = work(Script(error(kind)))
    assert (result.status, result.reason) == ("failed", f"{kind}: it was {kind}")
    assert events[1]["error"] == {"kind": kind, "message": f"it was {kind}"} and events[1]["price_paid"] == 0


def test_errors_of_the_program_are_raised_after_a_note() -> None:
    journal = Journal()
    with pytest.raises(ZeroDivisionError):
        work(Script(ZeroDivisionError("bug")), journal=journal)
    assert journal.events[-1]["status"] == "failed" and journal.events[-1]["reason"] == "ZeroDivisionError: bug"


def test_retries_and_429_through_the_pool() -> None:
    """The busy model is asked again when it said; failures cost time, not steps."""
    async def program() -> tuple[AgentResult, float]:
        busy = error("rate_limit")
        busy.retry_after = 7.0
        model = Script(busy, error("server"), says("The answer."))
        agent = Agent("helper", Pool(model, base_delay=1.0), TOOLS, journal=journal)
        return await agent.run("The task."), asyncio.get_running_loop().time()

    journal = Journal()
    result, seconds = simulate(program())
    assert (result.status, result.steps) == ("finished", 1) and 7.5 <= seconds <= 9
    assert [event["attempts"] for event in journal.events if event["type"] == "model_call"] == [3]


def test_cancellation_stops_everything_and_is_noted() -> None:
    async def program() -> None:
        running = asyncio.ensure_future(Agent("helper", model, TOOLS, journal=journal).run("The task."))
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert asyncio.all_tasks() == {asyncio.current_task()}

    for line in (asks(call("wait", seconds=100), call("wait", seconds=50)), lambda messages: asyncio.sleep(100)):
        model, journal = Script(line), Journal()
        simulate(program())
        assert [event["status"] for event in journal.events if event["type"] == "agent_finished"] == ["cancelled"]


def test_side_by_side_ends_whole() -> None:
    """Results in order; after an error nothing goes on."""
    ends: list[str] = []

    async def one(name: str, seconds: float, fails: bool = False) -> str:
        try:
            await asyncio.sleep(seconds)
            if fails:
                raise ValueError(name)
            return name
        finally:
            ends.append(name)

    assert simulate(side_by_side([one("a", 2), one("b", 1)])) == ["a", "b"]
    with pytest.raises(ValueError, match="d"):
        simulate(side_by_side([one("c", 2), one("d", 1, True)]))
    assert ends == ["b", "a", "d", "c"]


def test_a_long_run_is_not_quadratic() -> None:
    """What is counted and written for a step does not grow with the steps before: events of 400 steps are of one size,
    and the prompt is counted once a step."""
    counted = []
    model = Script(lambda messages: asks(call("double", number=len(messages))))
    model.count = lambda messages, tools: counted.append(len(messages)) or 10
    result, events, _ = work(model, limits=Limits(steps=400))
    sizes = [len(json.dumps(event)) for event in events if event["type"] == "model_call"][1:-1]
    assert max(sizes) < 1.2 * min(sizes) and result.steps == 400
    assert len(counted) <= 2 * 400 + 2  # the script counts once more
