"""A deliberately exploding run, with and without QK-Clip: draws qk_clip.svg beside this file.

    python docs/figures/qk_clip.py [steps]

A K2-class network of two layers learns to copy: the second half of every sequence repeats its random first half, and
only the second half carries loss, so everything hinges on attention. The learning rate is thirty times the usual one,
and no weight decay holds the matrices down. Without the clip the attention logits climb into the hundreds, where one
step's change of a logit is enough to move a head's whole weight to another token, and the task, once learnt, keeps
being lost again; with τ = 30 and nothing else changed the logits stay near τ and the loss only ever falls. (Where it is
all but zero gradients are noise, which Muon still turns into full-size updates: a clipped run that goes on for long
enough may be thrown out of its minimum too.)
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from moonbase.config import ModelConfig
from moonbase.model import Transformer
from moonbase.optim import MuonClip, attention_weights, parameter_groups, qk_clip_
from moonbase.recipe import OptimizerConfig

TAU = 30.0
SEEDS = (0, 1, 2)
LEARNING_RATE = 0.03
BATCH, TIME, SYMBOLS = 8, 48, 32


class Curve(NamedTuple):
    """One run, one value a step."""

    loss: list[float]
    max_logit: list[float]


def spikes(loss: list[float]) -> list[int]:
    """The steps, from 0, whose loss is no number or more than twice the median of the twenty before it."""
    return [step for step in range(20, len(loss))
            if not math.isfinite(loss[step]) or loss[step] > 2 * median(loss[step - 20:step])]


def tiny_model(seed: int) -> Transformer:
    config = ModelConfig(vocab_size=256, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
                         num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=32,
                         kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8,
                         num_experts_per_tok=2, routed_scaling_factor=1.5, max_position_embeddings=256)
    return Transformer(config).initialize(seed)


def train(tau: float | None, steps: int, seed: int) -> Curve:
    """Train with QK-Clip at τ, or without it where τ is None."""
    model = tiny_model(seed)
    named = dict(model.named_parameters())
    groups = parameter_groups(named.items(), model.config, OptimizerConfig())
    optimizer = MuonClip(groups, adam_lr_ratio=0.1, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    curve = Curve([], [])
    for step in range(1, steps + 1):
        half = torch.randint(0, SYMBOLS, (BATCH, TIME // 2), generator=generator)
        tokens = torch.cat([half, half, half[:, :1]], dim=1)
        targets = tokens[:, 1:].clone()
        targets[:, :TIME // 2 - 1] = -100
        # Training passes τ here and gets mere bounds below it; for the drawing all maxima are to be exact.
        losses = model.loss(tokens[:, :-1], targets, None, 1e-9)
        loss = losses.loss_sum / (targets != -100).sum()
        loss.backward()
        max_logit = torch.stack([layer.max_logit for layer in losses.statistics])
        optimizer.set_learning_rate(LEARNING_RATE * min(1.0, step / 10))
        optimizer.step()
        optimizer.zero_grad()
        if tau is not None:
            qk_clip_(attention_weights(named, model.config), max_logit, tau, model.config)
        curve.loss.append(loss.item())
        curve.max_logit.append(max_logit.max().item())
    return curve


def draw(without: list[Curve], with_clip: list[Curve], path: Path) -> None:
    """Two panels over the steps, both logarithmic: largest logit and loss, one line per seed."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "moonbase", "font.size": 10, "axes.spines.top": False,
                         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, layout="constrained")
    last = len(without[0].loss)
    kinds = ((without, "#c8553d", "without clip"), (with_clip, "#2a6f97", f"QK-Clip, τ = {TAU:.0f}"))
    for curves, colour, label in kinds:
        for seed, curve in enumerate(curves):
            style = {"color": colour, "linewidth": 1.1, "alpha": 0.8, "label": None if seed else label}
            top.plot(range(1, last + 1), curve.max_logit, **style)
            bottom.plot(range(1, last + 1), curve.loss, **style)
    top.axhline(TAU, color="#555555", linewidth=0.8, linestyle="--")
    top.annotate("τ", (last, TAU), xytext=(4, 0), textcoords="offset points", va="center", color="#555555")
    top.set(yscale="log", ylabel="largest attention logit", ylim=(1, None), xlim=(0, last))
    bottom.set(yscale="log", ylabel="loss, nats per token", xlabel="step")
    top.legend(frameon=False, loc="lower right")
    top.set_title(f"The same run with and without QK-Clip, {len(without)} seeds", loc="left", fontsize=11)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    torch.set_num_threads(1)  # at these sizes a second thread costs more than it brings
    path = Path(__file__).with_suffix(".svg")
    runs = {tau: [train(tau, steps, seed) for seed in SEEDS] for tau in (None, TAU)}
    draw(runs[None], runs[TAU], path)
    for tau, curves in runs.items():
        for seed, (loss, max_logit) in zip(SEEDS, curves, strict=True):
            found = spikes(loss)
            highest = f", up to {max(loss[step] for step in found):.3f}" if found else ""
            print(f"τ = {tau}, seed {seed}: largest logit {max(max_logit):.0f}, {len(found)} spikes{highest}; "
                  f"median loss of the last 50 steps {median(loss[-50:]):.5f}")
    print(path)


if __name__ == "__main__":
    main()
