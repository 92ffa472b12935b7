"""Starts `kernels.py` where its kernels can run: Triton must be told before its first import whether to interpret."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_kernels(**environment: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/ops/kernels.py", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert " passed" in answer.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="triton is not installed (pip install triton; its interpreter needs no GPU)")
def test_kernels_in_the_interpreter() -> None:
    run_kernels(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu() -> None:
    run_kernels(TRITON_INTERPRET="0")
