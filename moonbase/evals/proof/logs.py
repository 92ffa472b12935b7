"""Records against the logs that they were collected from, where a bundle holds them."""

from __future__ import annotations

import itertools
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.proof import chain
from moonbase.evals.proof.canonical import BundleError, clean, portable
from moonbase.evals.records import Record, read_records
from moonbase.evals.suite import Suite

LARGEST_MEMBER = 64 * 2**20
"""Bytes of one logged sample, which is read whole."""
LARGEST_LOGS = 64 * 2**30
"""Bytes of all that the logs unpack to."""
MOST_TIMES = 500
"""A log, unpacked, is so many times as large at most, where that is more than one sample may have."""
MOST_MEMBERS = 1_000_000


def check_logs(bundle: Path, suite: Suite, plan: dict[str, Any], records: str) -> tuple[int, list[str]]:
    """Collect the records again from Inspect's logs; how many were the same, and where they differ.

    Raises ImportError where Inspect is not installed, BundleError where a log is none.
    """
    import inspect_ai.log  # noqa: F401

    from moonbase.evals.collect import collect

    if sum(_unpacked(path) for path in sorted((bundle / "logs").glob("*.eval"))) > LARGEST_LOGS:
        raise BundleError(f"logs: unpack to more than {LARGEST_LOGS} bytes")
    models, price = plan.get("models"), plan.get("price")
    same, problems = 0, []
    with tempfile.TemporaryDirectory(prefix="moonbase-verify-") as place:
        folder = Path(place)
        try:
            collect(suite, list(models or []), bundle / "logs", folder, price or {})
        except UserError as error:
            raise BundleError(str(error).replace(f"{bundle}/", "")) from None
        again = (Record.model_validate(portable(record.canonical())).canonical()
                 for record in read_records(folder / records))
        for stated, found in itertools.zip_longest(chain.read_links(bundle, records, ""), again):
            if stated is None or found is None:
                problems.append(f"{records}: has {'fewer' if stated is None else 'more'} records than the logs")
                break
            names = [name for name in found if stated.record.get(name) != found[name]]
            same += not names
            if names and len(problems) < 100:
                problems.append(f"{records}, line {stated.number}: the logs have another {', '.join(names)}")
    return same, problems


def _unpacked(path: Path) -> int:
    """Bytes that a log unpacks to: a zip file. Raises BundleError where a member would not fit the memory."""
    try:
        with zipfile.ZipFile(path) as log:
            members = log.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleError(f"logs/{path.name}: not a log of Inspect ({clean(error, 80)})") from None
    if len(members) > MOST_MEMBERS or any(member.file_size > LARGEST_MEMBER for member in members):
        raise BundleError(f"logs/{path.name}: unpacks to more than {LARGEST_MEMBER} bytes in one place")
    total = sum(member.file_size for member in members)
    if total > max(LARGEST_MEMBER, MOST_TIMES * path.stat().st_size):
        raise BundleError(f"logs/{path.name}: unpacks to {total} bytes, more than {MOST_TIMES} times its size")
    return total
