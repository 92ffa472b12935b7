"""CPU side of `ops.cross_entropy`: the kernel of cpu_kernels_cross_entropy.c, which holds few tokens' logits at a time.

Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moonbase.ops import native

# Above this many weights of the head (256 MB) the kernel's two rearranged copies of it are too dear.
LARGEST_HEAD = 64 << 20


class _Task(ctypes.Structure):
    """struct cross_entropy."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("hidden", "head", "targets", "grad_hidden", "grad_head")),
        *((name, ctypes.c_int64) for name in ("tokens", "inputs", "vocabulary", "num_threads")),
        ("loss", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("head_T", "head_panels", "logits", "losses")),
        *((name, ctypes.c_long) for name in ("from_", "to")),
    ]


def takes(hidden_ND: Tensor, head_VD: Tensor) -> bool:
    """Whether the kernel works on these."""
    return (native.takes(hidden_ND, head_VD) and head_VD.shape[0] % native.GRAIN == 0
            and head_VD.numel() <= LARGEST_HEAD)


def loss_and_gradients(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, need_hidden: bool,
                       need_head: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of the losses (0-d fp32) and the gradients that are asked for. Negative targets have no loss. Raises
    IndexError for a target beyond the vocabulary."""
    hidden_ND, head_VD, targets_N = hidden_ND.contiguous(), head_VD.contiguous(), targets_N.contiguous()
    assert targets_N.dtype == torch.int64 and targets_N.shape[0] == hidden_ND.shape[0]
    grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
    grad_head = torch.empty_like(head_VD) if need_head else None
    task = _Task(
        hidden_ND.data_ptr(), head_VD.data_ptr(), targets_N.data_ptr(),
        None if grad_hidden is None else grad_hidden.data_ptr(), None if grad_head is None else grad_head.data_ptr(),
        *hidden_ND.shape, head_VD.shape[0], torch.get_num_threads())
    if native.call("moonbase_cross_entropy", task):
        raise IndexError(f"target {int(targets_N.max())}, but the vocabulary has {head_VD.shape[0]} entries")
    return torch.tensor(task.loss, dtype=torch.float32), grad_hidden, grad_head
