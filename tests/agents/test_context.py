"""Context strategies: what the model sees after they have triggered."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from moonbase.agents.agent import Agent, AgentResult
from moonbase.agents.budget import Limits
from moonbase.agents.context import HIDDEN, STRATEGIES, Discard, HideToolResults, Room, Summarise, View
from moonbase.agents.folding import fold
from moonbase.agents.journal import Journal
from moonbase.agents.models.base import CallOptions, estimate_tokens
from moonbase.agents.simulation import simulate
from moonbase.agents.tools.tool import Toolset, tool
from tests.agents.scripts import Script, asks, call, roles, says

CONTEXT = 1000


@tool(inline=True)
def read(size: int, number: int) -> str:
    """A text of so many tokens.

    Args:
        size: Tokens.
        number: Which.
    """
    return f"{number}".ljust(4 * size, "x")


TOOLS = Toolset([read])


def run(
    strategy: Any, sizes: list[int], last: Any = None, steps: int = 100, context: int | None = CONTEXT
) -> tuple[Script, AgentResult, list[dict[str, Any]]]:
    """Read texts of these sizes, one a step, then answer."""
    numbers = iter(range(len(sizes)))

    def line(messages: list[dict[str, Any]]) -> Any:
        if messages[-1]["content"] == Summarise().request:
            return says(f"SUMMARY of {observed(messages)}")
        number = next(numbers, None)
        if number is None:
            return last or says("The answer.")
        return asks(call("read", size=sizes[number], number=number))

    journal, model = Journal(), Script(line, context_tokens=context)
    agent = Agent("reader", model, TOOLS, system="You read.", context=strategy, journal=journal,
                  limits=Limits(steps=steps), options=CallOptions(max_tokens=50))
    return model, simulate(agent.run("Read all.")), journal.events


def observed(messages: list[dict[str, Any]]) -> list[str]:
    """The numbers of the texts that can be seen; - for a hidden one."""
    return ["-" if message["content"] == HIDDEN else message["content"].rstrip("x")
            for message in messages if message["role"] == "tool"]


def share(model: Script, number: int) -> float:
    return estimate_tokens(model.shown[number], TOOLS.schemas()) / CONTEXT


def test_nothing_is_hidden_below_the_threshold() -> None:
    for strategy in STRATEGIES.values():
        model, result, _ = run(strategy, [100, 100, 100])
        assert observed(model.shown[-1]) == ["0", "1", "2"] and result.status == "finished"
        assert share(model, -1) < 0.8


def test_discard_all_goes_back_to_the_task() -> None:
    model, result, events = run(STRATEGIES["discard-all"], [250, 250, 250, 100])
    # After three texts the prompt is beyond 80 %.
    assert [roles(messages) for messages in model.shown] == ["su", "suat", "suatat", "su", "suat"]
    assert model.shown[3] == model.shown[0] and observed(model.shown[4]) == ["3"]
    assert result.status == "finished" and result.steps == 5
    assert [event["context_dropped"] for event in events if event["type"] == "model_call"] == [
        [], [], [], [[2, 8]], [[2, 8]]]


def test_discard_75_keeps_the_newest_quarter() -> None:
    model, *_ = run(STRATEGIES["discard-75%"], [150, 150, 150, 300, 10])
    # Four rounds are there when it gets too full: three go.
    assert [observed(messages) for messages in model.shown] == [
        [], ["0"], ["0", "1"], ["0", "1", "2"], ["3"], ["3", "4"]]


def test_tool_results_are_hidden_but_for_the_latest_round() -> None:
    model, _, events = run(STRATEGIES["hide-tool-result"], [250, 250, 250, 100])
    assert [observed(messages) for messages in model.shown] == [
        [], ["0"], ["0", "1"], ["-", "-", "2"], ["-", "-", "2", "3"]]
    assert all("tool_calls" in message for message in model.shown[3] if message["role"] == "assistant")
    assert [event["context_shortened"] for event in events if event["type"] == "model_call"][3:] == [[3, 5], [3, 5]]


def test_a_summary_is_a_step_without_tools_and_takes_the_place_of_the_history() -> None:
    model, result, events = run(STRATEGIES["summary"], [250, 250, 250, 100])
    assert result.status == "finished" and result.steps == 6 == len(model.shown)
    assert model.tools[3] == [] and roles(model.shown[3]) == "suatatatu"
    assert roles(model.shown[4]) == "suu"
    assert model.shown[4][-1]["content"] == "What you have found so far:\nSUMMARY of ['0', '1', '2']"
    assert roles(model.shown[5]) == "suuat"
    # The trace knows of every prompt what was in it.
    record = fold([{"type": "episode_started", "agent": "main", "time": 0.0, "schema": "moonbase.trace/1",
                    "episode": "x"}, *events]).agents[0]
    calls = [one for one in record.calls if one.kind == "model"]
    for one, shown in zip(calls, model.shown, strict=True):
        assert [record.messages[index] for start, stop in one.sees for index in range(start, stop)] == shown


def test_the_last_step_is_not_spent_on_a_summary() -> None:
    model, result, _ = run(STRATEGIES["summary"], [250, 250, 250], steps=4)
    assert (result.status, result.text, result.steps) == ("finished", "The answer.", 4)
    assert observed(model.shown[-1]) == [] and model.tools[-1] == []
    # With two left, the summary is one of them and the answer the other.
    model, result, _ = run(STRATEGIES["summary"], [250, 250, 250], steps=5)
    assert (result.status, model.tools[-2:]) == ("finished", [[], []]) and "SUMMARY" in str(model.shown[-1])


def test_what_is_too_long_to_be_summed_up_is_summed_up_in_part() -> None:
    model, result, _ = run(STRATEGIES["summary"], [300, 300, 600])
    # Together they are more than the context: the oldest go before the model is asked for a summary.
    assert result.status == "finished" and observed(model.shown[3]) == ["2"]
    assert all(share(model, number) <= 1 for number in range(len(model.shown)))


def test_a_text_beyond_the_context_ends_it_or_is_dropped() -> None:
    assert run(STRATEGIES["keep-all"], [5000])[1].status == "failed"
    assert run(STRATEGIES["hide-tool-result"], [5000])[1].reason.startswith("the context is full")
    for name in ("discard-all", "discard-75%"):
        model, result, _ = run(STRATEGIES[name], [5000])
        assert result.status == "finished" and roles(model.shown[-1]) == "su"
    model, result, _ = run(STRATEGIES["summary"], [5000])
    assert result.status == "finished" and observed(model.shown[1]) == []


@given(st.integers(0, 10**6), st.sampled_from(sorted(STRATEGIES)), st.floats(0.2, 0.9))
def test_no_result_without_its_call_and_the_task_always(seed: int, name: str, threshold: float) -> None:
    """Random histories, shown one message after the other to a strategy that is called again and again."""
    dice = random.Random(seed)
    strategy = STRATEGIES[name] if name == "keep-all" else type(STRATEGIES[name])(threshold=threshold)
    messages: list[dict[str, Any]] = [{"role": "system"}, {"role": "user"}]
    view = View([0, 1], set())
    for _ in range(30):
        if dice.random() < 0.2:
            batch = [{"role": "user"}]
        else:
            ids = [f"{len(messages)}.{number}" for number in range(dice.randint(1, 3))]
            batch = [{"role": "assistant", "tool_calls": [{"id": id} for id in ids]},
                     *({"role": "tool", "tool_call_id": id} for id in ids)]
        view = View([*view.visible, *range(len(messages), len(messages) + len(batch))], set(view.shortened))
        messages += batch
        tokens = dice.randint(0, 100)
        after = strategy.manage(messages, view, 2, Room(tokens, 100))
        if tokens <= threshold * 100:
            assert after == view
        view = after
        shown = [messages[index] for index in view.visible]
        assert view.visible == sorted(set(view.visible)) and view.visible[:2] == [0, 1]
        called = [one["id"] for message in shown for one in message.get("tool_calls", ())]
        assert called == [message["tool_call_id"] for message in shown if message["role"] == "tool"]
        assert view.shortened <= set(view.visible)
        assert all(messages[index]["role"] == "tool" for index in view.shortened)


def test_the_context_is_never_overrun_by_those_that_can_help_it() -> None:
    """Many texts of random sizes: each prompt fits together with its reply."""
    dice = random.Random(1)
    sizes = [dice.randint(1, 300) for _ in range(60)]
    for name in ("discard-all", "discard-75%", "summary"):
        model, result, _ = run(STRATEGIES[name], sizes)
        assert result.status == "finished"
        for shown, names, options in zip(model.shown, model.tools, model.options, strict=True):
            assert estimate_tokens(shown, TOOLS.schemas() if names else []) + options.max_tokens <= CONTEXT
    assert Discard(part=0.75).name == "discard-75%" and HideToolResults().name == "hide-tool-result"


def test_names_are_those_of_the_strategies() -> None:
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


def test_where_the_size_is_unknown_nothing_triggers() -> None:
    for strategy in STRATEGIES.values():
        model, result, _ = run(strategy, [5000] * 5, context=None)
        assert result.status == "finished" and observed(model.shown[-1]) == list("01234")


