"""Who answered, as far as a log tells, for any provider of Inspect.

Models of this package say so themselves (`ModelOutput.metadata["moonbase"]`). Of hosted ones the raw response names the
host behind a router, the `system_fingerprint` and the model that was meant; Inspect keeps it in the log only where the
run says `log_model_api=True`, and without it those fields stay None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from moonbase.errors import UserError
from moonbase.evals.providers.endpoints import pinned_host, told_precision
from moonbase.evals.records import ModelCall

if TYPE_CHECKING:
    from inspect_ai.log import EvalSample

JsonObject = Mapping[str, Any]

DECODING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop_seqs", "frequency_penalty", "presence_penalty",
            "logit_bias", "num_choices", "best_of", "reasoning_effort", "reasoning_tokens", "reasoning_history",
            "effort", "verbosity", "parallel_tool_calls", "extra_body")  # fmt: skip
"""Fields of Inspect's GenerateConfig that change what a model says."""
_STATUS = re.compile(r"\b(?:status(?:[_ ]code)?|error(?: code)?|http)\D{0,3}([45]\d\d)\b", re.IGNORECASE)


def answering_event(sample: EvalSample | JsonObject, model: str | None = None) -> JsonObject:
    """The call that made a sample's answer: the last one of the evaluated model, not of a judge or another role.

    `sample`: as Inspect reads it, or as it stands in the log. `model`: the evaluated one, as `log.eval.model` names it;
    None takes any that has no role. Empty where there is none.
    """
    return _answering(_as_json(sample), model)


def model_call(
    sample: EvalSample | JsonObject, model: str | None = None, model_args: JsonObject | None = None,
    base_url: str | None = None,
) -> ModelCall:
    """Facts about the call that made a sample's answer.

    `model`, `model_args`, `base_url`: of the evaluation (`log.eval`); they tell the host that a router was pinned to,
    and that another host was called than the provider's own. Raises UserError where a model of this package says what
    this version does not understand.
    """
    sample = _as_json(sample)
    event = _answering(sample, model)
    output = _output(sample, event)
    own = (output.get("metadata") or {}).get("moonbase")
    if isinstance(own, Mapping):
        try:
            return ModelCall.model_validate(own)
        except ValidationError as error:
            # To go on without it would lose the digest of the weights, and nobody would see that.
            first = error.errors()[0]
            raise UserError(f"a call of {event.get('model') or model or 'a model'}: metadata['moonbase'] is not what "
                            f"this version writes there ({'.'.join(map(str, first['loc']))}: {first['msg']}); read the "
                            "log with the version that wrote it") from None
    name = model or event.get("model") or ""
    response, request = _raw(event, "response"), _raw(event, "request")
    sent = {"provider": (request.get("extra_body") or {}).get("provider")} | dict(model_args or {})
    trouble = _trouble(sample, event)
    choices = output.get("choices") or [{}]
    # A call that failed has an output all the same, an empty one that claims to have stopped by itself.
    stop_reason = None if trouble else choices[0].get("stop_reason")
    return ModelCall(
        provider=_text(response.get("provider")) or pinned_host(name, sent) or _host_of(name, base_url),
        precision=_text(response.get("quantization")) or told_precision(sent),
        fingerprint=_text(response.get("system_fingerprint")), decoding=decoding_of(event), stop_reason=stop_reason,
        api_signal=_signal(stop_reason, response, trouble))


def resolved_model(sample: EvalSample | JsonObject, model: str | None = None) -> str | None:
    """The name by which the host calls the model that answered: aliases such as `-latest` are resolved in it."""
    sample = _as_json(sample)
    event = _answering(sample, model)
    return _text(_raw(event, "response").get("model")) or _text(_output(sample, event).get("model"))


def decoding_of(event: JsonObject) -> dict[str, Any]:
    """What was set for a call."""
    config = event.get("config") or {}
    return {name: config[name] for name in DECODING if config.get(name) is not None}


def _as_json(sample: EvalSample | JsonObject) -> JsonObject:
    if isinstance(sample, Mapping):
        return sample
    events = [event.model_dump(mode="json", exclude={"input", "tools"})
              for event in sample.events or () if event.event == "model"]
    return {"events": events, "output": sample.output.model_dump(mode="json") if sample.output else None,
            "error": sample.error.model_dump(mode="json") if sample.error else None}


def _answering(sample: JsonObject, model: str | None) -> JsonObject:
    for event in reversed(sample.get("events") or ()):
        if event.get("event") == "model" and not event.get("role") and model in (None, event.get("model")):
            return event
    return {}


def _output(sample: JsonObject, event: JsonObject) -> JsonObject:
    return event.get("output") or sample.get("output") or {}


def _raw(event: JsonObject, side: str) -> JsonObject:
    raw = (event.get("call") or {}).get(side)
    return raw if isinstance(raw, Mapping) else {}


def _host_of(name: str, base_url: str | None = None) -> str:
    """openai/gpt-4.1 → openai; openai-api/deepseek/deepseek-chat → deepseek; anthropic/claude-opus-4-5 at another
    address → that address, for whoever answers there is not Anthropic."""
    parts = name.split("/")
    if parts[0].startswith("openai-api") and len(parts) > 2:
        return parts[1]
    return (urlsplit(base_url).netloc.rpartition("@")[2] if base_url else "") or parts[0]


def _signal(stop_reason: str | None, response: JsonObject, trouble: str) -> str | None:
    """What the interface itself said of a refusal: a filter, a refusal, or the status of an error."""
    if stop_reason == "content_filter":
        return "content_filter"
    for reply in _choices(response):
        message = reply.get("message")
        if isinstance(message, Mapping) and message.get("refusal"):
            return "refusal"
        if "content_filter" in (reply.get("finish_reason"), reply.get("native_finish_reason")):
            return "content_filter"
    if response.get("stop_reason") == "refusal":
        return "refusal"
    status = _STATUS.search(trouble)
    return status[1] if status else None


def _trouble(sample: JsonObject, event: JsonObject) -> str:
    """What went wrong with a call; where there was none, with its sample."""
    if event:
        return event.get("error") or ""
    return (sample.get("error") or {}).get("message") or ""


def _choices(response: JsonObject) -> Iterator[JsonObject]:
    choices = response.get("choices")
    yield from (choice for choice in (choices if isinstance(choices, list) else ()) if isinstance(choice, Mapping))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
