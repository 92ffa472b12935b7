"""The tool `shell`: a command line in the sandbox, each in a process of its own."""

from __future__ import annotations

import os

from moonbase.agents.tools.sandbox import QUEUE_SECONDS, Sandbox
from moonbase.agents.tools.tool import ToolContext, ToolResult, Toolset, tool

LONGEST_BYTES = 128 << 10
"""Of one argument of a process, less one (MAX_ARG_STRLEN, execve(2))."""


def shell_tools(sandbox: Sandbox) -> Toolset:
    """The tool `shell`."""
    program = next((path for path in ("/bin/bash", "/usr/bin/bash") if os.path.exists(path)), "/bin/sh")

    @tool(timeout=QUEUE_SECONDS)
    async def shell(command: str, context: ToolContext) -> ToolResult:
        """Run a shell command in the work folder and see what it prints. Files stay; the current folder, variables and
        processes in the background do not. There is no network and no input.

        Args:
            command: The command line; any number of lines.
        """
        try:
            length = len(command.encode())
        except UnicodeEncodeError:
            return ToolResult("Error: the command holds half of a surrogate pair, which no text has.", error=True)
        if "\0" in command:
            return ToolResult("Error: the command holds a NUL, which no command line can.", error=True)
        if length >= LONGEST_BYTES:
            return ToolResult(f"Error: the command has {length:,} bytes; a command line takes {LONGEST_BYTES - 1:,}. "
                              "Write it to a file and run that.", error=True)
        result = await sandbox.run([program, "-c", command], seconds=context.seconds_left)
        return ToolResult(result.text(), error=result.status != 0)

    return Toolset([shell], resources=[sandbox])
