"""The world of a shop. Skipped where the folder of shared data is absent."""

from __future__ import annotations

import asyncio
import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moonbase.agents.tools.tool import ToolContext
from moonbase.agents.worlds import retail, retail_tools
from moonbase.errors import UserError

CONTEXT = ToolContext("main", 1, "main#1.0")


@pytest.fixture(scope="module")
def shop(shared_data: Path) -> retail.RetailData:
    folder = shared_data / "tau2" / "retail"
    if not folder.is_dir():
        pytest.skip(f"the retail data is absent: {folder}")
    return retail.load_retail(folder)


def _run(world: retail.RetailWorld, actions: list[retail.Action]) -> list[bool]:
    """Call through the toolset as an agent does; whether each was refused."""
    tools = retail_tools.retail_tools(world)

    async def run() -> list[bool]:
        return [(await tools.call(action.name, json.dumps(action.arguments), CONTEXT)).error for action in actions]

    return asyncio.run(run())


def _whole(world: retail.RetailWorld) -> list[dict[str, Any]]:
    """The whole database: what a digest stands for."""
    return [{key: records.peek(key) for key in records} for records in (world.users, world.orders)]


def test_gold_actions_are_rewarded(shop: retail.RetailData) -> None:
    assert len(shop.tasks) == 114
    assert (len(shop.tasks_of("train")), len(shop.tasks_of("test"))) == (74, 40)
    refused = {}
    for task in shop.tasks.values():
        world = retail.RetailWorld.for_task(shop, task.id)
        before = shop.tasks[task.id].actions
        for action, error in zip(before, _run(world, list(task.actions)), strict=True):
            if error:
                refused.setdefault(task.id, []).append(action.name)
        assert retail_tools.reward(world) == 1.0, task.id
    # Thirteen tasks look for what is not there on purpose; two ask for what the rules forbid: 64 exchanges a pending
    # order before it modifies it, 105 has 17.00 on the only card for a difference of 21.10.
    writing = {task: names for task, names in refused.items() if set(names) & retail_tools.WRITING}
    assert writing == {"64": ["exchange_delivered_order_items"], "105": ["exchange_delivered_order_items"]}
    assert len(refused) == 15


def test_dropped_and_altered_writes_are_not_rewarded(shop: retail.RetailData) -> None:
    dropped = altered = 0
    kept = set()
    for task in shop.tasks.values():
        gold = retail.RetailWorld.for_task(shop, task)
        _perform(gold, task.actions)
        whole = _whole(gold)
        for place, action in enumerate(task.actions):
            if action.name not in retail_tools.WRITING:
                continue
            world = retail.RetailWorld.for_task(shop, task)
            _perform(world, task.actions[:place] + task.actions[place + 1 :])
            assert retail_tools.reward(world) == float(_whole(world) == whole)
            dropped += 1
            if retail_tools.reward(world):
                kept.add((task.id, action.name))
            for changed in _alterations(shop, action):
                world = retail.RetailWorld.for_task(shop, task)
                _perform(world, [*task.actions[:place], changed, *task.actions[place + 1 :]])
                assert retail_tools.reward(world) == float(_whole(world) == whole)
                if (task.id, action.name) not in kept:
                    assert retail_tools.reward(world) == 0.0, (task.id, changed)
                    altered += 1
    assert dropped == 176 and altered > 400
    # What was refused anyway, or is overwritten by a later action, does not matter.
    assert kept == {("64", "exchange_delivered_order_items"), ("105", "exchange_delivered_order_items"),
                    ("22", "modify_user_address"), ("110", "modify_user_address")}


def _perform(world: retail.RetailWorld, actions: Any) -> None:
    for action in actions:
        try:
            retail_tools.perform(world, action)
        except retail.Refused:
            pass


def _alterations(shop: retail.RetailData, action: retail.Action) -> list[retail.Action]:
    """The same action with one argument changed, each in a way that means something else."""
    made: list[dict[str, Any]] = []
    for name, value in action.arguments.items():
        if name == "reason":
            made.append({name: {"no longer needed", "ordered by mistake"}.difference({value}).pop()})
        elif name == "order_id":
            made.append({name: next(key for key in shop.database["orders"] if key != value)})
        elif name == "item_ids" and len(value) > 1:
            made.append({name: value[1:]} | ({"new_item_ids": action.arguments["new_item_ids"][1:]}
                                             if "new_item_ids" in action.arguments else {}))
        elif name == "new_item_ids":
            product = shop.product_of_item[value[0]]
            variants = shop.database["products"][product]["variants"]
            made += [{name: [item, *value[1:]]} for item, variant in variants.items()
                     if variant["available"] and item not in (value[0], action.arguments["item_ids"][0])][:2]
        elif name in ("address1", "city", "state", "zip"):
            made.append({name: f"{value}x"})
    return [retail.Action(action.name, action.arguments | one) for one in made]


