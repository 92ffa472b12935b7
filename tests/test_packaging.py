"""What `pip install .` gives: a wheel with everything in it, which works far from the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from moonbase.ops import native
from tests.train.tiny import MODEL

ROOT = Path(__file__).resolve().parents[1]
CONSOLE_SCRIPT = Path(sys.executable).with_name("moonbase")

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
needs_console_script = pytest.mark.skipif(
    not CONSOLE_SCRIPT.is_file(), reason="the command moonbase is not installed beside this interpreter: pip install .")


def call(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that has to succeed."""
    answer = subprocess.run([str(word) for word in command], cwd=cwd, env=os.environ | environment, capture_output=True,
                            text=True, timeout=600, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the build backend is absent: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet",
         "--disable-pip-version-check", "--wheel-dir", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel alone is installed into; what it needs comes from this interpreter's packages."""
    folder = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--disable-pip-version-check", "--target",
         folder, wheel, cwd=folder)
    return folder


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moonbase").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}
    assert names - metadata == ours
    # The kinds of files that are no Python, each by one that has to be there.
    assert names >= {"moonbase/py.typed", "moonbase/ops/cpu_kernels.c", "moonbase/ops/cpu_kernels.h",
                     "moonbase/presets/pico.yaml", "moonbase/presets/kimi-k2.5.yaml", "moonbase/serve/page/index.html",
                     "moonbase/serve/page/icon.svg", "moonbase/serve/page/app.js", "moonbase/agents/page/page.html",
                     "moonbase/report/template.html.jinja", "moonbase/report/style.css"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert wheel.name.endswith("-py3-none-any.whl")


def test_what_is_installed_with_it_and_what_an_extra_brings(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    required: dict[str, set[str]] = {}
    for requirement in metadata.get_all("Requires-Dist"):
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        required.setdefault(extra[1] if extra else "", set()).add(re.split(r"[^\w-]", requirement)[0])
    # .parquet and .zst are formats like any other, streamed data sets are the extra's.
    assert required[""] >= {"torch", "pyarrow", "zstandard"} and required["hub"] == {"datasets"}
    assert required[""].isdisjoint({"transformers", "safetensors", "datasets", "fastapi"})
    assert set(metadata.get_all("Provides-Extra")) >= {"serve", "agents", "evals", "hub", "ray", "tensorboard", "dev"}


# --- where it is installed --------------------------------------------------------------------------------------------


def test_it_runs_far_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    python, place = [sys.executable, "-m", "moonbase"], {"PYTHONPATH": str(installed)}
    where = call(sys.executable, "-c", "import moonbase; print(moonbase.__file__)", cwd=tmp_path, **place)
    assert Path(where.strip()) == installed / "moonbase" / "__init__.py"
    version = call(*python, "--version", cwd=tmp_path, **place)
    assert re.match(r"moonbase \d+\.\d+\.\d+\ntorch ", version) and "\ndevice " in version
    assert call(installed / "bin" / "moonbase", "--version", cwd=tmp_path, **place) == version
    facts = json.loads(call(*python, "info", "kimi-k2", "--json", cwd=tmp_path, **place))
    assert facts["parameters"] == 1_026_408_232_448


@pytest.mark.slow
@pytest.mark.skipif(not native.compilers(), reason="no C compiler here")
def test_its_kernels_are_built_from_what_was_installed(installed: Path, tmp_path: Path) -> None:
    """A small training on .txt, .zst and .parquet, whose products, experts and optimizer take the kernels in C."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [f"def function_{number}(x):\n    return x + {number}\n" * 20 for number in range(60)]
    (texts / "a.txt").write_text("".join(lines), encoding="utf-8")
    (texts / "b.txt.zst").write_bytes(zstandard.ZstdCompressor().compress("".join(lines[::2]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), texts / "c.parquet")
    recipe = {"name": "tiny", "model": MODEL, "sequence_length": 32, "batch_size": 4, "steps": 3,
              "data": {"sources": [str(texts)], "workers": 1}}
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    place = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache"), "MOONBASE_NATIVE": "1"}
    answer = call(sys.executable, "-m", "moonbase", "train", "tiny.yaml", "--out", "run", "--json", cwd=tmp_path,
                  **place)
    assert json.loads(answer)["status"] == "finished"
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["corpus"]["skipped"] == {} and facts["corpus"]["documents"] >= 62
    assert len(list((tmp_path / "cache" / "moonbase").glob("cpu-kernels-*.so"))) == 1
    assert "<html" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


# --- the command ------------------------------------------------------------------------------------------------------


@needs_console_script
@pytest.mark.parametrize("words", [[], ["train"]])
def test_the_module_is_the_command(words: list[str], tmp_path: Path) -> None:
    by_name = call(CONSOLE_SCRIPT, *words, "--help", cwd=tmp_path, COLUMNS="100")
    by_module = call(sys.executable, "-m", "moonbase", *words, "--help", cwd=tmp_path, COLUMNS="100")
    assert by_module.replace("python -m moonbase", "moonbase") == by_name and "Usage: moonbase" in by_name


@needs_bash
@needs_console_script
def test_completion_in_a_shell_that_has_installed_it(tmp_path: Path) -> None:
    """As a user: `moonbase --install-completion`, a new shell, the Tab key."""
    place = {"HOME": str(tmp_path), "PATH": f"{CONSOLE_SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"}
    # The `true` keeps bash in place, whose child the command finds out its shell by.
    call("bash", "-c", "moonbase --install-completion; true", cwd=tmp_path, **place)

    def tab(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        script = f"""
source "$HOME/.bashrc"
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
complete -p moonbase > /dev/null && $(complete -p moonbase | sed 's/.* -F \\([^ ]*\\).*/\\1/') moonbase
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        return call("bash", "--noprofile", "--norc", "-c", script, cwd=tmp_path, **place).split()

    assert tab("moonbase", "qui") == ["quickstart"]
    assert tab("moonbase", "info", "kimi") == ["kimi-k2", "kimi-k2.5"]
    assert "--resume" in tab("moonbase", "train", "--re")
