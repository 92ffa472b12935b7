"""Replay of a published trace of conversations (Mooncake) with the prefix cache on and off.

A line of the trace has input and output lengths and the ids of its prompt's blocks of 512 tokens: equal ids mean equal
text. Lengths are scaled so that the longest prompt fits the model: a block of the trace becomes one block of our cache,
filled with tokens drawn from its id. Requests come as fast as the engine takes them.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moonbase.bench.rows import plain_row
from moonbase.engine import Engine, Sampling
from moonbase.engine.cache import BLOCK_TOKENS
from moonbase.errors import UserError
from moonbase.model import Transformer

TRACE_BLOCK = 512
"""Tokens behind one block id of the trace."""


@dataclass(frozen=True)
class TraceRequest:
    """One conversation turn, scaled."""

    prompt_ids: list[int]
    new_tokens: int


def default_trace() -> Path | None:
    """The trace in the folder of shared data, where there is one (MOONBASE_SHARED)."""
    folder = os.environ.get("MOONBASE_SHARED")
    path = Path(folder or ".") / "mooncake" / "conversation_trace.jsonl.gz"
    return path if folder and path.is_file() else None


def read_trace(path: Path, count: int, vocab_size: int, context: int) -> list[TraceRequest]:
    """The first `count` requests. Raises UserError naming the line that is none."""
    opened = gzip.open if path.suffix == ".gz" else open
    rows = []
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for line in itertools.islice(lines, count):
                row = json.loads(line)
                rows.append((int(row["input_length"]), int(row["output_length"]), [int(id) for id in row["hash_ids"]]))
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: line {len(rows) + 1}: not a request of a trace: {error!r}") from None
    if not rows:
        raise UserError(f"{path}: no requests")
    # One block of the trace per cache block, or less where even that is too long for the model.
    longest = max(length for length, _, _ in rows)
    most_new = max(output for _, output, _ in rows)
    scale = min(BLOCK_TOKENS / TRACE_BLOCK, (context - 2) / (longest + most_new))
    room = context - max(1, int(most_new * scale)) - 1
    per_block = max(1, int(TRACE_BLOCK * scale))
    requests = []
    for length, output, ids in rows:
        tokens = [token for id in ids for token in _tokens_of(id, per_block, vocab_size)]
        requests.append(TraceRequest(tokens[: max(1, min(room, int(length * scale)))], max(1, int(output * scale))))
    return requests


def _tokens_of(block: int, count: int, vocab_size: int) -> list[int]:
    chance = random.Random(block)
    return [chance.randrange(vocab_size) for _ in range(count)]


def replay(model: Transformer, tokenizer: Any, requests: list[TraceRequest], prefix_cache: bool,
           max_running: int) -> dict[str, Any]:
    """Run all requests. Returns seconds, the replies' tokens, and the engine's counters."""
    engine = Engine(model, tokenizer, prefix_cache=prefix_cache, max_running=max_running)
    pending = [engine.request(one.prompt_ids, Sampling(max_tokens=one.new_tokens, ignore_eos=True))
               for one in requests]
    started = time.perf_counter()
    for request in pending:
        engine.submit(request)
    while engine.busy:
        engine.step()
        engine.fetch()
    seconds = time.perf_counter() - started
    statistics = engine.statistics
    assert statistics.blocks_used == 0, "blocks without an owner are left"
    return {"seconds": seconds, "ids": [request.output_ids for request in pending],
            "hit_rate": statistics.cached_tokens / max(1, statistics.prompt_tokens)}


def repeated_share(requests: list[TraceRequest]) -> float:
    """Share of prompt tokens in whole blocks that an earlier prompt began with: what a cache without end could find."""
    seen: set[tuple[int, ...]] = set()
    found = total = 0
    for request in requests:
        ids = tuple(request.prompt_ids)
        starts = [ids[:end] for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS)]
        # A prompt's last token is always computed.
        sought = starts[: (len(ids) - 1) // BLOCK_TOKENS]
        found += BLOCK_TOKENS * sum(1 for _ in itertools.takewhile(seen.__contains__, sought))
        seen.update(starts)
        total += len(ids)
    return found / total


def measure_trace(name: str, model: Transformer, tokenizer: Any, path: Path, count: int = 200,
                  max_running: int = 16) -> list[dict[str, Any]]:
    """Rows: requests/s with the cache beside without it, and the share of prompt tokens that it found."""
    requests = read_trace(path, count, model.config.vocab_size, model.config.max_position_embeddings)
    # What is paid once (kernels compiled, memory touched) is paid before either side is timed.
    replay(model, tokenizer, requests[:4], True, max_running)
    cold = replay(model, tokenizer, requests, False, max_running)
    warm = replay(model, tokenizer, requests, True, max_running)
    same = sum(one == other for one, other in zip(cold["ids"], warm["ids"], strict=True))
    repeated = repeated_share(requests)
    shape = f"{name}, first {len(requests)} of {path.name.split('.')[0]}"
    ours, theirs = (len(requests) / result["seconds"] for result in (warm, cold))
    return [
        plain_row(shape, "requests/s", ours, theirs, "prefix cache off"),
        plain_row(shape, "% of prompt tokens from the cache", 100 * warm["hit_rate"]),
        plain_row(shape, "% of prompt tokens that the trace repeats", 100 * repeated),
        plain_row(shape, "% of replies with the same tokens", 100 * same / len(requests)),
    ]
