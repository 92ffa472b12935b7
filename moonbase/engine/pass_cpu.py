"""A forward pass in one call into C (cpu_kernels_pass.c), for fp32 models on a CPU, their experts perhaps in INT4.

A pass of a small model over a few tokens is some hundred operations of microseconds each, and most of the time lies
between them. `Transformer.decode` stays the definition; this wraps a model from outside and reads its weights where
they lie, so that what an optimizer or `load_state_dict` writes is seen at once. Weights that were replaced or moved are
found again before the next pass, and a model that the kernels do not fit (any longer) is left to `Transformer.decode`.

Shapes: N rows, B sequences, M blocks of the longest, D hidden, V vocabulary, R rope dims.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from moonbase.config import ModelConfig
from moonbase.engine.cache import BLOCK_TOKENS, LatentCache
from moonbase.model import Transformer
from moonbase.model.linear import Linear, RMSNorm
from moonbase.model.mla import LatentAttention
from moonbase.model.moe import Experts, FeedForward, MixtureOfExperts, Router
from moonbase.model.quantized_experts import QuantizedExperts
from moonbase.model.rope import rotations
from moonbase.model.transformer import Block, Decoder, Embedding
from moonbase.ops import native

_WEIGHTS = ("input_norm", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b", "o", "post_norm", "gate", "up", "down",
            "router", "bias", *(f"expert_{stack}{form}" for stack in ("gate_up", "down")
                                for form in ("", "_packed", "_scale")))
_SIZES = ("num_layers", "rows", "hidden", "heads", "q_rank", "rank", "nope", "rope", "value", "num_experts", "choices",
          "groups", "kept_groups", "expert_width", "normalise", "page", "pages", "num_threads")
_INSIDE = ("layer", "block", "inner_threads", "x", "normed", "query", "read", "weights", "routed", "chosen", "order",
           "inverse", "ends", "work", "pending")
PLAIN_MODULES = {Transformer, Decoder, Embedding, Block, LatentAttention, FeedForward, MixtureOfExperts, Router,
                 Experts, Linear, RMSNorm, nn.ModuleList}
_DTYPES = {"packed": torch.int32, "scale": torch.bfloat16}
"""Of INT4 experts, by the end of the tensor's name; all others are fp32."""
_POSITIONS = 1024
"""Rotations are computed for so many positions at once, always the same ones together: one piece is one thread's."""


class _Layer(ctypes.Structure):
    """struct pass_layer."""

    _fields_ = [*((name, ctypes.c_void_p) for name in (*_WEIGHTS, "store")), ("width", ctypes.c_int64)]


class _Pass(ctypes.Structure):
    """struct pass."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "layers", "embedding", "norm", "cosine", "sine", "token", "sequence", "position", "tables", "out")),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_float) for name in ("scale", "eps", "latent_eps", "routed_scale")),
        *((name, ctypes.c_int64) for name in _INSIDE),
    ]


class _Head(ctypes.Structure):
    """struct head of cpu_kernels_dots.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "rows", "out")),
        *((name, ctypes.c_int64) for name in ("count", "columns", "depth", "num_threads")),
    ]


