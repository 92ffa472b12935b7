"""What a run is made of: the recipe. A YAML file or preset name plus `key=value` overrides, saved into the run folder.

`moonbase train RECIPE key=value ...` sets any field below by its dotted name: `steps=500 optimizer.lr=1e-3
data=my/texts`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from moonbase.config import SCIENTIFIC, Frozen, ModelConfig, validated
from moonbase.errors import UserError, did_you_mean
from moonbase.layout import INT4_GROUP, Int4Rule
from moonbase.presets import load_preset, preset_names


class Source(Frozen):
    """One origin of training text."""

    path: str = Field(min_length=1)
    """A folder, a file, or `hub:NAME` for a streamed data set (extra `hub`)."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the token stream relative to the others; 1 for all means in proportion to size."""
    text_field: str = "text"
    """Which field of a .jsonl or .parquet record holds the text."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, value: str) -> str:
        if "\0" in value:
            raise ValueError(f"no file name holds a NUL byte, found {value!r}")
        return value


class DataConfig(Frozen):
    """Where text comes from and how it is cut."""

    sources: tuple[Source, ...] = ()
    tokenizer: str | None = Field(default=None, min_length=1)
    """A tokenizer folder or file; None trains a byte-fallback BPE of the model's vocabulary size on the corpus."""
    vocabulary_sources: tuple[Source, ...] = ()
    """Further texts that a new vocabulary is learned from, though the model is not: later stages may speak of more than
    this one reads. Not for a given tokenizer."""
    split_digits: bool = False
    """Whether a new vocabulary keeps every digit a token of its own, which small models copy numbers better by."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Share of documents held out, chosen by a hash of their content."""
    max_documents: int | None = Field(default=None, gt=0)
    max_bytes: int | None = Field(default=None, gt=0)
    """Stop reading after this many bytes of text."""
    workers: int | None = Field(default=None, gt=0)
    """Tokenising processes; None takes one per core."""

    @model_validator(mode="before")
    @classmethod
    def _accept_shorthand(cls, value: Any) -> Any:
        # data=FOLDER and data=[FOLDER, FILE] are what most people write.
        if isinstance(value, str | Path):
            value = [value]
        if isinstance(value, list | tuple):
            value = {"sources": value}
        return value

    @field_validator("sources", "vocabulary_sources", mode="before")
    @classmethod
    def _accept_paths(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            value = [value]
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list | tuple):
            raise ValueError(f"a folder, a file or a list of them is needed, found {value!r}")
        return [{"path": str(item)} if isinstance(item, str | Path) else item for item in value]


class OptimizerConfig(Frozen):
    """MuonClip (Kimi K2 §2.1); `name: adamw` is the baseline."""

    name: Literal["muonclip", "adamw"] = "muonclip"
    lr: float = Field(default=1e-3, gt=0)
    """Peak rate of the matrices (Muon) and, times `adam_lr_ratio`, of everything else (AdamW)."""
    adam_lr_ratio: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    update_rms: float = Field(default=0.2, gt=0)
    """Target RMS of a Muon update (Moonlight §2.2), which lets Muon share AdamW's rate and decay."""
    ns_steps: int = Field(default=5, gt=0)
    ns_coefficients: Literal["quintic", "polar_express"] = "quintic"
    per_head: bool = False
    """Orthogonalise q_b / kv_b head by head instead of as one matrix."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = Field(default=1e-8, gt=0)
    qk_clip: float | None = Field(default=100.0, gt=0)
    """τ: heads whose largest attention logit exceeds it are scaled back (K2 §2.1); None switches the clip off."""
    grad_clip: float | None = Field(default=1.0, gt=0)


class ScheduleConfig(Frozen):
    """Learning rate over the run."""

    kind: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = Field(default=20, ge=0)
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    """Last part of the run in which WSD decays."""
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)


class BalanceConfig(Frozen):
    """Keeping the experts evenly used."""

    bias_rate: float = Field(default=1e-3, ge=0)
    """Step of the selection-only bias (DeepSeek-V3 γ, Moonlight u)."""
    bias_rule: Literal["deepseek", "moonlight"] = "moonlight"
    """deepseek: ± γ by the sign of the load error; moonlight: the sign less its mean over experts."""
    sequence_loss: float = Field(default=1e-4, ge=0)
    """α of the sequence-wise balance loss (DeepSeek-V3 §2.1.2); K2's value is not published."""


