"""The trace of an episode: who did what, when, at whose request, and what it cost. One JSON line an episode.

The schema alone: `folding.fold` makes an episode of the events of a session, `episodes` reads and writes files of them.
docs/traces.md documents every field.

Times are seconds since the start of the episode. A call is a model call, `AGENT#STEP`, or a tool call,
`AGENT#STEP.INDEX`; a sub-agent is named after the call that started it, `AGENT/STEP.INDEX` (an item of a bulk call:
`AGENT/STEP.INDEX.ITEM`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA = "moonbase.trace/1"

Measure = Literal["steps", "tokens", "seconds"]
MEASURES: tuple[Measure, ...] = ("steps", "tokens", "seconds")
Status = Literal["finished", "over_budget", "stuck", "failed", "cancelled", "unfinished"]


class Record(BaseModel):
    """An unknown field is a mistake: what a reader does not know it must not drop silently. JSON has no infinity."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LimitsRecord(Record):
    """What may be spent; null where there is no limit."""

    steps: float | None = None
    """Model calls."""
    tokens: float | None = None
    """Input and output tokens of all calls."""
    seconds: float | None = None
    """Wall-clock."""
    money: float | None = None
    """Dollars."""
    critical_steps: float | None = None
    """Σ_t (S_main + max_i S_sub,i): see `CriticalRecord`."""
    subagents: float | None = None
    """Sub-agents started, theirs included."""


class SpentRecord(Record):
    """What was spent, in the units of `LimitsRecord`."""

    steps: int = 0
    """Model calls, the failed ones included."""
    tokens: int = 0
    """Input and output tokens."""
    seconds: float = 0.0
    """Wall-clock."""
    money: float = 0.0
    """Dollars."""
    critical_steps: int = 0
    """Σ_t (S_main + max_i S_sub,i)."""
    subagents: int = 0
    """Sub-agents started, theirs included."""


class BudgetRecord(Record):
    """The state of an agent's budget when a call had ended."""

    spent: SpentRecord = SpentRecord()
    """By the agent and its sub-agents."""
    limits: LimitsRecord = LimitsRecord()
    """Those in force then."""


class UsageRecord(Record):
    """Tokens of one call."""

    input_tokens: int = 0
    """The prompt, cached tokens included."""
    output_tokens: int = 0
    """The reply, reasoning included."""
    cached_tokens: int = 0
    """The part of the prompt that the model's cache already had."""


class CallError(Record):
    """Why a model call gave no reply."""

    kind: str
    """rate_limit, overloaded, timeout, server, connection, context_length, auth, bad_request or refused."""
    message: str = ""
    """In the words of the other side."""


class ModelCall(Record):
    """One question to a model, its retries included."""

    kind: Literal["model"] = "model"
    """Tells it from a tool call."""
    id: str
    """AGENT#STEP."""
    step: int
    """Of this agent, from 1."""
    stage: int
    """The orchestrator's step that this belongs to."""
    started: float
    """When it was asked for; waiting for a free place counts as part of the call."""
    waited: float = 0.0
    """Seconds from `started` to the beginning of the last attempt: in line for a free place or for what calls in flight
    may give back of the budget, and in attempts that failed. All of a call that was broken off before."""
    ended: float
    """When the reply was complete, or the last attempt had failed."""
    model: str = ""
    """The name that the model gave itself, or the agent's."""
    sampling: dict[str, Any] = {}
    """Temperature, top_p, max_tokens, seed and whatever else was asked for."""
    usage: UsageRecord = UsageRecord()
    """Tokens in and out."""
    money: float = 0.0
    """Dollars paid."""
    finish_reason: str | None = None
    """stop, tool_calls or length; null where there is no reply."""
    error: CallError | None = None
    """Why there is no reply."""
    attempts: int = 1
    """More than 1 where it had to be tried again."""
    sees: list[tuple[int, int]] = []
    """The prompt: [start, stop) ranges over the agent's messages. What context management hid is not in them."""
    shortened: list[int] = []
    """Messages among them whose content was a line that says so instead: `agents.context.HIDDEN`."""
    message: int | None = None
    """Index of the reply in the agent's messages."""
    budget: BudgetRecord | None = None
    """The agent's budget after the call."""
    prompt_ids: list[int] | None = None
    """The prompt as token ids, where the model gives them."""
    token_ids: list[int] | None = None
    """The reply as token ids, all of them sampled, where the model gives them."""
    logprobs: list[float | None] | None = None
    """One for each of `token_ids`: natural logarithm of its probability when it was sampled; null for -inf."""
    sampled: list[tuple[int, int]] | None = None
    """The sampled mask: [start, stop) ranges over `prompt_ids` followed by `token_ids` of the tokens that the model
    drew, in order and apart; it was given all others. Null where there are no `token_ids`."""
    on_critical_path: list[Measure] = []
    """The measures (steps, tokens, seconds) in which this call is on the critical path."""

    @property
    def sampled_mask(self) -> list[bool]:
        """`sampled`, a value for each token of `prompt_ids` and `token_ids`."""
        mask = [False] * (len(self.prompt_ids or ()) + len(self.token_ids or ()))
        for start, stop in self.sampled or ():
            mask[start:stop] = [True] * (stop - start)
        return mask

    @model_validator(mode="after")
    def _mask_fits(self) -> ModelCall:
        """A mask of other tokens than those that are there would train on the wrong ones."""
        at, count = 0, len(self.prompt_ids or ()) + len(self.token_ids or ())
        for start, stop in self.sampled or ():
            if not at <= start < stop <= count:
                raise ValueError(f"sampled [{start}, {stop}): no range of the {count} tokens in order")
            at = stop
        return self


