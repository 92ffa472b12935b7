"""Whether a schema comes to an end: its references somewhere, its values after finitely many letters.

What does grows from the leaves up, until nothing is added.
"""

from __future__ import annotations

from typing import Any

from moonbase.chat.schema_walk import COMBINERS, resolve

Places = list[tuple[dict[str, Any], str]]
"""Every schema below a root, outermost first, with its place."""


def endless_reference(root: dict[str, Any], everything: Places) -> str | None:
    """The place of a schema whose references and combiners lead back to itself and to no plain schema."""
    targets = {}
    for schema, _ in everything:
        combiner = next((name for name in COMBINERS if name in schema), None)
        found = [] if combiner is None else [resolve(root, schema["$ref"])] if combiner == "$ref" else schema[combiner]
        targets[id(schema)] = [id(target) for target in found]
    grounded = _grow({key: ("all", found) for key, found in targets.items()})
    return next((place for schema, place in everything if id(schema) not in grounded), None)


def ends(root: dict[str, Any], everything: Places) -> bool:
    """Whether some value can be finished; an array counts as having an item, as Moonshot's rules have it."""
    return id(root) in _grow({id(schema): _wanted(root, schema) for schema, _ in everything})


def _wanted(root: dict[str, Any], schema: dict[str, Any]) -> tuple[str, list[int]]:
    """What must end, all of it or any, for a schema to end."""
    if "$ref" in schema:
        return "all", [id(resolve(root, schema["$ref"]))]
    for combiner in COMBINERS[1:]:
        if combiner in schema:
            return "any", [id(option) for option in schema[combiner]]
    if "enum" in schema or "const" in schema or (isinstance(schema.get("type"), list) and len(schema["type"]) > 1):
        return "all", []
    wanted = [schema["properties"][name] for name in schema.get("required", [])]
    prefix = schema.get("prefixItems", [])
    wanted += prefix[: int(schema.get("minItems", 0))]
    wanted += [schema["items"]] if "items" in schema and not prefix else []
    return "all", [id(inner) for inner in wanted]


def _grow(wanted: dict[int, tuple[str, list[int]]]) -> set[int]:
    """The schemas that end, each looked at again only when something that it waits for does."""
    waiting: dict[int, list[int]] = {}
    missing: dict[int, int] = {}
    for key, (rule, parts) in wanted.items():
        different = set(parts)
        missing[key] = min(1, len(different)) if rule == "any" else len(different)
        for part in different:
            waiting.setdefault(part, []).append(key)
    work = [key for key, count in missing.items() if not count]
    found: set[int] = set()
    while work:
        key = work.pop()
        if key in found:
            continue
        found.add(key)
        for above in waiting.get(key, []):
            missing[above] -= 1
            if missing[above] <= 0:
                work.append(above)
    return found
