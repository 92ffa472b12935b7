"""The server under load: many streaming clients over HTTP against `moonbase serve` in a process of its own, then a
trace replayed with the prefix cache on and off.

The load is closed-loop: every client sends its next request when the last has been answered. Clients share a system
prompt, as real ones do. Afterwards the server must be empty: no running request, no block without an owner.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moonbase.bench.networks import check_room
from moonbase.bench.rows import note, plain_row
from moonbase.bench.trace import default_trace, measure_trace
from moonbase.checkpoint import save_weights
from moonbase.data import Tokenizer, train_tokenizer
from moonbase.errors import UserError
from moonbase.model import Transformer
from moonbase.recipe import load_recipe
from moonbase.sizes import sizes

CLIENTS = 64
SECONDS = 60.0
NEW_TOKENS = 32
METHOD = (f"Load over HTTP from as many clients, each of which sends its next request, for up to {NEW_TOKENS} tokens, "
          "when the last was answered. Rows of a trace: Mooncake's conversations in their order, scaled to the model, "
          "as fast as the engine takes them, with the prefix cache and without.")
_QUESTIONS = ("What is {a} times {b}?", "Add {a} and {b}, then explain the sum in one line.",
              "Write a Python function that divides {a} by {b}.", "Is {a} larger than {b}? Say why.")


def measure(
    preset: str, peer: str | None, clients: int = CLIENTS, seconds: float = SECONDS, trace: Path | None = None,
    trace_requests: int = 200,
) -> list[dict[str, Any]]:
    """Rows for load and trace. Raises UserError where the server cannot be started."""
    trace, peer_command = trace or default_trace(), _peer_command() if peer else None
    # Random weights in fp32 here, and on a CPU again in the server.
    copies = 1 if torch.cuda.is_available() else 2
    check_room("serve", preset, copies * 4 * sizes(load_recipe(preset).model).parameters, False)
    if trace is None:
        note("no trace: set MOONBASE_SHARED to a folder with mooncake/conversation_trace.jsonl.gz to replay one")
    with tempfile.TemporaryDirectory(prefix="moonbase-bench-") as temporary:
        folder = Path(temporary) / "model"
        model, tokenizer = _write_model(preset, folder)
        with _server([sys.executable, "-m", "moonbase", "serve", str(folder), "--model-name", "model"]) as address:
            ours = _seen(asyncio.run(_load(address, "model", clients, seconds)))
            left = _emptied(address)
        theirs = None
        if peer_command:
            with _server([peer_command, "serve", str(folder)]) as address:
                theirs = _seen(asyncio.run(_load(address, str(folder), clients, seconds)))
        rows = _load_rows(f"{preset}, {clients} clients for {seconds:.0f} s", ours, theirs, left)
        if trace:
            rows += measure_trace(preset, model, tokenizer, trace, trace_requests)
    return rows


def _write_model(preset: str, folder: Path) -> tuple[Transformer, Tokenizer]:
    """Random weights with a vocabulary learned from the standard library, as a checkpoint folder."""
    config = load_recipe(preset).model
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    tokenizer = train_tokenizer([path.read_text(encoding="utf-8", errors="replace") for path in sources],
                                min(config.vocab_size, 2048))
    model = Transformer(config).initialize().eval()
    save_weights(model, folder, config)
    tokenizer.save(folder)
    # For peers, which render chats by a file beside the weights.
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    return model, tokenizer


_TEMPLATE = (
    "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
    "{% for message in messages %}<|im_{{ message.role }}|>{{ message.role }}<|im_middle|>{{ message.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)


def _peer_command() -> str:
    command = shutil.which("transformers", path=os.pathsep.join([str(Path(sys.executable).parent),
                                                                 os.environ.get("PATH", "")]))
    if command is None:
        raise UserError("peer transformers is not installed here: pip install 'transformers[serving]'")
    return command


@contextmanager
def _server(command: list[str]) -> Iterator[str]:
    """`command` on a free port of this machine, until it has answered; ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tempfile.TemporaryFile(mode="w+", encoding="utf-8")
    process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while not _healthy(address):
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise UserError(f"{command[-2:]} did not start: {log.read()[-300:].strip()}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _healthy(address: str) -> bool:
    import httpx

    try:
        return httpx.get(f"{address}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


async def _load(address: str, model: str, clients: int, seconds: float) -> dict[str, Any]:
    """What the clients saw: times to the first token, tokens, errors."""
    import httpx

    result: dict[str, Any] = {"first": [], "gaps": [], "tokens": 0, "requests": 0, "errors": []}
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:

        async def talk(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until:
                try:
                    await _one(client, model, chance, result)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    result["errors"].append(repr(error))

        started = time.monotonic()
        await asyncio.gather(*[talk(number) for number in range(clients)])
        result["seconds"] = time.monotonic() - started
    return result


async def _one(client: Any, model: str, chance: random.Random, result: dict[str, Any]) -> None:
    question = chance.choice(_QUESTIONS).format(a=chance.randrange(1000), b=chance.randrange(1, 1000))
    body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": NEW_TOKENS,
            "temperature": 1.0, "seed": chance.randrange(1 << 30), "messages": [{"role": "user", "content": question}]}
    started, last, ended = time.monotonic(), None, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(str(event["error"]))
            if event.get("usage"):
                result["tokens"] += event["usage"]["completion_tokens"]
            ended = ended or any(choice.get("finish_reason") for choice in event["choices"])
            # The first event may carry the role alone.
            if any(choice["delta"].get("content") for choice in event["choices"]):
                now = time.monotonic()
                result["first" if last is None else "gaps"].append(now - (started if last is None else last))
                last = now
    if not ended:
        raise ValueError("the stream ended without a finish_reason")
    result["requests"] += 1


def _emptied(address: str) -> dict[str, float]:
    """Gauges of the idle server: everything should be back at 0."""
    import httpx

    for _ in range(50):
        text = httpx.get(f"{address}/metrics", timeout=10).text
        gauges = {name: float(value) for name, value in re.findall(
            r"^moonbase_(cache_blocks_used|running_requests|queue_requests)(?:\{[^}]*\})? ([\d.e+]+)$", text, re.M)}
        if not any(gauges.values()):
            break
        time.sleep(0.1)
    return gauges


def _seen(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one load, by unit."""
    if result["errors"]:
        note(f"{len(result['errors'])} requests failed, the first: {result['errors'][0]}")
    if not result["first"]:
        raise UserError("no request was answered: " + (result["errors"] or ["nothing came back"])[0])
    first = sorted(result["first"])
    return {
        "tokens/s": result["tokens"] / result["seconds"],
        "requests/s": result["requests"] / result["seconds"],
        "ms to the first token, median": 1000 * statistics.median(first),
        "ms to the first token, p95": 1000 * first[min(len(first) - 1, int(0.95 * len(first)))],
        "ms between pieces, median": 1000 * statistics.median(result["gaps"] or [0.0]),
        "errors": len(result["errors"]),
    }


def _load_rows(
    shape: str, ours: dict[str, float], theirs: dict[str, float] | None, left: dict[str, float]
) -> list[dict[str, Any]]:
    values = {**ours, "blocks left in use": left.get("cache_blocks_used", torch.nan)}
    return [plain_row(shape, unit, value, (theirs or {}).get(unit), "transformers serve",
                      less_is_better=not unit.endswith("/s")) for unit, value in values.items()]