class ToolCall(Record):
    """One use of a tool; a sub-agent's life is one of its parent's tool calls."""

    kind: Literal["tool"] = "tool"
    """Tells it from a model call."""
    id: str
    """AGENT#STEP.INDEX: the step of the model call that asked for it, and its place among that reply's calls."""
    step: int
    """Of this agent, from 1."""
    stage: int | None = None
    """The orchestrator's step that this belongs to; null in traces that are older than the field."""
    name: str
    """The tool."""
    arguments: str = ""
    """As the model wrote them: JSON if all is well."""
    started: float
    """When it began."""
    ended: float | None = None
    """When the result was there; null where the episode broke off before."""
    error: bool = False
    """Whether the result tells of a failure."""
    message: int | None = None
    """Index of the result in the agent's messages."""
    children: list[str] = []
    """Ids of the sub-agents that it started."""
    on_critical_path: list[Measure] = []
    """The measures (steps, tokens, seconds) in which this call is on the critical path."""


Call = Annotated[ModelCall | ToolCall, Field(discriminator="kind")]


class AgentRecord(Record):
    """One agent: its task, all that it read and wrote, and its calls."""

    id: str
    """main, or AGENT/STEP.INDEX[.ITEM] after the call that started it."""
    name: str
    """The role it was given."""
    parent: str | None = None
    """Id of the agent that started it."""
    parent_call: str | None = None
    """Id of the tool call that started it."""
    system: str = ""
    """Its system prompt."""
    task: str = ""
    """What it was asked to do."""
    tools: list[str] = []
    """Names of the tools it had."""
    model: str = ""
    """Name of its model."""
    trainable: bool = False
    """Whether its replies may be trained on; sub-agents are frozen (PARL)."""
    status: Status = "unfinished"
    """finished, over_budget, stuck, failed, cancelled; unfinished where the stream stops before its end."""
    text: str = ""
    """Its answer: all that its parent sees of it."""
    reason: str = ""
    """Why it did not finish, in words."""
    limits: LimitsRecord = LimitsRecord()
    """Its own limits."""
    messages: list[dict[str, Any]] = []
    """Everything it ever read or wrote, in the format of the OpenAI chat API; nothing is removed from here."""
    calls: list[Call] = []
    """Step by step: the model call, then the tool calls that its reply asked for."""
    started: float = 0.0
    """When it was started, waiting for a free place included."""
    ended: float | None = None
    """When it had its answer; null while unfinished."""
    spent: SpentRecord = SpentRecord()
    """By its own calls; only `critical_steps` and `subagents` count what is below it."""


class CriticalRecord(Record):
    """The longest chain of calls of which each waits for the one before."""

    steps: int = 0
    """CriticalSteps = Σ_t (S_main + max_i S_sub,i) over the orchestrator's stages t."""
    tokens: int = 0
    """Input and output tokens of the chain that has most of them."""
    seconds: float = 0.0
    """From the start of the first agent to its end: queueing and the runtime's own time included."""


class Episode(Record):
    """One task, from the question to the answer: a line of a trace file."""

    schema_version: Literal["moonbase.trace/1"] = SCHEMA
    """Readers refuse what they do not know."""
    id: str
    """Of this episode."""
    task: str = ""
    """What was asked."""
    started_at: str = ""
    """ISO 8601: the time zero of all others."""
    seconds: float = 0.0
    """Until the last event."""
    status: Status = "unfinished"
    """As for an agent."""
    text: str = ""
    """The answer."""
    model: str = ""
    """The orchestrator's model."""
    limits: LimitsRecord = LimitsRecord()
    """Of the whole episode."""
    sub_limits: LimitsRecord = LimitsRecord()
    """Of each sub-agent."""
    seed: int | None = None
    """Of whatever is random in the runtime."""
    tools: list[str] = []
    """Names of the orchestrator's tools."""
    agents: list[AgentRecord] = []
    """In the order in which they were started: parents come before their children, the orchestrator first."""
    spent: SpentRecord = SpentRecord()
    """By all agents together."""
    rewards: dict[str, float] = {}
    """Name to value, as graders gave them."""
    critical: CriticalRecord = CriticalRecord()
    """Length of the critical path; the calls on it say so themselves."""


def wrong_schema(found: Any) -> str:
    """What to say about a trace of another version."""
    return f"the trace is of schema {str(found)[:60]!r} and this moonbase reads {SCHEMA!r}. Update moonbase to read it."
