"""`replay/DATASET:MODEL`: answers that a model really gave, stored earlier (`stored`), instead of asking it.

    inspect eval task.py --model replay/mmlu-pro:llama -M data=FOLDER

A sample names its answer in its metadata, `{"replay_key": ...}`, else the text of the question finds it. Whatever would
make a number look better than the stored answers can bear is refused: a second answer to the same question, a dialogue
that goes on, an answer to another question, and to judge.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentReasoning,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelCall,
    ModelOutput,
    ModelUsage,
    StopReason,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from moonbase.agents.models.base import count_text
from moonbase.errors import UserError
from moonbase.evals import records
from moonbase.evals.providers.sample import sample_epoch, sample_metadata
from moonbase.evals.providers.stored import StoredAnswer, find_answers, normal

CONNECTIONS = 100
STOP_REASONS: dict[str, StopReason] = {"stop": "stop", "length": "max_tokens", "content_filter": "content_filter"}
ALIKE = 0.9
"""Published versions of one question differ by a word here and there; of different questions no two are so alike."""


class ReplayAPI(ModelAPI):
    """The stored answers of one model to one dataset."""

    def __init__(
        self, model_name: str, base_url: str | None = None, api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(), *, data: str | None = None, **unknown: Any,
    ) -> None:
        """`model_name`: DATASET:MODEL. `data`: the folder of stored answers, else $MOONBASE_SHARED. Raises UserError.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        if unknown:
            raise UserError(f"replay/{model_name}: no model argument {min(unknown)!r}; there is data")
        self.answers = find_answers(model_name, data)

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> tuple[ModelOutput, ModelCall]:
        """The stored answer, at once: nothing of `config` has any say in it. Raises UserError."""
        self._check(input)
        key = sample_metadata().get("replay_key")
        if key is None:
            answer = self.answers.of_question(next((one.text for one in reversed(input) if one.role == "user"), ""))
        else:
            answer = self.answers.of_key(str(key))
            self._check_question(answer, input)
        if len(answer.text) > 40 and any(answer.text in message.text for message in input):
            raise UserError(f"replay/{self.model_name} was asked about its own stored answer: it cannot judge; name "
                            "another model for the judge (--model-role grader=...)")
        # The time of the call is that of the model's work, which is long past.
        told = {"dataset": self.answers.dataset, "model": self.answers.model, "key": answer.key}
        return self._output(answer, told), ModelCall(request=told, response={}, time=0.0)

    def max_connections(self) -> int:
        """Nobody waits for anything."""
        return CONNECTIONS

    def connection_key(self) -> str:
        """Each has its own queue."""
        return self.model_name

    async def count_text_tokens(self, text: str) -> int:
        """A rule of thumb: Inspect's own would fetch a vocabulary from the network."""
        return count_text(text)

    def _check(self, input: Sequence[ChatMessage]) -> None:
        if sample_epoch() > 1:
            raise UserError(f"replay/{self.model_name} has one stored answer to each question, and a second sample of "
                            "it would be the same: run it with one epoch")
        if any(message.role == "assistant" for message in input):
            raise UserError(f"replay/{self.model_name} has answers to questions alone: it cannot go on with a dialogue")

    def _check_question(self, answer: StoredAnswer, input: Sequence[ChatMessage]) -> None:
        asked, question = normal("\n".join(message.text for message in input)), normal(answer.question)
        if question not in asked and difflib.SequenceMatcher(None, question, asked).ratio() < ALIKE:
            raise UserError(f"replay/{self.model_name}: key {answer.key!r} is the answer to another question than the "
                            "sample asks; its replay_key is wrong")

    def _output(self, answer: StoredAnswer, told: dict[str, str]) -> ModelOutput:
        content: str | list[Any] = answer.text
        if answer.reasoning:
            content = [ContentReasoning(reasoning=answer.reasoning), ContentText(text=answer.text)]
        name = answer.model or self.answers.model
        stop_reason = STOP_REASONS.get(answer.stop_reason, "unknown")
        call = records.ModelCall(
            provider=answer.provider or "replay", fingerprint=answer.fingerprint, stop_reason=stop_reason,
            api_signal="content_filter" if answer.stop_reason == "content_filter" else None)
        message = ChatMessageAssistant(content=content, model=name, source="generate")
        return ModelOutput(
            model=name, choices=[ChatCompletionChoice(message=message, stop_reason=stop_reason)],
            usage=ModelUsage(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens,
                             total_tokens=answer.input_tokens + answer.output_tokens,
                             reasoning_tokens=answer.reasoning_tokens or None),
            metadata={"moonbase": call.model_dump(mode="json"),
                      "replay": {**told, "usage": "recorded" if answer.has_usage else "not recorded"}})
