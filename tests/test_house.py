"""The laws of the house, held by reading the source: imports go down, files stay small, nothing ties to one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moonbase"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FLOORS = (
    ("config", "errors", "files", "layout", "presets", "recipe", "sizes", "vocabulary"),
    ("ops", "report"),
    ("chat", "checkpoint", "data", "deploy", "model", "optim"),
    ("engine", "loading", "train"),
    ("agents", "serve"),
    ("evals", "rl", "synth"),
    ("__init__", "__main__", "bench", "claims", "cli", "cli_agents", "cli_evals", "cli_info", "cli_results",
     "quickstart", "terminal"),
)
# The lowest and the highest floor are one room each: their modules may import one another.
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SHARED_FLOORS = (0, len(FLOORS) - 1)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every absolute module name that a file imports, wherever in the file, with its line."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ("moonbase", *path.relative_to(PACKAGE).parent.parts)
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            else:
                base = node.module or ""
            # `from moonbase import chat` names a room, `from moonbase.chat import render` is one already.
            for alias in node.names if base == "moonbase" else ():
                yield node.lineno, f"{base}.{alias.name}"
            if base != "moonbase":
                yield node.lineno, base


def forbidden_imports(path: Path) -> list[str]:
    room, found = room_of(path), []
    floor = FLOOR_OF[room]
    for line, name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "moonbase" or len(parts) < 2 or parts[1] in ("__version__", room):
            continue
        assert parts[1] in FLOOR_OF, f"{path}:{line}: moonbase.{parts[1]} has no floor in the table of this test"
        other = FLOOR_OF[parts[1]]
        if other > floor or (other == floor and floor not in SHARED_FLOORS):
            found.append(f"{path}:{line}: {room} (floor {floor}) imports {parts[1]} (floor {other})")
    return found


def test_every_room_has_a_floor() -> None:
    homeless = {room_of(path) for path in SOURCES} - FLOOR_OF.keys()
    assert not homeless, f"new rooms: give them a floor in this test and in the design: {sorted(homeless)}"


def test_imports_go_down_only() -> None:
    # The package's own __init__ names what is found on first use.
    assert not [line for path in SOURCES if path != PACKAGE / "__init__.py" for line in forbidden_imports(path)]


@pytest.mark.parametrize(
    ("place", "statement"),
    [
        ("model/x.py", "from moonbase.train import run"),
        ("model/x.py", "import moonbase.optim"),
        ("model/x.py", "from moonbase import optim"),
        ("ops/x.py", "def f():\n    from moonbase.report import page"),
        ("model/x.py", "from .. import train"),
        ("model/x.py", "from ..engine.cache import Cache"),
        ("config.py", "from moonbase.ops.norm import rms_norm"),
        ("train/x.py", "from moonbase.cli import main"),
    ],
)
def test_the_law_notices(place: str, statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(statement, encoding="utf-8")
    assert len(forbidden_imports(path)) == 1


def test_oracles_stay_in_the_tests() -> None:
    """What we compare with is no part of the package; and nothing unpickles a file that a user was given.

    `bench/` measures beside peers and may load them when it runs.
    """
    pickles = {"pickle", "dill", "joblib"}
    oracles = {"transformers", "compressed_tensors"}
    found = [f"{path}:{line}: {name}" for path in SOURCES for line, name in imports_of(path)
             if name.split(".")[0] in (pickles if path.parent.name == "bench" else pickles | oracles)]
    assert not found


OPTIONAL = {"datasets", "pyarrow", "zstandard", "tensorboard", "triton", "ray", "fastapi", "starlette", "uvicorn",
            "httpx", "httpx2", "prometheus_client", "llguidance", "jsonschema", "mcp", "mcp_types", "bm25s", "anyio",
            "inspect_ai", "scipy", "statsmodels", "sympy", "reasoning_gym", "rfc8785", "cryptography",
            "securesystemslib"}
# Inspect's part of the evaluation room, which only Inspect loads.
OF_INSPECT = {PACKAGE / "evals" / "tasks", PACKAGE / "evals" / "providers"}


def imported_at_once(path: Path) -> list[str]:
    # Kernels live in files of their own, NAME_cuda.py, which only a machine with a GPU loads.
    optional = OPTIONAL - {"triton"} if path.stem.endswith("_cuda") else OPTIONAL
    if path.parent in OF_INSPECT:
        optional = optional - {"inspect_ai"}
    tree = tree_of(path)
    deferring = ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.If
    deferred = {id(inner) for outer in ast.walk(tree) if isinstance(outer, deferring) for inner in ast.walk(outer)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in deferred:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{path}:{node.lineno}: {name}" for name in modules if name.split(".")[0] in optional]
    return found


def test_optional_packages_are_imported_where_they_are_used() -> None:
    assert not [line for path in SOURCES for line in imported_at_once(path)]


def test_a_file_fits_in_one_sitting() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert not {path: lines for path, lines in lengths.items() if lines > 500}


def test_a_function_fits_on_a_screen() -> None:
    found = [
        f"{path}:{node.lineno}: {node.name}"
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80
    ]
    assert not found


TEXT_FILES = [
    path
    for pattern in ("*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "moonbase/**/*.*", "tests/**/*.py", "docs/**/*.*")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path.suffix in {"", *".py .md .toml .txt .yaml .html .css .js .j2 .jinja .json".split()}
]
# Paths of somebody's machine; written in two parts so that this file does not find itself.
MACHINE = re.compile(r"(?<![\w.])/" + r"(work|home/\w+|root|Users/\w+|mnt/\w+|farm)/")


def test_no_path_of_one_machine() -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in TEXT_FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found


def test_import_moonbase_is_light() -> None:
    """Neither torch nor any room is loaded before it is asked for; a room is an attribute, a slip of the pen is not."""
    code = """
import sys, moonbase
print(sorted(n for n in sys.modules if n.split(".")[0] in ("torch", "numpy", "pydantic", "yaml", "typer", "rich")
             or n.startswith("moonbase.")))
print(moonbase.sizes.sizes.__name__, "torch" in sys.modules, {"load", "Engine", "sizes"} <= set(dir(moonbase)))
try:
    moonbase.no_such_thing
except AttributeError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout.splitlines() == [
        "[]", "sizes False True", "module 'moonbase' has no attribute 'no_such_thing'",
    ]


def test_one_tested_set_pins_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert pinned["torch"] == "2.13.0"
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["hub"], *extras["tensorboard"],
              *extras["evals"]]
    unpinned = {re.split(r"[^\w-]", name)[0].lower() for name in wanted} - pinned.keys()
    assert not unpinned


def test_a_machine_without_a_fitting_python_hears_so_in_one_line(tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.2 && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    answer = subprocess.run(["make", "-s", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True)
    complaint = [line for line in answer.stderr.splitlines() if not line.startswith("make")]
    assert answer.returncode == 2
    assert len(complaint) == 1 and complaint[0].startswith("moonbase needs Python 3.11 or newer; found: Python 3.8.2.")
    assert not (tmp_path / ".venv").exists()
