"""`moonbase.load`: a model from a run folder, a checkpoint folder or a preset, ready to use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moonbase.errors import UserError
from moonbase.presets import preset_config

if TYPE_CHECKING:
    import torch

    from moonbase.config import ModelConfig
    from moonbase.data import Tokenizer
    from moonbase.layout import Int4Rule
    from moonbase.model import Transformer


def load(
    source: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    keep_int4: bool | Literal["auto"] = False,
) -> Transformer:
    """A model in evaluation mode.

    source: run folder (its newest checkpoint), checkpoint folder (ours or Hugging Face layout; bf16, fp8 and INT4 are
    multiplied out; a run that was trained in INT4 computes in it), or `preset:NAME` (random weights). device: default
    the GPU if there is one. dtype: default bf16 on a GPU and fp32 on a CPU.
    keep_int4: whether routed experts that are stored or were trained in INT4 stay packed, at 0.5625 bytes a weight.
    They are buffers then (`QuantizedExperts`): right for an engine, not for training on. "auto": where the source has
    such experts and the device has kernels that are as fast with them. Raises UserError / CheckpointError.
    """
    import torch

    from moonbase.checkpoint import experts_in_int4, load_weights, read_config, resolve_model_folder, stored_mtp
    from moonbase.model import Transformer
    from moonbase.model.quantized_experts import hold_in_int4
    from moonbase.recipe import trained_in_int4

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if str(source).startswith("preset:"):
        if keep_int4 is True:
            raise UserError(f"{source}: a preset has random weights, none of them in INT4")
        config = preset_config(str(source).removeprefix("preset:"))
        if config.index_topk is None:
            _check_room(str(source), config, device, dtype)
        model = Transformer(config).initialize()
        return cast(model, dtype).to(device).eval()
    folder = resolve_model_folder(source)
    config = read_config(folder)
    if config.num_nextn_predict_layers and not stored_mtp(folder, config):
        config = config.model_copy(update={"num_nextn_predict_layers": 0})
    with torch.device("meta"):
        model = Transformer(config)
    rule = trained_in_int4(folder)
    wanted = keep_int4 is True or (keep_int4 == "auto" and packed_is_fast(config, device, dtype))
    if wanted and (rule is not None or experts_in_int4(folder)):
        hold_in_int4(model)
        # A run's checkpoint holds masters: they are quantised row by row as they are read.
        load_weights(model, folder, config, dtype=dtype, device=device, int4_rule=rule)
        return model.eval()
    if keep_int4 is True:
        raise UserError(f"{source}: its experts are not in INT4; moonbase convert {source} NEW --format hf-int4 makes "
                        "a folder where they are")
    load_weights(model, folder, config, dtype=dtype if rule is None else torch.float32, device=device)
    if rule is not None:
        quantize_experts(model, rule)
        cast(model, dtype)
    return model.eval()


def packed_is_fast(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an engine loses nothing by experts that stay in INT4: on a CPU, and on a Hopper GPU with a compiler."""
    import torch

    from moonbase.ops import experts_int4_hopper, experts_int4_prompt_hopper

    if device.type != "cuda":
        return device.type == "cpu"
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    return (dtype == torch.bfloat16 and experts > 0
            and experts_int4_hopper.fits(config.num_experts_per_tok, experts, hidden, width)
            and experts_int4_prompt_hopper.fits(experts, hidden, width)
            and experts_int4_hopper.available() and experts_int4_prompt_hopper.available())


def load_tokenizer_of(source: str | Path) -> Tokenizer:
    """The tokenizer saved beside a model. Raises UserError where there is none."""
    from moonbase.checkpoint import resolve_model_folder
    from moonbase.data import load_tokenizer

    if str(source).startswith("preset:"):
        raise UserError(f"{source}: a preset has random weights and no tokenizer; give a run folder (moonbase "
                        "quickstart makes one) or a checkpoint folder")
    return load_tokenizer(resolve_model_folder(source))


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Convert the parameters; buffers (the router's biases) stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def quantize_experts(model: Transformer, rule: Int4Rule) -> None:
    """Round the routed experts to INT4 in place."""
    from moonbase.ops.int4 import fake_quantize_

    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            fake_quantize_(parameter.data, parameter.data, rule)


def _check_room(source: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights are drawn in fp32 on the CPU, the same for every device, and move then."""
    import torch

    from moonbase.report.machine import free_memory_bytes
    from moonbase.sizes import sizes

    parameters = sizes(config).parameters
    needs = [("memory", 4 * parameters, free_memory_bytes())]
    if device.type == "cuda":
        needs.append((f"memory of {device}", dtype.itemsize * parameters, torch.cuda.mem_get_info(device)[0]))
    for place, needed, free in needs:
        if free is not None and needed > free:
            raise UserError(f"{source}: {needed / 1e9:,.0f} GB of random weights do not fit into the {free / 1e9:,.0f} "
                            f"GB of free {place}; take a smaller preset such as preset:pico, or ask for the numbers "
                            f"alone: moonbase info {source}")
