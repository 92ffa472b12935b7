"""A deliberately exploding run, with and without QK-Clip: draws qk_clip.svg beside this file.

    python docs/figures/qk_clip.py [steps]

A K2-class network of two layers learns to copy: the second half of every sequence repeats its random first half, and
only the second half carries loss, so everything hinges on attention. The learning rate is some fifty times too high.
Without the clip the attention logits climb into the hundreds, where one step's change of a logit is enough to move a
head's whole weight to another token, and a task once learnt keeps flaring up; with τ = 30 and nothing else changed the
logits stay at τ and the loss goes down quietly.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from moonbase.config import ModelConfig
from moonbase.model import Transformer
from moonbase.optim import MuonClip, attention_weights, parameter_groups, qk_clip_
from moonbase.recipe import OptimizerConfig

TAU = 30.0
VOCABULARY, BATCH, TIME = 64, 16, 48


class Curve(NamedTuple):
    """One run, one value a step."""

    loss: list[float]
    max_logit: list[float]


def tiny_model(seed: int) -> Transformer:
    config = ModelConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
                         num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=32,
                         kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8,
                         num_experts_per_tok=2, routed_scaling_factor=1.5, max_position_embeddings=256)
    return Transformer(config).initialize(seed)


def train(tau: float | None, steps: int, lr: float = 0.05, seed: int = 0) -> Curve:
    """Train with QK-Clip at τ, or without it where τ is None."""
    model = tiny_model(seed)
    named = dict(model.named_parameters())
    optimizer = MuonClip(parameter_groups(named.items(), model.config, OptimizerConfig()), adam_lr_ratio=0.003 / lr)
    generator = torch.Generator().manual_seed(seed)
    curve = Curve([], [])
    for step in range(1, steps + 1):
        half = torch.randint(0, VOCABULARY, (BATCH, TIME // 2), generator=generator)
        tokens = torch.cat([half, half, half[:, :1]], dim=1)
        targets = tokens[:, 1:].clone()
        targets[:, :TIME // 2 - 1] = -100
        # A threshold of almost nothing makes the model report exact maxima where no clip needs them.
        losses = model.loss(tokens[:, :-1], targets, None, tau or 1e-9)
        loss = losses.loss_sum / (targets != -100).sum()
        loss.backward()
        max_logit = torch.stack([layer.max_logit for layer in losses.statistics])
        optimizer.set_learning_rate(lr * min(1.0, step / 10))
        optimizer.step()
        optimizer.zero_grad()
        if tau is not None:
            qk_clip_(attention_weights(named, model.config), max_logit, tau, model.config)
        curve.loss.append(loss.item())
        curve.max_logit.append(max_logit.max().item())
    return curve


def draw(without: Curve, with_clip: Curve, path: Path) -> None:
    """Two panels over the steps, both logarithmic: largest logit and loss."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "moonbase", "font.size": 10, "axes.spines.top": False,
                         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    steps = range(1, len(without.loss) + 1)
    for curve, colour, label in ((without, "#c8553d", "without clip"), (with_clip, "#2a6f97", f"QK-Clip, τ = {TAU:.0f}")):
        top.plot(steps, curve.max_logit, color=colour, linewidth=1.4, label=label)
        bottom.plot(steps, curve.loss, color=colour, linewidth=1.1, label=label)
    top.axhline(TAU, color="#555555", linewidth=0.8, linestyle="--")
    top.annotate("τ", (len(steps), TAU), xytext=(4, 0), textcoords="offset points", va="center", color="#555555")
    top.set(yscale="log", ylabel="largest attention logit", ylim=(1, None), xlim=(0, len(steps)))
    bottom.set(yscale="log", ylabel="loss, nats per token", xlabel="step")
    top.legend(frameon=False, loc="lower right")
    top.set_title("The same run with and without QK-Clip", loc="left", fontsize=11)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    path = Path(__file__).with_suffix(".svg")
    without, with_clip = train(None, steps), train(TAU, steps)
    draw(without, with_clip, path)
    last = steps // 3
    for name, curve in (("without clip", without), ("with clip", with_clip)):
        print(f"{name}: largest logit {max(curve.max_logit):.0f}, loss over the last {last} steps "
              f"mean {sum(curve.loss[-last:]) / last:.4f}, largest {max(curve.loss[-last:]):.4f}")
    print(path)


if __name__ == "__main__":
    main()
