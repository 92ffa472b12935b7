"""Requests to a random interface of functions; the calls are carried out and the end is compared.

Models get the functions as tools of their own (`tasks/fresh_task.py`), or, in the form `text`, as JSON Schema in the
question, and write the calls as JSON. Both forms ask the same question and are graded alike: any calls that lead to the
wanted state are right, in any order that leads there. Solver A writes the calls and carries them out; solver B changes
the stock by arithmetic alone.
"""

from __future__ import annotations

import json
from typing import Any

from moonbase.evals.fresh.answers import read_json
from moonbase.evals.fresh.problem import Draw

Spec = dict[str, Any]
State = dict[str, dict[str, Any]]
CALLS = (1, 2, 3, 5, 8)
FUNCTIONS = (4, 5, 6, 8, 8)
MOST_CALLS = 64
"""Of an answer, carried out or refused."""
LONGEST_WORD = 60
"""Characters of an argument that is a text."""
_THINGS = (("crate", "板条箱"), ("barrel", "木桶"), ("pallet", "托盘"), ("vial", "药瓶"), ("reel", "卷盘"),
           ("panel", "面板"))
_PLACES = (("bay", "库位"), ("shelf", "货架"), ("dock", "码头"), ("room", "房间"))
_LEVELS = (("low", "低"), ("normal", "普通"), ("high", "高"))
_VERBS = {"move": ("move", "relocate", "transfer"), "adjust": ("adjust", "change_count", "shift_count"),
          "rank": ("set_priority", "rank", "mark"), "discard": ("discard", "remove", "scrap"),
          "merge": ("merge", "combine", "fold"),
          "split": ("split", "divide", "portion"), "reserve": ("reserve", "hold", "claim"),
          "release": ("release", "unhold", "free")}


def make(draw: Draw, difficulty: int) -> Spec:
    thing, place = draw.randrange(len(_THINGS)), draw.randrange(len(_PLACES))
    count = 4 + 2 * difficulty
    names = [f"{_THINGS[thing][0][0].upper()}{number}" for number in draw.sample(range(100, 1000), count)]
    places = [f"{_PLACES[place][0][0].upper()}{number}" for number in draw.sample(range(1, 60), 5)]
    state = {name: {"place": draw.choice(places), "count": 2 * draw.randint(5, 400),
                    "priority": draw.choice(_LEVELS)[0],
                    "held": draw.random() < 0.5} for name in names}
    # Of the functions some are not needed; each interface has its own words for the same acts.
    acts = draw.sample(tuple(_VERBS), FUNCTIONS[difficulty - 1])
    words = {act: f"{draw.choice(_VERBS[act])}_{_THINGS[thing][0]}" for act in acts}
    keys = {"id": draw.choice(("id", "item", "code", f"{_THINGS[thing][0]}_id")),
            "amount": draw.choice(("amount", "by", "delta")),
            "to": draw.choice(("to", "target", "destination")), "level": draw.choice(("level", "priority", "rank"))}
    wishes: list[dict[str, Any]] = []
    free = list(names)
    draw.shuffle(free)
    current = {name: dict(values) for name, values in state.items()}
    while len(wishes) < CALLS[difficulty - 1]:
        act = draw.choice(acts)
        name, other = free[0], free[1]
        wish: dict[str, Any] = {"act": act, "id": name}
        values = current[name]
        if act == "move":
            wish["to"] = draw.choice([one for one in places if one != values["place"]])
        elif act == "adjust":
            # Asked for as the new count, half of it or a change; the call takes the change.
            wish["how"] = draw.choice(("by", "to", "half") if difficulty > 1 else ("by",))
            wish["number"] = draw.randint(2, 90) if wish["how"] != "to" else values["count"] + draw.randint(3, 80)
        elif act == "rank":
            wish["level"] = draw.choice([one[0] for one in _LEVELS if one[0] != values["priority"]])
        elif act == "merge":
            wish["to"] = other
        elif act == "split":
            wish |= {"to": f"{_THINGS[thing][0][0].upper()}{1000 + len(wishes)}",
                     "number": draw.randint(1, values["count"] - 1)}
        elif act in ("reserve", "release") and values["held"] == (act == "reserve"):
            free.append(free.pop(0))
            continue
        wishes.append(wish)
        free = free[2 if act == "merge" else 1 :]
    return {"kind": f"{len(wishes)}-calls", "difficulty": difficulty, "thing": thing, "place": place, "places": places,
            "state": state, "functions": words, "keys": keys, "wishes": wishes}


