"""What benches of whole networks share: whether there is room for one, the same network in transformers, its held-out
loss, and an engine's tokenizer where only ids are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from moonbase.config import ModelConfig
from moonbase.data.stream import Batch
from moonbase.errors import UserError
from moonbase.layout import INT4_GROUP
from moonbase.ops.attention import Documents
from moonbase.ops.cross_entropy import IGNORE
from moonbase.report.machine import free_memory_bytes
from moonbase.train.trainer import Trainer


class NoText:
    """A tokenizer that is never asked."""

    special_tokens: dict[str, int] = {}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        raise AssertionError

    decode = token_bytes = encode


def check_room(bench: str, preset: str, needed: float, on_gpu: bool) -> None:
    """Raises UserError where fewer bytes than that are free: a machine that runs out of memory ends other people's
    processes."""
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_memory_bytes()
    if free is not None and needed > free:
        raise UserError(f"bench {bench}: {preset} needs at least {needed / 1e9:,.0f} GB of "
                        f"{'GPU memory' if on_gpu else 'memory'} here, and {free / 1e9:,.0f} GB are free; take a "
                        "smaller preset, pico for example")


def check_experts(bench: str, preset: str, config: ModelConfig) -> None:
    """Raises UserError for a network whose experts cannot be stored in INT4, or that has none."""
    sparse = config.n_routed_experts and config.num_hidden_layers > config.first_k_dense_replace
    if not sparse or config.moe_intermediate_size % INT4_GROUP or config.hidden_size % INT4_GROUP:
        raise UserError(f"bench {bench}: {preset} has no layer of routed experts in groups of {INT4_GROUP}; take "
                        "another preset")


def transformers_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """The same network, with random weights of its own. Raises UserError where transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM, DeepseekV3Config
    except ImportError:
        raise UserError("peer transformers is not installed here: pip install transformers") from None
    values = config.to_hf()
    values.pop("model_type")
    with device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(DeepseekV3Config(**values), dtype=dtype, attn_implementation="sdpa",
                                                **options)


@torch.no_grad()
def held_out_loss(trainer: Trainer, batches: Iterable[Batch]) -> float:
    """Nats per token."""
    device = trainer.world.device
    nats, tokens = 0.0, 0
    for batch in batches:
        for start in range(0, trainer.recipe.batch_size, trainer.micro_batch_size):
            rows = slice(start, start + trainer.micro_batch_size)
            targets = batch.targets[rows]
            nats += trainer.model.loss(batch.tokens[rows].to(device), targets.to(device),
                                       Documents.from_ids(batch.documents[rows], device)).loss_sum.item()
            tokens += int((targets != IGNORE).sum())
    return nats / max(tokens, 1)
