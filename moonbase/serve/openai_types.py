"""Requests of the OpenAI surface as pydantic models: what is read, within which limits.

Fields that are not listed are ignored: clients send more of them every year. Those that would change the answer and
that this server does not know are listed in `UNSUPPORTED` and refused, unless their value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_CHOICES = 32
MOST_STOPS = 16
MOST_TOOLS = 512

UNSUPPORTED = {
    "functions": "give tools instead",
    "function_call": "give tool_choice instead",
    "audio": "only text is produced",
    "web_search_options": "give a tool instead",
    "suffix": "text is only continued",
    "moderation": "there is no moderation",
}

ASKS_NOTHING = {"functions": ([],), "function_call": ("none",), "suffix": ("",)}
"""Beside null: values of those fields with which the answer is the same as without them."""

ModelName = Annotated[str, Field(max_length=256)]
"""It is said again in every chunk of the answer."""
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    """No conversions: "5" is not 5. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Strict):
    type: str
    text: str = ""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("type"), str):
            if value["type"] == "refusal" and isinstance(value.get("refusal"), str):
                # What the assistant of another model would not do; in the dialogue it is what it said.
                return {"type": "text", "text": value["refusal"]}
            if value["type"] != "text":
                raise ValueError(f"content of type {value['type'][:40]!r} is unsupported; this model reads text")
            if "text" not in value:
                raise ValueError("a part of type 'text' needs the field text")
        return value


class CalledFunction(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str | None = None


class HistoryCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: list[TextPart] | str | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: list[HistoryCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    """What an assistant said instead of content."""
    partial: bool | None = None
    """On the last message, of the assistant: go on with it (Kimi's partial mode)."""

    @model_validator(mode="after")
    def _is_whole(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is required in a message of role {self.role}")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls do not belong into a message of role {self.role}")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("tool_call_id is required in a message of role tool")
        return self

    def plain(self) -> dict[str, Any]:
        """As `moonbase.chat` takes it."""
        message = self.model_dump(exclude_none=True, exclude={"partial", "refusal"})
        if self.role == "assistant" and self.content is None and self.refusal:
            message["content"] = self.refusal
        for call in message.get("tool_calls", ()):
            call["function"].setdefault("arguments", "")
        if self.role == "developer":
            message["role"] = "system"
        return message


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """As `moonbase.chat` takes it; what the client left out stays out, so that the declaration is what it wrote."""
        return self.model_dump(exclude_unset=True, exclude_none=True)


class FunctionName(Strict):
    name: str


class NamedChoice(Strict):
    type: Literal["function"]
    function: FunctionName


class AllowedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Field(max_length=MOST_TOOLS)]


class AllowedChoice(Strict):
    """Only some of the tools for this reply."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Strict):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema.schema is required with type json_schema")
        return self


class StreamOptions(Strict):
    include_usage: bool | None = None


class Thinking(Strict):
    type: Literal["enabled", "disabled"]
    keep: Literal["all"] | None = None
    """The reasoning of all turns stays in the prompt, not only that of the current tool loop."""


class TemplateOptions(Strict):
    thinking: bool | None = None
    preserve_thinking: bool | None = None


class Common(Strict):
    """What chat and plain completions share."""

    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: list[str] | str | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # Not OpenAI's, but what open engines take beside (`extra_body` in its client).
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_supported(cls, value: Any) -> Any:
        for name, mend in UNSUPPORTED.items():
            asked = value.get(name) if isinstance(value, dict) else None
            if asked is not None and asked not in ASKS_NOTHING.get(name, ()):
                raise ValueError(f"{name} is unsupported; {mend}")
        return value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: list[str] | str | None) -> list[str] | str | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MOST_STOPS or not all(0 < len(stop) <= 1000 for stop in stops):
            raise ValueError(f"up to {MOST_STOPS} texts of 1 to 1,000 characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    modalities: list[str] | None = None
    return_token_ids: bool | None = None
    """vLLM's: with the answer the ids of the prompt and of all that was sampled; `logprobs` are then of these."""

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if isinstance(self.tool_choice, AllowedChoice):
            known = {tool.function.name for tool in self.tools or ()}
            for tool in self.tool_choice.allowed_tools.tools:
                if tool.function.name not in known:
                    raise ValueError(f"tool_choice allows {tool.function.name[:80]!r}, which is not among the tools")
        if self.modalities not in (None, ["text"]):
            raise ValueError("modalities: only ['text'] is supported")
        for number, message in enumerate(self.messages):
            if message.partial and (message.role != "assistant" or number < len(self.messages) - 1):
                raise ValueError(f"messages[{number}].partial belongs to a last message of the assistant")
        if self.messages[-1].partial and self.messages[-1].tool_calls:
            raise ValueError("messages[-1].tool_calls: a partial message ends within its text")
        return self

    @property
    def wants_thinking(self) -> bool | None:
        """The switch in any of its three spellings; None leaves it to the style."""
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.thinking is not None:
            return self.chat_template_kwargs.thinking
        return False if self.reasoning_effort == "none" else None

    @property
    def keeps_thinking(self) -> bool:
        """Whether the reasoning of earlier turns is shown to the model, in either spelling."""
        kept = self.chat_template_kwargs is not None and self.chat_template_kwargs.preserve_thinking
        return bool(kept) or (self.thinking is not None and self.thinking.keep == "all")


class CompletionRequest(Common):
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 with `echo`: nothing is generated, the prompt comes back, with its log-probabilities if they are asked for."""
    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is unsupported unless it equals n")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens of 0 needs echo: true; without it there is nothing to answer")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, texts or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else self.prompt
