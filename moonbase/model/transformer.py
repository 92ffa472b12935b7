"""The whole decoder: embeddings, MLA + (dense | sparse) blocks, head, and multi-token prediction (DeepSeek-V3 §2.2).

The module trains, samples, serves and is evaluated. It knows nothing of distribution, precision, quantisation, logging
or files; all of these wrap it from outside. What training wants to know of a forward pass (expert load, largest logits,
balance loss) leaves as return values.

Shapes: B batch, T time, D hidden, V vocabulary, L layers, H heads, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moonbase.config import ModelConfig
from moonbase.errors import UserError
from moonbase.model.linear import Linear, RMSNorm
from moonbase.model.mla import LatentAttention, LatentCache
from moonbase.model.moe import FeedForward, MixtureOfExperts
from moonbase.model.rope import rotations
from moonbase.ops.attention import Documents
from moonbase.ops.cross_entropy import IGNORE, cross_entropy


class LayerStatistics(NamedTuple):
    """What one block reports of a forward pass; no gradient except through `balance_loss`."""

    max_logit: Tensor
    """[H] fp32, see `ops.attention.attention`."""
    expert_load: Tensor
    """[E] fp32 tokens per routed expert; [0] for a dense block."""
    balance_loss: Tensor
    """Scalar; 0 for a dense block."""


class Losses(NamedTuple):
    """Result of `Transformer.loss`: sums over tokens, so that micro-batches and processes simply add up."""

    loss_sum: Tensor
    """Σ -log p(next token), nats, fp32."""
    mtp_loss_sum: Tensor
    """The same for tokens further on, mean over MTP modules (DeepSeek-V3 eq. 25 with λ = 1); 0 without them."""
    balance_loss: Tensor
    """Mean over sequences, summed over layers, not yet weighted by α."""
    statistics: list[LayerStatistics]
    """One entry per block, MTP blocks last."""


class Embedding(nn.Module):
    """Token embeddings; `weight` [V, D]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


class Block(nn.Module):
    """Pre-norm block: attention, then a dense or sparse feed-forward part."""

    def __init__(self, config: ModelConfig, layer: int, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None = None,
        clip_threshold: float | None = None,
    ) -> tuple[Tensor, LayerStatistics]:
        """Training and prefill form. Returns the new hidden states and what happened inside."""
        x_BTD, normalised = self.input_layernorm.beside(x_BTD)
        attended, max_logit = self.self_attn(normalised, (cos, sin), documents, clip_threshold)
        x_BTD, normalised = self.post_attention_layernorm.of_sum(x_BTD, attended)
        if isinstance(self.mlp, FeedForward):
            no_load, no_loss = (x_BTD.new_zeros(shape, dtype=torch.float32) for shape in (0, ()))
            return x_BTD + self.mlp(normalised), LayerStatistics(max_logit, no_load, no_loss)
        fed, load, balance_loss = self.mlp(normalised)
        return x_BTD + fed, LayerStatistics(max_logit, load, balance_loss)

    def decode(self, x_ND: Tensor, rotation: tuple[Tensor, Tensor], cache: LatentCache) -> Tensor:
        """Decoding form: attention reads the cached latents."""
        x_ND = x_ND + self.self_attn.decode(self.input_layernorm(x_ND), rotation, cache)
        normalised = self.post_attention_layernorm(x_ND)
        return x_ND + (self.mlp(normalised) if isinstance(self.mlp, FeedForward) else self.mlp.decode(normalised))


