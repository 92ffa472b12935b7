"""The tools of the retail world, by the names and arguments that its tasks use."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import json
import operator
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

from moonbase.agents.tools.tool import Tool, ToolContext, ToolResult, Toolset, tool
from moonbase.agents.worlds.retail import Action, Record, Refused, RetailWorld

WRITING = frozenset((
    "cancel_pending_order", "exchange_delivered_order_items", "modify_pending_order_address",
    "modify_pending_order_items", "modify_pending_order_payment", "modify_user_address",
    "return_delivered_order_items"))
"""Tools that change the database."""
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.UAdd: operator.pos, ast.USub: operator.neg}


class RetailTools:
    """What an agent of the shop can do. Methods answer a record or a text, and raise Refused."""

    def __init__(self, world: RetailWorld) -> None:
        self.world = world

    def find_user_id_by_email(self, email: str) -> str:
        """Find a user's id by e-mail address.

        Args:
            email: The e-mail address.
        """
        wanted = _plain(email)
        return self.world.find_user(lambda user: _plain(user["email"]) == wanted)

    def find_user_id_by_name_zip(self, first_name: str, last_name: str, zip: str) -> str:
        """Find a user's id by name and zip code, where the e-mail address is not known.

        Args:
            first_name: The first name.
            last_name: The last name.
            zip: The zip code of the user's default address.
        """
        wanted = _plain(first_name), _plain(last_name), zip.strip()
        return self.world.find_user(lambda user: wanted == (
            _plain(user["name"]["first_name"]), _plain(user["name"]["last_name"]), user["address"]["zip"]))

    def get_user_details(self, user_id: str) -> Record:
        """A user's profile: name, e-mail, default address, payment methods, order ids.

        Args:
            user_id: The user id.
        """
        return self.world.user(user_id)

    def get_order_details(self, order_id: str) -> Record:
        """An order: status, items, address, shipments, payments.

        Args:
            order_id: The order id; it begins with '#'.
        """
        return self.world.order(order_id)

    def get_product_details(self, product_id: str) -> Record:
        """A product with all its variants: options, price, availability.

        Args:
            product_id: The product id (not an item id).
        """
        return self.world.product(product_id)

    def get_item_details(self, item_id: str) -> Record:
        """One variant of a product: options, price, availability.

        Args:
            item_id: The item id (not a product id).
        """
        return self.world.item(item_id)

    def list_all_product_types(self) -> Record:
        """The names of all products with their product ids."""
        return dict(sorted((product["name"], key) for key, product in self.world.products.items()))

    def calculate(self, expression: str) -> str:
        """Work out an arithmetical expression, rounded to two decimals.

        Args:
            expression: Numbers, + - * / and parentheses.
        """
        try:
            return str(round(float(_work_out(ast.parse(expression[:500].strip(), mode="eval").body)), 2))
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
            raise Refused(f"{expression[:100]!r} cannot be worked out ({type(error).__name__})") from None

    def transfer_to_human_agents(self, summary: str) -> str:
        """Hand the user over to a human agent; only where the policy and the tools do not allow to help.

        Args:
            summary: What the user wants and why it cannot be done here.
        """
        self.world.transferred.append(summary)
        return "The user is handed over to a human agent."

    def cancel_pending_order(
        self, order_id: str, reason: Literal["no longer needed", "ordered by mistake"]
    ) -> Record:
        """Cancel a pending order. Gift cards are refunded at once, other payment methods in 5 to 7 business days. The
        user must have said yes to it.

        Args:
            order_id: The order id; it begins with '#'.
            reason: Why the user cancels.
        """
        return self.world.cancel(order_id, reason)

    def modify_pending_order_items(
        self, order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str
    ) -> Record:
        """Put other variants of the same products in the place of items of a pending order. This can be done once, so
        all changes must be in one call. The user must have said yes to it.

        Args:
            order_id: The order id; it begins with '#'.
            item_ids: Items to be replaced; an id stands as often as the item is meant.
            new_item_ids: For each of them the available variant that takes its place.
            payment_method_id: Who pays or gets the difference in price.
        """
        return self.world.modify_items(order_id, item_ids, new_item_ids, payment_method_id)

    def modify_pending_order_payment(self, order_id: str, payment_method_id: str) -> Record:
        """Pay a pending order by another method of the user. The user must have said yes to it.

        Args:
            order_id: The order id; it begins with '#'.
            payment_method_id: The new payment method; a gift card must cover the whole amount.
        """
        return self.world.modify_payment(order_id, payment_method_id)

    def modify_pending_order_address(
        self, order_id: str, address1: str, address2: str, city: str, state: str, country: str, zip: str
    ) -> Record:
        """Change the shipping address of a pending order. The user must have said yes to it.

        Args:
            order_id: The order id; it begins with '#'.
            address1: Street and number.
            address2: Apartment or suite, or nothing.
            city: The city.
            state: The state, in two letters.
            country: The country.
            zip: The zip code.
        """
        return self.world.modify_order_address(order_id, _address(address1, address2, city, state, country, zip))

    def modify_user_address(
        self, user_id: str, address1: str, address2: str, city: str, state: str, country: str, zip: str
    ) -> Record:
        """Change the default address of a user. The user must have said yes to it.

        Args:
            user_id: The user id.
            address1: Street and number.
            address2: Apartment or suite, or nothing.
            city: The city.
            state: The state, in two letters.
            country: The country.
            zip: The zip code.
        """
        return self.world.modify_user_address(user_id, _address(address1, address2, city, state, country, zip))

    def return_delivered_order_items(self, order_id: str, item_ids: list[str], payment_method_id: str) -> Record:
        """Ask to return items of a delivered order; an order can be returned or exchanged once. The user must have
        said yes to it.

        Args:
            order_id: The order id; it begins with '#'.
            item_ids: Items to be returned; an id stands as often as the item is meant.
            payment_method_id: Who gets the refund: the original payment method or a gift card.
        """
        return self.world.give_back(order_id, item_ids, payment_method_id)

    def exchange_delivered_order_items(
        self, order_id: str, item_ids: list[str], new_item_ids: list[str], payment_method_id: str
    ) -> Record:
        """Ask to exchange items of a delivered order for other variants of the same products; an order can be returned
        or exchanged once. The user must have said yes to it.

        Args:
            order_id: The order id; it begins with '#'.
            item_ids: Items to be exchanged; an id stands as often as the item is meant.
            new_item_ids: For each of them the available variant in exchange.
            payment_method_id: Who pays or gets the difference in price.
        """
        return self.world.exchange(order_id, item_ids, new_item_ids, payment_method_id)


TOOL_NAMES = tuple(name for name in vars(RetailTools) if not name.startswith("_"))


def retail_tools(world: RetailWorld) -> Toolset:
    """The shop's tools over one world; they answer where they are called."""
    methods = RetailTools(world)
    return Toolset(dataclasses.replace(known, call=_call_of(getattr(methods, known.name))) for known in _prototypes())


