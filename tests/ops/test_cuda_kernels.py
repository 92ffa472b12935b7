"""Starts the files of kernel tests where the kernels can run.

Each in a process of its own: Triton must be told before its first import whether to interpret."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
each_file = pytest.mark.parametrize("file", [
    "ops/kernels.py", "ops/linear_kernels.py", "ops/experts_kernels.py", "ops/decoding_kernels.py",
    "ops/int4_kernels.py", "engine/pass_kernels.py"])


def run_kernels(file: str, **environment: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/{file}", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert " passed" in answer.stdout


@each_file
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="triton is not installed (pip install triton; its interpreter needs no GPU)")
def test_kernels_in_the_interpreter(file: str) -> None:
    run_kernels(file, TRITON_INTERPRET="1")


@each_file
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu(file: str) -> None:
    run_kernels(file, TRITON_INTERPRET="0")
