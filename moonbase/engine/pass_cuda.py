"""A forward pass of few large steps on a GPU, for models whose weights are plain matrices.

`Transformer.decode` stays the definition; this wraps a model from outside and reads its weights where they lie.
Decoding reads the latents as they are (absorbed form), 576 values per token of context. Prompts take the expanded form:
a chunk of thousands of tokens shares what its context's latents expand to, and scoring that is 3.4 times less
arithmetic than scoring the latents themselves (DeepSeek-V3 §2.1.1).

Between the matrix products stand fused kernels (`ops.decoding_cuda`); nothing in `decode` waits for the host, so it can
be recorded as a CUDA graph.

Shapes: N tokens of the pass, D hidden, H heads, C latent, R rope dims, X = C + R, K query and key dims, V value dims,
S tokens of all contexts that prompts read, laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonbase.config import ModelConfig
from moonbase.engine.cache import BLOCK_TOKENS, Batch, LatentCache
from moonbase.engine.pass_cpu import PLAIN_MODULES
from moonbase.model import Transformer
from moonbase.model.linear import RMSNorm
from moonbase.model.mla import LatentAttention
from moonbase.model.moe import Experts, FeedForward, MixtureOfExperts
from moonbase.model.quantized_experts import QuantizedExperts
from moonbase.model.rope import rotate, rotations
from moonbase.model.transformer import Block, MTPModule
from moonbase.ops.int4_chunks import divides, pack_chunks, unpack_chunks
from moonbase.ops.latent_attention import latent_attention

EXPANDED_BYTES = 1 << 32
"""Contexts are expanded together up to this size, then one after the other."""
CROWD = 12
"""Rows an expert gets on average from which on the kernel for prompts does all work on INT4 experts: the one for rows
that decode takes eight rows at once and reads the weights again for the next."""
LEAST_STRETCHES = 4
"""Parts of a context that a GPU reads side by side, however many sequences there may be: when few of them are there, a
token should not wait for one processor."""
CHUNK_TOKENS = 16384
"""Prompt tokens that a pass reads: so many share what their context expands to, and every expert gets a few hundred."""


def workspace_bytes(config: ModelConfig, chunk_tokens: int, itemsize: int) -> int:
    """Memory that a pass over so many prompt tokens may take beside weights and cache: for K2's sizes 12 GB with
    16,384 tokens and its longest context."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    expanded = 3 * heads * config.qk_head_dim * itemsize
    # Queries before and after rotation, what is read, and both parts of a long context in fp32.
    attending = (max(EXPANDED_BYTES, config.max_position_embeddings * expanded)
                 + chunk_tokens * heads * (2 * config.qk_head_dim + config.v_head_dim) * itemsize)
    # Rows of all choices in fp32, and what stands between the two products.
    feeding = chunk_tokens * max(
        config.num_experts_per_tok * (4 * hidden + itemsize * config.moe_intermediate_size),
        itemsize * config.intermediate_size)
    return max(attending, feeding) + 6 * chunk_tokens * hidden * itemsize


class Reading(NamedTuple):
    """Parts of prompts in one pass, behind the rows that decode."""

    first_row: int
    """Rows before it decode one token each."""
    counts: list[int]
    """New tokens of each part."""
    stops: list[int]
    """Tokens of its context, the new ones included."""
    slots_S: Tensor
    """int64: where all contexts lie in the cache, one after the other."""


