"""The tables of docs/traces.md, from the models: `python -m tests.agents.trace_documentation` writes them anew."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from moonbase.agents import trace

PAGE = Path(__file__).resolve().parents[2] / "docs" / "traces.md"
RECORDS = ("Episode", "AgentRecord", "ModelCall", "ToolCall", "CriticalRecord", "SpentRecord", "LimitsRecord",
           "BudgetRecord", "UsageRecord", "CallError")


def tables() -> dict[str, str]:
    """Name of a record -> its table: field, type, what it means."""
    found = {}
    for node in ast.parse(Path(trace.__file__).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name not in RECORDS:
            continue
        fields = getattr(trace, node.name).model_fields
        lines = ["| field | type | meaning |", "|---|---|---|"]
        for at, item in enumerate(node.body):
            if isinstance(item, ast.AnnAssign) and item.target.id in fields:
                meaning = ast.literal_eval(node.body[at + 1].value)
                kind = ast.unparse(item.annotation).replace("|", "\\|")
                need = "" if fields[item.target.id].is_required() else ", optional"
                lines.append(f"| `{item.target.id}` | `{kind}`{need} | {' '.join(meaning.split())} |")
        assert len(lines) - 2 == len(fields), node.name
        found[node.name] = "\n".join(lines)
    return found


def shown(text: str) -> dict[str, str]:
    """The tables that stand in a page, under the headings with the records' names."""
    return dict(re.findall(r"^### `(\w+)`\n\n((?:\|.*\n)+)", text, re.M))


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        head, tail = re.split(rf"(?<=^### `{name}`\n)(?:\|.*\n|\n)*", text, maxsplit=1, flags=re.M)
        text = f"{head}\n{table}\n\n{tail}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
