"""Layers of a model that is too large for one GPU, in their true shape, through the engine: what a whole one would do.

As many layers as fit (routed experts in INT4, the rest in bf16, random numbers) answer as a model of their own: paged
cache, recorded passes, greedy sampling over the true vocabulary. Every shape is measured twice, with all layers that
fit and with the dense first layer alone. The difference is what the sparse layers cost, and it is this, per layer, that
is extrapolated to the whole depth; embedding, head, sampling and the host's part are counted once.

What the extrapolated figure means: tokens/s of each GPU where a row of them holds the model, layers after layers, and
all are at work (a pipeline). Left out is what they send each other: a hidden state per token and GPU, and the time in
which a pipeline fills. It is not comparable with a deployment in expert parallelism as it stands. There a GPU holds a
handful of the experts and computes them for the tokens of all GPUs, so that a weight is read for hundreds of tokens,
while here a batch reads nearly all experts for itself. Hence a second measurement, of one GPU's share of such a
deployment: all layers, as many tokens of its own as there, all choices of as many tokens spread over its part of the
experts. Left out are dispatch and combine, where every token's hidden state travels to up to eight GPUs and back in
each layer, and that some experts are busier than others. Published figures contain both.

Contexts are random latents that the cache pretends to have computed (`engine.measurement`): filling 128k by prompts
would take longer than all that is measured. Decoding does not see the difference; which experts are hit is counted.

Roofs: weights of the experts hit, all other weights and the latents, at the measured rate of reading, or the
arithmetic at the measured rate of a large product, whichever takes longer.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moonbase import ops
from moonbase.bench.moe import INT4_BYTES
from moonbase.bench.networks import NoText, check_experts
from moonbase.bench.picture import duration
from moonbase.bench.rows import findings, kernel_row, note
from moonbase.bench.timing import Cost, Roofs, measured_roofs, synchronize
from moonbase.config import ModelConfig
from moonbase.engine import Engine, Sampling
from moonbase.engine.engine import free_gpu_bytes
from moonbase.engine.measurement import pretend_known, step_and_count_experts
from moonbase.engine.pass_cuda import CHUNK_TOKENS, workspace_bytes
from moonbase.errors import UserError
from moonbase.layout import INT4_GROUP, INT4_KINDS, checkpoint_layout
from moonbase.model import Transformer
from moonbase.model.linear import RMSNorm
from moonbase.model.moe import MixtureOfExperts
from moonbase.model.quantized_experts import QuantizedExperts, hold_in_int4
from moonbase.ops import native
from moonbase.ops.cuda_library import library
from moonbase.ops.int4_chunks import CHUNK_BYTES, CHUNK_INPUTS, CHUNK_ROWS, divides, pack_chunks, unpack_chunks
from moonbase.recipe import load_recipe
from moonbase.report.machine import free_memory_bytes
from moonbase.report.words import byte_size
from moonbase.sizes import decode_flops_per_token, forward_flops_per_token, kv_bytes_per_token, weight_bytes

STEPS = 12
"""Decoding passes that are timed, behind two that record and warm up."""
SPARE_BYTES = 6 << 30
"""For recorded passes, libraries, and what lies about in the allocator."""


class Shape(NamedTuple):
    """B sequences; decoding, one token each behind a context, or whole prompts."""

    batch: int
    context: int
    decodes: bool

    def __str__(self) -> str:
        return f"{'decode' if self.decodes else 'prompts'} {self.batch}x{self.context:,}"

    @property
    def tokens(self) -> int:
        """Computed in the time that is measured."""
        return self.batch if self.decodes else self.batch * self.context

    @property
    def room(self) -> int:
        """Tokens in the cache."""
        return self.batch * (self.context + STEPS + 32)


class Share(NamedTuple):
    """One GPU of a deployment in expert parallelism: its tokens, and the experts that it computes."""

    shape: Shape
    experts: int


_GPU_SHAPES = (
    *(Shape(batch, 2048, True) for batch in (1, 16, 64, 256)), Shape(64, 8192, True), Shape(16, 32768, True),
    Shape(4, 131072, True), Shape(1, 131072, True),
    *(Shape(1, prompt, False) for prompt in (2048, 8192, 32768)), Shape(16, 2048, False))
_CPU_SHAPES = (Shape(1, 64, True), Shape(4, 64, True), Shape(1, 128, False))
# 128 H200s (LMSYS, 2025): 96 decode with 480 requests each and 480 experts of which 96 are copies; 32 read prompts,
# 131,072 tokens a pass, with 384 experts. A token has eight choices, so eight experts stand in for the five.
_K2_SHARES = (
    Share(Shape(480, 2048, True), 8), Share(Shape(2, 2048, False), 12))
_PUBLISHED = {True: (3000.0, "published, 96 decoding H200s"), False: (7000.0, "published, 32 prefilling H200s")}
"""Tokens/s per GPU that decodes or reads prompts; counted over all 128 they are 2,250 and 1,750."""
_BESIDE_PUBLISHED = (Shape(256, 2048, True), Shape(16, 2048, False))
"""Extrapolated shapes of about that workload, 2,000 tokens in and 100 out; others have no peer."""
_METHOD = ("Sequences x tokens of context or prompt. As many layers as fit, through the engine: paged cache, recorded "
           "passes, greedy sampling, the host's part included. Medians of 12 passes decoding; of prompts the better "
           "of two runs behind one that compiles. A sparse layer is the difference to the dense layer alone, divided "
           "by their number. Contexts are random latents; the experts hit are counted.")
_METHOD_EXTRAPOLATED = (
    " All layers are so many times a sparse one beside the dense layer alone, extrapolated: tokens/s of each GPU of a "
    "pipeline that holds them, what its GPUs send each other left out.")
_METHOD_SHARE = (
    " Rows of a share: one GPU of a deployment in expert parallelism, all layers, as many tokens of its own as "
    "published, and experts with as many choices as its part of them would get; dispatch, combine and uneven load left "
    "out.")
_METHOD_PUBLISHED = " Published figures include what is left out here, in fp8."
_METHOD_CPU = " What a processor's caches hold is read faster than the roof says."


def measure(
    preset: str, peer: str | None, shapes: Sequence[Shape] | None = None, layers: int | None = None,
    shares: Sequence[Share] | None = None,
) -> dict[str, Any]:
    """Three rows per shape, one per share. `layers`: all, the dense ones included; None: what fits."""
    config, on_gpu = load_recipe(preset).model, torch.cuda.is_available()
    check_experts("slice", preset, config)
    shapes = shapes or (_GPU_SHAPES if on_gpu else _CPU_SHAPES)
    if shares is None:
        shares = _K2_SHARES if on_gpu and _is_k2(config) else ()
    roofs = measured_roofs()
    _compile()
    longest = max(shape.context for shape in shapes) + STEPS + 64
    config = config.model_copy(update={"num_nextn_predict_layers": 0, "max_position_embeddings": max(
        config.max_position_embeddings, longest)})
    rows: list[dict[str, Any]] = []
    for found in (*_slice_rows(preset, config, shapes, layers, roofs), *_share_rows(config, shares, roofs)):
        rows += found
    return findings(f"Layers of {preset}", rows, roofs, _method(rows, on_gpu))


def _method(rows: Sequence[dict[str, Any]], on_gpu: bool) -> str:
    """Of the rows that are there."""
    seen = {_METHOD_EXTRAPOLATED: any("extrapolated" in row["shape"] for row in rows),
            _METHOD_SHARE: any("a GPU's share" in row["shape"] for row in rows),
            _METHOD_PUBLISHED: any(row["peer"] for row in rows), _METHOD_CPU: not on_gpu}
    return _METHOD + "".join(part for part, applies in seen.items() if applies)


def _is_k2(config: ModelConfig) -> bool:
    return (config.hidden_size, config.n_routed_experts, config.num_hidden_layers) == (7168, 384, 61)


# --- layers that fit --------------------------------------------------------------------------------------------------


def _slice_rows(
    preset: str, config: ModelConfig, shapes: Sequence[Shape], layers: int | None, roofs: Roofs
) -> Iterator[list[dict[str, Any]]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    depth, least = config.num_hidden_layers, max(1, config.first_k_dense_replace)
    _collect()
    layers = layers or _fitting(config, shapes, device)
    if layers <= least:
        raise UserError(f"bench slice: not one sparse layer of {preset} fits here; take a smaller preset")
    model = random_model(_with(config, num_hidden_layers=layers), device)
    shallow = first_layers(model, least)
    note(f"{preset}: {layers} of {depth} layers, {byte_size(_weights_of(model))} of weights")
    for shape in shapes:
        try:
            (whole, hits), (rest, _) = (measure_shape(each, shape) for each in (model, shallow))
        except torch.OutOfMemoryError as error:
            note(f"{shape}: {error}")
            continue
        hit = statistics.fmean(hits) if hits else _expected_hit(config, shape)
        layer = (whole - rest) / (layers - least)
        if layer <= 0:
            note(f"{shape}: {duration(whole)} with {layers} layers, {duration(rest)} with {least}: too noisy to tell")
            continue
        yield _rows_of(config, shape, hit, roofs, {layers: whole, depth: rest + (depth - least) * layer}, layer)


def _rows_of(
    config: ModelConfig, shape: Shape, hit: float, roofs: Roofs, seconds: dict[int, float], layer: float
) -> list[dict[str, Any]]:
    """seconds: of the layers that fit, and of all, extrapolated; layer: of a sparse one."""
    (some, measured), (depth, extrapolated) = next(iter(seconds.items())), [*seconds.items()][-1]
    wholes = {count: cost(_with(config, num_hidden_layers=count), shape, hit) for count in (some, depth)}
    deeper = cost(_with(config, num_hidden_layers=depth + 1), shape, hit)
    own = Cost(deeper.flops - wholes[depth].flops, deeper.bytes - wholes[depth].bytes)
    label, experts = str(shape), f"{hit:.0f} of {config.n_routed_experts} experts"
    rows = [
        kernel_row(f"{shape}, a sparse layer, {experts}", label, own, {"ours": layer}, roofs,
                   ours_name="engine"),
        _plain(kernel_row(f"{shape}, {some} of {depth} layers", label, wholes[some], {"ours": measured},
                          roofs, ours_name="engine", unit="tokens/s", amount=shape.tokens))]
    if some != depth:
        times, source = {"ours": extrapolated}, None
        if _is_k2(config) and shape in _BESIDE_PUBLISHED:
            published, source = _PUBLISHED[shape.decodes]
            times["peer"] = shape.tokens / published
        rows.append(_plain(kernel_row(
            f"{shape}, all {depth} layers, extrapolated", label, wholes[depth], times, roofs,
            ours_name="engine", peer_name=source, unit="tokens/s per GPU of a pipeline", amount=shape.tokens)))
    all_layers = "" if some == depth else f", {shape.tokens / extrapolated:,.0f} with all {depth}, extrapolated"
    per_token = f", {duration(extrapolated)} a token" if shape.decodes else ""
    note(f"{shape}: {duration(layer)} a sparse layer ({experts}; {rows[0]['roof_share']:.0%} of the roof), "
         f"{shape.tokens / measured:,.0f} tokens/s with {some} of {depth} layers ({rows[1]['roof_share']:.0%})"
         f"{all_layers}{per_token}")
    return rows


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without what a roofline is drawn from: one point per shape is enough, and that a layer's."""
    return {key: value for key, value in row.items()
            if key not in ("label", "flops", "bytes", "seconds", "peer_seconds", "peer_flops", "peer_bytes")}


