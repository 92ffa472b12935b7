"""The feed-forward parts: a dense SwiGLU, and a sparse mixture of experts with sigmoid routing (DeepSeek-V3 §2.1.2).

The router's selection-only bias `e_score_correction_bias` is a buffer: gradients never touch it, the optimizer room
moves it by the load. The load leaves through the return value, so that neither recomputation nor evaluation can count
it twice.

Shapes: B batch, T time, D hidden, E experts, K chosen experts, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moonbase.config import ModelConfig
from moonbase.model.linear import Linear
from moonbase.ops.experts import experts
from moonbase.ops.feed_forward import feed_forward
from moonbase.ops.top_k import top_k
from moonbase.ops.wide_linear import wide_linear


class FeedForward(nn.Module):
    """W_down( silu(W_gate x) ⊙ W_up x )."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width)
        self.up_proj = Linear(hidden_size, width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Router(nn.Module):
    """Scores, selection and weights; fp32 throughout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns scores [B, T, E], chosen experts [B, T, K] and their weights [B, T, K]."""
        config = self.config
        scores = wide_linear(x_BTD, self.weight).sigmoid()
        indices = self.select(scores.detach())
        weights = scores.gather(-1, indices)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return scores, indices, weights * config.routed_scaling_factor

    def select(self, scores: Tensor) -> Tensor:
        """Top-K of the biased scores, within the best `topk_group` groups by the sum of each group's best two."""
        config = self.config
        biased = scores + self.e_score_correction_bias
        if config.n_group > 1:
            grouped = biased.unflatten(-1, (config.n_group, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
            # -inf as in DeepSeek's inference code: 0 would beat every expert whose biased score is negative.
            biased = grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return top_k(biased, config.num_experts_per_tok)


class Experts(nn.Module):
    """The routed experts' weights, stacked: gate rows above up rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, width))

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return experts(x_ND, indices_NK, weights_NK, self.gate_up_proj, self.down_proj)


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared ones that every token passes (one fused MLP of n_shared · width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = FeedForward(config.hidden_size, width)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns [B, T, D], the tokens per expert [E] fp32 and the sequence-wise balance loss, unweighted."""
        scores, indices, weights = self.gate(x_BTD)
        routed = self.experts(x_BTD.flatten(0, 1), indices.flatten(0, 1), weights.flatten(0, 1)).view_as(x_BTD)
        load_BE, balance_loss = self._balance(scores, indices)
        if self.config.n_shared_experts:
            routed = routed + self.shared_experts(x_BTD)
        return routed, load_BE.sum(0), balance_loss

    def decode(self, x_ND: Tensor) -> Tensor:
        """The same without load and balance loss, for N tokens of any sequences. Returns [N, D]."""
        _, indices, weights = self.gate(x_ND)
        routed = self.experts(x_ND, indices, weights)
        return routed + self.shared_experts(x_ND) if self.config.n_shared_experts else routed

    def _balance(self, scores_BTE: Tensor, indices_BTK: Tensor) -> tuple[Tensor, Tensor]:
        """Load per sequence [B, E] and Σ_i f_i P_i averaged over sequences (DeepSeek-V3 eq. 17-20)."""
        batch, time, num_experts = scores_BTE.shape
        chosen = indices_BTK.flatten(1)
        load_BE = torch.zeros(batch, num_experts, device=chosen.device).scatter_add_(
            1, chosen, torch.ones_like(chosen, dtype=torch.float32))
        fraction = load_BE * (num_experts / (self.config.num_experts_per_tok * time))
        share = (scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)).mean(1)
        return load_BE, (fraction * share).sum(-1).mean()
