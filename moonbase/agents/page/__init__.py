"""The trace as one page: a single HTML file that loads nothing, for a browser without a network.

The page's parts lie beside this file and are put together as they are; the episodes are embedded as JSON, which the
scripts turn into elements and text nodes, never into markup. A content security policy lets only these scripts run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moonbase.agents.trace import Episode
from moonbase.errors import UserError
from moonbase.files import write_text

_HERE = Path(__file__).parent
_SCRIPTS = ("dom.js", "markdown.js", "content.js", "episode.js", "chart.js", "transcript.js", "table.js", "app.js")

# What a reader of words has no use for stays in the trace.
_LEFT_OUT = {"agents": {"__all__": {"calls": {"__all__": {"prompt_ids", "token_ids", "logprobs", "sampled"}}}}}


def write_page(episodes: Iterable[Episode], path: str | Path) -> Path:
    """Write the page of some episodes under `path`, whole or not at all, and return the path.

    Raises UserError where there is no episode or the file cannot be written.
    """
    path = Path(path)
    write_text(path, render_page(episodes))
    return path


def render_page(episodes: Iterable[Episode]) -> str:
    """The whole page as text; the same episodes give the same bytes."""
    summaries, blocks = [], []
    for number, episode in enumerate(episodes):
        summaries.append(_summary(episode))
        blocks.append(_block(f"episode-{number}", episode.model_dump_json(exclude=_LEFT_OUT)))
    if not blocks:
        raise UserError("there is no episode to show")
    style = _part("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_part(name) for name in _SCRIPTS) + "})();\n"
    parts = {
        "POLICY": f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
                  "base-uri 'none'; form-action 'none'",
        "STYLE": style, "SCRIPT": script, "EPISODES": "\n".join([_block("episodes", json.dumps(summaries)), *blocks]),
    }  # fmt: skip
    # Cut at the marks first: what is put in is not searched for marks.
    pieces = _part("page.html").split("%%")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def _part(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _block(name: str, text: str) -> str:
    """JSON inside HTML: no `<`, so that nothing in it can end the element or begin another."""
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _digest(content: str) -> str:
    """How a content security policy names one exact text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _summary(episode: Episode) -> dict[str, Any]:
    """What the picker says of an episode before it is opened."""
    return {"id": episode.id, "task": episode.task[:200], "status": episode.status, "seconds": episode.seconds,
            "agents": len(episode.agents), "rewards": episode.rewards}
