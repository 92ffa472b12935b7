"""Tools that a test serves over MCP, and that write down whatever they did.

    python -m moonbase.agents.tools.mcp_server tests.agents.chain_tools:toolset      with NOTES=FILE
"""

from __future__ import annotations

import asyncio
import json
import os

from moonbase.agents.tools.tool import Toolset, tool


def toolset() -> Toolset:
    """`note`, which takes a moment, and `count`."""
    path = os.environ["NOTES"]
    seconds = float(os.environ.get("SECONDS", "0"))

    @tool
    async def note(text: str) -> str:
        """Write something down.

        Args:
            text: What to write down.
        """
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(text) + "\n")
        await asyncio.sleep(seconds)
        return f"noted {text}"

    @tool(inline=True)
    def count() -> int:
        """How many notes there are."""
        with open(path, encoding="utf-8") as file:
            return len(file.readlines())

    return Toolset([note, count])
