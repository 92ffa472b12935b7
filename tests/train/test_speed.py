"""Compilation and recomputation from outside the model."""

from __future__ import annotations

import pytest
import torch

from moonbase.config import ModelConfig
from moonbase.model import Transformer
from moonbase.train.speed import recompute_blocks


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_recomputed_blocks_can_be_compiled(kind: str) -> None:
    """The compiler traces through every kind of recomputation. Nothing is generated (backend aot_eager), so that no C++
    compiler is needed; dense blocks only, since a CPU's loop over experts cannot be one graph."""
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=8,
                         num_hidden_layers=2, first_k_dense_replace=2, num_attention_heads=2, q_lora_rank=16,
                         kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4,
                         num_experts_per_tok=2, max_position_embeddings=64)
    tokens = torch.arange(24).view(2, 12) % 64
    gradients = []
    for compiled in (False, True):
        model = Transformer(config).initialize(0)
        recompute_blocks(model, kind)
        if compiled:
            for block in model.blocks():
                block.compile(dynamic=False, backend="aot_eager")
        model.loss(tokens[:, :-1], tokens[:, 1:]).loss_sum.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch._dynamo.reset()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_full_recomputation_keeps_nothing_but_inputs() -> None:
    """Of a compiled block, whatever happens inside autograd functions."""
    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=8,
                         num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=16,
                         kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4,
                         num_experts_per_tok=2, max_position_embeddings=64)
    model = Transformer(config).initialize(0)
    recompute_blocks(model, "full")
    block = next(iter(model.blocks()))
    block.compile(dynamic=False, backend="aot_eager_decomp_partition")
    inputs = [torch.randn(2, 12, 32, requires_grad=True), torch.randn(12, 4), torch.randn(12, 4)]
    out, _ = block(*inputs)
    given = {tensor.data_ptr() for tensor in [*inputs, *block.parameters()]}
    # Bytes aside: the compiler keeps where random numbers stand, which attention might ask for.
    kept = {tensor.data_ptr() for tensor in out.grad_fn.saved_tensors if tensor.is_floating_point()}
    torch._dynamo.reset()
    assert inputs[0].data_ptr() in kept <= given