def test_reads_change_nothing(shop: retail.RetailData) -> None:
    world = retail.RetailWorld(shop)
    empty, whole = world.digest(), copy.deepcopy(_whole(world))
    user, order = next(iter(shop.database["users"].values())), next(iter(shop.database["orders"].values()))
    item = order["items"][0]
    reads = [("find_user_id_by_email", {"email": user["email"]}), ("get_user_details", {"user_id": user["user_id"]}),
             ("find_user_id_by_name_zip", {"first_name": user["name"]["first_name"].upper(),
                                           "last_name": user["name"]["last_name"], "zip": user["address"]["zip"]}),
             ("get_order_details", {"order_id": order["order_id"]}), ("get_item_details", {"item_id": item["item_id"]}),
             ("get_product_details", {"product_id": item["product_id"]}), ("list_all_product_types", {}),
             ("calculate", {"expression": "(1319.43 - 302.67) * 2 / 4"}),
             ("transfer_to_human_agents", {"summary": "x"})]
    assert {name for name, _ in reads} | retail_tools.WRITING == set(retail_tools.TOOL_NAMES)
    tools = retail_tools.retail_tools(world)
    answers = [asyncio.run(tools.call(name, json.dumps(arguments), CONTEXT)) for name, arguments in reads]
    assert not any(answer.error for answer in answers)
    assert answers[0].content == answers[2].content == user["user_id"]
    assert json.loads(answers[1].content) == user and json.loads(answers[3].content) == order
    assert answers[7].content == "508.38"
    assert world.digest() == empty and _whole(world) == whole


def test_money_adds_up(shop: retail.RetailData) -> None:
    """Whatever the gold actions do, an order that stands is paid, one that is cancelled is not, and what gift cards
    lose is what orders gained from them."""
    for task in shop.tasks.values():
        world = retail.RetailWorld.for_task(shop, task)
        _perform(world, task.actions)
        from_cards: Counter[str] = Counter()
        for key, order in world.orders.changed().items():
            paid = sum(_signed(entry) for entry in order["payment_history"])
            price = sum(item["price"] for item in order["items"])
            assert paid == pytest.approx(0 if order["status"] == "cancelled" else price, abs=0.011), (task.id, key)
            new = order["payment_history"][len(shop.database["orders"][key]["payment_history"]) :]
            for entry in new:
                from_cards[entry["payment_method_id"]] += _signed(entry)
        for key, user in world.users.changed().items():
            for name, method in user["payment_methods"].items():
                before = shop.database["users"][key]["payment_methods"][name]
                if method["source"] == "gift_card":
                    assert before["balance"] - method["balance"] == pytest.approx(from_cards.pop(name, 0), abs=0.011)
        assert not any(name.startswith("gift_card") and abs(amount) > 0.01 for name, amount in from_cards.items())


def _signed(entry: dict[str, Any]) -> float:
    return entry["amount"] if entry["transaction_type"] == "payment" else -entry["amount"]