class CudaPass:
    """`decode`, `further` and `logits` of the model, in the forms that suit a GPU. Only for a model that `fits`.

    A token's bits depend on its own sequence alone: not on other sequences, nor on the chunks its prompt came in.
    """

    def __init__(self, model: Transformer, cache: LatentCache, most_sequences: int = 1) -> None:
        """`most_sequences` decode at once."""
        self._model, self._cache = model, cache
        config = model.config
        # Decided once: a token's bits do not depend on how many others are there.
        self._crowded = bool(config.n_routed_experts) and (
            most_sequences * config.num_experts_per_tok >= CROWD * config.n_routed_experts)
        self._stretches = max(LEAST_STRETCHES, 8192 // (config.num_attention_heads * most_sequences))
        self.chosen: list[Tensor] | None = None
        """Where to put the experts that each sparse layer's rows choose, for who wants to count them."""
        self.prepare(model)
        limit = min(config.max_position_embeddings, cache.store.shape[1] * BLOCK_TOKENS)
        self._cos_PR, self._sin_PR = rotations(config, torch.arange(limit, device=cache.store.device))
        self._side = torch.cuda.Stream(cache.store.device) if cache.store.is_cuda else None

    @staticmethod
    def prepare(model: Transformer) -> None:
        """Experts in INT4 into the order of the kernels; takes as much memory again as the largest layer's do, for a
        moment, and nothing the second time."""
        if divides(model.config.hidden_size, model.config.moe_intermediate_size):
            for module in model.modules():
                if isinstance(module, QuantizedExperts):
                    module.arrange(pack_chunks, unpack_chunks)

    @staticmethod
    def fits(model: Transformer) -> bool:
        """Half precision but for experts in INT4, and nothing wrapped around the modules or their weights."""
        return (all(type(module) in PLAIN_MODULES | {MTPModule, QuantizedExperts} for module in model.modules())
                and all(type(weight) is nn.Parameter and weight.dtype in (torch.bfloat16, torch.float16)
                        for weight in model.parameters()))

    def decode(self, tokens_N: Tensor, positions_N: Tensor, batch: Batch, reading: Reading | None = None) -> Tensor:
        """Normalised hidden states [N, D]. Tokens read their own sequence's latents, but for `reading`."""
        decoder = self._model.model
        x_ND = decoder.embed_tokens(tokens_N)
        return self._blocks(x_ND, list(decoder.layers), decoder.norm, positions_N, batch, reading)

    def further(
        self, hidden_ND: Tensor, tokens_N: Tensor, positions_N: Tensor, batch: Batch, reading: Reading | None
    ) -> Tensor:
        """`Transformer.decode_further` of the first multi-token-prediction module."""
        from moonbase.ops.decoding_cuda import add_and_norm
        from moonbase.ops.linear_cuda import linear

        module = self._model.mtp[0]
        both = [add_and_norm(x_ND, norm.weight, norm.eps)[1] for x_ND, norm in (
            (self._model.model.embed_tokens(tokens_N), module.enorm), (hidden_ND, module.hnorm))]
        x_ND = linear(torch.cat(both, dim=-1), module.eh_proj.weight)
        return self._blocks(x_ND, [module.layer], module.norm, positions_N, batch, reading)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The head's, in the weights' precision [N, V]."""
        from moonbase.ops.linear_cuda import linear

        return linear(hidden_ND, self._model.lm_head.weight)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _blocks(
        self, x_ND: Tensor, layers: Sequence[Block], norm: RMSNorm, positions_N: Tensor, batch: Batch,
        reading: Reading | None,
    ) -> Tensor:
        """What `norm` makes of x after `layers`."""
        from moonbase.ops.decoding_cuda import add_and_norm

        norms = [*[layer.input_layernorm for layer in layers[1:]], norm]
        x_ND, normed_ND = add_and_norm(x_ND, layers[0].input_layernorm.weight, layers[0].input_layernorm.eps)
        for layer, norm_after in zip(layers, norms, strict=True):
            attended_ND = self._attend(layer.self_attn, normed_ND, positions_N, batch, reading)
            norm = layer.post_attention_layernorm
            x_ND, normed_ND = add_and_norm(x_ND, norm.weight, norm.eps, attended_ND)
            decoding = normed_ND.shape[0] if reading is None else reading.first_row
            x_ND, normed_ND = self._feed(layer.mlp, x_ND, normed_ND, norm_after, decoding, batch)
        return normed_ND

    def _attend(
        self, attention: LatentAttention, x_ND: Tensor, positions_N: Tensor, batch: Batch, reading: Reading | None
    ) -> Tensor:
        """Attention of one layer [N, D]; the new tokens' latents are in the cache afterwards."""
        from moonbase.ops import decoding_cuda
        from moonbase.ops.linear_cuda import linear

        heads, weight = attention.config.num_attention_heads, attention.kv_b_proj.weight
        store_PZX, norm = self._cache.store[attention.layer], attention.kv_a_layernorm
        with self._aside():
            decoding_cuda.store_latents(linear(x_ND, attention.kv_a_proj_with_mqa.weight), norm.weight, norm.eps,
                                        self._cos_PR, self._sin_PR, positions_N, store_PZX, batch.slot_N)
        if attention.config.q_lora_rank is None:
            query_NQ = linear(x_ND, attention.q_proj.weight)
        else:
            norm = attention.q_a_layernorm
            _, normed = decoding_cuda.add_and_norm(linear(x_ND, attention.q_a_proj.weight), norm.weight, norm.eps)
            query_NQ = linear(normed, attention.q_b_proj.weight)
        query_NHK = query_NQ.unflatten(-1, (heads, -1))
        self._wait_for_side()
        first = x_ND.shape[0] if reading is None else reading.first_row
        outputs = []
        if first:
            query_NHX = decoding_cuda.absorb_query(query_NHK[:first], weight, self._cos_PR, self._sin_PR,
                                                   positions_N[:first])
            read_NHC = latent_attention(query_NHX, store_PZX, batch.tables_BM, batch.sequence_N[:first],
                                        batch.position_N[:first], attention.config.softmax_scale, self._cache.rank,
                                        self._stretches)
            outputs.append(decoding_cuda.expand_values(read_NHC, weight, attention.config.v_head_dim))
        if reading is not None:
            rows = slice(first, first + sum(reading.counts))
            cos, sin = self._cos_PR[positions_N[rows]], self._sin_PR[positions_N[rows]]
            outputs.append(self._read_prompts(attention, query_NHK[rows], cos, sin, store_PZX, reading))
            padding = x_ND.shape[0] - rows.stop
            outputs.append(outputs[0].new_zeros(padding, outputs[0].shape[1]))
        return linear(outputs[0] if len(outputs) == 1 else torch.cat(outputs), attention.o_proj.weight)

    def _read_prompts(
        self, attention: LatentAttention, query_NHK: Tensor, cos_NR: Tensor, sin_NR: Tensor, store_PZX: Tensor,
        reading: Reading,
    ) -> Tensor:
        """Every part against its own context, in expanded form [N, H · V]."""
        from moonbase.ops.linear_cuda import linear

        config = attention.config
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        query_nope, query_rope = query_NHK.split([nope, config.qk_rope_head_dim], dim=-1)
        query_NHK = torch.cat([query_nope, rotate(query_rope, cos_NR, sin_NR)], dim=-1)
        rows_PX = store_PZX.flatten(0, 1)
        key_weight, value_weight = _expansion(attention)
        outputs, row, slot = [], 0, 0
        for counts, stops in _batches(reading, heads * 3 * config.qk_head_dim * store_PZX.element_size()):
            read_SX = rows_PX[reading.slots_S[slot : slot + sum(stops)]]
            key_SHK = linear(read_SX, key_weight).unflatten(-1, (heads, -1))
            value_SHV = linear(read_SX[:, : config.kv_lora_rank], value_weight).unflatten(-1, (heads, -1))
            outputs.append(context_attention(
                query_NHK[row : row + sum(counts)], key_SHK, value_SHV, counts, stops, config.softmax_scale))
            row, slot = row + sum(counts), slot + sum(stops)
        return torch.cat(outputs).flatten(1)

    def _feed(
        self, mlp: FeedForward | MixtureOfExperts, x_ND: Tensor, normed_ND: Tensor, norm: RMSNorm, decoding: int,
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        """x and what the feed-forward part makes of `normed_ND`, and what `norm` makes of that sum. The first
        `decoding` rows decode."""
        from moonbase.ops.decoding_cuda import add_and_norm, router_logits, select_experts

        if isinstance(mlp, FeedForward):
            return add_and_norm(x_ND, norm.weight, norm.eps, _dense(mlp, normed_ND))
        config, router, shared_ND = mlp.config, mlp.gate, None
        if config.n_shared_experts:
            with self._aside():
                shared_ND = _dense(mlp.shared_experts, normed_ND)
        indices_NK, weights_NK = select_experts(
            router_logits(normed_ND, router.weight), router.e_score_correction_bias, config.num_experts_per_tok,
            config.n_group, config.topk_group, config.norm_topk_prob, config.routed_scaling_factor, batch.sequence_N)
        if self.chosen is not None:
            self.chosen.append(indices_NK)
        if shared_ND is not None:
            self._wait_for_side()  # the experts' kernel takes all processors
        routed = _route(mlp.experts, 0 if self._crowded else decoding, normed_ND, indices_NK, weights_NK)
        # The rows of all choices are the largest tensors of a pass: they are summed where they are.
        parts = [add_and_norm(x_ND[rows], norm.weight, norm.eps, choices_NKD=choices_NKD,
                              shared_ND=None if shared_ND is None else shared_ND[rows]) for rows, choices_NKD in routed]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work beside what follows until `_wait_for_side`, in passes that are recorded: few rows leave most of a GPU
        idle in a product with few outputs. What it reads must live, and what it makes must not be used, until then.
        """
        if self._side is None or not torch.cuda.is_current_stream_capturing():
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            yield

    def _wait_for_side(self) -> None:
        if self._side is not None and torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)


def _expansion(attention: LatentAttention) -> tuple[Tensor, Tensor]:
    """Weights [H · K, X] and [H · V, C] that make keys and values of what the cache holds.

    Below the latents' part of a key stands an identity: the product copies the rotated part to every head, exactly, and
    the keys need not be put together from two pieces afterwards.
    """
    config, weight = attention.config, attention.kv_b_proj.weight
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    key_HNC, value_HVC = weight.unflatten(0, (config.num_attention_heads, -1)).split([nope, config.v_head_dim], dim=1)
    key_HKX = F.pad(key_HNC, (0, rope, 0, rope))
    key_HKX[:, nope:, config.kv_lora_rank :] = torch.eye(rope, dtype=weight.dtype, device=weight.device)
    return key_HKX.flatten(0, 1), value_HVC.flatten(0, 1)


def context_attention(
    query_NHK: Tensor, key_SHK: Tensor, value_SHV: Tensor, counts: Sequence[int], stops: Sequence[int], scale: float
) -> Tensor:
    """The last `counts[i]` of `stops[i]` tokens of sequence i attend to what stands before them and themselves.

    Queries and keys of all sequences lie end to end. Returns [N, H, V].
    """
    if query_NHK.is_cuda:
        from moonbase.ops.attention_cuda import attention_to_context

        return attention_to_context(query_NHK, key_SHK, value_SHV, counts, stops, scale)
    outputs = []
    for query, key, value in zip(query_NHK.split(list(counts)), key_SHK.split(list(stops)),
                                 value_SHV.split(list(stops)), strict=True):
        seen = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(len(key) - len(query))
        outputs.append(F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (query, key, value)), attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


def _batches(reading: Reading, bytes_each: int) -> list[tuple[list[int], list[int]]]:
    """Counts and stops of the parts that are expanded together."""
    batches: list[tuple[list[int], list[int]]] = []
    for count, stop in zip(reading.counts, reading.stops, strict=True):
        if batches and (sum(batches[-1][1]) + stop) * bytes_each <= EXPANDED_BYTES:
            batches[-1][0].append(count)
            batches[-1][1].append(stop)
        else:
            batches.append(([count], [stop]))
    return batches


def _route(stack: Experts | QuantizedExperts, decoding: int, *call: Tensor) -> list[tuple[slice, Tensor]]:
    """Rows of the pass, and of them those of all choices, fp32 [N, K, D], or their sums [N, 1, D]; `call`: x, indices
    and weights."""
    everything = slice(None)
    if isinstance(stack, Experts):
        from moonbase.ops.experts_decoding_cuda import experts_for_inference

        return [(everything, experts_for_inference(*call, stack.gate_up_proj, stack.down_proj))]
    if not stack.is_arranged:
        return [(everything, stack(*call).float().unsqueeze(1))]
    from moonbase.ops.experts_int4_cuda import experts_int4_for_few, experts_int4_for_prompts

    weights = stack.gate_up_proj_arranged, stack.down_proj_arranged
    works = (experts_int4_for_few, slice(decoding)), (experts_int4_for_prompts, slice(decoding, None))
    return [(rows, work(*(each[rows] for each in call), *weights)) for work, rows in works if len(call[0][rows])]


def _dense(mlp: FeedForward, x_ND: Tensor) -> Tensor:
    from moonbase.ops.linear_cuda import gated_linear, linear

    return linear(gated_linear(x_ND, mlp.gate_proj.weight, mlp.up_proj.weight), mlp.down_proj.weight)
