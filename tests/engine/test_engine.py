"""Generation against the plainest loop there is, transformers, and the arithmetic of chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from moonbase.engine import Engine, Sampling
from moonbase.engine.engine import choose
from moonbase.errors import UserError
from moonbase.model import Transformer
from tests.model.tiny import hf_config, tiny_model, yarn


class Bytes:
    """One id per byte: the smallest tokenizer that can cut a character in two."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id % 256 for id in ids).decode("utf-8", errors="replace")


def engine(stop_ids: Sequence[int] = (), **changes) -> Engine:
    return Engine(tiny_model(**dict(rope_scaling=yarn(8)) | changes).eval(), Bytes(), stop_ids)


def by_hand(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """No cache, no batch: the whole text through the training form for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[5, 9, 11, 3, 60, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [30, 31]]


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=None, n_group=4, topk_group=2, rope_scaling=None)])
def test_greedy_equals_the_loop_without_a_cache(changes) -> None:
    ours = engine(**changes)
    found = ours.generate_ids(PROMPTS, Sampling(max_tokens=25))
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        assert continuation == by_hand(ours.model, prompt, 25)
        assert ours.generate_ids([prompt], Sampling(max_tokens=25)) == [continuation]
    assert len({tuple(continuation) for continuation in found}) > 1


def test_greedy_equals_transformers() -> None:
    from transformers import DeepseekV3ForCausalLM

    ours = engine()
    theirs = DeepseekV3ForCausalLM(hf_config(ours.model.config)).eval()
    theirs.load_state_dict(ours.model.state_dict())
    prompt = torch.tensor([PROMPTS[0]])
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False,
                               eos_token_id=None, pad_token_id=0)
    assert ours.generate_ids([PROMPTS[0]], Sampling(max_tokens=30)) == [expected[0, len(PROMPTS[0]) :].tolist()]


@pytest.mark.parametrize("tokens", [1, 3, 10, 11])
def test_long_prompts_are_read_in_parts(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result, and never more tokens at a time than allowed."""
    ours, widths = engine(), []
    whole = ours.generate_ids(PROMPTS, Sampling(max_tokens=12))
    decode = ours.model.decode
    monkeypatch.setattr("moonbase.engine.engine.PREFILL_TOKENS", tokens)
    monkeypatch.setattr(ours.model, "decode", lambda part, *rest: widths.append(part.shape[1]) or decode(part, *rest))
    assert ours.generate_ids(PROMPTS, Sampling(max_tokens=12)) == whole
    assert max(widths) == tokens and sum(widths) == max(map(len, PROMPTS)) + 11


def test_it_stops_before_a_stop_id() -> None:
    free = engine().generate_ids(PROMPTS, Sampling(max_tokens=20))
    stop = free[0][6]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert any(len(one) < len(other) for one, other in zip(cut, free, strict=True))
    assert engine(stop_ids=[stop]).generate_ids(PROMPTS, Sampling(max_tokens=20)) == cut
    # The configuration's own ids count too, one or several.
    assert engine(eos_token_id=[stop, 999]).generate_ids(PROMPTS, Sampling(max_tokens=20)) == cut
    assert engine(eos_token_id=stop).generate_ids(PROMPTS, Sampling(max_tokens=20)) == cut


def test_lengths() -> None:
    for count in (1, 2, 7):
        assert [len(ids) for ids in engine().generate_ids(PROMPTS, Sampling(max_tokens=count))] == [count] * 4
    assert engine().generate_ids([]) == [] and engine().generate([]) == []


def test_the_context_is_the_limit_of_each_prompt_by_itself() -> None:
    small = engine(max_position_embeddings=16)
    together = small.generate_ids(PROMPTS, Sampling(max_tokens=100))
    assert [len(prompt) + len(ids) for prompt, ids in zip(PROMPTS, together, strict=True)] == [16] * 4
    assert together == [small.generate_ids([prompt], Sampling(max_tokens=100))[0] for prompt in PROMPTS]
    assert len(small.generate_ids([[1] * 15], Sampling(max_tokens=100))[0]) == 1
    with pytest.raises(UserError, match="16 tokens; the model's context is 16"):
        small.generate_ids([[1], [1] * 16])


def test_an_empty_prompt_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="empty prompt"):
        engine(vocab_size=300).generate(["a", ""])
    with pytest.raises(UserError, match="empty prompt"):
        list(engine(vocab_size=300).stream(""))


@pytest.mark.parametrize(
    ("values", "field"),
    [(dict(max_tokens=0), "max_tokens"), (dict(temperature=-0.1), "temperature"),
     (dict(temperature=float("nan")), "temperature"), (dict(top_p=0.0), "top_p"), (dict(top_p=1.01), "top_p"),
     (dict(top_p=float("nan")), "top_p")],
)
def test_wrong_sampling_values(values, field) -> None:
    with pytest.raises(UserError, match=field):
        Sampling(**values)


# --- chance -----------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf, 1.5, -3.0]])


def drawn(sampling: Sampling, count: int = 20_000) -> Counter:
    generator = torch.Generator().manual_seed(sampling.seed)
    return Counter(choose(LOGITS.expand(count, -1), sampling, [generator] * count).tolist())


