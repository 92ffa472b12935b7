"""From a recipe to a trainer: model, recomputation, compilation, sharding, masters, optimizer; one order for everyone
who makes training steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moonbase.checkpoint import load_weights, read_config, resolve_model_folder
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.optim import MuonClip, parameter_groups
from moonbase.recipe import OptimizerConfig, Recipe
from moonbase.train.parallel import World, shard
from moonbase.train.precision import Masters
from moonbase.train.speed import compile_blocks, recompute_blocks
from moonbase.train.trainer import Callback, Stream, Trainer


def make_trainer(recipe: Recipe, world: World, stream: Stream, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A trainer before its first step. Raises UserError where `recipe.init` does not fit."""
    on_gpu = world.device.type == "cuda"
    in_bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    compute_dtype = torch.bfloat16 if in_bf16 else torch.float32
    model = build_model(recipe, world)
    recompute_blocks(model, recipe.recompute)
    if recipe.compile == "blocks" or (recipe.compile == "auto" and on_gpu):
        compile_blocks(model)
    if world.size > 1:
        shard(model, world, compute_dtype)
    masters = Masters(model, torch.float32 if world.size > 1 else compute_dtype)
    return Trainer(recipe, model, masters, make_optimizer(recipe, masters), stream, world, list(callbacks))


def build_model(recipe: Recipe, world: World) -> Transformer:
    """Freshly initialised, or from `recipe.init`; fp32, on the device. Raises UserError where the two do not fit."""
    model = Transformer(recipe.model)
    if recipe.init is None:
        return model.initialize(recipe.seed).to(world.device)
    folder = resolve_model_folder(recipe.init)
    stored = read_config(folder)
    ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rope_scaling", "model_type"}
    different = [name for name, value in stored if name not in ignored and value != getattr(recipe.model, name)]
    if different:
        raise UserError(f"init={recipe.init}: its {', '.join(different)} differ from the recipe's model")
    load_weights(model, folder, recipe.model, dtype=torch.float32)
    return model.to(world.device)


def make_optimizer(recipe: Recipe, masters: Masters) -> MuonClip:
    """MuonClip (or its all-AdamW baseline) over the masters."""
    config: OptimizerConfig = recipe.optimizer
    return MuonClip(
        parameter_groups(masters.named.items(), recipe.model, config), lr=config.lr, weight_decay=config.weight_decay,
        momentum=config.momentum, nesterov=config.nesterov, update_rms=config.update_rms, ns_steps=config.ns_steps,
        ns_coefficients=config.ns_coefficients, adam_betas=config.adam_betas, adam_eps=config.adam_eps,
        adam_lr_ratio=config.adam_lr_ratio)
