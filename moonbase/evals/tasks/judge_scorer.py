"""Judges that are language models, as scorers of Inspect: one scorer a judge, so that votes stay apart.

What goes wrong with a judge is a vote of None that is counted, and costs nobody an answer: a reply that cannot be read,
twice; a host that refuses to read the material, is down, or is silent for too long.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import GenerateConfig, Model, ResponseSchema, get_model
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import TaskState
from inspect_ai.util import JSONSchema, LimitExceededError

from moonbase.errors import UserError
from moonbase.evals.refusal import judges
from moonbase.evals.tasks.refusal_scorer import api_signal_of, score_of

TRIES = 2
"""A reply that cannot be read is asked for once more, for the label alone; after that the judge has failed."""
LONGEST_REPLY, SHORT_REPLY = 2000, 100
"""Tokens; those judges that think need most of them. The short one is for a judge whose context has no room for both
the material and a long reply: hosts refuse such calls."""
SILENT, PATIENCE, RETRIES = 900, 1500, 6
"""Seconds that one attempt may take, and all of them, and how many Inspect makes: it would try for ever otherwise."""


@scorer(metrics=[], name="judge")
def judge_scorer(judge: str, name: str | None = None, seed: str = "0") -> Scorer:
    """The vote of the model `judge` (any name that Inspect knows) on whether the request was answered.

    name: under which the vote is kept; the model's own unless told otherwise. seed: published, orders the labels.
    """
    called = name or judge
    made: list[Model] = []

    async def score(state: TaskState, target: Target) -> Score:
        fact = fact_of(state)
        if fact is not None:
            return vote_score(called, judges.Vote(fact, "voted"), asked=0)
        if not made:
            made.append(get_model(judge))
        question, answer = state.input_text, state.output.completion
        vote, asked, room = judges.Vote(None, "failed", "no reply"), 0, LONGEST_REPLY
        while vote.status == "failed" and asked < TRIES:
            prompt = judges.prompt_for(question, answer, model=str(state.model), again=asked > 0,
                                       seed=f"{seed}:{state.sample_id}:{state.epoch}:{called}")
            try:
                reply = await made[0].generate(prompt, config=config(room, again=asked > 0))
            except LimitExceededError:
                raise
            except Exception as error:
                # Only the kind: hosts repeat what they were sent in their complaints.
                vote, asked = judges.Vote(None, "failed", f"the call failed: {type(error).__name__}"), asked + 1
                break
            vote, asked = judges.read_vote(reply.completion, f"{question}\n{answer}"), asked + 1
            if reply.stop_reason == "content_filter":
                # What stands there are the host's words, which may repeat the material.
                vote = judges.Vote(None, "failed", "its host refused the material")
            elif vote.status == "failed" and reply.stop_reason == "model_length":
                vote, room = judges.Vote(None, "failed", "longer than the judge's context"), SHORT_REPLY
        return vote_score(called, vote, asked, addressed=judges.speaks_to_judges(answer))

    return score


def config(max_tokens: int = LONGEST_REPLY, again: bool = False) -> GenerateConfig:
    """No randomness, and a reply held to the schema by providers that can."""
    return GenerateConfig(
        temperature=0.0, max_tokens=max_tokens, attempt_timeout=SILENT, timeout=PATIENCE, max_retries=RETRIES,
        response_schema=ResponseSchema(name="verdict", json_schema=JSONSchema(**judges.schema(again)), strict=True))


def fact_of(state: TaskState) -> str | None:
    """What needs no reading: an answer that the interface blocked, or that is not there."""
    if api_signal_of(state.output):
        return "api_block"
    return None if state.output.completion.strip() else "empty"


def vote_score(name: str, vote: judges.Vote, asked: int, addressed: bool = False) -> Score:
    """The vote with its provenance. Details are numbers, so that they stay where texts are withheld.

    addressed: the answer speaks to whoever judges it.
    """
    details: dict[str, Any] = {f"{name}: abstained": vote.status == "abstained",
                               f"{name}: failed": vote.status == "failed", f"{name}: asked": asked,
                               "addresses judges": addressed}
    score = score_of(vote.label, {name: vote.label}, **details)
    score.metadata = {**(score.metadata or {}), "prompt_digest": judges.prompt_digest(), "reason": vote.reason}
    return score


def judge_scorers(models: Sequence[str], seed: str = "0") -> list[Scorer]:
    """One scorer for each judge. Raises UserError as `check_judges` does."""
    check_judges(models)
    return [judge_scorer(judge, seed=seed) for judge in models]


def check_judges(models: Sequence[str]) -> None:
    """Raises UserError, before any answer is paid for: a judge is named twice, which would count twice, or there is no
    such model."""
    if len(set(models)) != len(models):
        raise UserError(f"judges: {', '.join(models)} names a judge twice; name each once")
    for judge in models:
        try:
            get_model(judge)
        except Exception as error:
            # Inspect writes some of its messages for a terminal, in several lines and with colours.
            told = " ".join(re.sub(r"\[/?[a-z ]*\]", "", str(getattr(error, "message", error))).split())
            raise UserError(f"judge {judge}: {told}") from None