def schemas(spec: Spec, language: str = "en") -> list[dict[str, Any]]:
    """Of the interface, as JSON Schema; names are English, descriptions in the language."""
    keys, zh = spec["keys"], language == "zh"
    thing, place = _THINGS[spec["thing"]][zh], _PLACES[spec["place"]][zh]
    def text(en: str, chinese: str) -> dict[str, Any]:
        return {"type": "string", "description": chinese if zh else en}

    def integer(en: str, chinese: str) -> dict[str, Any]:
        return {"type": "integer", "description": chinese if zh else en}

    one = text(f"number of the {thing}", f"{thing}编号")
    takes = {
        "move": {keys["to"]: {**text(f"number of the {place}", f"{place}编号"), "enum": sorted(spec["places"])}},
        "adjust": {keys["amount"]: integer("change of the count; negative: fewer", "数量的变化值；减少时为负数")},
        "rank": {keys["level"]: {**text("the new priority", "新的优先级"), "enum": [level[0] for level in _LEVELS]}},
        "merge": {keys["to"]: text(f"number of the {thing} that takes all", f"并入的目标{thing}的编号")},
        "split": {keys["to"]: text(f"number of the new {thing}", f"新{thing}的编号"),
                  keys["amount"]: {**integer("how many go into it", "放入新编号的数量"), "minimum": 1}},
    }
    does = {
        "move": (f"Bring a {thing} to another {place}.", f"把{thing}移到另一个{place}。"),
        "adjust": (f"Change the count of a {thing}.", f"调整{thing}的数量。"),
        "rank": (f"Set the priority of a {thing}.", f"设置{thing}的优先级。"),
        "discard": (f"Throw a {thing} away.", f"丢弃{thing}。"),
        "merge": (f"Put everything of a {thing} into another one; the first is gone.",
                  f"把一个{thing}的全部内容并入另一个，原来的{thing}随之消失。"),
        "split": (f"Put a part of a {thing} into a new one in the same {place}.",
                  f"把一个{thing}的一部分放入同一{place}的新{thing}。"),
        "reserve": (f"Reserve a {thing}.", f"预留{thing}。"),
        "release": (f"End the reservation of a {thing}.", f"取消{thing}的预留。"),
    }
    return [{"name": name, "description": does[act][zh], "parameters": {
        "type": "object", "properties": {keys["id"]: one} | takes.get(act, {}),
        "required": [keys["id"], *takes.get(act, {})], "additionalProperties": False}}
        for act, name in sorted(spec["functions"].items(), key=lambda item: item[1])]


def render(spec: Spec, language: str) -> str:
    """The request; what the functions are, the tools tell, or `in_text`."""
    zh = language == "zh"
    thing, place = _THINGS[spec["thing"]][zh], _PLACES[spec["place"]][zh]
    levels = dict(_LEVELS)
    if zh:
        stock = "\n".join(
            f"- {name}：{place} {one['place']}，数量 {one['count']}，"
            f"优先级{levels[one['priority']]}（{one['priority']}），{'已预留' if one['held'] else '未预留'}"
            for name, one in spec["state"].items())
        wishes = "\n".join(f"{number}. {_wish_zh(wish, thing, place)}" for number, wish in enumerate(spec["wishes"], 1))
        return f"各{thing}的现状：\n{stock}\n\n请用所给的函数完成以下事项：\n{wishes}"
    stock = "\n".join(f"- {name}: {place} {one['place']}, count {one['count']}, priority {one['priority']}, "
                      f"{'reserved' if one['held'] else 'not reserved'}" for name, one in spec["state"].items())
    wishes = "\n".join(f"{number}. {_wish_en(wish, thing, place)}" for number, wish in enumerate(spec["wishes"], 1))
    return f"The {thing}s as they are:\n{stock}\n\nPlease do the following with the functions you are given:\n{wishes}"


def in_text(spec: Spec, language: str) -> str:
    """What stands behind the request where the model has no tools of its own: the functions, and how to answer."""
    functions = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas(spec, language))
    if language == "zh":
        return (f"\n\n可用函数（JSON Schema）：\n{functions}\n\n"
                '请只用一个 JSON 列表回答，依次列出要调用的函数：[{"name": "…", "arguments": {…}}, …]')
    return (f"\n\nThe functions (JSON Schema):\n{functions}\n\n"
            'Answer with one JSON list of the calls to make: [{"name": "…", "arguments": {…}}, …]')


