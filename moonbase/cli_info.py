"""`moonbase info`: what a network costs, from its configuration alone. No tensor is made and torch is not imported."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from moonbase.config import ModelConfig
from moonbase.errors import UserError, did_you_mean
from moonbase.presets import load_preset, preset_config, preset_names
from moonbase.recipe import Recipe, load_recipe
from moonbase.sizes import sizes, training_memory

DEFAULT_CONTEXT = 4096


def find_config(target: str) -> ModelConfig:
    """The network behind a preset name, `preset:NAME`, a config.json, a recipe (YAML), a checkpoint or a run folder.

    Raises UserError where `target` is none of these or cannot be read.
    """
    if target.startswith("preset:"):
        return preset_config(target.removeprefix("preset:"))
    if target in preset_names():
        return preset_config(target)
    path = Path(target)
    # os.path says no, where pathlib raises, to names that the file system cannot hold.
    if os.path.isdir(path):
        if (path / "config.yaml").is_file():
            return load_recipe(str(path / "config.yaml")).model
        if (path / "config.json").is_file():
            return ModelConfig.from_folder(path)
        raise UserError(f"{target}: neither a run folder (config.yaml) nor a checkpoint folder (config.json)")
    if path.suffix in (".yaml", ".yml") and os.path.isfile(path):
        return load_recipe(target).model
    if os.path.isfile(path):
        return ModelConfig.from_file(path)
    known = preset_names()
    raise UserError(f"{target}: neither a preset ({', '.join(known)}) nor a config.json, a checkpoint folder or a run "
                    f"folder{did_you_mean(target, known)}")


def find_recipe(target: str) -> Recipe | None:
    """The recipe behind a preset name, a YAML file or a run folder; None for a network without one."""
    name, path = target.removeprefix("preset:"), Path(target)
    if name in preset_names():
        return load_recipe(name) if "steps" in load_preset(name) else None
    if os.path.isdir(path):
        try:
            return load_recipe(str(path / "config.yaml")) if (path / "config.yaml").is_file() else None
        except UserError:  # another version's: what is asked about is the network
            return None
    return load_recipe(target) if path.suffix in (".yaml", ".yml") else None


def describe(target: str, context: int | None = None) -> dict[str, Any]:
    """Everything `moonbase info` reports, in plain numbers: parameters, FLOPs per token, bytes.

    `context` is the sequence length (training) or the number of tokens already seen (decoding) that the FLOPs are
    stated for; None takes 4096, or what the network can see where that is less.
    """
    config = find_config(target)
    if context is None:
        context = min(DEFAULT_CONTEXT, config.max_position_embeddings)
    facts: dict[str, Any] = {"model": target, "model_type": config.model_type}
    facts |= dataclasses.asdict(sizes(config, context))
    facts |= {
        "num_hidden_layers": config.num_hidden_layers,
        "num_moe_layers": config.num_moe_layers,
        "n_routed_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "softmax_scale": config.softmax_scale,
        "max_position_embeddings": config.max_position_embeddings,
        "kv_bytes_at_full_context": facts["kv_bytes_per_token"] * config.max_position_embeddings,
    }
    recipe = find_recipe(target)
    if recipe is not None:
        facts["training_bytes"] = training_memory(recipe)
        facts["training"] = {
            "tokens at once": f"{recipe.micro_batch_size or recipe.batch_size} x {recipe.sequence_length:,}",
            **{name: getattr(recipe, name) for name in ("masters", "gradients", "recompute")}}
    shards = list(Path(target).glob("*.safetensors")) if os.path.isdir(target) else []
    if shards:
        facts["stored_bytes"] = sum(shard.stat().st_size for shard in shards)
    return facts


def show(facts: dict[str, Any]) -> None:
    """Print `describe`'s facts as a table for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(facts["model"]), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for row in _rows(facts):
        table.add_row(*row, end_section=row[0] == "")
    Console(highlight=False).print(table)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    context, full = facts["context"], facts["max_position_embeddings"]
    rows = [
        _count("parameters", facts["parameters"]),
        _count("active per token", facts["active_parameters"]),
        _count("  without embedding and head", facts["active_parameters_without_embeddings"]),
        _count("one expert", facts["expert_parameters"]),
        _count("attention, one layer", facts["attention_parameters_per_layer"]),
    ]
    if facts["mtp_parameters"]:
        rows.append(_count("multi-token prediction, extra", facts["mtp_parameters"]))
    rows += [
        ("layers", f"{facts['num_hidden_layers']}", f"{facts['num_moe_layers']} with experts"),
        ("experts per layer", f"{facts['n_routed_experts']}", f"{facts['num_experts_per_tok']} per token"),
        ("", "", ""),
        ("training FLOPs per token", _si(facts["train_flops_per_token"]), f"sequences of {context:,}"),
        ("decode FLOPs per token", _si(facts["decode_flops_per_token"]), f"after {context:,} tokens"),
        ("", "", ""),
    ]
    rows += [(f"weights in {name}", *_bytes(size)) for name, size in facts["weight_bytes"].items()]
    if "stored_bytes" in facts:
        rows.append(("stored in this folder", *_bytes(facts["stored_bytes"])))
    rows += [
        ("KV cache per token (bf16)", f"{facts['kv_bytes_per_token']:,} B", ""),
        (f"KV cache at {full:,} tokens", *_bytes(facts["kv_bytes_at_full_context"])),
    ]
    if "training_bytes" in facts:
        parts = facts["training_bytes"]
        rows += [("", "", ""), ("training on one GPU, about", *_bytes(sum(parts.values())))]
        rows += [(f"  {name}", *_bytes(size)) for name, size in parts.items() if size]
        rows += [(f"  with {name}", value, "") for name, value in facts["training"].items()]
    return rows


def _count(name: str, number: int) -> tuple[str, str, str]:
    return name, f"{number:,}", _si(number)


def _bytes(size: int) -> tuple[str, str]:
    """Bytes in decimal and in binary units, because published sizes use both under one name."""
    for power, decimal, binary in ((3, "GB", "GiB"), (2, "MB", "MiB")):
        if size >= 1000**power or power == 2:
            return f"{size / 1000**power:,.2f} {decimal}", f"{size / 1024**power:,.2f} {binary}"
    raise AssertionError("unreachable: megabytes take everything")


def _si(number: int) -> str:
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.4g} {letter}"
    return str(number)
