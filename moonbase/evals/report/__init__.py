"""The report of an evaluation: one HTML file in English and one in Chinese, and a table beside them.

`read` reads what the evaluation left, `sorting` finds the figures that belong together, `drawings` draws them,
`conclusions` says what they do not show, `page` writes the page and `table` the CSV. No number is computed here: each
is a figure of `results.json`, printed as it stands there. The names below are found on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moonbase.evals.report.page import render_report, write_report, write_reports
    from moonbase.evals.report.table import render_table, write_table

__all__ = ["render_report", "render_table", "write_report", "write_reports", "write_table"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "table" if name.endswith("table") else "page"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
