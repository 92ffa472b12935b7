"""A server over stdio in bare JSON, for what no library would do: `mcp_raw_server.py BEHAVIOUR`."""

from __future__ import annotations

import json
import os
import sys
import time

behaviour = sys.argv[1]
OBJECT = {"type": "object"}
TOOLS = {
    "lying": [
        {"name": "odd name/with.dots ✓", "inputSchema": OBJECT},
        {"name": "x" * 100, "inputSchema": OBJECT},
        {"name": "not_valid", "inputSchema": {"type": "object", "properties": {"a": {"type": "objekt"}}}},
        {"name": "far", "inputSchema": {"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1:9/schema"}}}},
        {"name": "lost", "inputSchema": {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}},
        {"name": "near", "inputSchema": {"type": "object", "properties": {"a": {"$ref": "#/$defs/n"}},
                                         "$defs": {"n": {"type": "integer"}}}},
        {"name": "near", "inputSchema": OBJECT, "description": "the same name again"},
        {"name": "wrong_shape", "inputSchema": OBJECT},
        {"name": "promise", "inputSchema": OBJECT, "outputSchema": {
            "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
        {"name": "protocol_error", "inputSchema": OBJECT},
        {"name": "echo", "inputSchema": OBJECT},
        {"name": "flood", "inputSchema": OBJECT},
    ],
}


def say(message: dict) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def result_of(name: str) -> dict:
    if name == "wrong_shape":
        return {"content": "this should be a list"}
    if name == "promise":
        return {"content": [], "structuredContent": {"n": "no number"}}
    if name == "flood":
        print("no JSON\n" * 5000, flush=True)
        time.sleep(600)
    return {"content": [{"type": "text", "text": f"{name} of {os.getpid()}"}]}


def answer(request: dict) -> dict:
    method = request["method"]
    if method == "initialize":
        if behaviour == "modern":
            return {"error": {"code": -32022, "message": "Unsupported protocol version",
                              "data": {"supported": ["2026-07-28"], "requested": "2025-11-25"}}}
        return {"result": {"protocolVersion": request["params"]["protocolVersion"], "capabilities": {"tools": {}},
                           "serverInfo": {"name": behaviour, "version": "1"}}}
    if method == "server/discover" and behaviour == "modern":
        return {"result": {"supportedVersions": ["2026-07-28"], "capabilities": {"tools": {}}, "resultType": "complete",
                           "ttlMs": 0, "cacheScope": "public"}}
    if method == "tools/list":
        if behaviour == "endless":
            return {"result": {"tools": [], "nextCursor": "again"}}
        tools = TOOLS.get(behaviour, [{"name": "echo", "inputSchema": OBJECT}])
        return {"result": {"tools": tools, "resultType": "complete", "ttlMs": 0, "cacheScope": "public"}}
    if method == "tools/call":
        if request["params"]["name"] == "protocol_error":
            return {"error": {"code": -32000, "message": "refused by hidden-value-1"}}
        return {"result": result_of(request["params"]["name"]) | {"resultType": "complete"}}
    return {"error": {"code": -32601, "message": f"no method {method}"}}


if behaviour == "exits":
    print("some trace\ncannot open the database with hidden-value-1\n", file=sys.stderr)
    sys.exit(7)
if behaviour == "silent":
    time.sleep(600)
if behaviour == "meets":
    open(os.path.join(os.environ["PLACE"], str(os.getpid())), "w").close()
    while len(os.listdir(os.environ["PLACE"])) < 4:
        time.sleep(0.02)
if behaviour == "lying":
    print("Welcome to the server!\n\n{\"half\": \n\xff\xfe[]", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request:
        continue
    if behaviour == "lying":
        say({"id": 987654, "result": {}})
        say({"id": "x", "method": "sampling/createMessage", "params": {}})
        print("DEBUG: got", request.get("method"), flush=True)
    if "method" not in request:
        continue
    if behaviour == "stuck" and request["method"] == "tools/call":
        time.sleep(600)
    if behaviour == "dies_in_calls" and request["method"] == "tools/call":
        os._exit(1)
    say({"id": request["id"], **answer(request)})
    if behaviour == "dies_after_calls" and request["method"] == "tools/call":
        os._exit(1)