def perform(world: RetailWorld, action: Action) -> Record | str:
    """Do one call outside a toolset. Raises Refused; KeyError for a tool that is not there."""
    if action.name not in TOOL_NAMES:
        raise KeyError(action.name)
    return getattr(RetailTools(world), action.name)(**action.arguments)


def reward(world: RetailWorld) -> float:
    """1.0 where a world's database is the one that its task's gold actions leave, else 0.0."""
    task = world.task
    assert task is not None, "a world without a task has no reward"
    known = world.data.gold_digests
    if task.id not in known:
        gold = RetailWorld(world.data, task)
        for action in task.actions:
            with contextlib.suppress(Refused):
                perform(gold, action)
        known[task.id] = gold.digest()
    return float(world.digest() == known[task.id])


@functools.cache
def _prototypes() -> tuple[Tool, ...]:
    """The tools without a world: their schemas take longer to make than an episode may."""
    empty = RetailTools.__new__(RetailTools)
    return tuple(tool(getattr(empty, name), inline=True) for name in TOOL_NAMES)


def _call_of(method: Callable[..., Record | str]) -> Callable[[dict[str, Any], ToolContext], Any]:
    async def call(arguments: dict[str, Any], context: ToolContext) -> ToolResult | str:
        try:
            answer = method(**arguments)
        except Refused as refusal:
            return ToolResult(f"Error: {refusal}.", error=True)
        return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)

    return call


def _address(address1: str, address2: str, city: str, state: str, country: str, zip: str) -> Record:
    """As the database has it."""
    return {"address1": address1, "address2": address2, "city": city, "country": country, "state": state, "zip": zip}


def _plain(text: str) -> str:
    """Without case, accents and white space at the ends."""
    letters = unicodedata.normalize("NFKD", text.strip()).casefold()
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _work_out(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_work_out(node.left), _work_out(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_work_out(node.operand))
    raise ValueError(ast.dump(node)[:50])
