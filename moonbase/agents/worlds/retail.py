"""A shop's database behind tools, and tasks graded by the database that an agent leaves: the retail domain of τ²-bench.

The data (Barres et al. 2025, "τ²-Bench"; tasks from Yao et al. 2024) is read from a folder with `db.json.gz`,
`tasks.json.gz`, `split_tasks.json.gz` and `policy.md.gz`; none of it is in this package. Tools have the names and
arguments that the tasks' actions use, and do what the policy says. What a rule forbids is refused with a text that says
why, and changes nothing.

The tools stand in `retail_tools`, and so does the reward: 1.0 where the database after the episode is the database
after the task's gold actions, compared by a digest that knows no order of keys, else 0.0. Gold actions that are refused
(tasks that make an agent try in vain) change nothing, and the rest is done. Nothing of the dialogue is judged: what the
user had to be told is in `RetailTask.communicate`.

Where the tools leave an agent free although the policy does not, this world does as τ²-bench does: addresses and
payments of an order may change after its items did, and nobody checks that the user agreed. Where τ²-bench gives all
items of one modification the price of the last, here each has its own.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from moonbase.errors import UserError

ITEMS_MODIFIED = "pending (items modified)"
STOP = "###STOP###"
"""What a user says who has nothing more to say."""
Record = dict[str, Any]


class Refused(Exception):
    """A call that the rules forbid; its text is the observation."""


@dataclass(frozen=True)
class Action:
    """A gold call."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class RetailTask:
    """What a user wants, and what it should come to."""

    id: str
    split: str
    """train or test; test tasks never enter training."""
    scenario: str
    """For whoever plays the user; the agent must not see it."""
    actions: tuple[Action, ...]
    communicate: tuple[str, ...] = ()
    """What the user had to be told. Not graded here."""


@dataclass(frozen=True)
class RetailData:
    """All of the domain, as read."""

    database: dict[str, dict[str, Record]]
    tasks: dict[str, RetailTask]
    policy: str
    """The system prompt of the agent."""
    gold_digests: dict[str, str] = field(default_factory=dict, compare=False)
    """Of the databases after the gold actions, by task; `retail_tools.reward` fills it as it goes."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the database as read, whatever the order of keys."""
        return _digest(self.database)

    @cached_property
    def product_of_item(self) -> dict[str, str]:
        """Products never change."""
        return {item: product["product_id"] for product in self.database["products"].values()
                for item in product["variants"]}

    def tasks_of(self, split: str) -> list[RetailTask]:
        """The tasks of `train` or `test`."""
        return [task for task in self.tasks.values() if task.split == split]


def load_retail(folder: Path | str) -> RetailData:
    """Read a folder. Raises UserError where something is missing or is not what it should be."""
    folder = Path(folder)
    texts = {}
    for name in ("db.json.gz", "tasks.json.gz", "split_tasks.json.gz", "policy.md.gz"):
        try:
            texts[name] = gzip.decompress((folder / name).read_bytes()).decode()
        except OSError as error:
            raise UserError(f"{folder / name} cannot be read ({error}): name the folder tau2/retail") from None
    try:
        splits = {task: split for split, tasks in json.loads(texts["split_tasks.json.gz"]).items()
                  if split in ("train", "test") for task in tasks}
        tasks = {task["id"]: RetailTask(
            task["id"], splits.get(task["id"], ""), _scenario(task["user_scenario"]),
            tuple(Action(action["name"], action["arguments"])
                  for action in task["evaluation_criteria"]["actions"] or ()),
            tuple(task["evaluation_criteria"]["communicate_info"] or ()))
            for task in json.loads(texts["tasks.json.gz"])}
        database = json.loads(texts["db.json.gz"])
        if set(database) != {"products", "users", "orders"}:
            raise ValueError(f"tables {sorted(database)}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not the retail data ({error}); get it anew") from None
    return RetailData(database, tasks, texts["policy.md.gz"])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _scenario(scenario: Record) -> str:
    """The user's part in plain words."""
    instructions = scenario["instructions"]
    if isinstance(instructions, str):
        return instructions
    parts = [("", scenario.get("persona")), ("Why you call: ", instructions.get("reason_for_call")),
             ("What you know: ", instructions.get("known_info")),
             ("What you do not know: ", instructions.get("unknown_info")),
             ("How you behave: ", instructions.get("task_instructions"))]
    return "\n".join(label + text.strip() for label, text in parts if text)


