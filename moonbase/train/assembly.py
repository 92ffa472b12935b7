"""From a recipe to a trainer: model, recomputation, compilation, sharding, masters, optimizer; one order for everyone
who makes training steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moonbase.checkpoint import load_weights, read_config, resolve_model_folder
from moonbase.checkpoint.placement import local_part
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.optim import MuonClip, parameter_groups
from moonbase.optim.rounding import Key
from moonbase.recipe import OptimizerConfig, Recipe
from moonbase.train.parallel import World, shard
from moonbase.train.precision import Masters
from moonbase.train.speed import compile_blocks, recompute_blocks
from moonbase.train.trainer import Callback, Stream, Trainer


def make_trainer(recipe: Recipe, world: World, stream: Stream, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A trainer before its first step. Raises UserError where `recipe.init` does not fit, and for bf16 masters of
    several processes."""
    on_gpu = world.device.type == "cuda"
    in_bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    compute_dtype = torch.bfloat16 if in_bf16 else torch.float32
    check_processes(recipe, world)
    sharded, bf16_masters = world.size > 1, recipe.masters != "fp32"
    # Shapes first: of a sharded model no process ever holds more than its part.
    with torch.device("meta"):
        model = Transformer(recipe.model)
    recompute_blocks(model, recipe.recompute)
    if recipe.compile == "blocks" or (recipe.compile == "auto" and on_gpu):
        compile_blocks(model)
    if sharded:
        shard(model, world, compute_dtype)
    if bf16_masters and in_bf16:
        # Never fp32, not even while they are drawn or read.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.bfloat16()
    fill(model, recipe, world)
    masters = Masters(model, torch.float32 if sharded else compute_dtype, recipe.qat, bf16_masters)
    return Trainer(recipe, model, masters, make_optimizer(recipe, masters), stream, world, list(callbacks))


def check_processes(recipe: Recipe, world: World) -> None:
    """Raises UserError for bf16 masters of several processes: FSDP2 divides what one GPU cannot hold, and its shards
    are fp32."""
    if world.size > 1 and recipe.masters != "fp32":
        raise UserError(f"masters={recipe.masters} is for one process, here are {world.size}, which divide the memory "
                        "of fp32 masters between them: set masters=fp32 gradients=kept")


def fill(model: Transformer, recipe: Recipe, world: World) -> Transformer:
    """Fresh weights, or those of `recipe.init`; on the device, in the parameters' dtypes, of a sharded model this
    process's part alone. Large bf16 models on a GPU are drawn there (see `_draw_on_device`).

    Raises UserError where the two do not fit.
    """
    if recipe.init is None:
        model.to_empty(device=world.device)
        on_device = world.device.type == "cuda" and model.lm_head.weight.dtype == torch.bfloat16
        return (_draw_on_device if on_device else _initialize)(model, recipe.seed)
    folder = resolve_model_folder(recipe.init)
    stored = read_config(folder)
    ignored = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rope_scaling", "model_type"}
    different = [name for name, value in stored if name not in ignored and value != getattr(recipe.model, name)]
    if different:
        raise UserError(f"init={recipe.init}: its {', '.join(different)} differ from the recipe's model")
    model.to_empty(device=world.device)
    load_weights(model, folder, recipe.model)
    return model


@torch.no_grad()
def _draw_on_device(model: Transformer, seed: int) -> Transformer:
    """The same distribution as `Transformer.initial_values`, other numbers: each parameter has a generator of its own
    on the device, keyed by seed and name. 16B normal numbers take one core minutes, and a GPU a second."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        key = Key.of(seed, name, "initial values")
        generator = torch.Generator(parameter.device).manual_seed((key.high << 32 | key.low) - (1 << 63))
        for matrix in parameter if parameter.ndim == 3 else [parameter]:  # fp32 of one matrix at a time
            values = torch.empty(matrix.shape, device=matrix.device)
            matrix.copy_(values.normal_(0.0, model.config.initializer_range, generator=generator))
    for buffer in model.buffers():
        buffer.zero_()
    return model


@torch.no_grad()
def _initialize(model: Transformer, seed: int) -> Transformer:
    parameters = dict(model.named_parameters())
    for name, values in model.initial_values(seed):
        local, offsets = local_part(parameters[name])
        for dim, (first, size) in enumerate(zip(offsets, local.shape, strict=True)):
            values = values.narrow(dim, first, size)
        local.copy_(values)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def make_optimizer(recipe: Recipe, masters: Masters) -> MuonClip:
    """MuonClip (or its all-AdamW baseline) over the masters."""
    config: OptimizerConfig = recipe.optimizer
    return MuonClip(
        parameter_groups(masters.named.items(), recipe.model, config), lr=config.lr, weight_decay=config.weight_decay,
        momentum=config.momentum, nesterov=config.nesterov, update_rms=config.update_rms, ns_steps=config.ns_steps,
        ns_coefficients=config.ns_coefficients, adam_betas=config.adam_betas, adam_eps=config.adam_eps,
        adam_lr_ratio=config.adam_lr_ratio, seed=recipe.seed,
        bf16_rounding=None if recipe.masters == "fp32" else recipe.masters)
