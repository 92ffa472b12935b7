"""Who answered: pinned endpoints, and what a log tells of hosted models. Inspect's own providers talk to a small server
here that answers as a router does."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moonbase.errors import UserError
from moonbase.evals.providers.endpoints import check_model_name, pinned_host, told_precision
from moonbase.evals.records import ModelCall

PIN = {"provider": {"only": ["deepinfra/fp8"], "allow_fallbacks": False, "quantizations": ["fp8"]}}


@pytest.mark.parametrize(("name", "arguments", "base_url"), [
    ("moonbase/runs/pico", None, None), ("replay/xstest:gpt4", None, None), ("openai/gpt-4.1-2025-04-14", None, None),
    ("anthropic/claude-opus-4-5", None, None), ("together/moonshotai/Kimi-K2-Instruct", None, None),
    ("openai-api/deepseek/deepseek-chat", None, "https://api.deepseek.com"), ("vllm/moonshotai/Kimi-K2.5", None, None),
    ("openrouter/moonshotai/kimi-k2.5", PIN, None),
    ("openrouter/moonshotai/kimi-k2.5:free", {"provider": {"order": ["Novita"], "allow_fallbacks": False}}, None),
    ("hf-inference-providers/moonshotai/Kimi-K2.5:novita", None, None)])  # fmt: skip
def test_one_host_is_let_through(name: str, arguments: Any, base_url: str | None) -> None:
    check_model_name(name, arguments, base_url)


@pytest.mark.parametrize(("name", "arguments", "base_url", "mend"), [
    ("kimi-k2", None, None, "PROVIDER/MODEL"),
    ("openrouter/moonshotai/kimi-k2.5", None, None, "--model-arg provider="),
    ("openrouter/moonshotai/kimi-k2.5", {"provider": {"order": ["Novita"]}}, None, "--model-arg provider="),
    ("openrouter/moonshotai/kimi-k2.5", {"provider": {"order": ["Novita", "Groq"], "allow_fallbacks": False}}, None,
     "--model-arg provider="),
    ("openrouter/moonshotai/kimi-k2.5", {"provider": {"only": ["Novita", "Groq"]}}, None, "--model-arg provider="),
    ("openrouter/moonshotai/kimi-k2.5", {"provider": {"sort": "price"}}, None, "--model-arg provider="),
    ("openrouter/moonshotai/kimi-k2.5:nitro", PIN, None, "leave it out"),
    ("openrouter/moonshotai/kimi-k2.5", PIN | {"models": ["openai/gpt-4.1"]}, None, "leave it out"),
    ("openrouter/auto", PIN, None, "name the one"), ("openrouter/openrouter/auto", PIN, None, "name the one"),
    ("together/auto", None, None, "name the one"), ("azureai/model-router", None, None, "name the one"),
    ("hf-inference-providers/moonshotai/Kimi-K2.5", None, None, ":HOST"),
    ("hf-inference-providers/moonshotai/Kimi-K2.5:fastest", None, None, ":HOST"),
    ("openai-api/openrouter/moonshotai/kimi-k2.5", None, None, "use openrouter/MODEL"),
    ("openai/moonshotai/kimi-k2.5", None, "https://openrouter.ai/api/v1", "use openrouter/MODEL"),
    ("litellm-proxy/kimi", None, None, "the host's own")])  # fmt: skip
def test_a_router_that_chooses_is_refused(name: str, arguments: Any, base_url: str | None, mend: str) -> None:
    with pytest.raises(UserError) as refused:
        check_model_name(name, arguments, base_url)
    line = str(refused.value)
    assert name in line and mend in line and "\n" not in line


def test_what_a_pin_says() -> None:
    assert pinned_host("openrouter/moonshotai/kimi-k2.5", PIN) == "deepinfra/fp8" and told_precision(PIN) == "fp8"
    assert pinned_host("hf-inference-providers/moonshotai/Kimi-K2.5:novita") == "novita"
    assert pinned_host("openai/gpt-4.1") is None and told_precision({}) is None


# --- logs of hosted models --------------------------------------------------------------------------------------------


class Router(BaseHTTPRequestHandler):
    """Answers a chat as OpenRouter does; the question says what happens."""

    requests: list[dict[str, Any]]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append(request)
        question = request["messages"][-1]["content"]
        if question == "forbidden":
            body, status = {"error": {"message": "not here", "code": 403}}, 403
        else:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}
            if question == "filtered":
                choice |= {"finish_reason": "content_filter", "message": {"role": "assistant", "content": ""}}
            if question == "refused":
                choice["message"] |= {"content": None, "refusal": "I cannot."}
            status, body = 200, {
                "id": "gen-1", "object": "chat.completion", "created": 1, "model": "moonshotai/kimi-k2.5-0127",
                "provider": "DeepInfra", "system_fingerprint": "fp_123", "choices": [choice],
                "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def router() -> Iterator[str]:
    Router.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Router)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run(model: Any, logs: Path, inputs: list[str], **more: Any) -> Any:
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.log import read_eval_log
    from inspect_ai.solver import generate

    task = Task(dataset=[Sample(id=text, input=text) for text in inputs], solver=generate())
    log = eval(task, model=model, log_dir=str(logs), display="none", fail_on_error=False, max_retries=0, **more)[0]
    return read_eval_log(log.location)


def test_what_a_router_tells_is_in_the_record(router: str, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
    pytest.importorskip("openai", reason="Inspect's provider needs the openai package")
    from inspect_ai.model import get_model

    from moonbase.evals.providers.provenance import model_call, resolved_model

    model = get_model("openrouter/moonshotai/kimi-k2.5", base_url=router, api_key="unused", memoize=False, **PIN)
    log = run(model, tmp_path, ["plain", "filtered", "refused", "forbidden"], log_model_api=True, temperature=0.3,
              max_tokens=9, seed=5)  # fmt: skip
    samples = {sample.id: sample for sample in log.samples}
    assert Router.requests[0]["provider"] == PIN["provider"]
    name = log.eval.model
    assert model_call(samples["plain"], name, log.eval.model_args) == ModelCall(
        provider="DeepInfra", precision="fp8", fingerprint="fp_123", stop_reason="stop",
        decoding={"temperature": 0.3, "max_tokens": 9, "seed": 5})
    assert resolved_model(samples["plain"], name) == "moonshotai/kimi-k2.5-0127"
    assert model_call(samples["filtered"], name).api_signal == "content_filter"
    assert model_call(samples["refused"], name).api_signal == "refusal"
    forbidden = model_call(samples["forbidden"], name, log.eval.model_args)
    assert forbidden.api_signal == "403" and forbidden.stop_reason is None
    assert forbidden.provider == "deepinfra/fp8"
    # The same from the log as it stands on the disk.
    with zipfile.ZipFile(log.location) as files:
        for id, sample in samples.items():
            stored = json.loads(files.read(f"samples/{id}_epoch_1.json"))
            assert model_call(stored, name, PIN) == model_call(sample, name, PIN)
            assert resolved_model(stored, name) == resolved_model(sample, name)


def test_an_evaluation_records_what_a_host_tells(router: str, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
    pytest.importorskip("openai", reason="Inspect's provider needs the openai package")
    from moonbase.evals.proof.rescoring import Rescorer
    from moonbase.evals.records import read_records
    from moonbase.evals.run import run_suite
    from moonbase.evals.suite import Suite

    rows = "id,prompt\n1,plain\n2,refused\n3,filtered\n"
    (tmp_path / "small.csv").write_text(rows)
    suite = Suite.model_validate({
        "name": "small", "title": "small", "metric": "complied", "judges": ["rules"], "tasks": [{
            "name": "small", "source": "file:small", "metric": "complied",
            "params": {"file": "small.csv", "sha256": hashlib.sha256(rows.encode()).hexdigest()}}]})
    model = "openai-api/local/kimi-k2.5"
    run_suite(suite, [model], tmp_path / "out", data=tmp_path, quiet=True,
              model_args={model: {"base_url": router, "api_key": "unused"}})
    found = {record.item: record for record in read_records(tmp_path / "out" / "records.jsonl")}
    assert {(record.call.provider, record.call.fingerprint) for record in found.values()} == {("DeepInfra", "fp_123")}
    assert [(found[id].call.api_signal, found[id].label) for id in "23"] == [
        ("refusal", "api_block"), ("content_filter", "api_block")]
    assert found["1"].call.api_signal is None and found["1"].label != "api_block"
    # Whoever labels the outputs again, from the records alone, comes to the same.
    again = Rescorer(SimpleNamespace(seeds=(), source=lambda task: "file:small"))
    assert [again.check(record) for record in found.values()] == [[], [], []] and again.rescored == 3


def test_a_log_without_raw_calls_tells_what_it_can(router: str, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
    pytest.importorskip("openai", reason="Inspect's provider needs the openai package")
    from inspect_ai.model import get_model

    from moonbase.evals.providers.provenance import model_call, resolved_model

    model = get_model("openai-api/local/kimi-k2.5", base_url=router, api_key="unused", memoize=False)
    log = run(model, tmp_path, ["plain"], log_model_api=False)
    call = model_call(log.samples[0], log.eval.model)
    assert (call.provider, call.fingerprint, call.precision, call.stop_reason) == ("local", None, None, "stop")
    assert resolved_model(log.samples[0]) == "moonshotai/kimi-k2.5-0127"


def test_a_judge_is_not_the_one_who_answered(tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.log import read_eval_log
    from inspect_ai.model import ModelOutput, ModelUsage, get_model
    from inspect_ai.scorer import model_graded_qa
    from inspect_ai.solver import generate

    from moonbase.evals.providers.provenance import answering_event

    def says(name: str, text: str) -> Any:
        output = ModelOutput.from_content(f"resolved-{name}", text)
        # Without, Inspect would count them, with a vocabulary from the network.
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return get_model(f"mockllm/{name}", memoize=False, custom_outputs=[output])

    task = Task(dataset=[Sample(input="2+2?", target="4")], solver=generate(), scorer=model_graded_qa())
    log = eval(task, model=says("solver", "4"), model_roles={"grader": says("judge", "GRADE: C")},
               log_dir=str(tmp_path), display="none")[0]  # fmt: skip
    sample = read_eval_log(log.location).samples[0]
    assert sum(event.event == "model" for event in sample.events) == 2
    assert answering_event(sample, log.eval.model)["output"]["model"] == "resolved-solver"
    assert answering_event(sample)["output"]["model"] == "resolved-solver"


@pytest.mark.parametrize(("model", "base_url", "provider"), [
    ("anthropic/claude-opus-4-5", None, "anthropic"),
    ("anthropic/k2", "http://user:word@10.0.0.7:8000", "10.0.0.7:8000"),
    ("vllm/k2", "http://127.0.0.1:8000/v1", "127.0.0.1:8000"),
    ("openai-api/deepseek/deepseek-chat", "https://api.deepseek.com", "deepseek")])  # fmt: skip
def test_another_address_is_not_called_by_the_provider_s_name(model: str, base_url: str | None, provider: str) -> None:
    from moonbase.evals.providers.provenance import model_call

    sample = {"events": [{"event": "model", "model": model, "output": {"choices": [{"stop_reason": "stop"}]}}]}
    assert model_call(sample, model, {}, base_url).provider == provider


def test_what_another_version_wrote_is_not_passed_over() -> None:
    """To go on without it would make a call with a digest of its weights one of an unknown host."""
    from moonbase.evals.providers.provenance import model_call

    def sample(**own: Any) -> dict[str, Any]:
        return {"events": [{"event": "model", "model": "moonbase/runs/pico", "output": {
            "choices": [{"stop_reason": "stop"}], "metadata": {"moonbase": own}}}]}

    assert model_call(sample(provider="moonbase", weights_digest="sha256:1")).weights_digest == "sha256:1"
    with pytest.raises(UserError, match=r"moonbase/runs/pico: metadata.*colour.*the version that wrote it"):
        model_call(sample(provider="moonbase", weights_digest="sha256:1", colour="red"))
