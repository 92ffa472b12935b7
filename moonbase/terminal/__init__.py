"""Talking to a model in the terminal: `moonbase chat MODEL`.

`speakers` answer (a model on this machine, or an endpoint elsewhere), `screen` shows what they say and keeps them from
driving the terminal, `session` is the loop between: lines, commands, rounds of tools.
"""

from __future__ import annotations

from moonbase.terminal.session import chat

__all__ = ["chat"]
