"""Any endpoint of OpenAI's chat API: /v1/chat/completions, spoken to over httpx.

Endpoints differ. Reasoning comes as `reasoning_content` or `reasoning` and is sent back under the name it came with;
of the optional fields, those that an endpoint turns down are left out from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moonbase.agents.models.base import CallOptions, Completion, Message, ModelError, Price, Usage
from moonbase.agents.models.endpoint import (
    Endpoint,
    EndpointModel,
    as_arguments,
    as_count,
    as_dict,
    as_list,
    as_text,
    is_object,
)

REASONING_FIELDS = ("reasoning_content", "reasoning")
OPTIONAL = ("stream_options", "temperature", "top_p", "seed", "logprobs", "return_token_ids")
"""Fields of a request without which a reply is still one; the endpoint's own values hold then."""
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
_FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls",
                   "max_tokens": "length", "end_turn": "stop", "eos": "stop", "tool_use": "tool_calls"}  # fmt: skip


class OpenAIModel(EndpointModel):
    """A model behind an OpenAI-compatible URL."""

    path = "/chat/completions"

    def __init__(
        self, name: str, url: str, *, api_key: str | None = None, price: Price = Price(),
        context_tokens: int | None = None, extra: Mapping[str, Any] = {}, token_ids: bool = False,
    ) -> None:
        """`url`: with its `/v1`. `extra`: more fields of every request, such as `{"thinking": {"type": "disabled"}}`.
        `token_ids`: ask for ids and log-probabilities of the tokens, which some engines give (vLLM's
        `return_token_ids`). Raises UserError for an address or a key that cannot be one."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        super().__init__(name, Endpoint(url.rstrip("/"), headers), price, context_tokens)
        self.extra = dict(extra) | ({"return_token_ids": True, "logprobs": True} if token_ids else {})
        self._reasoning_field = REASONING_FIELDS[0]

    def _body(self, messages: list[Message], tools: list[dict[str, Any]], options: CallOptions) -> dict[str, Any]:
        refused = self.endpoint.refused
        body: dict[str, Any] = {
            "model": self.name, "messages": [self._sent(message) for message in messages], "stream": True,
            "stream_options": {"include_usage": True}, "temperature": options.temperature, "top_p": options.top_p,
            "max_completion_tokens" if "max_tokens" in refused else "max_tokens": options.max_tokens,
        }  # fmt: skip
        if options.seed is not None:
            body["seed"] = options.seed
        if tools:
            choice = options.tool_choice
            named = choice not in ("auto", "none", "required")
            body |= {"tools": tools, "tool_choice": {"type": "function", "function": {"name": choice}} if named
                     else choice}
        body |= self.extra
        return {name: value for name, value in body.items() if name not in OPTIONAL or name not in refused}

    def _sent(self, message: Message) -> Message:
        """A message without what is not of this API."""
        sent = {name: message[name] for name in _MESSAGE_FIELDS if name in message}
        reasoning = message.get("reasoning_content")
        if reasoning and "reasoning_content" not in self.endpoint.refused:
            sent[self._reasoning_field] = reasoning
        return sent

    def _answer(self) -> _Answer:
        return _Answer()

    def _optional(self, error: ModelError, body: Mapping[str, Any]) -> list[str]:
        optional = [name for name in OPTIONAL if name in body]
        # A limit there must be: one name of it goes only where the error asks for the other.
        if "max_tokens" in body and "max_completion_tokens" in str(error):
            optional.append("max_tokens")
        if any(self._reasoning_field in message for message in body["messages"]):
            # Remembered under one name: the endpoint takes no reasoning at all.
            optional.append("reasoning_content")
        return optional

    def _read(self, answer: _Answer) -> Completion:
        completion = read_completion(answer.whole(), self.name)
        if answer.reasoning_field is not None:
            self._reasoning_field = answer.reasoning_field
        return completion


class _Answer:
    """The events of an answer, put together to what it would be in one piece."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {}
        self.message: dict[str, Any] = {}
        self.texts: dict[str, list[str]] = {}
        self.calls: dict[Any, dict[str, Any]] = {}
        self.lists: dict[str, list[Any]] = {}
        self.finish_reason: Any = None
        self.done = self.streamed = False
        self.reasoning_field: str | None = None

    def take(self, event: dict[str, Any]) -> None:
        """The next event."""
        if event.get("done") is True:
            self.done = True
            return
        choices = as_list(event.get("choices"))
        choice = as_dict(choices[0]) if choices else {}
        for name in ("model", "usage", "prompt_token_ids"):
            if event.get(name):
                self.body[name] = event[name]
        if "delta" not in choice:
            if "message" in choice:
                self.body |= event
            self._note_reasoning(as_dict(choice.get("message")))
            return
        self.streamed = True
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = as_dict(choice["delta"])
        self._note_reasoning(delta)
        for name in ("content", "refusal", *REASONING_FIELDS):
            if delta.get(name):
                self.texts.setdefault(name, []).append(as_text(delta[name]))
        for call in as_list(delta.get("tool_calls")):
            self._take_call(as_dict(call))
        for name, entries in (("token_ids", choice.get("token_ids")),
                              ("logprobs", as_dict(choice.get("logprobs")).get("content"))):
            self.lists.setdefault(name, []).extend(as_list(entries))
        if choice.get("prompt_token_ids"):
            self.body["prompt_token_ids"] = choice["prompt_token_ids"]

    def whole(self) -> dict[str, Any]:
        """The answer in one piece. Raises ModelError for a stream that broke off."""
        if not self.streamed:
            return self.body
        if self.finish_reason is None and not self.done:
            raise ModelError("connection", "the endpoint closed the connection in the middle of the answer")
        message: dict[str, Any] = {name: "".join(texts) for name, texts in self.texts.items()}
        message["tool_calls"] = [
            {"id": call.get("id"), "function": {"name": call["name"], "arguments": "".join(call["arguments"])}}
            for call in self.calls.values()
        ]
        choice = {"message": message, "finish_reason": self.finish_reason, "token_ids": self.lists.get("token_ids"),
                  "logprobs": {"content": self.lists.get("logprobs")}}
        return self.body | {"choices": [choice]}

    def _take_call(self, part: dict[str, Any]) -> None:
        """One element of a delta's `tool_calls`. Some endpoints send no index, or the same for all."""
        key, id, function = part.get("index"), part.get("id"), as_dict(part.get("function"))
        id = id if isinstance(id, str) else ""
        if not isinstance(key, int):
            key = len(self.calls) if id or not self.calls else next(reversed(self.calls))
        known = self.calls.get(key)
        if known is not None and id and known["id"] and id != known["id"] and function.get("name"):
            # Another call under the same index: what follows is of this one.
            self.calls[key, known["id"]], known = self.calls.pop(key), None
        if known is None:
            known = self.calls.setdefault(key, {"id": "", "name": "", "arguments": []})
        known["id"] = known["id"] or id
        known["name"] = known["name"] or as_text(function.get("name"))
        arguments = function.get("arguments")
        if arguments is not None:
            known["arguments"].append(arguments if isinstance(arguments, str) else as_arguments(arguments))

    def _note_reasoning(self, message: dict[str, Any]) -> None:
        for name in REASONING_FIELDS:
            if self.reasoning_field is None and isinstance(message.get(name), str) and message[name]:
                self.reasoning_field = name


