"""The circumstances of an evaluation: what was asked, by which code, of which weights, on which machine, at what price.

What follows from the other files of the bundle (hypotheses, items, decoding, weights) `verify` derives again. The rest
(machine, packages, commit) is the publisher's word, bound by the signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from moonbase.errors import UserError
from moonbase.evals.proof.canonical import clean, digest_json, portable
from moonbase.evals.proof.survey import Survey

SCHEMA = "moonbase.manifest/1"
_ROOM = Path(__file__).resolve().parents[1]
CODE = {
    "figures": ("figures.py", "comparison.py", "fine_tuning.py", "statistics"),
    "generators": ("fresh",),
    "judge_prompts": ("refusal/judges.py",),
    "reports": ("report", "../report"),
    "scorers": ("refusal", "tasks"),
}
"""What the digests under `code` cover, in the folder moonbase/evals."""
DRAWN_WITH = ("matplotlib", "numpy", "jinja2", "markupsafe")
"""What report pages are made with, besides our own code."""


def code_digests() -> dict[str, str]:
    """One digest per kind of code: over the names and bytes of its files, sorted by name."""
    return {kind: _tree_digest(places) for kind, places in CODE.items()}


def _tree_digest(places: tuple[str, ...]) -> str:
    total = hashlib.sha256()
    found = {file.resolve().relative_to(_ROOM.parent).as_posix(): file for file in _files(places)}
    for name, path in sorted(found.items()):
        total.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n".encode())
    return "sha256:" + total.hexdigest()


def _files(places: tuple[str, ...]) -> Iterator[Path]:
    for place in places:
        path = _ROOM / place
        found = path.rglob("*") if path.is_dir() else [path]
        yield from (file for file in found if file.is_file() and file.suffix != ".pyc")


def lock() -> dict[str, Any]:
    """The pinned set (constraints.txt of a checkout, else None) and what is installed in fact."""
    constraints = _ROOM.parents[1] / "constraints.txt"
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()
                 if dist.metadata["Name"]}
    return {"constraints": "sha256:" + hashlib.sha256(constraints.read_bytes()).hexdigest()
            if constraints.is_file() else None, "installed": dict(sorted(installed.items()))}


def suite_part(suite_json: dict[str, Any], name: str) -> Any:
    """A field of the suite in suite.json, which holds the suite under `suite` beside its models and seed."""
    inner = suite_json.get("suite")
    return inner.get(name) if isinstance(inner, dict) else suite_json.get(name)


def derived(suite_json: dict[str, Any], survey: Survey) -> dict[str, Any]:
    """The part of a manifest that follows from the suite and the records."""
    hypotheses = suite_part(suite_json, "hypotheses") or []
    return portable({
        "suite": {"name": suite_part(suite_json, "name"), "digest": digest_json(portable(suite_json))},
        "hypotheses": hypotheses,
        "seed": suite_json.get("seed"),
        "prices": suite_json.get("price") or {},
        "withheld": bool(suite_part(suite_json, "withhold")),
        **survey.facts(),
    })


def build(suite_json: dict[str, Any], survey: Survey, *, publish: bool, missing: dict[str, Any]) -> dict[str, Any]:
    """The manifest; `missing`: what `complete` knows to be missing.

    Raises UserError where `publish` is asked for and the code is not a commit anyone can fetch.
    """
    from moonbase.report import git_commit, machine_facts

    commit = git_commit()
    dirty = commit is not None and commit.endswith("-dirty")
    if publish and (commit is None or dirty):
        problem = "the checkout has changes that are in no commit" if dirty else "this is not a checkout of a commit"
        raise UserError(f"not fit for publication: {problem}; commit them and seal again, or seal without publishing")
    return {
        "schema": SCHEMA, "publish": publish,
        "commit": commit.removesuffix("-dirty") if commit else None, "dirty": dirty,
        "code": code_digests(), "lock": lock(), "machine": portable(machine_facts()),
        **derived(suite_json, survey),
        **({"missing": missing} if missing else {}),
    }


def same_writer(stated: dict[str, Any]) -> bool:
    """Whether the reports of a bundle were written by this code and these libraries, so that they must be the same."""
    installed, here = (stated.get("lock") or {}).get("installed") or {}, lock()["installed"]
    return (stated.get("code") or {}).get("reports") == code_digests()["reports"] \
        and all(installed.get(name) == here.get(name) for name in DRAWN_WITH)


def differences(stated: Any, found: Any, where: str = "", tolerance: float = 0.0) -> list[str]:
    """Where two JSON values part, each in one line: path, stated value, found value.

    `tolerance`: the relative difference of two numbers that is none.
    """
    if isinstance(stated, dict) and isinstance(found, dict):
        lines = []
        for name in [*found, *(name for name in stated if name not in found)]:
            place = f"{where}.{name}" if where else str(name)
            if name not in stated or name not in found:
                lines.append(f"{place} is {'missing' if name in found else 'not expected'}")
            else:
                lines += differences(stated[name], found[name], place, tolerance)
        return lines
    if isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        return [line for number, pair in enumerate(zip(stated, found, strict=True))
                for line in differences(*pair, f"{where}.{number}", tolerance)]
    kinds = {type(stated), type(found)}
    if tolerance and float in kinds and kinds <= {int, float}:
        return [] if abs(stated - found) <= tolerance * abs(found) + 1e-12 else [_parting(where, stated, found)]
    if isinstance(stated, bool) != isinstance(found, bool) or stated != found:
        return [_parting(where, stated, found)]
    return []


def _parting(where: str, stated: Any, found: Any) -> str:
    return f"{where} says {clean(repr(stated), 80)}, the rest of the bundle gives {clean(repr(found), 80)}"