class QuantizationAware(Frozen):
    """Quantisation-aware training: routed experts as INT4 will hold them, weights only (K2-Thinking)."""

    start_step: int = Field(default=0, ge=0)
    """The first step, counted from 0, that computes with quantised experts."""
    rule: Int4Rule = "absmax/7"
    """How a group of 32 gets its scale; `moonbase convert --format hf-int4` takes the same one."""


class CheckpointConfig(Frozen):
    """When a checkpoint is written, and how many stay."""

    every_minutes: float = Field(default=5.0, gt=0)
    every_steps: int | None = Field(default=None, gt=0)
    """Also after every so many steps; None goes by the clock alone."""
    keep_last: int = Field(default=2, gt=0)
    """Older checkpoints are removed once a newer one is complete."""
    optimizer: bool = True
    """Whether the optimizer's state lies beside the weights, as much again or twice as much. Without it a run cannot be
    resumed, only trained further with stage=continue."""


class GuardConfig(Frozen):
    """When a step is thrown away, and when training gives up."""

    max_bad_steps: int = Field(default=10, gt=0)
    """Consecutive skipped steps after which the run stops."""
    spike_factor: float | None = Field(default=5.0, gt=1)
    """A gradient norm above this multiple of its running median is a spike; None keeps only the NaN guard."""