# The world


class RetailWorld:
    """A database of its own for one episode."""

    def __init__(self, data: RetailData, task: RetailTask | None = None) -> None:
        self.data, self.task = data, task
        self.products = data.database["products"]
        self.users = _Copied(data.database["users"])
        self.orders = _Copied(data.database["orders"])
        self.transferred: list[str] = []
        """Summaries handed to human agents."""

    @classmethod
    def for_task(cls, data: RetailData, task: str | RetailTask) -> RetailWorld:
        """A fresh world for a task or its id. Raises UserError for an unknown id."""
        if isinstance(task, str):
            if task not in data.tasks:
                raise UserError(f"there is no retail task {task!r}: ids are {', '.join(list(data.tasks)[:5])}, …")
            task = data.tasks[task]
        return cls(data, task)

    def digest(self) -> str:
        """SHA-256 of the whole database, whatever the order of keys.

        Two worlds of the same data have equal digests where their databases are equal: of the records, those that
        changed are written out, and for the rest stands the digest of the data as read.
        """
        return _digest([self.data.digest, self.users.changed(), self.orders.changed()])

    # Reading

    def order(self, order_id: str) -> Record:
        """Raises Refused."""
        return _find(self.orders, order_id, "order", "an order id begins with '#W'")

    def user(self, user_id: str) -> Record:
        """Raises Refused."""
        return _find(self.users, user_id, "user", "find it by e-mail, or by name and zip code")

    def product(self, product_id: str) -> Record:
        """Raises Refused."""
        return _find(self.products, product_id, "product", "an item id is no product id")

    def item(self, item_id: str) -> Record:
        """A variant of a product. Raises Refused."""
        product = self.data.product_of_item.get(item_id)
        if product is None:
            raise Refused(f"there is no item {item_id!r}; a product id is no item id")
        return self.products[product]["variants"][item_id]

    def find_user(self, matches: Callable[[Record], bool]) -> str:
        """The id of the first user who matches. Raises Refused."""
        for user_id in self.users:
            if matches(self.users.peek(user_id)):
                return user_id
        raise Refused("no user is found by this")

    # Writing: everything is checked before anything is changed.

    def cancel(self, order_id: str, reason: str) -> Record:
        """Cancel an order and give back what was paid."""
        order = self.order(order_id)
        _ask_status(order, ("pending",), "cancelled")
        if reason not in ("no longer needed", "ordered by mistake"):
            raise Refused("the reason must be 'no longer needed' or 'ordered by mistake'")
        refunds = [_transaction("refund", paid["amount"], paid["payment_method_id"])
                   for paid in order["payment_history"]]
        for refund in refunds:
            self._move(order, refund["payment_method_id"], refund["amount"])
        order |= {"status": "cancelled", "cancel_reason": reason,
                  "payment_history": order["payment_history"] + refunds}
        return order

    def modify_items(
        self, order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str
    ) -> Record:
        """Put other variants in the place of items of a pending order; the difference in price is paid at once."""
        order = self.order(order_id)
        _ask_status(order, ("pending",), "modified; items can be modified once")
        pairs = self._pair(order, item_ids, new_item_ids)
        if any(item["item_id"] == new["item_id"] for item, new in pairs):
            raise Refused("each new item must differ from the old one")
        difference = _difference(pairs)
        self._ask_cover(order, payment_method_id, difference)
        self._move(order, payment_method_id, -difference)
        order["payment_history"].append(
            _transaction("payment" if difference > 0 else "refund", abs(difference), payment_method_id))
        for item, new in pairs:
            item |= {"item_id": new["item_id"], "price": new["price"], "options": dict(new["options"])}
        order["status"] = ITEMS_MODIFIED
        return order

    def exchange(self, order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str) -> Record:
        """Ask for other variants in exchange for items of a delivered order; nothing is paid yet."""
        order = self.order(order_id)
        _ask_status(order, ("delivered",), "exchanged")
        difference = _difference(self._pair(order, item_ids, new_item_ids))
        self._ask_cover(order, payment_method_id, difference)
        order |= {"status": "exchange requested", "exchange_items": sorted(item_ids),
                  "exchange_new_items": sorted(new_item_ids), "exchange_payment_method_id": payment_method_id,
                  "exchange_price_difference": difference}
        return order

    def give_back(self, order_id: str, item_ids: list[str], payment_method_id: str) -> Record:
        """Ask to return items of a delivered order."""
        order = self.order(order_id)
        _ask_status(order, ("delivered",), "returned")
        method = self._method(order, payment_method_id)
        original = order["payment_history"][0]["payment_method_id"]
        if method["source"] != "gift_card" and payment_method_id != original:
            raise Refused(f"a refund goes to the original payment method ({original}) or to a gift card")
        _items_of(order, item_ids)
        order |= {"status": "return requested", "return_items": sorted(item_ids),
                  "return_payment_method_id": payment_method_id}
        return order

    def modify_payment(self, order_id: str, payment_method_id: str) -> Record:
        """Pay a pending order by another method."""
        order = self.order(order_id)
        _ask_status(order, ("pending", ITEMS_MODIFIED), "modified")
        self._method(order, payment_method_id)
        history = order["payment_history"]
        if len(history) != 1 or history[0]["transaction_type"] != "payment":
            raise Refused("the payment of an order can be modified only while there is one payment and no refund")
        before, amount = history[0]["payment_method_id"], history[0]["amount"]
        if before == payment_method_id:
            raise Refused("the new payment method must differ from the old one")
        self._ask_cover(order, payment_method_id, amount)
        self._move(order, payment_method_id, -amount)
        self._move(order, before, amount)
        history += [_transaction("payment", amount, payment_method_id), _transaction("refund", amount, before)]
        return order

    def modify_order_address(self, order_id: str, address: dict[str, str]) -> Record:
        """Ship a pending order elsewhere."""
        order = self.order(order_id)
        _ask_status(order, ("pending", ITEMS_MODIFIED), "modified")
        order["address"] = address
        return order

    def modify_user_address(self, user_id: str, address: dict[str, str]) -> Record:
        """Change a user's default address."""
        user = self.user(user_id)
        user["address"] = address
        return user

    # What the writing ones share

    def _pair(self, order: Record, item_ids: list[str], new_item_ids: list[str]) -> list[tuple[Record, Record]]:
        """Items of an order with the variants that take their places. Raises Refused."""
        if len(item_ids) != len(new_item_ids):
            raise Refused(f"{len(item_ids)} items and {len(new_item_ids)} new items; each needs one")
        pairs = []
        for item, new_id in zip(_items_of(order, item_ids), new_item_ids, strict=True):
            new = self.products[item["product_id"]]["variants"].get(new_id)
            if new is None:
                raise Refused(f"item {new_id} is no variant of {item['name']}; the product must stay the same")
            if not new["available"]:
                raise Refused(f"item {new_id} is not available")
            pairs.append((item, new))
        return pairs

    def _method(self, order: Record, payment_method_id: str) -> Record:
        """A payment method of the order's user. Raises Refused."""
        methods = self.user(order["user_id"])["payment_methods"]
        if payment_method_id not in methods:
            raise Refused(f"the user has no payment method {payment_method_id!r}; there are {', '.join(methods)}")
        return methods[payment_method_id]

    def _ask_cover(self, order: Record, payment_method_id: str, amount: float) -> None:
        """Raises Refused where a gift card has too little."""
        method = self._method(order, payment_method_id)
        if method["source"] == "gift_card" and method["balance"] < amount:
            raise Refused(f"{payment_method_id} has {method['balance']:.2f}, less than the {amount:.2f} to pay")

    def _move(self, order: Record, payment_method_id: str, amount: float) -> None:
        """Put an amount on a gift card; other methods are settled elsewhere."""
        method = self._method(order, payment_method_id)
        if method["source"] == "gift_card":
            method["balance"] = round(method["balance"] + amount, 2)