def read_completion(body: dict[str, Any], name: str) -> Completion:
    """A whole chat completion as every model here gives it. Raises ModelError for one that has no reply."""
    choices = as_list(body.get("choices"))
    choice = as_dict(choices[0]) if choices else {}
    given = choice.get("message")
    if not isinstance(given, dict):
        what = "choices" if not choices else "message"
        raise ModelError("server", f"{name}: the answer has no {what}")
    finish = choice.get("finish_reason")
    if finish in ("content_filter", "refusal"):
        raise ModelError("refused", f"{name}: the endpoint's filter held the reply back")
    notes: list[str] = []
    message: Message = {"role": "assistant", "content": as_text(given.get("content"))}
    if not message["content"] and given.get("refusal"):
        message["content"] = as_text(given["refusal"])
        notes.append("the model refuses")
    reasoning = next((as_text(given[field]) for field in REASONING_FIELDS if given.get(field)), "")
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = _calls(given, notes, cut=finish == "length")
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    reason = _FINISH_REASONS.get(finish, "stop") if isinstance(finish, str) else "stop"
    if reason != "length":
        # Some say `stop` beside calls, or `tool_calls` without any.
        reason = "tool_calls" if calls else "stop"
    model = body.get("model")
    completion = Completion(message, reason, _usage(body.get("usage")), model if isinstance(model, str) else name,
                            notes=notes)
    completion.prompt_ids = _ids(body.get("prompt_token_ids") or choice.get("prompt_token_ids"))
    completion.token_ids = _ids(choice.get("token_ids"))
    logprobs = [as_dict(entry).get("logprob") for entry in as_list(as_dict(choice.get("logprobs")).get("content"))]
    # Those of some of the tokens (moonbase gives the content's) cannot be told apart without ids.
    if completion.token_ids is not None and len(logprobs) == len(completion.token_ids) and all(
            isinstance(value, int | float) for value in logprobs):
        completion.logprobs = [float(value) for value in logprobs]
    return completion


def _calls(given: dict[str, Any], notes: list[str], cut: bool) -> list[dict[str, Any]]:
    """The calls of a reply; ids that are absent or used twice are made. Where the reply was `cut`, a call that is not
    whole is none."""
    calls: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, entry in enumerate(as_list(given.get("tool_calls"))):
        function = as_dict(as_dict(entry).get("function"))
        called, arguments = as_text(function.get("name")).strip(), as_arguments(function.get("arguments"))
        if cut and not is_object(as_text(function.get("arguments"))):
            notes.append(f"the call of {called or 'a tool'} was cut off")
            continue
        if not called:
            notes.append("a call without the name of a tool was left out")
            continue
        id = as_dict(entry).get("id")
        if not isinstance(id, str) or not id or id in seen:
            notes.append("a call had no id of its own")
            id = f"call_{number}"
            while id in seen:
                id += "_"
        seen.add(id)
        calls.append({"id": id, "type": "function", "function": {"name": called, "arguments": arguments}})
    return calls


def _usage(value: Any) -> Usage:
    usage = as_dict(value)
    prompt = as_count(usage.get("prompt_tokens"))
    # DeepSeek and Moonshot name cached tokens at other places.
    cached = (as_count(as_dict(usage.get("prompt_tokens_details")).get("cached_tokens"))
              or as_count(usage.get("cached_tokens")) or as_count(usage.get("prompt_cache_hit_tokens")))
    return Usage(prompt, as_count(usage.get("completion_tokens")), min(cached, prompt))


def _ids(value: Any) -> list[int] | None:
    ids = as_list(value)
    return ids if ids and all(isinstance(id, int) and not isinstance(id, bool) for id in ids) else None
