"""Starts `pass_kernels.py` where its kernels can run, as `tests/ops/test_cuda_kernels.py` does with others."""

from __future__ import annotations

import pytest

from tests.ops.test_cuda_kernels import interpreted, on_a_gpu, run_kernels


@interpreted
def test_the_pass_in_the_interpreter() -> None:
    run_kernels("engine/pass_kernels", TRITON_INTERPRET="1")


@pytest.mark.gpu
@on_a_gpu
def test_the_pass_on_the_gpu() -> None:
    run_kernels("engine/pass_kernels", TRITON_INTERPRET="0")
