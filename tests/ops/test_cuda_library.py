"""What a launch hands over, and what becomes of kernels that cannot be had."""

from __future__ import annotations

import ctypes
import logging
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moonbase.ops import cuda_library
from moonbase.ops.cuda_library import Arguments, HopperKernels, Launcher, fields


class _Given(Arguments):
    _fields_ = fields(pointers=("x", "out"), int64=("row",), float32=("scale",), int32=("rows", "wide"))


def test_a_launch_hands_over_addresses_and_the_stream() -> None:
    x, out = torch.zeros(3), torch.ones(3)
    seen: list[Any] = []

    def scale(*arguments: Any) -> int:
        seen.extend(arguments)
        return 0

    given = _Given((x, out), 7, 0.5, 3, True)
    Launcher("scale_hopper", SimpleNamespace(moonbase_scale=scale), 132, 99).launch(
        "moonbase_scale", given, x, 5, about="x")
    # As C lays a struct out: 8 bytes each, then 4, to a multiple of 8.
    assert bytes(given) == struct.pack("@PPqfii4x", x.data_ptr(), out.data_ptr(), 7, 0.5, 3, 1)
    assert seen[0]._obj is given and [seen[1].value, seen[2], seen[3].value] == [x.data_ptr(), 5, 99]
    assert bytes(_Given((x, None), 7, 0.5, 3, 1))[8:16] == bytes(8)
    with pytest.raises(AssertionError):
        _Given((x, out), 7, 0.5, 3)


def test_an_error_names_the_kernels_and_the_call() -> None:
    kernels = SimpleNamespace(moonbase_scale=lambda *arguments: 700)
    with pytest.raises(RuntimeError, match=r"^scale_hopper: CUDA error 700, x \(3, 4\)$"):
        Launcher("scale_hopper", kernels, 132, 0).launch("moonbase_scale", 1, about="x (3, 4)")


def test_without_a_compiler_that_works_there_are_none(monkeypatch: pytest.MonkeyPatch,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    find = cuda_library.library.__wrapped__
    monkeypatch.setattr(cuda_library, "compiler", lambda: "/bin/false")
    with caplog.at_level(logging.INFO):
        assert find("experts_int4_hopper") is None and "Triton's slower kernels are used" in caplog.text
        monkeypatch.setenv("MOONBASE_NATIVE", "0")
        assert find("experts_int4_hopper") is None and "no nvcc" in caplog.text
    # Compiled or not, a GPU of another kind cannot run them.
    monkeypatch.setattr(cuda_library, "library", lambda name: ctypes.CDLL(None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, there in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert HopperKernels("experts_int4_hopper").available() == there
