"""Self-contained run reports: one HTML file from what a run folder holds, readable on a phone, on paper and offline.

`run_folder` reads, `series` thins curves, `figures` and `svg` draw, `words` writes numbers, `page` puts it together;
`machine` collects the facts about this computer that a run records. The names below are found on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moonbase.report.machine import git_commit, machine_facts, package_versions
    from moonbase.report.page import write_report

__all__ = ["git_commit", "machine_facts", "package_versions", "write_report"]
_HOMES = {"git_commit": "machine", "machine_facts": "machine", "package_versions": "machine", "write_report": "page"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