class MTPModule(nn.Module):
    """One step of multi-token prediction: h' = M [norm(Emb(t_{i+k})); norm(h)], then a sparse block.

    DeepSeek-V3 eq. 21-23.
    The halves of `eh_proj` are [embedding; hidden], as the engines that run the published weights feed it.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.layer = Block(config, layer, dense=False)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_BTD: Tensor, embedded_BTD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None = None,
        clip_threshold: float | None = None,
    ) -> tuple[Tensor, LayerStatistics]:
        """`hidden_BTD`: what the previous depth fed its head; `embedded_BTD`: embeddings one token further on."""
        joined = torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], dim=-1)
        out, statistics = self.layer(self.eh_proj(joined), cos, sin, documents, clip_threshold)
        return self.norm(out), statistics

    def decode(
        self, hidden_ND: Tensor, embedded_ND: Tensor, rotation: tuple[Tensor, Tensor], cache: LatentCache
    ) -> Tensor:
        """Decoding form of `forward`."""
        joined = torch.cat([self.enorm(embedded_ND), self.hnorm(hidden_ND)], dim=-1)
        return self.norm(self.layer.decode(self.eh_proj(joined), rotation, cache))


class Decoder(nn.Module):
    """Everything between tokens and the head; named `model` so that parameters carry their published names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer, dense=layer < config.first_k_dense_replace)
            for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A K2-class language model. Raises UserError for a configuration that it cannot run (sparse attention)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.index_topk is not None:
            raise UserError("index_topk: DeepSeek sparse attention can be sized (moonbase info) but not run")
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(
            MTPModule(config, config.num_hidden_layers + depth) for depth in range(config.num_nextn_predict_layers))

    @torch.no_grad()
    def initialize(self, seed: int = 0) -> Transformer:
        """Fill all parameters with `initial_values`, and the buffers with zeros."""
        for parameter, (_, values) in zip(self.parameters(), self.initial_values(seed), strict=True):
            parameter.copy_(values)
        for buffer in self.buffers():
            buffer.zero_()
        return self

    def initial_values(self, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Parameter by parameter: gains 1, everything else from N(0, initializer_range²), drawn on the CPU in fp32.

        The same seed gives the same weights on every device, in every precision and on any number of processes.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                yield name, torch.ones(parameter.shape)
            else:
                values = torch.empty(parameter.shape)
                yield name, values.normal_(0.0, self.config.initializer_range, generator=generator)

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """Logits of the next token, fp32 [B, T, V]. `documents_BT` int32 keeps packed documents apart."""
        hidden, _, _ = self._hidden(tokens_BT, Documents.from_ids(documents_BT), None)
        return self.lm_head(hidden).float()

    def loss(
        self, tokens_BT: Tensor, targets_BT: Tensor, documents: Documents | None = None,
        clip_threshold: float | None = None,
    ) -> Losses:
        """Training pass. `targets_BT` int64 holds the next token or -100; the logits are never all there at once."""
        hidden, rotation, statistics = self._hidden(tokens_BT, documents, clip_threshold)
        loss_sum = cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets_BT.flatten())
        mtp_loss_sum = loss_sum.new_zeros(())
        for module in self.mtp:
            tokens_BT, targets_BT = _one_further(tokens_BT, targets_BT, documents)
            embedded = self.model.embed_tokens(tokens_BT)
            hidden, layer_statistics = module(hidden, embedded, *rotation, documents, clip_threshold)
            statistics.append(layer_statistics)
            mtp_loss_sum = mtp_loss_sum + cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets_BT.flatten())
        balance_loss = torch.stack([layer.balance_loss for layer in statistics]).sum()
        return Losses(loss_sum, mtp_loss_sum / max(1, len(self.mtp)), balance_loss, statistics)

    def decode(self, tokens_N: Tensor, positions_N: Tensor, cache: LatentCache) -> Tensor:
        """Extend cached sequences by N tokens in all. Returns the normalised hidden states that the head reads [N, D].

        `cache` knows which token belongs to which sequence.
        """
        x_ND = self.model.embed_tokens(tokens_N)
        rotation = rotations(self.config, positions_N)
        for block in self.model.layers:
            x_ND = block.decode(x_ND, rotation, cache)
        return self.model.norm(x_ND)

    def decode_further(
        self, depth: int, hidden_ND: Tensor, next_tokens_N: Tensor, positions_N: Tensor, cache: LatentCache
    ) -> Tensor:
        """One step of multi-token prediction: from what the depth before fed its head at `positions_N` and the tokens
        that follow there, the hidden states that predict the token after those [N, D]."""
        embedded = self.model.embed_tokens(next_tokens_N)
        return self.mtp[depth].decode(hidden_ND, embedded, rotations(self.config, positions_N), cache)

    def blocks(self) -> Iterator[Block]:
        """All blocks in order, MTP's last: what is wrapped for compilation, recomputation or sharding."""
        yield from self.model.layers
        for module in self.mtp:
            yield module.layer

    def _hidden(
        self, tokens_BT: Tensor, documents: Documents | None, clip_threshold: float | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], list[LayerStatistics]]:
        """Normalised last hidden states, the rotations, and one statistics entry per block.

        Positions count from the row's start: rope is relative, so a packed document need not start at 0.
        """
        rotation = rotations(self.config, torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        x_BTD = self.model.embed_tokens(tokens_BT)
        statistics = []
        for block in self.model.layers:
            x_BTD, layer_statistics = block(x_BTD, *rotation, documents, clip_threshold)
            statistics.append(layer_statistics)
        return self.model.norm(x_BTD), rotation, statistics


def _one_further(tokens_BT: Tensor, targets_BT: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the next depth of multi-token prediction: everything one token on, within the document.

    A position without a target hands its next token on all the same (masked prompts stay readable to later positions),
    but has no target at this depth either. The target after a document's last token may be known, where the document
    was cut; the one after that belongs to another document.
    """
    following = torch.cat([tokens_BT[:, 1:], tokens_BT[:, -1:]], dim=1)
    further = torch.cat([targets_BT[:, 1:], torch.full_like(targets_BT[:, :1], IGNORE)], dim=1)
    known = targets_BT != IGNORE
    may_look_on = known
    if documents is not None:
        same = documents.ids_BT[:, 1:] == documents.ids_BT[:, :-1]
        may_look_on = known & torch.nn.functional.pad(same, (0, 1))
    return torch.where(known, targets_BT, following), further.where(may_look_on, IGNORE)