def _wish_en(wish: dict[str, Any], thing: str, place: str) -> str:
    act, name, number, to = wish["act"], wish["id"], wish.get("number"), wish.get("to")
    if act == "adjust":
        return {"by": f"{number} more have arrived for {thing} {name}.",
                "to": f"{thing.capitalize()} {name} should have a count of {number}.",
                "half": f"Half of what {thing} {name} held is gone; correct its count."}[wish["how"]]
    return {"move": f"Bring {thing} {name} to {place} {to}.",
            "rank": f"Make the priority of {thing} {name} {wish.get('level')}.",
            "discard": f"Throw {thing} {name} away.", "merge": f"Put everything of {thing} {name} into {thing} {to}.",
            "split": f"Take {number} out of {thing} {name} into a new {thing} {to}.",
            "reserve": f"Reserve {thing} {name}.",
            "release": f"{thing.capitalize()} {name} need not be reserved any longer."}[act]


def _wish_zh(wish: dict[str, Any], thing: str, place: str) -> str:
    act, name, number, to = wish["act"], wish["id"], wish.get("number"), wish.get("to")
    if act == "adjust":
        return {"by": f"{thing} {name} 新到了 {number} 件。", "to": f"{thing} {name} 的数量应为 {number}。",
                "half": f"{thing} {name} 的数量少了一半，请更正。"}[wish["how"]]
    return {"move": f"把{thing} {name} 移到{place} {to}。",
            "rank": f"把{thing} {name} 的优先级设为{dict(_LEVELS).get(wish.get('level'), '')}。",
            "discard": f"丢弃{thing} {name}。", "merge": f"把{thing} {name} 的全部内容并入{thing} {to}。",
            "split": f"从{thing} {name} 中取出 {number} 件放入新的{thing} {to}。", "reserve": f"预留{thing} {name}。",
            "release": f"{thing} {name} 不再需要预留。"}[act]


def calls_of(spec: Spec) -> list[dict[str, Any]]:
    """Calls that do what is wished, one a wish."""
    keys, calls = spec["keys"], []
    for wish in spec["wishes"]:
        arguments: dict[str, Any] = {keys["id"]: wish["id"]}
        count = spec["state"][wish["id"]]["count"]
        if wish["act"] == "adjust":
            arguments[keys["amount"]] = {"by": wish["number"], "to": wish["number"] - count,
                                         "half": -count // 2}[wish["how"]]
        if wish["act"] == "split":
            arguments[keys["amount"]] = wish["number"]
        if "to" in wish:
            arguments[keys["to"]] = wish["to"]
        if "level" in wish:
            arguments[keys["level"]] = wish["level"]
        calls.append({"name": spec["functions"][wish["act"]], "arguments": arguments})
    return calls


class Desk:
    """The things of an item while calls are carried out, one after the other."""

    def __init__(self, spec: Spec) -> None:
        self.state: State = {name: dict(values) for name, values in spec["state"].items()}
        self.done: list[dict[str, Any]] = []
        """The calls that were carried out."""
        self._keys = spec["keys"]
        self._act_of = {name: act for act, name in spec["functions"].items()}
        self._parameters_of = {schema["name"]: schema["parameters"] for schema in schemas(spec)}

    def call(self, name: Any, arguments: Any) -> dict[str, Any]:
        """What has changed, by name; None for a thing that is gone. Raises ValueError for a call that the interface
        does not take, and changes nothing then."""
        if name not in self._act_of:
            raise ValueError(f"no function {str(name)[:40]!r}")
        _check(self._parameters_of[name], arguments)
        before = {one: dict(values) for one, values in self.state.items()}
        _apply(self.state, self._act_of[name], self._keys, arguments)
        self.done.append({"name": name, "arguments": dict(arguments)})
        return {one: self.state.get(one) for one in before.keys() | self.state.keys()
                if before.get(one) != self.state.get(one)}


def carry_out(spec: Spec, calls: Any) -> State:
    """The state after the calls. Raises ValueError for a call that the interface does not take."""
    desk = Desk(spec)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or len(calls) > MOST_CALLS:
        raise ValueError(f"not a list of at most {MOST_CALLS} calls")
    for number, call in enumerate(calls):
        try:
            desk.call(*_name_and_arguments(call))
        except ValueError as error:
            raise ValueError(f"call {number}: {error}") from None
    return desk.state


def _name_and_arguments(call: Any) -> tuple[Any, Any]:
    """{"name", "arguments"}, with arguments as an object or as its text, or OpenAI's {"function": {…}}."""
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict):
        raise ValueError("a call is not an object")
    arguments = call.get("arguments", call.get("parameters", {}))
    return (call.get("name") if isinstance(call.get("name"), str) else None,
            json.loads(arguments) if isinstance(arguments, str) else arguments)


