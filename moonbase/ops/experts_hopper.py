"""The products of routed experts in training on a Hopper GPU, bf16: the calls of `experts_hopper.cu`.

Shapes: N rows sorted by expert, E experts, D hidden, I expert width, F = 2I (gate, then up); K depth and M columns of a
product. `ends_E` int32: where each expert's rows end, the last one's at N.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from moonbase.ops.cuda_library import Arguments, HopperKernels, fields

MOST_EXPERTS = 512
"""What the kernel's lists have room for."""
DEPTH = 64
"""Every size of a layer is a multiple of it."""
LEAST_DEPTH = 512
"""Of a product of rows: a tile's end is spread over so much of the next."""
_GATE_UP, _PRODUCT, _GRADIENT, _WEIGHT_GRADIENT = range(4)


_KERNELS = HopperKernels("experts_hopper")


class _Call(Arguments):
    _fields_ = fields(pointers=("left", "right", "ends", "weights", "gate_up", "out"), int64=("rows",),
                      int32=("experts", "depth", "columns"))


def fits(x: Tensor, gate_up_EFD: Tensor, down_EDI: Tensor) -> bool:
    """Whether the kernels take a layer with these weights and such rows: bf16, sizes in sixty-fours, none small."""
    experts, hidden, width = down_EDI.shape
    return (experts <= MOST_EXPERTS and hidden % DEPTH == width % DEPTH == 0
            and hidden >= LEAST_DEPTH and width >= LEAST_DEPTH
            and all(each.dtype == torch.bfloat16 and each.is_contiguous() for each in (x, gate_up_EFD, down_EDI)))


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels can be used on this machine's GPU; the first call compiles them. A constant for a compiled
    block."""
    return _KERNELS.available()


@custom_op("moonbase::experts_gate_up", mutates_args=())
def gate_up_product(rows_ND: Tensor, gate_up_EFD: Tensor, weight_N: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """Row n of expert e becomes gate and up, x_n · W_eᵀ, [N, F]; and silu(gate) · up · weight of what was rounded,
    [N, I]. `weight_N` fp32."""
    gate_up_NF = rows_ND.new_empty(rows_ND.shape[0], gate_up_EFD.shape[1])
    activation_NI = rows_ND.new_empty(rows_ND.shape[0], gate_up_EFD.shape[1] // 2)
    _multiply(_GATE_UP, rows_ND, gate_up_EFD, ends_E, activation_NI, weight_N, gate_up_NF)
    return gate_up_NF, activation_NI


@custom_op("moonbase::experts_product", mutates_args=())
def product(rows_NK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    """Row n of expert e becomes x_n · W_eᵀ. Returns [N, M]."""
    out_NM = rows_NK.new_empty(rows_NK.shape[0], weight_EMK.shape[1])
    _multiply(_PRODUCT, rows_NK, weight_EMK, ends_E, out_NM)
    return out_NM


@custom_op("moonbase::experts_gradient", mutates_args=())
def gradient(grad_NK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
    """Row n of expert e becomes g_n · W_e: the gradient of the rows of `product`. Returns [N, M]."""
    out_NM = grad_NK.new_empty(grad_NK.shape[0], weight_EKM.shape[2])
    _multiply(_GRADIENT, grad_NK, weight_EKM, ends_E, out_NM)
    return out_NM


@custom_op("moonbase::experts_weight_gradient", mutates_args=())
def weight_gradient(grad_NM: Tensor, rows_NK: Tensor, ends_E: Tensor) -> Tensor:
    """Per expert the sum of outer products of its rows, Gₑᵀ Xₑ, [E, M, K]; zeros where it has none. A number that is
    not finite may also show in the gradient of the expert before."""
    out_EMK = grad_NM.new_empty(ends_E.shape[0], grad_NM.shape[1], rows_NK.shape[1])
    _multiply(_WEIGHT_GRADIENT, grad_NM, rows_NK, ends_E, out_EMK)
    return out_EMK


@gate_up_product.register_fake
def _(rows_ND: Tensor, gate_up_EFD: Tensor, weight_N: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, double = rows_ND.shape[0], gate_up_EFD.shape[1]
    return rows_ND.new_empty(num_rows, double), rows_ND.new_empty(num_rows, double // 2)


@product.register_fake
def _(rows_NK: Tensor, weight_EMK: Tensor, ends_E: Tensor) -> Tensor:
    return rows_NK.new_empty(rows_NK.shape[0], weight_EMK.shape[1])


@gradient.register_fake
def _(grad_NK: Tensor, weight_EKM: Tensor, ends_E: Tensor) -> Tensor:
    return grad_NK.new_empty(grad_NK.shape[0], weight_EKM.shape[2])


@weight_gradient.register_fake
def _(grad_NM: Tensor, rows_NK: Tensor, ends_E: Tensor) -> Tensor:
    return grad_NM.new_empty(ends_E.shape[0], grad_NM.shape[1], rows_NK.shape[1])


def _multiply(
    form: int, left: Tensor, right: Tensor, ends: Tensor, out: Tensor, weight: Tensor | None = None,
    gate_up: Tensor | None = None,
) -> None:
    (rows, depth), experts = left.shape, ends.shape[0]
    columns = right.shape[1] if form in (_GATE_UP, _PRODUCT) else right.shape[-1]
    forward = (experts, columns, depth)
    shape = {_WEIGHT_GRADIENT: (rows, columns), _GATE_UP: forward, _PRODUCT: forward}
    given = [left, right, ends, weight, gate_up, out]
    assert right.shape == shape.get(form, (experts, depth, columns)) and ends.dtype == torch.int32
    assert experts <= MOST_EXPERTS and depth % DEPTH == columns % DEPTH == 0
    assert rows == 0 or form == _WEIGHT_GRADIENT or depth >= LEAST_DEPTH
    assert left.dtype == right.dtype == torch.bfloat16 and (weight is None or weight.dtype == torch.float32)
    assert gate_up is None or gate_up.dtype == torch.bfloat16
    assert all(each is None or each.is_contiguous() for each in given)
    assert all(each is None or each.data_ptr() % 16 == 0 for each in (left, right, gate_up, out))
    if rows == 0:
        out.zero_()
        return
    gpu = _KERNELS.on(left.device)
    gpu.launch("moonbase_experts_bf16", _Call(given, rows, experts, depth, columns), form, gpu.processors // 2 * 2,
               about=f"{tuple(left.shape)} times {tuple(right.shape)}")