class CpuPass:
    """`compute` is `Transformer.decode`, and `logits` the head, wherever `ready` says so."""

    def __init__(self, model: Transformer, cache: LatentCache) -> None:
        self._model, self._cache = model, cache
        # What every module of the model holds by which name, and where the tensors among that lie.
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._links: list[object] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []
        self._task: _Pass | None = None
        self._head: Tensor | None = None
        self._known_positions = 0
        self._cosine, self._sine = (torch.empty(0) for _ in range(2))

    def ready(self) -> bool:
        """Whether the kernels fit the model as it is now. Follows weights that were replaced or moved."""
        same = self._links and all(map(is_, map(dict.get, self._owners, self._names), self._links)) and (
            self._addresses == [tensor.data_ptr() for tensor in self._tensors])
        if not same:
            self._look()
        return self._task is not None

    def compute(
        self, tokens: Sequence[int], sequences: Sequence[int], positions: Sequence[int], tables_BM: Tensor
    ) -> Tensor:
        """Hidden states [N, D]: row n is token `tokens[n]` at `positions[n]` of the sequence whose blocks are row
        `sequences[n]` of `tables_BM` int32. Tokens of one sequence stand side by side, in order. Only if `ready()`."""
        task, hidden = self._task, self._model.config.hidden_size
        assert task is not None and tables_BM.is_contiguous() and tables_BM.dtype == torch.int32
        last = max(positions)
        if last >= self._known_positions:
            self._rotate_further(last)
        out_ND = torch.empty(len(tokens), hidden, dtype=torch.float32, device="cpu")
        # Referred to until the call is over: the task holds addresses only.
        rows = [array("i", values) for values in (tokens, sequences, positions)]
        task.token, task.sequence, task.position = (values.buffer_info()[0] for values in rows)
        task.tables, task.out = tables_BM.data_ptr(), out_ND.data_ptr()
        task.rows, task.pages, task.num_threads = len(tokens), tables_BM.shape[1], torch.get_num_threads()
        native.call("moonbase_pass", task)
        return out_ND

    def logits(self, hidden_ND: Tensor, rows: Sequence[int]) -> Tensor:
        """The head at some rows [len(rows), V], of a pass that was computed here."""
        weight = self._head
        assert weight is not None and hidden_ND.is_contiguous() and hidden_ND.dtype == torch.float32
        out_BV = torch.empty(len(rows), weight.shape[0], dtype=torch.float32, device="cpu")
        wanted = array("i", rows)
        native.call("moonbase_head", _Head(
            hidden_ND.data_ptr(), weight.data_ptr(), wanted.buffer_info()[0], out_BV.data_ptr(), len(rows),
            *weight.shape, torch.get_num_threads()))
        return out_BV

    # --- inside -------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Find all weights; no task where the kernels do not fit."""
        modules = [self._model, self._model.lm_head, self._model.model, *self._model.model.modules()]
        found = [(links, name, value) for module in modules
                 for links in (module._modules, module._parameters, module._buffers) for name, value in links.items()]
        self._owners, self._names, self._links = (list(column) for column in zip(*found, strict=True))
        self._tensors = tensors = [value for value in self._links if isinstance(value, Tensor)]
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        fits = (_fits(self._model.config, self._cache)
                and all(type(module) in PLAIN_MODULES | {QuantizedExperts} for module in modules)
                and all(_plain(value, _DTYPES.get(name.rpartition("_")[2], torch.float32))
                        for name, value in zip(self._names, self._links, strict=True) if isinstance(value, Tensor))
                and native.available())
        self._task = self._describe() if fits else None
        self._head = self._model.lm_head.weight if fits else None

    def _describe(self) -> _Pass:
        config, decoder = self._model.config, self._model.model
        self._layers = (_Layer * config.num_hidden_layers)(*(
            _layer(block, self._cache.store[number]) for number, block in enumerate(decoder.layers)))
        return _Pass(
            layers=ctypes.addressof(self._layers), embedding=decoder.embed_tokens.weight.data_ptr(),
            norm=decoder.norm.weight.data_ptr(), cosine=self._cosine.data_ptr(), sine=self._sine.data_ptr(),
            num_layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
            q_rank=config.q_lora_rank or 0, rank=config.kv_lora_rank, nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim, value=config.v_head_dim, num_experts=config.n_routed_experts,
            choices=config.num_experts_per_tok, groups=config.n_group, kept_groups=config.topk_group,
            expert_width=config.moe_intermediate_size, normalise=config.norm_topk_prob, page=BLOCK_TOKENS,
            scale=config.softmax_scale, eps=config.rms_norm_eps, latent_eps=config.latent_norm_eps,
            routed_scale=config.routed_scaling_factor)

    def _rotate_further(self, last: int) -> None:
        """Cosines and sines for positions up to `last` [positions, R / 2] and some more."""
        pieces = [(self._cosine, self._sine)]
        while self._known_positions <= last:
            start = self._known_positions
            pieces.append(rotations(self._model.config, torch.arange(start, start + _POSITIONS, device="cpu")))
            self._known_positions += _POSITIONS
        # The first piece is empty at first and has no columns.
        self._cosine, self._sine = (
            torch.cat([piece for piece in column if piece.numel()]) for column in zip(*pieces, strict=True))
        assert self._task is not None
        self._task.cosine, self._task.sine = self._cosine.data_ptr(), self._sine.data_ptr()


def _plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether its memory is such numbers, side by side on the CPU (not sharded, not fake)."""
    return (type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.dtype is dtype
            and tensor.is_contiguous())


def _fits(config: ModelConfig, cache: LatentCache) -> bool:
    """Whether every sum that the kernels form is as long as some number of vectors."""
    widths = [config.hidden_size, config.q_lora_rank or 0, config.kv_lora_rank, config.v_head_dim
              * config.num_attention_heads, config.moe_intermediate_size]
    if config.first_k_dense_replace:
        widths.append(config.intermediate_size)
    return all(width % native.GRAIN == 0 for width in widths) and _plain(cache.store)


def _layer(block: Block, store_PZX: Tensor) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    weights: dict[str, Tensor] = {
        "input_norm": block.input_layernorm.weight, "post_norm": block.post_attention_layernorm.weight,
        "kv_a": attention.kv_a_proj_with_mqa.weight, "kv_a_norm": attention.kv_a_layernorm.weight,
        "kv_b": attention.kv_b_proj.weight, "o": attention.o_proj.weight,
    }
    if attention.config.q_lora_rank is None:
        weights["q_b"] = attention.q_proj.weight
    else:
        weights |= {"q_a": attention.q_a_proj.weight, "q_a_norm": attention.q_a_layernorm.weight,
                    "q_b": attention.q_b_proj.weight}
    feed_forward = mlp if isinstance(mlp, FeedForward) else getattr(mlp, "shared_experts", None)
    width = 0
    if feed_forward is not None:
        weights |= {"gate": feed_forward.gate_proj.weight, "up": feed_forward.up_proj.weight,
                    "down": feed_forward.down_proj.weight}
        width = feed_forward.gate_proj.weight.shape[0]
    if isinstance(mlp, MixtureOfExperts):
        weights |= {"router": mlp.gate.weight, "bias": mlp.gate.e_score_correction_bias}
        weights |= {"expert_" + name.replace("_proj", ""): stack
                    for links in (mlp.experts._parameters, mlp.experts._buffers) for name, stack in links.items()}
    return _Layer(**{name: tensor.data_ptr() for name, tensor in weights.items()}, store=store_PZX.data_ptr(),
                  width=width)