class Recipe(Frozen):
    """Everything that determines a run."""

    name: str = Field(default="run", min_length=1)
    model: ModelConfig
    stage: Literal["pretrain", "continue", "sft"] = "pretrain"
    """pretrain: from random weights; continue: from the weights of `init`; sft: from them too, on chat dialogues (JSONL
    of OpenAI messages with tools), with the loss on what the assistant says."""
    init: str | None = Field(default=None, min_length=1)
    """Checkpoint or run folder to start from (stages continue and sft)."""
    style: Literal["kimi-k2", "kimi-k2-thinking", "kimi-k2.5"] | None = None
    """How dialogues are written as tokens. None asks `init`; whoever talks to the model later finds it here."""
    data: DataConfig = DataConfig()
    sequence_length: int = Field(default=512, gt=1)
    batch_size: int = Field(default=8, gt=0)
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Sequences per forward pass and process; None takes the whole share at once."""
    steps: int = Field(default=500, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    mtp_loss: float = Field(default=0.3, ge=0)
    """λ of the multi-token-prediction loss, where the model has such a module."""
    qat: QuantizationAware | None = None
    """Quantisation-aware training in INT4; None trains plain weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What it computes with. auto: bf16 on a GPU, fp32 on a CPU."""
    masters: Literal["fp32", "stochastic", "compensated", "nearest"] = "fp32"
    """What is updated and saved. fp32: 4 bytes a weight, beside what it computes with. The others keep matrices and
    their optimizer state in bf16 alone (gains stay fp32). stochastic: 2 bytes, small steps survive by chance, right on
    average. compensated: 4 bytes, a second bf16 number holds what the first could not. nearest: 2 bytes, small steps
    are lost; for comparison. One process."""
    gradients: Literal["kept", "freed"] = "kept"
    """freed: experts, embedding and head are updated within the backward pass, each as soon as its gradient exists, so
    that only a tenth of the gradients are alive together. Without fp32 masters, with one micro-batch a step; these
    gradients are clipped by the last step's norm, and no step can be thrown away for its own."""
    compile: Literal["auto", "off", "blocks"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    """What is recomputed in the backward pass: nothing, the cheap wide parts, or whole blocks."""
    validate_every: int = Field(default=100, gt=0)
    validation_batches: int = Field(default=8, gt=0)
    sample_every: int | None = Field(default=None, gt=0)
    sample_prompts: tuple[str, ...] = ("def ", "import ", "class ")
    """Text to continue; in stage sft, what a user says first."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    tensorboard: bool = False
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        # The run folder is called after it.
        if value in ("", ".", "..") or not set(value).isdisjoint("/\\\0"):
            raise ValueError(f"a plain name is needed, without slashes, found {value!r}")
        return value

    @field_validator("compile", mode="before")
    @classmethod
    def _accept_yaml_off(cls, value: Any) -> Any:
        # YAML 1.1 reads an unquoted `off` as false.
        return "off" if value is False else value

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.sequence_length > self.model.max_position_embeddings:
            raise ValueError(f"sequence_length={self.sequence_length} exceeds model.max_position_embeddings="
                             f"{self.model.max_position_embeddings}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of "
                             f"micro_batch_size={self.micro_batch_size}")
        if self.qat is not None:
            if self.qat.start_step >= self.steps:
                raise ValueError(f"qat.start_step={self.qat.start_step} lies behind the last of steps={self.steps}")
            for name in ("hidden_size", "moe_intermediate_size"):
                if getattr(self.model, name) % INT4_GROUP:
                    raise ValueError(f"qat needs model.{name} to be a multiple of {INT4_GROUP}, "
                                     f"found {getattr(self.model, name)}")
        if self.masters != "fp32" and self.qat is not None:
            raise ValueError(f"qat quantises copies of fp32 masters, so masters={self.masters} cannot go with it")
        if self.gradients == "freed":
            if self.masters == "fp32":
                raise ValueError("gradients=freed needs masters=stochastic or masters=compensated")
            if self.micro_batch_size not in (None, self.batch_size):
                raise ValueError("gradients=freed cannot add up micro-batches: micro_batch_size="
                                 f"{self.micro_batch_size} must be batch_size={self.batch_size}")
            if self.guard.spike_factor is not None:
                raise ValueError("gradients=freed has updated most weights when the gradient norm is known: set "
                                 "guard.spike_factor=null")
        if self.stage != "pretrain" and self.init is None:
            raise ValueError(f"stage={self.stage} needs init=CHECKPOINT to start from")
        if self.stage == "pretrain" and self.init is not None:
            raise ValueError(f"init={self.init} is for stage=continue or stage=sft: set one too, or leave init out")
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    def to_yaml(self) -> str:
        """Every field, defaults included, so that the file alone repeats the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def style_of(source: str | Path) -> str | None:
    """The chat style that a run folder, or a checkpoint inside one, was trained in; None where nothing says so."""
    style = _recipe_values(source).get("style")
    return style if isinstance(style, str) else None


def int4_rule_of(source: str | Path) -> Int4Rule:
    """The rule of INT4 scales that a run (its folder, or a checkpoint inside) was trained with, or the default."""
    return (_qat_of(source) or QuantizationAware()).rule


def trained_in_int4(checkpoint: str | Path) -> Int4Rule | None:
    """The rule of a run's checkpoint whose last step computed in INT4; None for any other folder. What it holds are the
    masters."""
    qat, number = _qat_of(checkpoint), Path(checkpoint).resolve().name.removeprefix("step-")
    return qat.rule if qat and number.isdecimal() and int(number) > qat.start_step else None


def _qat_of(source: str | Path) -> QuantizationAware | None:
    try:
        return QuantizationAware.model_validate(_recipe_values(source)["qat"])
    except (KeyError, ValueError):
        return None


def _recipe_values(source: str | Path) -> dict[str, Any]:
    """The fields of a run's recipe, unchecked; none where there is no run."""
    path = Path(source).resolve()
    for file in (path / "config.yaml", path.parent.parent / "config.yaml"):
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError, OSError):
            continue
        return values if isinstance(values, dict) else {}
    return {}


