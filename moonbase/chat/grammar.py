r"""What a reply with tool calls, or a reply that is JSON, looks like to the letter.

A tool section is a frame of special tokens around text (the same in all styles):

    <|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:IDX<|tool_call_argument_begin|>{json}<|tool_call_end|>      once or several times
    <|tool_calls_section_end|>

The frame is followed token by token (`engine/constraint.py`); only the JSON inside it needs a grammar. `json_grammar`
writes that grammar for a shape (`shape.py`), as text in llguidance's dialect of Lark: one rule for a shape that has
parts, one terminal for a string, a number, a set of literals. Every value of the grammar is a value of the schema:
compact, members in the order of the schema, no key twice among the named ones, no half of a surrogate pair, and no
member that hides a named one behind an escaped letter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal

from moonbase.chat.shape import Array, Choice, Literals, Number, Object, Shape, String, walk

_CHARACTER = (
    r'([^"\\\x00-\x1f]|\\["\\\/bfnrt]'
    r"|\\u([0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}"
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)


MAX_LETTERS = 300_000


def opens_thinking(style: str, thinking_open: bool) -> bool:
    """Whether the model itself may begin with `<think>`: where the style thinks and the prompt did not open it.

    The prompt of kimi-k2.5 always holds `<think>` or `<think></think>`; that of kimi-k2-thinking may hold neither.
    """
    return style == "kimi-k2-thinking" and not thinking_open


def json_grammar(shape: Shape) -> str:
    """A Lark grammar whose texts are the values of `shape` in compact JSON. Raises GrammarError."""
    return _Writer(shape).text()


class GrammarError(ValueError):
    """A shape whose grammar would be too long."""


class _Writer:
    def __init__(self, root: Shape) -> None:
        self.root = root
        self.names = {id(shape): f"v{number}" for number, shape in enumerate(walk(root))}
        self.terminals: dict[str, str] = {}
        self.lines: list[str] = []
        self.letters = 0

    def text(self) -> str:
        for shape in walk(self.root):
            self.rule(self.names[id(shape)], self.body(shape))
        # Any spelling of a text in tokens is allowed, not the tokenizer's own only.
        head = ['%llguidance {"no_forcing": true}', f"start: {self.names[id(self.root)]}"]
        return "\n".join([*head, *self.lines, *(f"{name}: {body}" for body, name in self.terminals.items())]) + "\n"

    def rule(self, name: str, body: str) -> str:
        self.lines.append(f"{name}: {body}")
        self.letters += len(self.lines[-1])
        if self.letters > MAX_LETTERS:
            raise GrammarError(f"its grammar has more than {MAX_LETTERS:,} letters")
        return name

    def terminal(self, body: str) -> str:
        return self.terminals.setdefault(body, f"T{len(self.terminals)}")

    def body(self, shape: Shape) -> str:
        if isinstance(shape, Choice):
            return " | ".join(self.names[id(option)] for option in shape.options)
        if isinstance(shape, Literals):
            return self.literals(shape.texts)
        if isinstance(shape, String):
            high = "" if shape.high is None else shape.high
            bounds = "*" if (shape.low, shape.high) == (0, None) else f"{{{shape.low},{high}}}"
            any_text = self.terminal(f'/"{_CHARACTER}{bounds}"/')
            if shape.pattern is None:
                return any_text
            matching = self.terminal(f'/"{shape.pattern.expression}"/')
            return matching if bounds == "*" else self.terminal(f"{matching} & {any_text}")
        if isinstance(shape, Number):
            return self.number(shape)
        if isinstance(shape, Array):
            return self.array(shape)
        assert isinstance(shape, Object)
        return self.object(shape)

    def literals(self, texts: Iterable[bytes]) -> str:
        return self.terminal(" | ".join(_quote(text) for text in texts))

    def number(self, shape: Number) -> str:
        if shape.step > 1:
            assert shape.low is not None and shape.high is not None
            bounds = {"minimum": int(shape.low), "maximum": int(shape.high)}
            schema = {"type": "integer", "multipleOf": shape.step, **bounds}
            return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_flexible': False}})}"
        before, after = shape.digits()
        if shape.low is None and shape.high is None:
            whole = f"-?(0|[1-9][0-9]{{0,{before - 1}}})"
            exponent = "" if shape.places else "([eE][+-]?[0-9]{1,2})?"
            return self.terminal(f"/{whole}{_any_fraction(after)}{exponent}/")
        options = []
        for sign, low, high, low_open, high_open in shape.magnitudes():
            patterns = [at_least(low, low_open, before, after)]
            patterns += [] if high is None else [at_most(high, high_open, after)]
            parts = [self.terminal(f"/{pattern}/") for pattern in patterns]
            magnitude = parts[0] if len(parts) == 1 else self.terminal(" & ".join(parts))
            # The sign belongs to the numeral: the longest token of the grammar wins, whichever place it has in it.
            options.append(self.terminal(f'"-" {magnitude}') if sign else magnitude)
        return " | ".join(options)

    def array(self, shape: Array) -> str:
        name = self.names[id(shape)]
        if shape.high == 0:
            return '"[" "]"'
        if shape.unique:
            assert isinstance(shape.items, Literals)
            return f'"[" {self.selection(name, shape)} "]"'
        if shape.prefix:
            return f'"[" {self.tuple(shape)} "]"'
        item = self.names[id(shape.items)]
        low, high = max(1, shape.low), shape.high
        more = f'("," {item}){{{low - 1},{"" if high is None else high - 1}}}' if high != 1 else ""
        return f'"[" {item} {more} "]"' if shape.low else f'"[" ({item} {more})? "]"'

    def tuple(self, shape: Array) -> str:
        """Items each of a kind of its own, then the others; what need not be there is bracketed from its comma on."""
        count, high = len(shape.prefix), shape.high
        text = ""
        if high is None or high > count:
            bounds = f"{max(0, shape.low - count)},{'' if high is None else high - count}"
            text = f'("," {self.names[id(shape.items)]}){{{bounds}}}'
        for number in reversed(range(count if high is None else min(count, high))):
            comma = '"," ' if number else ""
            text = f"{comma}{self.names[id(shape.prefix[number])]} {text}"
            text = text if number < shape.low else f"({text})?"
        return text

    def selection(self, name: str, shape: Array) -> str:
        """Literal items in their order, each at most once. A rule stands for the items from one place on, with so many
        chosen before; None: the choice went wrong."""
        assert isinstance(shape.items, Literals)
        texts = [self.literals([text]) for text in shape.items.texts]
        low, high = shape.low, len(texts) if shape.high is None else min(shape.high, len(texts))
        counted = low > 1 or high < len(texts)
        rules: dict[tuple[int, int], str | None] = {}
        for place in reversed(range(len(texts) + 1)):
            for chosen in range(high + 1 if counted else 2):
                after = chosen + 1 if counted else 1
                options = []
                if place < len(texts):
                    options.append(rules[place + 1, chosen])
                    if after <= high and rules[place + 1, after] is not None:
                        options.append(f'{"" if not chosen else chr(34) + "," + chr(34)} {texts[place]} '
                                       f"{rules[place + 1, after]}")
                elif chosen >= low:
                    options.append("")
                found = [option for option in options if option is not None]
                rules[place, chosen] = self.rule(f"{name}_{place}_{chosen}", " | ".join(found)) if found else None
        return rules[0, 0] or ""

    def object(self, shape: Object) -> str:
        name = self.names[id(shape)]
        members = [f'{self.literals([member.key])} ":" {self.names[id(member.shape)]}' for member in shape.members]
        required = [number for number, member in enumerate(shape.members) if member.required]
        other = f'{self.free_key(shape.taken)} ":" {self.names[id(shape.others)]}' if shape.others else ""
        if required:
            # Members before the first required one bring their comma behind them, the others before.
            parts = [f'({member} ",")?' for member in members[: required[0]]] + [members[required[0]]]
            for number in range(required[0] + 1, len(members)):
                part = f'"," {members[number]}'
                parts.append(part if number in required else f"({part})?")
            parts += [f'("," {other})*'] if other else []
            return f'"{{" {" ".join(parts)} "}}"'
        # Which member comes first decides about the commas; what may follow it is a rule of its own.
        tail = self.rule(f"{name}_after{len(members)}", f'("," {other})*') if other else ""
        options = [f"{other} {tail}"] if other else []
        for number in reversed(range(len(members))):
            options.append(f"{members[number]} {tail}")
            tail = self.rule(f"{name}_after{number}", f'("," {members[number]})? {tail}')
        inside = f"({' | '.join(reversed(options))})?" if options else ""
        return f'"{{" {inside} "}}"'

    def free_key(self, taken: Iterable[bytes]) -> str:
        """Any key without escapes but those taken; an escape could spell a taken one in other letters."""
        plain = self.terminal(r'/"[^"\\\x00-\x1f]*"/')
        names = sorted(taken)
        return self.terminal(f"{plain} & ~{self.literals(names)}") if names else plain


def _quote(text: bytes) -> str:
    """A text as a string of the grammar."""
    return json.dumps(text.decode("utf-8"), ensure_ascii=False)


def at_least(bound: Decimal, is_open: bool, before: int, after: int) -> str:
    """Regular expression of the numbers without sign that are not below `bound` (or, open, above it)."""
    whole, fraction = _digits(bound)
    any_fraction = _any_fraction(after)
    options = [
        whole[:place] + _between(int(digit) + 1, 9) + _repeat(len(whole) - place - 1) + any_fraction
        for place, digit in enumerate(whole) if digit != "9"
    ]
    if before > len(whole):
        options.append(f"[1-9][0-9]{{{len(whole)},{before - 1}}}{any_fraction}")
    if after:
        behind = [
            fraction[:place] + _between(int(digit) + 1, 9) + f"[0-9]{{0,{after - place - 1}}}"
            for place, digit in enumerate(fraction) if digit != "9"
        ]
        room = after - len(fraction)
        if not is_open:
            behind += [fraction + (f"[0-9]{{0,{room}}}" if fraction else f"[0-9]{{1,{room}}}")]
        elif room:
            # Something other than zeros must follow.
            behind += [f"{fraction}0{{{zeros}}}[1-9][0-9]{{0,{room - zeros - 1}}}" for zeros in range(room)]
        options += [rf"{whole}\.({'|'.join(behind)})"] if behind else []
    if not is_open and not fraction:
        options.append(whole)
    return "|".join(options)


def at_most(bound: Decimal, is_open: bool, after: int) -> str:
    """Regular expression of the numbers without sign that are not above `bound` (or, open, below it)."""
    whole, fraction = _digits(bound)
    any_fraction = _any_fraction(after)
    options = []
    for place, digit in enumerate(whole):
        lowest = 1 if place == 0 and len(whole) > 1 else 0
        if int(digit) > lowest:
            rest = _repeat(len(whole) - place - 1)
            options.append(whole[:place] + _between(lowest, int(digit) - 1) + rest + any_fraction)
    if len(whole) > 1:
        options.append(rf"(0|[1-9][0-9]{{0,{len(whole) - 2}}}){any_fraction}")
    if after:
        behind = [
            fraction[:place] + _between(0, int(digit) - 1) + f"[0-9]{{0,{after - place - 1}}}"
            for place, digit in enumerate(fraction) if digit != "0"
        ]
        behind += [fraction[:place] for place in range(1, len(fraction))]
        if not is_open:
            room = after - len(fraction)
            behind += [fraction + (f"0{{0,{room}}}" if fraction else f"0{{1,{room}}}")]
        options += [rf"{whole}\.({'|'.join(behind)})"] if behind else []
    if fraction or not is_open:
        options.append(whole)
    return "|".join(options)


def _digits(bound: Decimal) -> tuple[str, str]:
    whole, _, fraction = f"{bound:f}".partition(".")
    return whole, fraction.rstrip("0")


def _any_fraction(after: int) -> str:
    return rf"(\.[0-9]{{1,{after}}})?" if after else ""


def _between(low: int, high: int) -> str:
    return str(low) if low == high else f"[{low}-{high}]"


def _repeat(count: int) -> str:
    return f"[0-9]{{{count}}}" if count else ""
