"""Which parameter gets which update.

Muon: the matrices inside the network (attention and feed-forward projections, expert stacks, router, MTP projection).
AdamW: what is looked up or read out rather than multiplied through (embedding, head), and everything of fewer than two
dimensions (gains, biases). Weight decay on all of them: Moonlight (§2.2) found it needed on the gains too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from moonbase.config import ModelConfig
from moonbase.recipe import OptimizerConfig

_LOOKED_UP = ("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")


def is_looked_up(name: str) -> bool:
    """Whether a parameter is an embedding or a head."""
    return name.endswith(_LOOKED_UP)


def parameter_kind(name: str, parameter: Tensor) -> str:
    """"muon" or "adamw"."""
    return "adamw" if parameter.ndim < 2 or is_looked_up(name) else "muon"


def row_splits(name: str, config: ModelConfig, per_head: bool) -> int:
    """Into how many equal blocks of rows a matrix is cut before it is orthogonalised.

    `gate_up_proj` holds two matrices of the published network. Whether K2 treats q_b and kv_b head by head is not
    published; Moonlight warns that it changes the size of the update, so it is an option.
    """
    if name.endswith("experts.gate_up_proj"):
        return 2
    if per_head and name.endswith(("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight")):
        return config.num_attention_heads
    return 1


def parameter_groups(named_parameters: Iterable[tuple[str, Tensor]], config: ModelConfig,
                     optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort parameters into groups for `MuonClip`: one per kind and number of splits, in the order of first appearance.

    Every group has `kind`, `splits`, `params` and `names`. With `optimizer.name` "adamw", the baseline, all get AdamW.
    """
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        kind = "adamw" if optimizer.name == "adamw" else parameter_kind(name, parameter)
        splits = row_splits(name, config, optimizer.per_head) if kind == "muon" else 1
        group = groups.setdefault((kind, splits), {"kind": kind, "splits": splits, "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
