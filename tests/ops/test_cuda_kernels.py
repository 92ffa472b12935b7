"""Starts the files of kernel tests where the kernels can run.

A process for each room: Triton must be told before its first import whether to interpret."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FILES = {"ops": ("kernels", "linear_kernels", "experts_kernels", "decoding_kernels", "int4_kernels",
                 "experts_int4_kernels", "muon_kernels", "norm_kernels", "rotation_kernels",
                 "../optim/rounding_kernels"),
         "engine": ("pass_kernels",)}
each_room = pytest.mark.parametrize("room", list(FILES))


def run_kernels(room: str, **environment: str) -> None:
    files = [f"tests/{room}/{name}.py" for name in FILES[room]]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert " passed" in answer.stdout


@each_room
@pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                    reason="triton is not installed (pip install triton; its interpreter needs no GPU)")
def test_kernels_in_the_interpreter(room: str) -> None:
    run_kernels(room, TRITON_INTERPRET="1")


@each_room
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_the_gpu(room: str) -> None:
    run_kernels(room, TRITON_INTERPRET="0")