def _fitting(config: ModelConfig, shapes: Sequence[Shape], device: torch.device) -> int:
    """Layers whose weights fit beside the cache of the largest shape and what the engine keeps free; 0: none."""
    if device.type != "cuda":
        free = free_memory_bytes() or math.inf
        return next((layers for layers in range(config.num_hidden_layers, 0, -1)
                     if _bytes_on_a_cpu(_with(config, num_hidden_layers=layers)) < free), 0)
    free, room = free_gpu_bytes(device) - SPARE_BYTES, max(shape.room for shape in shapes)
    workspace = workspace_bytes(config, CHUNK_TOKENS, 2)
    for layers in range(config.num_hidden_layers, 0, -1):
        shorter = _with(config, num_hidden_layers=layers)
        left = free - weight_bytes(shorter, "int4")
        if room * kv_bytes_per_token(shorter) <= left - max(0.2 * left, workspace):
            return layers
    return 0


def _bytes_on_a_cpu(config: ModelConfig) -> int:
    """Of the weights; those beside the experts are fp32 there."""
    others = sum(tensor.numel for tensor in checkpoint_layout(config, mtp=False) if tensor.kind not in INT4_KINDS)
    return weight_bytes(config, "int4") + 2 * others


# --- a GPU's share of expert parallelism ------------------------------------------------------------------------------


