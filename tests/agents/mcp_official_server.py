"""A server made with the official library, for the tests of our client. Started as a program it speaks stdio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.utilities.types import Image
from mcp_types import BlobResourceContents, EmbeddedResource, ResourceLink, TextContent, TextResourceContents

server = MCPServer("official")
finished: list[str] = []


@server.tool()
def add(first: int, second: int = 10) -> int:
    """Add two numbers."""
    return first + second


@server.tool()
def fail(secret: str) -> str:
    """Raise an error."""
    raise ToolError(f"no luck with {secret}")


@server.tool()
def picture() -> list:
    """Give a bit of everything."""
    return [
        "a text", Image(data=b"\x89PNG12345", format="png"),
        ResourceLink(type="resource_link", name="notes", uri="file:///notes.txt", description="what was said"),
        EmbeddedResource(type="resource", resource=TextResourceContents(uri="file:///a.txt", text="inside")),
        EmbeddedResource(type="resource", resource=BlobResourceContents(
            uri="file:///b.pdf", blob="AAAA", mime_type="application/pdf")),
        TextContent(text="the end"),
    ]


@server.tool()
def environment(variable: str) -> str:
    """A variable of this server's environment."""
    return os.environ.get(variable, "not set")


@server.tool()
def processes() -> list[int]:
    """Start another process; its id and that of this one."""
    return [os.getpid(), subprocess.Popen(["sleep", "600"]).pid]


@server.tool()
def die() -> str:
    """End at once."""
    print("first line\nlast words of a server", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
async def sleep(duration: float) -> str:
    """Answer later."""
    try:
        await asyncio.sleep(duration)
    except asyncio.CancelledError:
        finished.append("cancelled")
        raise
    return "slept"


@server.tool()
def history() -> str:
    """What became of `sleep`."""
    return ",".join(finished)


if __name__ == "__main__":
    server.run("stdio")