def _check(schema: dict[str, Any], arguments: Any) -> None:
    if not isinstance(arguments, dict) or set(arguments) != set(schema["required"]):
        raise ValueError(f"takes {', '.join(schema['required'])}")
    for key, value in arguments.items():
        rule = schema["properties"][key]
        fits = (isinstance(value, str) and len(value) <= LONGEST_WORD if rule["type"] == "string"
                else type(value) is int and abs(value) < 10**9)
        if not fits or value not in rule.get("enum", (value,)) or (rule["type"] == "integer"
                                                                   and value < rule.get("minimum", value)):
            raise ValueError(f"{key} = {str(value)[:40]!r} is not taken")


def _apply(state: State, act: str, keys: dict[str, str], arguments: dict[str, Any]) -> None:
    name = arguments[keys["id"]]
    to, amount = arguments.get(keys["to"]), arguments.get(keys["amount"])
    if name not in state:
        raise ValueError(f"there is no {name[:40]!r}")
    one = state[name]
    if act == "move":
        one["place"] = to
    elif act == "adjust":
        one["count"] += amount
    elif act == "rank":
        one["priority"] = arguments[keys["level"]]
    elif act == "discard":
        del state[name]
    elif act == "merge":
        if to not in state or to == name:
            raise ValueError(f"there is no other {to[:40]!r}")
        state[to]["count"] += state.pop(name)["count"]
    elif act == "split":
        if to in state or amount > one["count"]:
            raise ValueError(f"{to[:40]!r} exists, or too much is taken")
        one["count"] -= amount
        state[to] = {"place": one["place"], "count": amount, "priority": "normal", "held": False}
    else:
        one["held"] = act == "reserve"


def solve_a(spec: Spec, language: str) -> State:
    return carry_out(spec, calls_of(spec))


def solve_b(spec: Spec, language: str) -> State:
    """Column by column: who is there, how many, where, of what priority, reserved or not."""
    before, wishes = spec["state"], spec["wishes"]
    gone = {wish["id"] for wish in wishes if wish["act"] in ("discard", "merge")}
    born = {wish["to"]: wish for wish in wishes if wish["act"] == "split"}
    flows: dict[str, int] = {}
    for wish in wishes:
        name, act = wish["id"], wish["act"]
        if act == "merge":
            flows[wish["to"]] = flows.get(wish["to"], 0) + before[name]["count"]
        if act == "split":
            flows[name] = flows.get(name, 0) - wish["number"]
        if act == "adjust":
            change = {"by": wish["number"], "to": wish["number"] - before[name]["count"],
                      "half": -before[name]["count"] // 2}
            flows[name] = flows.get(name, 0) + change[wish["how"]]
    place = {wish["id"]: wish["to"] for wish in wishes if wish["act"] == "move"}
    level = {wish["id"]: wish["level"] for wish in wishes if wish["act"] == "rank"}
    held = {wish["id"]: wish["act"] == "reserve" for wish in wishes if wish["act"] in ("reserve", "release")}
    after = {name: {"place": place.get(name, one["place"]), "count": one["count"] + flows.get(name, 0),
                    "priority": level.get(name, one["priority"]), "held": held.get(name, one["held"])}
             for name, one in before.items() if name not in gone}
    return after | {name: {"place": before[wish["id"]]["place"], "count": wish["number"], "priority": "normal",
                           "held": False} for name, wish in born.items()}


def verify(spec: Spec, language: str, target: State, text: str) -> tuple[float, str]:
    calls = read_json(text)
    if calls is None:
        return 0.0, "no JSON list of calls"
    try:
        state = carry_out(spec, calls)
    except ValueError as error:
        return 0.0, str(error)
    if state == target:
        return 1.0, ""
    wrong = sorted(name for name in state.keys() | target.keys() if state.get(name) != target.get(name))
    return 0.0, f"the end differs at {', '.join(wrong)[:120]}"


def effort(spec: Spec) -> int:
    return 2 * len(spec["wishes"]) + len(spec["functions"]) // 2 + sum("how" in wish for wish in spec["wishes"])
