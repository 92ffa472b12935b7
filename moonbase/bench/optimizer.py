"""What a MuonClip step and a QK-Clip cost, beside torch's own Muon on the same matrices."""

from __future__ import annotations

from typing import Any

import torch

from moonbase.bench.timing import seconds
from moonbase.model import Transformer
from moonbase.optim import attention_weights, qk_clip_
from moonbase.recipe import load_recipe
from moonbase.train.assembly import make_optimizer
from moonbase.train.precision import Masters


def measure(preset: str, peer: str | None) -> list[dict[str, Any]]:
    """Milliseconds of one optimizer step over all parameters and of QK-Clip over all layers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load_recipe(preset)
    with device:
        model = Transformer(recipe.model)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.02
    masters = Masters(model, torch.float32)
    for master in masters.named.values():
        master.grad = torch.randn_like(master) * 1e-3
    optimizer = make_optimizer(recipe, masters)
    ours = seconds(optimizer.step, rounds=10, warmup=2)
    optimizer.state.clear()
    theirs = _torch_muon(masters) if peer else None
    rows = [{"shape": f"{preset}, all matrices", "unit": "steps/s", "ours": 1 / ours, "peer": theirs and 1 / theirs,
             "peer_name": "torch.optim.Muon + AdamW" if peer else None, "ratio": theirs / ours if theirs else None,
             "roof_share": None}]
    weights = attention_weights(masters.named, recipe.model)
    largest = torch.full((len(weights), recipe.model.num_attention_heads), 120.0, device=device)
    clip = seconds(lambda: qk_clip_(weights, largest, 100.0, recipe.model), rounds=20, warmup=3)
    rows.append({"shape": f"{preset}, QK-Clip of every head", "unit": "steps/s", "ours": 1 / clip, "peer": None,
                 "peer_name": None, "ratio": None, "roof_share": None})
    return rows


def _torch_muon(masters: Masters) -> float:
    """torch.optim.Muon takes single matrices only, so every expert is a parameter of its own; the rest gets fused
    AdamW."""
    matrices, rest = [], []
    for name, master in masters.named.items():
        if master.ndim < 2 or name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rest.append(master)
            continue
        for matrix, gradient in zip(master.unbind() if master.ndim == 3 else [master],
                                    master.grad.unbind() if master.ndim == 3 else [master.grad], strict=True):
            single = matrix.detach().clone().requires_grad_()
            single.grad = gradient.clone()
            matrices.append(single)
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-3, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return seconds(step, rounds=3, warmup=1)
