"""Compiling and finding the CPU kernels: every way in which that can go wrong ends in PyTorch's own operations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moonbase.ops import compiled, native
from moonbase.ops.attention import attention, attention_reference
from moonbase.ops.cross_entropy import cross_entropy, cross_entropy_reference
from moonbase.ops.experts import experts, experts_reference
from moonbase.ops.norm import rms_norm, rms_norm_reference

load = native.library.__wrapped__  # what the process keeps is left alone

needs_compiler = pytest.mark.skipif(not native.compilers(), reason="no C compiler here")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MOONBASE_NATIVE", raising=False)
    return tmp_path / "cache" / "moonbase"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good library: compiling takes a second or two."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("MOONBASE_NATIVE", raising=False)
        assert load() is not None
    return folder / "moonbase"


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("cpu-kernels-*.so"))


@needs_compiler
def test_compiled_once_and_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load() is not None
    (library,) = libraries(cache)
    assert [path.name for path in cache.iterdir()] == [library.name], "nothing half-written stays"

    def no_more(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiled, "_compile", no_more)
    assert load() is not None


@needs_compiler
@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(name, marks=pytest.mark.slow) for name in ("empty", "other bytes"))])
def test_a_damaged_library_is_built_anew(cache: Path, built: Path, damage: str) -> None:
    (library,) = libraries(built)
    good = library.read_bytes()
    cache.mkdir(parents=True)
    bad = {"cut": good[:-2000], "empty": b"", "other bytes": good[:-1] + b"!"}[damage]
    (cache / library.name).write_bytes(bad)
    assert load() is not None
    assert [compiled._digest(path) for path in libraries(cache)] == [path.stem[-16:] for path in libraries(cache)]


@needs_compiler
@pytest.mark.slow
def test_other_sources_are_another_library(
    cache: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built, cache)
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in native.SOURCES.glob("cpu_kernels*"):
        shutil.copy(path, sources)
    with open(sources / "cpu_kernels.h", "a", encoding="utf-8") as header:
        header.write("/* changed */\n")
    monkeypatch.setattr(native, "SOURCES", sources)
    assert load() is not None
    assert len({path.name.split("-")[2] for path in libraries(cache)}) == 2


@needs_compiler
@pytest.mark.slow
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("MOONBASE_NATIVE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "aside"))
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    assert load() is not None
    assert not list((tmp_path / "aside").iterdir())


def test_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.compilers() == [] and load() is None


@pytest.mark.parametrize("script", ["exit 1", "exit 0", "echo not a library > /dev/null; exit 0"])
def test_a_compiler_that_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "broken-cc -Wall")
    assert native.compilers() == [str(compiler)] and load() is None
    assert not list(cache.iterdir())


@needs_compiler
@pytest.mark.slow
def test_the_next_compiler_is_tried(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert load() is not None


def test_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONBASE_NATIVE", "0")
    assert load() is None and not cache.exists()


def test_without_an_openmp_runtime(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_parallel_entry", lambda: None)
    assert load() is None


@needs_compiler
@pytest.mark.slow
def test_two_processes_at_once(cache: Path) -> None:
    code = "from moonbase.ops import native; print(native.available())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment,
                                  cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in processes] == ["True", "True"]
    assert libraries(cache) == sorted(cache.iterdir())


def test_what_the_kernels_take() -> None:
    x = torch.zeros(2, 32)
    assert native.takes(x, x) == native.available()
    for other in (x.double(), x[:, :7], x[:0], x.to("meta")):
        assert not native.takes(x, other)


@pytest.mark.parametrize("kernels", [True, False])
def test_every_operation_works_with_and_without(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    elif not native.available():
        pytest.skip("no CPU kernels here")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, gain, q, k, v = random(6, 32), random(32), random(1, 9, 2, 16), random(1, 9, 2, 16), random(1, 9, 2, 32)
    indices, targets = torch.rand(6, 5, generator=generator).argsort(1)[:, :2], torch.arange(6)
    weights, gate_up, down, head = random(6, 2), random(5, 32, 32), random(5, 32, 16), random(48, 32)
    cases = [
        (rms_norm, rms_norm_reference, (x, gain, 1e-6)),
        (experts, experts_reference, (x, indices, weights, gate_up, down)),
        (lambda *a: attention(*a)[0], lambda *a: attention_reference(*a)[0], (q, k, v, 0.3)),
        (cross_entropy, cross_entropy_reference, (x, head, targets)),
    ]
    for fast, plain, arguments in cases:
        wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
        found, expected = fast(*arguments), plain(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for one, other in zip(torch.autograd.grad(found.square().sum(), wanted),
                              torch.autograd.grad(expected.square().sum(), wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