# The other side of the dialogue


class RetailUser(Protocol):
    """Whoever plays the user: a model under `user_prompt`, or a script."""

    async def say(self, heard: str | None) -> str:
        """The user's next words, to what the agent said (None at the start); with STOP in them the dialogue ends."""
        ...


class ReadsAloud:
    """A user without a mind: reads the scenario, a line each time, then agrees once to whatever is asked, and stops."""

    def __init__(self, task: RetailTask) -> None:
        self._lines = [*task.scenario.splitlines(), "Yes.", STOP]

    async def say(self, heard: str | None) -> str:
        """The next line, whatever was heard."""
        return self._lines.pop(0) if len(self._lines) > 1 else self._lines[0]


def user_prompt(task: RetailTask) -> str:
    """The system prompt for a model that plays the user."""
    return (
        "You are a customer who writes to a shop's agent. Write only what the customer says, a message at a time, "
        "and only as much as the moment asks for. Do not make up anything that is not said below. When everything you "
        f"want is settled, or you are handed to a human agent, answer {STOP} and nothing else.\n\n{task.scenario}")


class _Copied(dict):
    """Records that are copied when they are first asked for, so that a fresh world costs nothing."""

    def __init__(self, source: dict[str, Record]) -> None:
        super().__init__()
        self._source = source

    def __missing__(self, key: str) -> Record:
        self[key] = copy.deepcopy(self._source[key])
        return self[key]

    def __contains__(self, key: object) -> bool:
        return key in self._source

    def __iter__(self) -> Any:
        return iter(self._source)

    def peek(self, key: str) -> Record:
        """To read only."""
        return self[key] if dict.__contains__(self, key) else self._source[key]

    def changed(self) -> dict[str, Record]:
        """The records that are not as they were."""
        return {key: value for key, value in self.items() if value != self._source[key]}


