"""The shop's dialogue, played by scripts: an agent that does what the task's gold actions say, and ones that do not.
Skipped where the folder of shared data is absent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from moonbase.agents.budget import Limits
from moonbase.agents.models.base import Message, ModelError
from moonbase.agents.models.scripted import ScriptedModel
from moonbase.agents.worlds import retail, retail_tools
from moonbase.agents.worlds.retail_dialogue import GREETING, SILENCE, ModelUser, RetailResult, play_retail
from moonbase.errors import UserError

NOWHERE = {"address1": "1 Nowhere", "address2": "", "city": "Nowhere", "state": "NA", "country": "USA", "zip": "00000"}


@pytest.fixture(scope="module")
def shop(shared_data: Path) -> retail.RetailData:
    folder = shared_data / "tau2" / "retail"
    if not folder.is_dir():
        pytest.skip(f"the retail data is absent: {folder}")
    return retail.load_retail(folder)


def clerk(actions: list[retail.Action]) -> ScriptedModel:
    """Does one action a turn, then only talks."""
    def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        done = sum(bool(message.get("tool_calls")) for message in messages)
        if done == len(actions):
            return {"content": "Done. Anything else?"}
        action = actions[done]
        return {"tool_calls": [{"id": f"c{done}", "type": "function", "function": {
            "name": action.name, "arguments": json.dumps(action.arguments)}}]}

    return ScriptedModel(policy)


def play(shop: retail.RetailData, task: retail.RetailTask, actions: Any, **options: Any) -> RetailResult:
    return asyncio.run(play_retail(shop, task, clerk(list(actions)), retail.ReadsAloud(task), **options))


def database(world: retail.RetailWorld) -> list[dict[str, Any]]:
    """All of it, record by record, past any digest."""
    return [{key: records.peek(key) for key in records} for records in (world.users, world.orders)]


def after(shop: retail.RetailData, actions: Any) -> list[dict[str, Any]]:
    """The database after these actions, done without an agent."""
    world = retail.RetailWorld(shop)
    for action in actions:
        try:
            retail_tools.perform(world, action)
        except retail.Refused:
            continue
    return database(world)


def test_the_gold_actions_are_rewarded_on_every_task(shop: retail.RetailData) -> None:
    assert len(shop.tasks) == 114
    for task in shop.tasks.values():
        result = play(shop, task, task.actions)
        assert (result.reward, result.status) == (1.0, "finished"), (task.id, result.reason)
        assert database(result.world) == after(shop, task.actions)
        heard = [message["content"] for message in result.messages if message["role"] == "user"]
        assert "\n".join(heard[:-1]) == "\n".join(line.strip() or SILENCE for line in task.scenario.splitlines())
        assert heard[-1] == "Yes."
        called = [call["function"]["name"] for message in result.messages for call in message.get("tool_calls") or ()]
        assert called == [action.name for action in task.actions]


def test_one_write_too_many_is_not_rewarded_on_any_task(shop: retail.RetailData) -> None:
    for task in shop.tasks.values():
        user = next(iter(shop.database["users"]))
        extra = retail.Action("modify_user_address", {"user_id": user, **NOWHERE})
        result = play(shop, task, [*task.actions, extra])
        assert (result.reward, result.status) == (0.0, "finished"), task.id


def test_a_write_that_is_left_out_is_not_rewarded_where_it_mattered(shop: retail.RetailData) -> None:
    mattered = 0
    for task in shop.tasks.values():
        last = next((place for place in reversed(range(len(task.actions)))
                     if task.actions[place].name in retail_tools.WRITING), None)
        if last is None:
            continue
        actions = [*task.actions[:last], *task.actions[last + 1 :]]
        same = after(shop, actions) == after(shop, task.actions)
        assert play(shop, task, actions).reward == float(same), task.id
        mattered += not same
    assert mattered > 90
    idle = play(shop, shop.tasks["0"], [])
    assert (idle.reward, idle.status) == (0.0, "finished")


def test_an_episode_that_does_not_end_is_not_rewarded(shop: retail.RetailData) -> None:
    task = shop.tasks["0"]
    steps = len(task.actions) + 2
    result = play(shop, task, task.actions, limits=Limits(steps=steps))
    assert database(result.world) == after(shop, task.actions), "all was done, but the user was not through"
    assert (result.reward, result.status) == (0.0, "over_budget") and result.episode.spent.steps == steps


def test_a_model_plays_the_user(shop: retail.RetailData) -> None:
    task, seen = shop.tasks["0"], []

    def policy(messages: list[Message], tools: list[dict[str, Any]]) -> Message:
        seen.append(messages[-1]["content"])
        turn = sum(message["role"] == "assistant" for message in messages)
        assert messages[0]["content"] == retail.user_prompt(task) and tools == []
        return {"content": ["Hello.", "", f"That is all. {retail.STOP}"][turn]}

    user = ModelUser(task, ScriptedModel(policy))
    result = asyncio.run(play_retail(shop, "0", clerk(list(task.actions)), user))
    assert result.reward == 1.0
    assert seen == [GREETING, "Done. Anything else?", "Done. Anything else?"]
    said = [message["content"] for message in result.messages if message["role"] == "user"]
    assert said == ["Hello.", SILENCE]
    assert user.usage.input_tokens > 0
    # The agent sees the policy and never the scenario; the trace has it all.
    assert result.messages[0] == {"role": "system", "content": shop.policy}
    assert not any("exchange" in str(message["content"]) for message in result.messages if message["role"] == "user")
    (main,) = result.episode.agents
    assert result.episode.rewards == {"database": 1.0} and main.status == "finished"
    assert [message["role"] for message in main.messages] == [message["role"] for message in result.messages]
    assert result.episode.spent.steps == len(task.actions) + 2


def test_a_user_that_fails_is_named(shop: retail.RetailData) -> None:
    for turns in (0, 1):
        def policy(messages: list[Message], tools: list[dict[str, Any]], turns: int = turns) -> Message | ModelError:
            said = sum(message["role"] == "assistant" for message in messages)
            return ModelError("auth", "no key", status=401) if said == turns else {"content": "Hello."}

        user = ModelUser(shop.tasks["1"], ScriptedModel(policy))
        result = asyncio.run(play_retail(shop, "1", clerk(list(shop.tasks["1"].actions)), user))
        assert (result.reward, result.status) == (0.0, "failed")
        assert result.reason == "auth: the model that plays the user: no key"
        assert result.episode.status == "failed"
    with pytest.raises(UserError, match="no retail task"):
        asyncio.run(play_retail(shop, "nothing", clerk([]), user))
