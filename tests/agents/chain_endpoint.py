"""An OpenAI-compatible endpoint whose agents know what they do: an orchestrator and its helpers, who note things over
MCP and keep variables in `python`.

    python -m tests.agents.chain_endpoint [--seconds S]

The first line on standard output is the URL.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from tests.agents.scripted_server import Handler, Server

ITEMS = ("heron", "otter", "beaver")


class ChainServer(Server):
    """Its replies depend on nothing but the messages."""

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """The assistant's message."""
        messages, names = body["messages"], {tool["function"]["name"] for tool in body.get("tools") or ()}
        turn = sum(message["role"] == "assistant" for message in messages)
        results = [message["content"] for message in messages if message["role"] == "tool"]
        if "assign_tasks" in names:
            return _orchestrator(turn, results)
        task = next(message["content"] for message in messages if message["role"] == "user")
        return _helper(turn, results, task.rpartition(" ")[2])


def _orchestrator(turn: int, results: list[str]) -> dict[str, Any]:
    turns = [("create_subagent", {"name": "noter", "system_prompt": "You take notes."}),
             ("assign_tasks", {"agent": "noter", "template": "Note the {item}", "items": list(ITEMS)})]
    if turn < len(turns):
        return _call(*turns[turn])
    lines = [json.loads(line) for line in results[1].splitlines()]
    return {"content": "\n".join(f"{line['item']}: {line['result']}" for line in lines)}


def _helper(turn: int, results: list[str], item: str) -> dict[str, Any]:
    """Notes its item, and asks its interpreter for the word that it kept there."""
    remember = f"word = {item!r}"
    turns = [("python", {"code": remember}), ("ours__note", {"text": item}), ("python", {"code": "word"})]
    if turn < len(turns):
        return _call(*turns[turn])
    if "NameError" in results[-1]:
        # Whoever is told that a variable is gone can define it again.
        assert results[-1].startswith("[Nothing from before is defined"), results[-1]
        return _call("python", {"code": f"{remember}; word"})
    return {"content": f"noted {results[-1]}"}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [{"id": "c", "type": "function", "function": {
        "name": name, "arguments": json.dumps(arguments)}}]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=0.0)
    server = ChainServer(("127.0.0.1", 0), Handler)
    server.seconds = parser.parse_args().seconds
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
