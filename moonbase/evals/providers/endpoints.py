"""Which endpoint answers: a name that leaves that to a router is refused.

Behind one model name a router has several hosts, with different precision, context, templates and filters, and takes
another one whenever it likes. Two runs of one evaluation are then runs of two models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moonbase.errors import UserError

ROUTERS = frozenset({"openrouter", "huggingface", "hf", "requesty", "portkey", "martian", "notdiamond", "unify",
                     "litellm", "aimlapi", "vercel", "helicone"})  # fmt: skip
"""Services that pass requests on, where they are reached as OpenAI-compatible endpoints (`openai-api/SERVICE/...`)."""
ROUTER_HOSTS = ("openrouter.ai", "router.huggingface.co", "requesty.ai", "portkey.ai", "ai-gateway.vercel.sh")
HF_POLICIES = frozenset({"auto", "fastest", "cheapest", "preferred"})
"""Suffixes with which the router of Hugging Face chooses the host by itself."""
OPENROUTER_SHORTCUTS = ("nitro", "floor", "exacto")
"""Suffixes with which OpenRouter chooses the host by itself."""
ROUTING_MODELS = frozenset({"auto", "model-router", "bodybuilder"})
"""Models that are routers themselves: not even the model is known beforehand."""
OPENROUTER_PIN = """--model-arg provider='{"only": ["HOST"], "allow_fallbacks": false}'"""


def check_model_name(name: str, model_args: Mapping[str, Any] | None = None, base_url: str | None = None) -> None:
    """Raise UserError for an Inspect model (`provider/model`) of which a router would decide who answers.

    `model_args`: what Inspect hands to the provider (`-M`): for OpenRouter they pin the host.
    """
    arguments = dict(model_args or {})
    provider, _, model = name.partition("/")
    if not model:
        raise UserError(f"model {name!r}: write PROVIDER/MODEL, such as moonbase/runs/pico or replay/xstest:gpt4")
    if provider in ("moonbase", "replay", "mockllm", "none"):
        return
    if model.rpartition("/")[2].partition(":")[0] in ROUTING_MODELS:
        raise UserError(f"model {name!r}: a router would choose the model; name the one to be evaluated")
    if provider == "openrouter":
        _check_openrouter(name, model, arguments)
    elif provider == "hf-inference-providers":
        _check_hugging_face(name, model)
    elif provider == "litellm-proxy":
        raise UserError(f"model {name!r}: a LiteLLM proxy may pass a request on to any of its deployments; name the "
                        "host's own provider, or openai-api/HOST/MODEL with the host's own base URL")
    elif provider.startswith("openai-api") and model.partition("/")[0].lower() in ROUTERS:
        raise UserError(f"model {name!r}: {model.partition('/')[0]} passes requests on, and nothing here says to whom; "
                        f"use openrouter/MODEL with {OPENROUTER_PIN}, or the host's own endpoint")
    elif base_url and any(host in base_url for host in ROUTER_HOSTS):
        raise UserError(f"model {name!r}: {base_url} is a router; use openrouter/MODEL with {OPENROUTER_PIN}, "
                        "hf-inference-providers/MODEL:HOST, or the host's own endpoint")


def pinned_host(name: str, model_args: Mapping[str, Any] | None = None) -> str | None:
    """The host that a router was told to use and no other; None where nobody told it."""
    provider, _, model = name.partition("/")
    if provider == "hf-inference-providers":
        host = model.partition(":")[2]
        return host if host and host not in HF_POLICIES else None
    routing = dict(model_args or {}).get("provider")
    if provider != "openrouter" or not isinstance(routing, Mapping):
        return None
    only, order = routing.get("only"), routing.get("order")
    if isinstance(only, list) and len(only) == 1:
        return str(only[0])
    if isinstance(order, list) and len(order) == 1 and routing.get("allow_fallbacks") is False:
        return str(order[0])
    return None


def told_precision(model_args: Mapping[str, Any] | None) -> str | None:
    """The precision that a router was told to insist on (`quantizations`: fp8, bf16 ...), if it is one."""
    routing = dict(model_args or {}).get("provider")
    wanted = routing.get("quantizations") if isinstance(routing, Mapping) else None
    return str(wanted[0]) if isinstance(wanted, list) and len(wanted) == 1 else None


def _check_openrouter(name: str, model: str, arguments: Mapping[str, Any]) -> None:
    suffix = model.partition(":")[2]
    if suffix in OPENROUTER_SHORTCUTS:
        raise UserError(f"model {name!r}: ':{suffix}' lets OpenRouter choose the host; leave it out and pin one: "
                        f"{OPENROUTER_PIN}")
    if arguments.get("models"):
        raise UserError(f"model {name!r}: the argument 'models' lets another model answer; leave it out")
    if pinned_host(name, arguments) is None:
        raise UserError(f"model {name!r}: OpenRouter would choose the host, and another one tomorrow; pin one: "
                        f"{OPENROUTER_PIN}")


def _check_hugging_face(name: str, model: str) -> None:
    if pinned_host(name) is None:
        raise UserError(f"model {name!r}: the router of Hugging Face would choose the host; write "
                        f"{name.partition(':')[0]}:HOST, such as :together or :novita")