def _find(records: dict[str, Record], key: str, kind: str, hint: str) -> Record:
    if key not in records:
        raise Refused(f"there is no {kind} {key!r}; {hint}")
    return records[key]


def _ask_status(order: Record, allowed: tuple[str, ...], done: str) -> None:
    if order["status"] not in allowed:
        raise Refused(f"order {order['order_id']} is {order['status']}: only a {allowed[0]} order can be {done}")


def _items_of(order: Record, item_ids: list[str]) -> list[Record]:
    """An item of the order for each id; an id that is there twice is two items. Raises Refused."""
    if not item_ids:
        raise Refused("name at least one item")
    free: dict[str, list[Record]] = {}
    for item in order["items"]:
        free.setdefault(item["item_id"], []).append(item)
    for item_id, count in Counter(item_ids).items():
        if count > len(free.get(item_id, [])):
            raise Refused(f"order {order['order_id']} has {len(free.get(item_id, []))} of item {item_id}, not {count}")
    return [free[item_id].pop(0) for item_id in item_ids]


def _difference(pairs: Iterable[tuple[Record, Record]]) -> float:
    return round(sum(new["price"] - item["price"] for item, new in pairs), 2)


def _transaction(kind: str, amount: float, payment_method_id: str) -> Record:
    return {"transaction_type": kind, "amount": amount, "payment_method_id": payment_method_id}