_WORDS = frozenset({"name", "init", "data", "data.sources", "data.tokenizer"})


_OF_THE_CORPUS = ("data", "sample_prompts", "sample_every")


def load_next_recipe(source: str, overrides: list[str] | tuple[str, ...]) -> Recipe:
    """The recipe that trains a run, or a checkpoint folder, further: `stage=sft` or `stage=continue` is among the
    overrides. Model, batches, optimizer and schedule are those of the run, the text is not. Raises UserError naming the
    field."""
    path = Path(source)
    stage = next(override.partition("=")[2] for override in overrides if override.startswith("stage="))
    if (path / "config.yaml").is_file():
        values = load_recipe(str(path / "config.yaml")).model_dump(mode="json", exclude=set(_OF_THE_CORPUS))
    else:
        values = {"name": path.resolve().name, "model": ModelConfig.from_folder(path).model_dump(mode="json")}
    values |= {"name": f"{values['name']}-{stage}", "init": source, "stage": stage}
    if qat := _qat_of(path):
        # What was trained in INT4 goes on in it from the first step.
        values["qat"] = qat.model_dump(mode="json") | {"start_step": 0}
    if stage == "sft":
        values["sample_prompts"] = ["Hello!", "Who are you?"]
    return _recipe_of(values, source, overrides)


def load_recipe(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe from a preset name or a YAML file, with `key=value` overrides. Raises UserError naming the field."""
    if recipe in preset_names():
        values, source = load_preset(recipe), f"preset {recipe}"
    else:
        path = Path(recipe)
        if not os.path.isfile(path):
            known = preset_names()
            raise UserError(f"{recipe}: neither a preset ({', '.join(known)}) nor a YAML file nor a run folder"
                            f"{did_you_mean(recipe, known)}")
        try:
            values, source = yaml.safe_load(path.read_text(encoding="utf-8")), str(path)
        except RecursionError:
            raise UserError(f"{path}: not readable YAML: nested too deeply") from None
        except (yaml.YAMLError, ValueError, OSError) as error:  # ValueError: no UTF-8, or a date that no calendar has
            raise UserError(f"{path}: not readable YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a mapping of recipe fields")
    return _recipe_of(values, source, overrides)


def _recipe_of(values: dict[str, Any], source: str, overrides: list[str] | tuple[str, ...]) -> Recipe:
    for override in overrides:
        _apply_override(values, override)
    model = values.get("model")
    if isinstance(model, str):
        values["model"] = load_preset(model)["model"]
    if not isinstance(values.get("model"), dict):
        raise UserError(f"{source}: model: a preset name or the network's fields are needed")
    values["model"] = ModelConfig.parse(values["model"], source=f"{source}: model")
    return validated(Recipe, values, source)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or "" in key.split("."):
        raise UserError(f"{override!r}: overrides are written key=value, for example optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text) if text else None
    except RecursionError:
        raise UserError(f"{key}: its value is nested too deeply") from None
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        value = text
    if SCIENTIFIC.fullmatch(text):
        # YAML 1.1 reads 1e-3 as a word; people mean the number. A quoted one stays a word.
        value = float(text)
    if key in _WORDS and not isinstance(value, str | list | dict | None):
        # A folder called 2024 is not a number.
        value = text
    if key == "data" and isinstance(value, str | list):
        # The other fields of `data` stay as an earlier override set them.
        key = "data.sources"
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if parent == "model" and isinstance(child, str):
            child = load_preset(child)["model"]
        if parent == "data" and isinstance(child, str | list):
            child = {"sources": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise UserError(f"{override!r}: {parent} has no fields of its own")
        node[parent] = dict(child)
        node = node[parent]
    node[last] = value
