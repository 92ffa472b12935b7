"""What an MCP server offers and answers, in the terms of our tools: names, schemas, results."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

LONGEST_NAME = 64
"""Of a tool, in the OpenAI chat API, which takes letters, digits, _ and - alone."""


def tool_names(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A name for every (server, tool), such as the OpenAI chat API takes, no two the same; the same every time."""
    taken: set[str] = set()
    names = []
    for server, tool in pairs:
        whole = f"{server}__{tool}"
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", whole)
        if len(name) > LONGEST_NAME or name in taken:
            mark = hashlib.sha256(f"{server}\0{tool}".encode(errors="surrogatepass")).hexdigest()[:8]
            name = f"{name[: LONGEST_NAME - 9]}_{mark}"
        taken.add(name)
        names.append(name)
    return names


def usable_schema(schema: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(the schema of the arguments, a note for the model).

    As the server gives it, unless it is not valid or refers to something elsewhere, which checking would then fetch;
    then any object.
    """
    import jsonschema

    schema = schema | {"type": "object"}
    try:
        jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
        text = json.dumps(schema)
    except (jsonschema.SchemaError, ValueError, RecursionError, re.error):
        text = None
    if text is not None and "$schema" in schema and not str(schema["$schema"]).startswith(
            ("http://json-schema.org/", "https://json-schema.org/")):
        text = None
    if text is not None and all(_resolves(schema, reference) for reference in _references(schema)):
        return schema, ""
    return {"type": "object"}, "(The server's schema of the arguments is not valid and is left out here.)"


def _references(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(item, str):
                yield item
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _resolves(schema: Any, reference: str) -> bool:
    """Whether a reference is a pointer to something in the schema."""
    if reference != "#" and not reference.startswith("#/"):
        return False
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and part.isdigit() and int(part) < len(schema):
            schema = schema[int(part)]
        elif isinstance(schema, dict) and part in schema:
            schema = schema[part]
        else:
            return False
    return True


def content_text(result: Any) -> str:
    """A result as text: texts as they are, everything else as a line that describes it."""
    lines = [_block_text(block) for block in result.content]
    if not lines and result.structured_content is not None:
        lines = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(lines) or "[the answer is empty]"


def _block_text(block: Any) -> str:
    if block.type == "text":
        return block.text
    if block.type in ("image", "audio"):
        return f"[{block.type}, {block.mime_type}, {_num_bytes(block.data):,} bytes: not shown]"
    if block.type == "resource_link":
        return f"[resource {block.name} <{block.uri}>{f': {block.description}' if block.description else ''}]"
    resource = block.resource
    if hasattr(resource, "text"):
        return f"[resource <{resource.uri}>]\n{resource.text}"
    kind = resource.mime_type or "binary"
    return f"[resource <{resource.uri}>, {kind}, {_num_bytes(resource.blob):,} bytes: not shown]"


def _num_bytes(encoded: str) -> int:
    try:
        return len(base64.b64decode(encoded))
    except ValueError:
        return len(encoded)
