"""The network's configuration: Hugging Face field names, validated, frozen, saved into everything it produces.

One class describes every K2-class model (DeepSeek-V3, V3.2, Moonlight, Kimi K2 and the text part of K2.5). Fields that
would change the computation in a way moonbase does not implement are refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moonbase.errors import UserError, did_you_mean

Positive = Field(gt=0)
SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
"""A number that YAML 1.1 reads as a word: 1e-3."""


class Frozen(BaseModel):
    """Base of every configuration: immutable, and unknown keys are an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `steps: true` as one step.
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            accepted = {annotation, *get_args(annotation)}
            if accepted & {int, float} and bool not in accepted:
                raise ValueError(f"a number is needed, found {value}")
        return value


class Strict(Frozen):
    """What describes a network: a number is a number, never a word that looks like one."""

    model_config = ConfigDict(strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _read_exponents(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML 1.1 reads 1e-6 as a word; a recipe's `rms_norm_eps: 1e-6` means the number.
        if isinstance(value, str) and info.field_name is not None:
            if cls.model_fields[info.field_name].annotation is float and SCIENTIFIC.fullmatch(value):
                return float(value)
        return value


class RopeScaling(Strict):
    """YaRN (Peng et al. 2023) as DeepSeek-V3 and Kimi K2 publish it."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    """Context extension over `original_max_position_embeddings`: 32 (K2), 40 (V3), 64 (K2.5)."""
    original_max_position_embeddings: int = Field(default=4096, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float = Field(default=1.0, ge=0)
    mscale_all_dim: float = Field(default=0.0, ge=0)
    """Absent means 0, as in DeepSeek's code: no change of the softmax scale."""

    @model_validator(mode="wrap")
    @classmethod
    def _check_attention_factor(cls, values: Any, handler: ModelWrapValidatorHandler[RopeScaling]) -> RopeScaling:
        stated = None
        if isinstance(values, dict):
            stated = values.get("attention_factor")
            values = {name: value for name, value in values.items() if name != "attention_factor"}
        scaling = handler(values)
        # Stated or not, it is the same number, and is not kept twice.
        meant = scaling.attention_factor
        if stated is not None and not (isinstance(stated, int | float) and math.isclose(stated, meant, rel_tol=1e-6)):
            raise ValueError(f"attention_factor={stated!r} is unsupported: factor, mscale and mscale_all_dim give "
                             f"{meant:.7g}")
        return scaling

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied with; 1 where the two scales are equal, as published."""
        return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)


class ModelConfig(Strict):
    """A K2-class decoder: MLA attention and a sparse mixture of experts.

    Field names and meanings are those of `DeepseekV3Config`, defaults are not: a field left out means its plainest
    form (one group, one dense layer, no query latent), and the file of a checkpoint must state what would differ.
    `presets/` holds the published values. Raises UserError (through `ModelConfig.parse`) on anything it cannot
    represent.
    """

    model_type: Literal["deepseek_v3", "deepseek_v32", "kimi_k2"] = "deepseek_v3"
    vocab_size: int = Positive
    hidden_size: int = Positive
    intermediate_size: int = Positive
    """Width of the feed-forward part of the leading dense layers."""
    moe_intermediate_size: int = Positive
    """Width of one expert."""
    num_hidden_layers: int = Positive
    first_k_dense_replace: int = Field(default=1, ge=0)
    """How many leading layers are dense."""
    num_attention_heads: int = Positive
    q_lora_rank: int | None = Field(default=None, gt=0)
    """Rank of the query latent; None means one full-rank `q_proj` (Moonlight)."""
    kv_lora_rank: int = Positive
    qk_nope_head_dim: int = Positive
    qk_rope_head_dim: int = Positive
    v_head_dim: int = Positive
    n_routed_experts: int = Positive
    num_experts_per_tok: int = Positive
    n_shared_experts: int = Field(default=1, ge=0)
    n_group: int = Field(default=1, gt=0)
    """Expert groups; 1 for Kimi, 8 for DeepSeek-V3."""
    topk_group: int = Field(default=1, gt=0)
    """How many groups a token may choose experts from."""
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(default=1.0, gt=0)
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    aux_loss_alpha: float = Field(default=0.001, ge=0)
    """Weight of the sequence-wise balance loss as stored in published configurations; training sets its own."""
    seq_aux: bool = True
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    """Multi-token-prediction modules after the last layer (DeepSeek-V3 ships one)."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    latent_norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of the two norms inside MLA; the reference implementation keeps 1e-6 whatever `rms_norm_eps` is."""
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = Positive
    initializer_range: float = Field(default=0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_id: int | Annotated[tuple[int, ...], Field(strict=False)] | None = None
    pad_token_id: int | None = None
    index_n_heads: int | None = Field(default=None, gt=0)
    """DeepSeek sparse attention (V3.2): heads of the indexer; None means full attention."""
    index_head_dim: int | None = Field(default=None, gt=0)
    index_topk: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check_shapes(self) -> ModelConfig:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} must not exceed n_group={self.n_group}")
        eligible = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > eligible:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {eligible} eligible experts")
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError("a group needs at least two experts: its score is the sum of its best two")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError("first_k_dense_replace must not exceed num_hidden_layers")
        index = (self.index_n_heads, self.index_head_dim, self.index_topk)
        if any(value is None for value in index) and any(value is not None for value in index):
            raise ValueError("index_n_heads, index_head_dim and index_topk go together")
        return self

    # --- derived quantities -------------------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def softmax_scale(self) -> float:
        """Logit scale (d_h + d_r)^(-1/2) · m², m = 0.1 · mscale_all_dim · ln(factor) + 1 (DeepSeek-V3's code)."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling is not None and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    # --- reading and writing ------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "model configuration") -> ModelConfig:
        """Build from a Hugging Face `config.json` (K2.5's `text_config` is unwrapped). Raises UserError, one line."""
        if not isinstance(values, dict):
            raise UserError(f"{source}: expected a mapping of fields, found {type(values).__name__}")
        if isinstance(values.get("text_config"), dict):
            values = values["text_config"]
        known, refused = {}, []
        for name, value in values.items():
            if name in cls.model_fields:
                known[name] = value
            elif name in _FIXED:
                if value not in _FIXED[name]:
                    refused.append(f"{name}={value!r} (supported: {_FIXED[name][0]!r})")
            elif name not in _IRRELEVANT and name not in ("rope_parameters", "num_key_value_heads"):
                guess = did_you_mean(str(name), cls.model_fields)
                guess = guess or " (unknown; remove it if it does not change the network)"
                refused.append(f"{_printable(name)}={value!r}{guess}")
        scalings = _gather_rope(values, known, refused)
        heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
        if kv_heads is not None and kv_heads != heads:
            refused.append(f"num_key_value_heads={kv_heads!r} (MLA has one per attention head: {heads!r})")
        if refused:
            raise UserError(f"{source}: unsupported field {'; '.join(refused)}")
        if values.get("model_type") not in (None, "deepseek_v3", "deepseek_v32", "kimi_k2"):
            raise UserError(f"{source}: unsupported field model_type={values['model_type']!r} "
                            "(supported: 'deepseek_v3', 'deepseek_v32', 'kimi_k2', 'kimi_k25')")
        if not scalings:
            return validated(cls, known, source)
        found = {name: validated(cls, known | {"rope_scaling": scaling}, source, {"rope_scaling": name})
                 for name, scaling in scalings.items()}
        config, *others = found.values()
        if any(other.rope_scaling != config.rope_scaling for other in others):
            raise UserError(f"{source}: {' and '.join(found)} disagree: keep the one that the network was trained with")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads without remote code."""
        values = self.model_dump(exclude_none=True)
        # Absent ids would become transformers' own defaults 0 and 1.
        values |= {name: getattr(self, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # transformers knows the architecture under DeepSeek's name; Kimi K2 is the same network.
        values["model_type"] = "deepseek_v3" if self.model_type == "kimi_k2" else self.model_type
        version = "V32" if self.model_type == "deepseek_v32" else "V3"
        values["architectures"] = [f"Deepseek{version}ForCausalLM"]
        values |= {"num_key_value_heads": self.num_attention_heads, "hidden_act": "silu", "attention_bias": False,
                   "attention_dropout": 0.0, "tie_word_embeddings": False, "moe_layer_freq": 1, "rope_interleave": True,
                   "q_lora_rank": self.q_lora_rank}
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        if self.rope_scaling is None:
            values["rope_scaling"] = None
        return values

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` of a checkpoint folder. Raises UserError."""
        return cls.from_file(Path(folder) / "config.json")

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a checkpoint's `config.json`, where the fields whose defaults differ by implementation must be stated.

        Raises UserError.
        """
        values = read_json(path)
        config = cls.parse(values, source=str(path))
        values = values["text_config"] if isinstance(values.get("text_config"), dict) else values
        missing = [name for name in _STATED if name not in values]
        if missing:
            raise UserError(f"{path}: missing field {', '.join(missing)} (no default is safe: implementations differ)")
        return config


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 · mscale · ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises UserError that names the file and the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a number of thousands of digits
        raise UserError(f"{path}: cannot be read: {error}") from None


def validated(cls: type[Frozen], values: dict[str, Any], source: str, written: dict[str, str] | None = None) -> Any:
    """Construct `cls`, turning pydantic's report into one line that names each wrong field.

    `written` has the names by which the user's file knows fields, where they differ. Raises UserError.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            field, *inner = item["loc"] or ("",)
            name = ".".join(_printable(part) for part in ((written or {}).get(field, field), *inner))
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = "unknown field" + _meant(cls, item["loc"])
            elif item["type"] == "model_type":
                message = f"a mapping of fields is needed, found {item['input']!r}"
            elif item["type"] not in ("missing", "value_error"):
                message += f", found {item['input']!r}"
            problems.append(f"{name}: {message}" if name else message)
        raise UserError(f"{source}: {'; '.join(problems)}") from None


def _printable(name: Any) -> str:
    """A field's name for a message of one line: quoted where it holds a line break or the like."""
    return str(name) if str(name).isprintable() else repr(name)


def _gather_rope(values: dict[str, Any], known: dict[str, Any], refused: list[str]) -> dict[str, Any]:
    """Rotary embedding from `rope_theta`, `rope_scaling` and transformers 5's `rope_parameters`, which may repeat them.

    Sets `rope_theta` in `known` and takes `rope_scaling` out. Returns the fields of RopeScaling (None: no scaling) by
    the name of the mapping that states them, empty where none does. Adds to `refused` what would be lost.
    """
    bases, scalings = {"rope_theta": values.get("rope_theta")}, {}
    known.pop("rope_scaling", None)
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            refused.append(f"{name}={rope!r} (a mapping of fields is needed)")
            continue
        rope = {key: value for key, value in rope.items() if value is not None}
        bases[f"{name}.rope_theta"] = rope.pop("rope_theta", None)
        for fixed in ("rope_interleave", "partial_rotary_factor"):
            value = rope.pop(fixed, None)
            if value not in _FIXED[fixed]:
                refused.append(f"{name}.{fixed}={value!r} (supported: {_FIXED[fixed][0]!r})")
        # transformers 5 writes `rope_type`, alone or beside the older `type`.
        kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope]
        if len(kinds) == 2 and kinds[0] != kinds[1]:
            refused.append(f"{name}.rope_type={kinds[0]!r} ({name}.type is {kinds[1]!r})")
        elif not kinds and rope and name == "rope_parameters":
            refused.append(f"{name}={rope!r} (rope_type is missing)")
        elif kinds or rope:
            rope |= {"type": kinds[0]} if kinds else {}
            scalings[name] = None if rope.get("type") == "default" else rope
    stated = {name: base for name, base in bases.items() if base is not None}
    for name, base in stated.items():
        known["rope_theta"] = base
        first = next(iter(stated))
        if base != stated[first]:
            refused.append(f"{name}={base!r} ({first} is {stated[first]!r})")
    return scalings


def _meant(cls: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """`(did you mean ...?)` for an unknown field: one of that name a level below, else a similar one beside it."""
    *parents, word = place
    beside = cls
    for parent in parents:
        beside = _kind_of(beside, parent) or beside  # the number of an item in a list leads nowhere further
    for name in cls.model_fields if beside is cls else ():
        kind = _kind_of(cls, name)
        if kind is not None and word in kind.model_fields:
            return f" (did you mean '{name}.{word}'?)"
    return did_you_mean(str(word), beside.model_fields)


def _kind_of(cls: type[BaseModel], name: int | str) -> type[BaseModel] | None:
    """The configuration that a field holds, alone or in a list; None where it holds something else."""
    field = cls.model_fields.get(name) if isinstance(name, str) else None
    kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


# DeepseekV3Config's defaults are DeepSeek-V3's own values, ours the plainest form: a checkpoint must say which it
# means, or it would load and compute something else.
_STATED = ("first_k_dense_replace", "q_lora_rank", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob",
           "routed_scaling_factor")

# Fields with one supported value: anything else would change the computation.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "tie_word_embeddings": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "ep_size": (1, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
}

# Fields that do not touch the network: bookkeeping, generation defaults, classification heads. `quantization_config`
# describes storage and is read by the checkpoint reader. `head_dim` repeats qk_rope_head_dim in transformers' files.
_IRRELEVANT = frozenset(
    """architectures auto_map dtype torch_dtype transformers_version use_cache quantization_config num_local_experts
    _name_or_path bad_words_ids begin_suppress_tokens cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores prefix problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class
    top_k top_p typical_p use_bfloat16 torchscript is_llama_config head_dim qk_head_dim moonbase_version
    _attn_implementation attn_implementation experts_implementation output_router_logits router_aux_loss_coef
    layer_types mlp_layer_types""".split()
)
