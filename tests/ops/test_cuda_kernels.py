"""Starts the files of kernel tests where the kernels can run; `tests/engine/test_cuda_pass.py` those of the engine.

A process of their own: Triton must be told before its first import whether to interpret."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = (*(f"ops/{name}_kernels" for name in (
    "linear", "experts", "decoding", "int4", "experts_int4", "muon", "norm", "rotation")),
    "ops/kernels", "optim/rounding_kernels")
interpreted = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                 reason="triton is not installed (pip install triton; its interpreter needs no GPU)")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run_kernels(*names: str, **environment: str) -> None:
    files = [f"tests/{name}.py" for name in names]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert " passed" in answer.stdout


@interpreted
def test_kernels_in_the_interpreter() -> None:
    run_kernels(*FILES, TRITON_INTERPRET="1")


@pytest.mark.gpu
@on_a_gpu
def test_kernels_on_the_gpu() -> None:
    run_kernels(*FILES, TRITON_INTERPRET="0")