def test_rules_are_kept(shop: retail.RetailData) -> None:
    world = retail.RetailWorld(shop)
    whole = copy.deepcopy(_whole(world))
    orders = shop.database["orders"]

    def order_with(status: str, card: bool = False) -> dict[str, Any]:
        return next(order for order in orders.values() if order["status"] == status and (
            not card or order["payment_history"][0]["payment_method_id"].startswith("gift_card")))

    pending, delivered, processed = order_with("pending"), order_with("delivered"), order_with("processed")
    item, method = pending["items"][0], pending["payment_history"][0]["payment_method_id"]
    variants = shop.database["products"][item["product_id"]]["variants"]
    sold_out = next(key for product in shop.database["products"].values()
                    for key, variant in product["variants"].items() if not variant["available"])
    sold_product = shop.product_of_item[sold_out]
    holder = next(order for order in orders.values() if order["status"] == "pending"
                  and any(one["product_id"] == sold_product for one in order["items"]))
    held = next(one["item_id"] for one in holder["items"] if one["product_id"] == sold_product)
    other_product = next(key for key, product in shop.product_of_item.items() if product != item["product_id"])
    fitting = next(key for key, one in variants.items() if one["available"] and key != item["item_id"])
    done = delivered["items"][0]["item_id"]
    paid = delivered["payment_history"][0]["payment_method_id"]

    def change(order: dict[str, Any], old: list[str], new: list[str], by: str) -> dict[str, Any]:
        return {"order_id": order["order_id"], "item_ids": old, "new_item_ids": new, "payment_method_id": by}

    cases = [
        ("cancel_pending_order", {"order_id": "#W0", "reason": "no longer needed"}, "there is no order"),
        ("cancel_pending_order", {"order_id": processed["order_id"], "reason": "no longer needed"}, "is processed"),
        ("cancel_pending_order", {"order_id": pending["order_id"], "reason": "too dear"}, "do not fit"),
        ("modify_pending_order_items", change(delivered, [done], [fitting], paid), "is delivered"),
        ("modify_pending_order_items", change(pending, [item["item_id"]], [other_product], method), "no variant of"),
        ("modify_pending_order_items", change(pending, [item["item_id"]] * 9, [fitting] * 9, method), "not 9"),
        ("modify_pending_order_items", change(pending, [item["item_id"]], [], method), "each needs one"),
        ("modify_pending_order_items", change(pending, [], [], method), "at least one"),
        ("modify_pending_order_items", change(pending, [item["item_id"]], [item["item_id"]], method), ""),
        ("modify_pending_order_items", change(pending, [item["item_id"]], [fitting], "paypal_0"), "no payment method"),
        ("modify_pending_order_items", change(holder, [held], [sold_out],
                                              holder["payment_history"][0]["payment_method_id"]), "not available"),
        ("modify_pending_order_payment", {"order_id": pending["order_id"], "payment_method_id": method}, "must differ"),
        ("exchange_delivered_order_items", change(pending, [item["item_id"]], [fitting], method), "is pending"),
        ("return_delivered_order_items", {"order_id": pending["order_id"], "item_ids": [item["item_id"]],
                                          "payment_method_id": method}, "is pending"),
        ("return_delivered_order_items", {"order_id": delivered["order_id"], "item_ids": ["1"],
                                          "payment_method_id": paid}, "has 0 of item 1"),
        ("get_user_details", {"user_id": "nobody"}, "there is no user"),
        ("get_product_details", {"product_id": item["item_id"]}, "no product"),
        ("calculate", {"expression": "__import__('os')"}, "cannot be worked out"),
        ("calculate", {"expression": "9**9**9"}, "cannot be worked out"),
        ("modify_user_address", {"user_id": "nobody"}, "do not fit"),
    ]
    tools = retail_tools.retail_tools(world)
    for name, arguments, text in cases:
        answer = asyncio.run(tools.call(name, json.dumps(arguments), CONTEXT))
        assert answer.error and text in answer.content, (name, arguments, answer)
    assert _whole(world) == whole


def test_items_change_once_and_returns_go_home(shop: retail.RetailData) -> None:
    task = next(task for task in shop.tasks.values()
                if [action.name for action in task.actions].count("modify_pending_order_items") == 1)
    action = next(action for action in task.actions if action.name == "modify_pending_order_items")
    world = retail.RetailWorld.for_task(shop, task)
    before = shop.database["orders"][action.arguments["order_id"]]
    after = retail_tools.perform(world, action)
    assert after["status"] == "pending (items modified)"
    assert [item["item_id"] for item in after["items"]] != [item["item_id"] for item in before["items"]]
    cancel = retail.Action("cancel_pending_order", {"order_id": before["order_id"], "reason": "no longer needed"})
    assert _run(world, [action, cancel]) == [True, True]
    for order in shop.database["orders"].values():
        user = shop.database["users"][order["user_id"]]
        original = order["payment_history"][0]["payment_method_id"]
        foreign = [name for name in user["payment_methods"] if not name.startswith("gift_card") and name != original]
        if order["status"] == "delivered" and foreign:
            answer = asyncio.run(retail_tools.retail_tools(world).call("return_delivered_order_items", json.dumps(
                {"order_id": order["order_id"], "item_ids": [order["items"][0]["item_id"]],
                 "payment_method_id": foreign[0]}), CONTEXT))
            assert answer.error and "original payment method" in answer.content
            break


def test_user_reads_the_scenario_aloud(shop: retail.RetailData, tmp_path: Path) -> None:
    task = shop.tasks["0"]
    user = retail.ReadsAloud(task)

    async def listen() -> list[str]:
        heard = [await user.say(None)]
        while heard[-1] != retail.STOP:
            heard.append(await user.say("Go on."))
        return heard

    heard = asyncio.run(listen())
    assert "\n".join(heard[:-2]) == task.scenario and "Yusuf Rossi" in task.scenario
    assert task.scenario in retail.user_prompt(task)
    assert "exchange_delivered" not in task.scenario
    with pytest.raises(UserError, match=r"db\.json\.gz cannot be read"):
        retail.load_retail(tmp_path)
    with pytest.raises(UserError, match="no retail task"):
        retail.RetailWorld.for_task(shop, "nothing")
