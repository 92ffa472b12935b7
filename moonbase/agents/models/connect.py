"""From what a user writes after `--model` to a chat model."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from moonbase.agents.models.anthropic import AnthropicModel
from moonbase.agents.models.base import ChatModel, Price
from moonbase.agents.models.openai import OpenAIModel
from moonbase.errors import CheckpointError, UserError

OWN_KEY = "MOONBASE_API_KEY"
"""The key for endpoints of no provider below, `moonbase serve` among them. Theirs go to nobody else."""
OWNER = "moonbase"
"""What `moonbase serve` says its models are `owned_by`: it gives the ids of tokens."""
LOOKUP_SECONDS = 10.0
_FORMS = "a run folder, a checkpoint folder, preset:NAME, http://HOST/v1, http://HOST/v1#NAME, openai:NAME[@URL], " \
         "moonshot:NAME or anthropic:NAME[@URL]"


class Provider(NamedTuple):
    """Where a provider listens, and which environment variable holds its key."""

    url: str
    hosts: tuple[str, ...]
    key: str


PROVIDERS = {
    "openai": Provider("https://api.openai.com/v1", ("openai.com",), "OPENAI_API_KEY"),
    "moonshot": Provider("https://api.moonshot.ai/v1", ("moonshot.ai", "moonshot.cn"), "MOONSHOT_API_KEY"),
    "anthropic": Provider("https://api.anthropic.com", ("anthropic.com",), "ANTHROPIC_API_KEY"),
}


def connect(
    model: str, *, base_url: str | None = None, api_key: str | None = None, price: Price | None = None,
    context_tokens: int | None = None,
) -> ChatModel:
    """A chat model by its address or its folder.

    `context_tokens`: that prompt and reply may have together, for endpoints that do not say it (most providers' own do
    not); where the model has fewer, it has fewer.

    `http://…/v1#NAME` is OpenAI-compatible; without `#NAME` it is asked for its models and the first is taken.
    `openai:NAME@URL` is the same, `anthropic:NAME@URL` speaks Anthropic's API; without a URL (or `base_url`) they are
    the providers' own. A server of moonbase is asked for the ids and log-probabilities of the tokens. Anything else is
    a model for the engine in this process: a run folder, a checkpoint folder, `preset:NAME`. Keys: `api_key`, or the
    environment variable of the provider whose host it is.

    Raises UserError: one line that says what to do.
    """
    connected = _connect(model, base_url, api_key, price or Price())
    if context_tokens is not None:
        if context_tokens < 1:
            raise UserError(f"context_tokens={context_tokens}: a context has at least one token")
        known = connected.context_tokens
        connected.context_tokens = context_tokens if known is None else min(known, context_tokens)
    return connected


def _connect(model: str, base_url: str | None, api_key: str | None, price: Price) -> ChatModel:
    kind, _, rest = model.partition(":")
    if model.startswith(("http://", "https://")):
        address, _, name = model.partition("#")
        return _openai(name, address, api_key, price)
    if kind in PROVIDERS:
        name, _, url = rest.partition("@")
        url = url or base_url or PROVIDERS[kind].url
        if not name:
            raise UserError(f"{model}: the model's name is missing; write {kind}:NAME")
        if kind == "anthropic":
            return AnthropicModel(name, _plain_url(url), api_key=_key(url, api_key), price=price)
        return _openai(name, url, api_key, price)
    if base_url is not None:
        return _openai(model, base_url, api_key, price)
    from moonbase.agents.models.engine import open_engine

    if not model:
        raise UserError(f"the model is missing; give {_FORMS}")
    try:
        return open_engine(model, price=price)
    except CheckpointError as error:
        if os.path.exists(model):
            raise
        raise UserError(f"{error}; a model is {_FORMS}") from None


def _openai(name: str, url: str, api_key: str | None, price: Price) -> OpenAIModel:
    url = _plain_url(url).removesuffix("/chat/completions")
    if not url.endswith("/v1") and url.count("/") == 2:
        # Nothing but a host.
        url += "/v1"
    key = _key(url, api_key)
    context, own = None, False
    if _provider(url) is None or not name:
        name, context, own = _look_up(name, url, key)
    # Others would have to be tried, and some answer a field that they do not know with an error.
    return OpenAIModel(name, url, api_key=key, price=price, context_tokens=context, token_ids=own)


def _plain_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: no address of an endpoint; write http://HOST:PORT/v1")
    return url.rstrip("/")


def _provider(url: str) -> Provider | None:
    """Whose host a URL names."""
    from urllib.parse import urlsplit

    try:
        host = urlsplit(url).hostname or ""
    except ValueError as error:
        raise UserError(f"{url}: no valid address: {error}") from None
    return next((provider for provider in PROVIDERS.values()
                 if any(host == known or host.endswith(f".{known}") for known in provider.hosts)), None)


def _key(url: str, given: str | None) -> str | None:
    """The key for a URL; None where none is needed. A provider's key goes to its own hosts only."""
    provider = _provider(url)
    if given or provider is None:
        return given or os.environ.get(OWN_KEY) or None
    key = os.environ.get(provider.key)
    if not key:
        raise UserError(f"{url} needs an API key: set the environment variable {provider.key}")
    return key


def _look_up(name: str, url: str, key: str | None) -> tuple[str, int | None, bool]:
    """The model's name at an endpoint, its context where the endpoint says so (moonbase and vLLM do), and whether the
    endpoint is a server of moonbase.

    Raises UserError where nothing is there, or no such model. A named model at an endpoint that has no list of models
    is taken at its word.
    """
    entries = _models(url, key, needed=not name)
    if entries is None:
        return name, None, False
    names = [entry["id"] for entry in entries]
    if not names:
        raise UserError(f"{url}/models: the endpoint has no model")
    entry = entries[names.index(name)] if name in names else entries[0] if not name else {}
    # One that is not listed may be an alias; whether it is, the first call will tell.
    context = entry.get("max_model_len")
    if not entry and len(names) == 1 and isinstance(entries[0].get("max_model_len"), int):
        context = entries[0]["max_model_len"]
    context = context if isinstance(context, int) and context > 0 else None
    return name or names[0], context, all(entry.get("owned_by") == OWNER for entry in entries)


def _models(url: str, key: str | None, needed: bool) -> list[dict[str, Any]] | None:
    """The endpoint's list of models; None where there is none and it is not `needed`."""
    try:
        import httpx
    except ImportError:
        raise UserError("talking to a URL needs httpx; install it with pip install 'moonbase[agents]'") from None
    try:
        answer = httpx.get(f"{url}/models", headers={"authorization": f"Bearer {key}"} if key else {},
                           timeout=LOOKUP_SECONDS)
        data = answer.json()["data"] if answer.status_code == 200 else None
        if isinstance(data, list):
            return [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
        raise UserError(f"{url}: no valid address or key: {error}") from None
    except httpx.ConnectError as error:
        raise UserError(f"{url} cannot be reached: {error}; is the server running?") from None
    except (httpx.HTTPError, ValueError, KeyError, TypeError, UnicodeEncodeError):
        answer = None
    if answer is not None and answer.status_code in (401, 403):
        raise UserError(f"{url} refuses the API key (status {answer.status_code}); give another, as api_key or in the "
                        f"environment variable {(_provider(url) or Provider('', (), OWN_KEY)).key}")
    if needed:
        raise UserError(f"{url}/models: no list of models; name one as {url}#NAME")
    return None