def _share_rows(config: ModelConfig, shares: Sequence[Share], roofs: Roofs) -> Iterator[list[dict[str, Any]]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape, experts in shares:
        _collect()
        part = _with(config, n_routed_experts=experts, n_group=1, topk_group=1)
        try:
            taken, hits = measure_shape(random_model(part, device), shape)
        except (torch.OutOfMemoryError, UserError) as error:
            note(f"{shape}, a GPU's share: {error}")
            continue
        published, source = _PUBLISHED[shape.decodes]
        row = kernel_row(
            f"{shape}, a GPU's share, all {config.num_hidden_layers} layers, {experts} experts",
            f"{shape}, share", cost(part, shape, statistics.fmean(hits) if hits else experts),
            {"ours": taken, "peer": shape.tokens / published}, roofs, ours_name="engine", peer_name=source,
            unit="tokens/s per GPU, communication left out", amount=shape.tokens)
        note(f"{row['shape']}: {row['ours']:,.0f} {row['unit']} ({row['roof_share']:.0%} of the roof); {source}: "
             f"{published:,.0f}")
        yield [_plain(row)]


# --- what is measured -------------------------------------------------------------------------------------------------


@torch.no_grad()
def random_model(config: ModelConfig, device: torch.device) -> Transformer:
    """Random weights made where they are used, routed experts as INT4 in the order of the kernels there: those of
    one layer of K2 would take 34 GB in bf16."""
    with torch.device("meta"):
        model = Transformer(config)
        hold_in_int4(model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.ones(parameter.shape, dtype=dtype, device=device)
            if not isinstance(module, RMSNorm):
                values.normal_(0.0, config.initializer_range)
            setattr(module, name, nn.Parameter(values))
        if isinstance(module, MixtureOfExperts):
            module.gate.e_score_correction_bias = torch.zeros(config.n_routed_experts, device=device)
            _fill(module.experts, config, device, arranged=device.type == "cuda" and divides(
                config.hidden_size, config.moe_intermediate_size))
    return model.eval()


def _fill(stack: QuantizedExperts, config: ModelConfig, device: torch.device, arranged: bool) -> None:
    """`arranged`: in the order of the kernels on a GPU, else as checkpoints have them."""
    count, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    stacks = {}
    for name, rows, inputs in (("gate_up_proj", 2 * width, hidden), ("down_proj", hidden, width)):
        if arranged:
            chunks = torch.empty(count, rows // CHUNK_ROWS, inputs // CHUNK_INPUTS, CHUNK_BYTES, dtype=torch.uint8,
                                 device=device)
            words = chunks.view(torch.int32)
            scales = chunks[..., CHUNK_ROWS * CHUNK_INPUTS // 2 :].view(torch.bfloat16)
            stacks[name] = chunks
        else:
            words = torch.empty(count, rows, inputs // 8, dtype=torch.int32, device=device)
            scales = torch.empty(count, rows, inputs // INT4_GROUP, dtype=torch.bfloat16, device=device)
            setattr(stack, name + "_packed", words)
            setattr(stack, name + "_scale", scales)
        words.random_(-(2**31), 2**31 - 1)
        # Weights spread by about 1 / sqrt(inputs): outputs are about as large as inputs. Random words mean weights of
        # -0.5 scales on average: with scales of one sign all tokens would become alike, and choose the same experts.
        scales.uniform_(0.5 / (4 * inputs**0.5), 1.5 / (4 * inputs**0.5))
        scales *= torch.randint(0, 2, scales.shape, dtype=torch.int8, device=device) * 2 - 1
    if arranged:
        stack.hold_arranged(stacks, pack_chunks, unpack_chunks)


def first_layers(model: Transformer, layers: int) -> Transformer:
    """A model of the first layers of another, with the same weights."""
    with torch.device("meta"):
        shorter = Transformer(_with(model.config, num_hidden_layers=layers))
    shorter.lm_head, shorter.model.norm = model.lm_head, model.model.norm
    shorter.model.embed_tokens, shorter.model.layers = model.model.embed_tokens, model.model.layers[:layers]
    return shorter.eval()


def measure_shape(model: Transformer, shape: Shape) -> tuple[float, list[int] | None]:
    """Seconds of a decoding pass, and how many experts each sparse layer hit; of prompts, until the first token of the
    last, without that count."""
    _collect()
    generator = torch.Generator().manual_seed(0)
    # A context and the token that is computed first.
    prompts = torch.randint(
        model.config.vocab_size, (shape.batch, shape.context + shape.decodes), generator=generator).tolist()
    engine = Engine(model, NoText(), max_running=shape.batch, cache_tokens=shape.room, prefix_cache=shape.decodes)
    if shape.decodes:
        return _decode(engine, prompts)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 3 and times[1] < 3):
        started = time.perf_counter()
        engine.generate_ids(prompts, Sampling(max_tokens=1, temperature=0.0, ignore_eos=True))
        times.append(time.perf_counter() - started)
    return min(times[1:]), None


def _decode(engine: Engine, prompts: list[list[int]]) -> tuple[float, list[int] | None]:
    pretend_known(engine, prompts)
    requests = [engine.request(prompt, Sampling(max_tokens=STEPS + 16, temperature=0.0, ignore_eos=True))
                for prompt in prompts]
    for request in requests:
        engine.submit(request)
    while any(request.reading for request in requests):
        engine.step()
    hits = step_and_count_experts(engine)
    times = []
    for _ in range(2 + STEPS):
        synchronize()
        started = time.perf_counter()
        engine.step()
        synchronize()
        times.append(time.perf_counter() - started)
    assert all(len(request.output_ids) == STEPS + 4 for request in requests), "somebody did not decode"
    return statistics.median(times[2:]), hits


def cost(config: ModelConfig, shape: Shape, hit: float) -> Cost:
    """Of a pass over `shape` through all layers of `config`: `hit` experts of each sparse one are read."""
    itemsize = 2 if torch.cuda.is_available() else 4
    expert = 3 * config.hidden_size * config.moe_intermediate_size * INT4_BYTES
    sparse = max(0, config.num_hidden_layers - config.first_k_dense_replace)
    others = sum(tensor.numel for tensor in checkpoint_layout(config, mtp=False)
                 if tensor.kind not in ("expert", "embedding"))
    weights = others * itemsize + sparse * hit * expert
    if shape.decodes:
        latents = shape.batch * shape.context * kv_bytes_per_token(config, itemsize)
        return Cost(shape.batch * decode_flops_per_token(config, shape.context), weights + latents)
    head = 2 * config.vocab_size * config.hidden_size  # of each prompt's last token alone
    flops = shape.tokens * (forward_flops_per_token(config, shape.context) - head) + shape.batch * head
    return Cost(flops, weights * -(-shape.tokens // CHUNK_TOKENS))


def _expected_hit(config: ModelConfig, shape: Shape) -> float:
    """Experts that tokens hit which like all alike."""
    tokens = min(shape.tokens, CHUNK_TOKENS)
    return config.n_routed_experts * (1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens)


def _compile() -> None:
    """All kernels that have a compiler of their own, side by side."""
    native.available()
    if torch.cuda.is_available():
        names = [path.stem for path in sorted(Path(ops.__file__).parent.glob("*.cu"))]
        with ThreadPoolExecutor() as pool:
            list(pool.map(library, names))


def _with(config: ModelConfig, **changes: int) -> ModelConfig:
    return config.model_copy(update=changes)


def _weights_of(model: Transformer) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