def chi_square(counts: Counter, expected: torch.Tensor) -> float:
    """0.999 of all fair draws stay below about 22 with 6 degrees of freedom."""
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(expected.tolist()) if p > 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probabilities(temperature: float) -> None:
    counts = drawn(Sampling(temperature=temperature))
    expected = (LOGITS[0].double() / temperature).softmax(-1)
    assert chi_square(counts, expected) < 22 and counts[5] == 0
    wrong = (LOGITS[0].double() / (temperature * 1.2)).softmax(-1)
    assert chi_square(counts, wrong) > 100, "this many draws would notice another temperature"


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 0.97, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float) -> None:
    probabilities = LOGITS[0].double().softmax(-1)
    kept, mass = [], 0.0
    for token in sorted(range(8), key=lambda token: -probabilities[token]):
        if mass < top_p and probabilities[token] > 0:
            kept.append(token)
            mass += probabilities[token].item()
    counts = drawn(Sampling(temperature=1.0, top_p=top_p))
    assert set(counts) == set(kept)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert chi_square(counts, expected) < 22


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
def test_temperature_towards_zero_is_greedy(temperature: float) -> None:
    assert drawn(Sampling(temperature=temperature), 200) == {0: 200}


def test_a_seed_fixes_the_text() -> None:
    samplings = [Sampling(max_tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (engine().generate_ids(PROMPTS, sampling) for sampling in samplings)
    assert one == same != other


def test_a_sampled_text_does_not_depend_on_its_neighbours() -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, seed=3)
    together = engine().generate_ids(PROMPTS, sampling)
    for last in range(1, len(PROMPTS)):
        assert engine().generate_ids(PROMPTS[:last], sampling) == together[:last]
    others = engine().generate_ids([[9, 9], *PROMPTS[1:3], [8]], sampling)
    assert others[1:3] == together[1:3]
    assert others[0] != together[0]


def test_equal_prompts_of_a_batch_and_of_neighbouring_seeds_get_texts_of_their_own() -> None:
    texts = [tuple(ids) for seed in (1, 2, 3)
             for ids in engine().generate_ids([[5, 9]] * 4, Sampling(max_tokens=20, temperature=1.0, seed=seed))]
    assert len(set(texts)) == 12


# --- streaming --------------------------------------------------------------------------------------------------------


class Script:
    """A model that says given ids, one after the other, whatever it is asked: only text handling is looked at."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.engine = engine(vocab_size=300)
        self.ids = list(ids)
        self.engine.model.decode = self.decode  # type: ignore[method-assign]
        self.at = 0

    def decode(self, tokens, positions, cache) -> torch.Tensor:
        logits = torch.zeros(1, 300)
        logits[0, self.ids[self.at % len(self.ids)]] = 1
        self.at += 1
        return logits


@pytest.mark.parametrize("text", ["plain", "naïve – 月面基地 🌕!", "🌕", "\ufffd is a character too", "tail \ufffd"])
def test_stream_says_what_generate_says(text: str) -> None:
    ids = [*text.encode(), 299]
    for count in range(1, len(ids) + 1):
        script = Script(ids)
        script.engine.stop_ids = frozenset([299])
        (whole,) = script.engine.generate(["go"], Sampling(max_tokens=count))
        script.at = 0
        pieces = list(script.engine.stream("go", Sampling(max_tokens=count)))
        assert "".join(pieces) == whole
        assert all(pieces) and (count < len(ids) or whole == text)


@pytest.mark.parametrize("end", ["stop id", "context"])
def test_a_character_cut_short_is_still_said(end: str) -> None:
    """Generation may end inside a character: at a stop id, or where the context is full."""
    script = Script([*"a🌕".encode()[:3], 299])
    script.engine.stop_ids = frozenset([299] if end == "stop id" else [])
    if end == "context":
        script.engine.model.config = script.engine.model.config.model_copy(update={"max_position_embeddings": 5})
    assert "".join(script.engine.stream("go", Sampling(max_tokens=50))) == "a\ufffd"


def test_pieces_are_whole_characters_as_soon_as_they_are_known() -> None:
    script = Script("é🌕x".encode())
    assert list(script.engine.stream("go", Sampling(max_tokens=7))) == ["é", "🌕", "x"]


def test_streaming_looks_at_the_last_character_only() -> None:
    script, sizes = Script("aé🌕".encode() * 30), []
    decode = script.engine.tokenizer.decode
    script.engine.tokenizer.decode = lambda ids: sizes.append(len(ids)) or decode(ids)  # type: ignore[method-assign]
    assert "".join(script.engine.stream("go", Sampling(max_tokens=210))) == "aé🌕" * 30
    assert max(sizes) == 4


def test_a_real_models_stream_equals_its_text() -> None:
    ours = engine(vocab_size=256)
    for seed in range(3):
        sampling = Sampling(max_tokens=40, temperature=1.5, seed=seed)
        assert "".join(ours.stream("häh", sampling)) == ours.generate(["häh"], sampling)[0]
