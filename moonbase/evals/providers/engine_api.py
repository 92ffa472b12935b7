"""`moonbase/MODEL`: the engine in this process as a model of Inspect.

    inspect eval task.py --model moonbase/runs/pico -M thinking=false

Calls that run at the same time are one batch. Tool calls and `response_schema` hold by construction: no token is
offered that would break them. Every output says in `metadata["moonbase"]` which weights made it and how it was drawn
(`records.ModelCall`), the seed included where nobody gave one, so that it can be drawn again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from moonbase.chat.prompt import Prompt, default_sampling, prompt_of
from moonbase.chat.styles import find_style
from moonbase.errors import TryAgain, UserError
from moonbase.evals.providers.engines import OpenEngine, check_source, engine_of
from moonbase.evals.providers.messages import from_turn, to_choice, to_logprobs, to_messages, to_tools
from moonbase.evals.providers.sample import sample_epoch
from moonbase.evals.records import ModelCall

if TYPE_CHECKING:
    from moonbase.engine import Sampling
    from moonbase.engine.turn import Turn

LONGEST_REPLY = 32_768
"""Tokens of a reply where nobody says how many; the context may allow fewer."""
CONNECTIONS = 64
"""Calls at the same time: what the engine runs in one batch."""
PASSED_ON = ("top_k", "presence_penalty", "frequency_penalty")
"""Settings that mean the same to Inspect and to the engine."""


class Job(NamedTuple):
    """What one call asks of the engine."""

    prompt: Prompt
    samplings: list[Sampling]
    """One for each choice."""
    constraint: Any
    clipped: bool
    """The context allows fewer tokens than were asked for."""
    decoding: dict[str, Any]


class EngineAPI(ModelAPI):
    """One model of this process."""

    def __init__(
        self, model_name: str, base_url: str | None = None, api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(), *, thinking: bool | None = None, style: str | None = None,
        **unknown: Any,
    ) -> None:
        """`model_name`: run folder, checkpoint folder, or `preset:NAME`. `thinking`: None leaves it to
        `reasoning_effort` and to the style. `style`: one of `moonbase.chat.STYLES`, None is the folder's own. Raises
        UserError; the weights are loaded by the first call."""
        super().__init__(model_name, base_url, api_key, [], config)
        if unknown:
            raise UserError(f"moonbase/{model_name}: no model argument {min(unknown)!r}; there are thinking, style")
        if thinking is not None and not isinstance(thinking, bool):
            raise UserError(f"moonbase/{model_name}: thinking={thinking!r} must be true or false")
        if style is not None:
            find_style(style)
        check_source(model_name)
        self.thinking, self._style = thinking, style

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One output. Raises UserError for what cannot be asked, and what the engine raises."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise UserError(f"moonbase/{self.model_name}: the engine needs Inspect's asyncio backend; unset "
                            "INSPECT_ASYNC_BACKEND") from None
        opened = await asyncio.to_thread(engine_of, self.model_name)
        # Rendering and grammars take a while for long prompts; the others' replies go on meanwhile.
        job = await asyncio.to_thread(self._prepare, opened, input, tools, tool_choice, config, sample_epoch())
        if isinstance(job, str):
            # No words of ours stand where the model's should: a scorer would take them for its answer.
            output = ModelOutput.from_content(f"moonbase/{self.model_name}", "", "model_length", error=job)
            output.metadata = {"moonbase": _call(opened, {}, "model_length")}
            return output
        turns = await asyncio.gather(*(_follow(opened, job, sampling) for sampling in job.samplings))
        return self._output(opened, job, turns, config)

    def max_connections(self) -> int:
        """As many as run in one batch."""
        return CONNECTIONS

    def connection_key(self) -> str:
        """Each model has an engine, and a queue, of its own."""
        return self.model_name

    def should_retry(self, ex: Exception) -> bool:
        """Only a queue that was full, or an engine that was being closed."""
        return isinstance(ex, TryAgain)

    async def count_text_tokens(self, text: str) -> int:
        """Exact."""
        opened = await asyncio.to_thread(engine_of, self.model_name)
        return len(opened.tokenizer.encode(text))

    async def tokenize(self, text: str) -> list[int]:
        """Ids of plain text."""
        opened = await asyncio.to_thread(engine_of, self.model_name)
        return opened.tokenizer.encode(text)

    # --- before -------------------------------------------------------------------------------------------------------

    def _prepare(
        self, opened: OpenEngine, messages: Sequence[ChatMessage], infos: Sequence[ToolInfo], tool_choice: ToolChoice,
        config: GenerateConfig, epoch: int,
    ) -> Job | str:
        """What to ask the engine, or why the context has no room for it. Raises UserError."""
        from moonbase.engine.turn import fewest_tokens, turn_constraint

        style, thinking = self._style or opened.style, self._thinking(config)
        # With the choice "none" the tools stay in the prompt: the model may talk of them.
        tools, choice = to_tools(infos), to_choice(tool_choice) if infos else "none"
        prompt = prompt_of(opened.tokenizer, to_messages(messages), tools, style, thinking=thinking,
                           preserve_thinking=config.reasoning_history == "all")
        room = opened.context_tokens - len(prompt.ids)
        if room < 1:
            return (f"the prompt has {len(prompt.ids)} tokens; the model's context is {opened.context_tokens} tokens "
                    "for prompt and reply")
        schema = None if config.response_schema is None else config.response_schema.json_schema
        constraint = turn_constraint(
            opened.tokenizer, opened.engine.model.config.vocab_size, prompt, tools, choice=choice,
            parallel=config.parallel_tool_calls is not False, json_only=schema is not None,
            schema=None if schema is None else schema.model_dump(exclude_none=True), strict=False)
        wanted = config.max_tokens or LONGEST_REPLY
        max_tokens, least = min(wanted, room), fewest_tokens(constraint)
        if max_tokens < least:
            raise UserError(f"moonbase/{self.model_name}: {max_tokens} tokens are too few: the shortest answer that "
                            f"keeps to the tools and the schema has {least}; give a larger max_tokens")
        samplings = self._samplings(opened, config, style, thinking, max_tokens, epoch)
        first = samplings[0]
        decoding = {"max_tokens": max_tokens, "temperature": first.temperature, "top_p": first.top_p,
                    "seed": first.seed, "style": style, "thinking": thinking}
        decoding |= {name: getattr(first, name) for name in PASSED_ON if getattr(config, name)}
        decoding |= {"stop": list(first.stop)} if first.stop else {}
        decoding |= {"logit_bias": {str(id): bias for id, bias in first.logit_bias.items()}} if first.logit_bias else {}
        decoding |= {"choices": len(samplings)} if len(samplings) > 1 else {}
        return Job(prompt, samplings, constraint, max_tokens == room and room < wanted, decoding)

    def _thinking(self, config: GenerateConfig) -> bool | None:
        if self.thinking is not None or config.reasoning_effort is None:
            return self.thinking
        return config.reasoning_effort != "none"

    def _samplings(
        self, opened: OpenEngine, config: GenerateConfig, style: str, thinking: bool | None, max_tokens: int, epoch: int
    ) -> list[Sampling]:
        """What nobody sets is as the publisher of the style recommends."""
        from moonbase.engine import Sampling

        settings: dict[str, Any] = {"temperature": 1.0, **default_sampling(style, thinking)}
        settings |= {name: value for name in ("temperature", "top_p", *PASSED_ON)
                     if (value := getattr(config, name)) is not None}  # fmt: skip
        stops = tuple(config.stop_seqs or ())
        special = opened.tokenizer.special_tokens
        if config.logprobs or config.top_logprobs:
            settings["logprobs"] = config.top_logprobs or 0
        return [
            Sampling(**settings, max_tokens=max_tokens, seed=seed, stop=stops,
                     # A special token is no text in which a stop string could be met.
                     stop_ids=tuple(special[stop] for stop in stops if stop in special),
                     logit_bias={int(id): bias for id, bias in (config.logit_bias or {}).items()})
            for seed in _seeds(config.seed, epoch, config.num_choices or 1)]

    # --- after --------------------------------------------------------------------------------------------------------

    def _output(self, opened: OpenEngine, job: Job, turns: Sequence[Turn], config: GenerateConfig) -> ModelOutput:
        name = f"moonbase/{self.model_name}"
        choices = []
        for turn in turns:
            # Of all that was drawn but the end token, so that there is one for each token that is counted.
            tokens = turn.sampled[: turn.completion_tokens]
            logprobs = to_logprobs(tokens, opened.tokenizer) if config.logprobs or config.top_logprobs else None
            choices.append(ChatCompletionChoice(message=from_turn(turn, name), stop_reason=_stop_reason(turn, job),
                                                logprobs=logprobs))
        output_tokens = sum(turn.completion_tokens for turn in turns)
        return ModelOutput(
            model=name, choices=choices, metadata={"moonbase": _call(opened, job.decoding, choices[0].stop_reason)},
            # Nobody charges less for what the prefix cache had, and whether it had it is chance: not told apart.
            usage=ModelUsage(input_tokens=len(job.prompt.ids), output_tokens=output_tokens,
                             total_tokens=len(job.prompt.ids) + output_tokens,
                             reasoning_tokens=sum(turn.reasoning_tokens for turn in turns)))


def _call(opened: OpenEngine, decoding: dict[str, Any], stop_reason: str) -> dict[str, Any]:
    return ModelCall(provider="moonbase", precision=opened.precision, fingerprint=opened.digest,
                     weights_digest=opened.digest, decoding=decoding, stop_reason=stop_reason).model_dump(mode="json")


async def _follow(opened: OpenEngine, job: Job, sampling: Sampling) -> Turn:
    """One reply to its end. Cancelled, it ends in the engine too."""
    from moonbase.engine.turn import Turn

    turn = Turn(job.prompt.parser())
    async with contextlib.aclosing(opened.service.generate(job.prompt.ids, sampling, job.constraint)) as pieces:
        async for piece in pieces:
            turn.push(piece)
    if turn.ended not in ("stop", "length"):
        raise RuntimeError(f"the engine ended the reply: {turn.ended}")
    return turn


def _seeds(seed: int | None, epoch: int, choices: int) -> list[int]:
    """One for each choice. The seed that was given draws the first choice of the first epoch; the repetitions of a
    sample would otherwise all be the same."""
    first = secrets.randbits(53) if seed is None else seed
    if seed is not None and epoch > 1:
        first = random.Random(f"{seed} epoch {epoch}").getrandbits(53)
    return [first if number == 0 else random.Random(f"{first} {number}").getrandbits(53) for number in range(choices)]


def _stop_reason(turn: Turn, job: Job) -> StopReason:
    if turn.ended == "length":
        return "model_length" if job.clipped else "max_tokens"
    return "tool_calls" if turn.said_calls else "stop"
