"""Chat text, written and read in one place: messages to prompt, prompt to ids, reply to content, reasoning, calls.

    parts = render_parts(messages, tools, "kimi-k2.5")        # markers and plain text, kept apart
    ids = encode(tokenizer, parts)                            # text that spells a marker stays text
    parser = StreamParser("kimi-k2.5", prefix=generation_prefix("kimi-k2.5"))
    events = parser.push("The moon")                          # ReasoningDelta("The moon"), ...
    reply = parser.reply                                      # complete after parser.finish()

`messages` checks what clients send, `styles` says how the three styles differ, `render` and `parse` write and read
them, `typescript` and `schema` declare and check tools, `grammar` says what a tool call may look like. Nothing here
knows a tokenizer or a model.
"""

from __future__ import annotations

from moonbase.chat.messages import next_call_index, normalise_messages
from moonbase.chat.parse import (
    ArgumentsDelta,
    ContentDelta,
    Event,
    ReasoningDelta,
    Reply,
    StreamParser,
    ToolCall,
    ToolCallAborted,
    ToolCallEnd,
    ToolCallStart,
    parse,
)
from moonbase.chat.render import Part, encode, encode_with_mask, render, render_parts
from moonbase.chat.styles import STYLES, default_style, generation_prefix

__all__ = [
    "STYLES",
    "ArgumentsDelta",
    "ContentDelta",
    "Event",
    "Part",
    "ReasoningDelta",
    "Reply",
    "StreamParser",
    "ToolCall",
    "ToolCallAborted",
    "ToolCallEnd",
    "ToolCallStart",
    "default_style",
    "encode",
    "encode_with_mask",
    "generation_prefix",
    "next_call_index",
    "normalise_messages",
    "parse",
    "render",
    "render_parts",
]
