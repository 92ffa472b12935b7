"""Choosing a token against the arithmetic of chance and plain restatements of the rules."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from moonbase.engine import Sampling
from moonbase.engine.sampling import choose, uniform
from moonbase.engine.scheduler import Request
from moonbase.errors import UserError
from tests.engine.tiny import PROMPTS, engine


@pytest.mark.parametrize(
    ("values", "field"),
    [(dict(max_tokens=0), "max_tokens"), (dict(temperature=-0.1), "temperature"),
     (dict(temperature=float("nan")), "temperature"), (dict(temperature=float("inf")), "temperature"),
     (dict(top_p=0.0), "top_p"), (dict(top_p=1.01), "top_p"), (dict(top_p=float("nan")), "top_p"),
     (dict(top_k=-1), "top_k"), (dict(min_p=1.5), "min_p"), (dict(presence_penalty=3), "presence_penalty"),
     (dict(frequency_penalty=float("nan")), "frequency_penalty"), (dict(repetition_penalty=0), "repetition_penalty"),
     (dict(logprobs=-1), "logprobs"), (dict(logit_bias={3: 101}), r"logit_bias\[3\]"), (dict(stop=("",)), "stop")],
)
def test_wrong_sampling_values(values, field) -> None:
    with pytest.raises(UserError, match=field):
        Sampling(**values)


LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf, 1.5, -3.0]])


def draw(sampling: Sampling, place: int = 0, prompt=(), output=()) -> Request:
    return Request([*prompt] or [0], sampling, seed=11, limit=1000, output_ids=list(output) or [0] * place)


class Place(Request):
    """A sequence that seems to have so many tokens already, so that each draw has a number of its own."""

    def __init__(self, sampling: Sampling, place: int) -> None:
        super().__init__([0], sampling, seed=11, limit=1000)
        self.output_ids = range(place)


def drawn(sampling: Sampling, count: int = 20_000) -> Counter:
    draws = [Place(sampling, place) for place in range(count)]
    return Counter(choose(LOGITS.expand(count, -1), draws).ids)


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


def test_top_k_and_min_p_keep_what_they_say() -> None:
    assert set(drawn(Sampling(temperature=2.0, top_k=3))) == {0, 6, 1}
    assert set(drawn(Sampling(temperature=2.0, top_k=1))) == {0}
    shares = LOGITS[0].softmax(-1) / LOGITS[0].softmax(-1).max()
    for share in (0.01, 0.2, 0.5, 1.0):
        expected = {token for token in range(8) if shares[token] >= share}
        assert set(drawn(Sampling(temperature=1.0, min_p=share))) == expected
    # Top-p is taken of what top-k has left, as every engine does.
    assert set(drawn(Sampling(temperature=1.0, top_k=2, top_p=0.7))) == {0, 6}
    assert set(drawn(Sampling(temperature=1.0, top_k=2, top_p=0.6))) == {0}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
def test_temperature_towards_zero_is_greedy(temperature: float) -> None:
    assert drawn(Sampling(temperature=temperature), 200) == {0: 200}


def test_penalties() -> None:
    """Each restated for one token at a time."""
    output, prompt = [0, 0, 1, 4], [6, 0]
    for sampling in (Sampling(presence_penalty=0.7), Sampling(frequency_penalty=1.3), Sampling(repetition_penalty=1.9),
                     Sampling(presence_penalty=-2, frequency_penalty=0.4, repetition_penalty=0.8),
                     Sampling(logit_bias={3: 5.0, 0: -100})):
        expected = []
        for token, value in enumerate(LOGITS[0].tolist()):
            if token in output or token in prompt:
                value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
            if token in output:
                value -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
            expected.append(value + sampling.logit_bias.get(token, 0))
        kept = LOGITS.clone()
        chosen = choose(LOGITS, [draw(sampling, prompt=prompt, output=output)])
        assert chosen.ids == [int(np.argmax(expected))]
        assert torch.equal(kept, LOGITS), "the model's own logits stay as they are"
        # What is reported is the model's own opinion.
        assert chosen.logprobs == pytest.approx([LOGITS[0].log_softmax(-1)[chosen.ids[0]].item()], abs=1e-5)


def test_a_mask_is_the_last_word() -> None:
    """Each row has its own, shared or none."""
    mask = np.isin(np.arange(8), (3, 7))
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, logit_bias={0: 100})
        for masks in ([mask, None, mask], [mask, mask.copy(), mask], [mask, mask, mask]):
            found = [set(), set(), set()]
            for place in range(60):
                draws = [draw(sampling, place) for _ in range(3)]
                for seen, id in zip(found, choose(LOGITS.expand(3, -1), draws, masks).ids, strict=True):
                    seen.add(id)
            only = {3} if temperature == 0 else {3, 7}
            assert found == [only if one is not None else {0} for one in masks]
    assert LOGITS[0, 0] == 2.0 and mask.sum() == 2, "neither is written to"


def test_counts_follow_what_is_generated() -> None:
    request = draw(Sampling(), prompt=[6, 0], output=[1, 1])
    for token in (4, 1, 0):
        assert request.counts(8, LOGITS.device).tolist() == np.bincount(request.output_ids, minlength=8).tolist()
        assert set(request.seen(8, LOGITS.device).nonzero().flatten().tolist()) == set(request.ids)
        request.append(token)
    assert request.counts(8, LOGITS.device).tolist() == [1, 3, 0, 0, 1, 0, 0, 0]


def test_everyone_has_settings_of_their_own() -> None:
    draws = [draw(Sampling()), draw(Sampling(temperature=1.0), 3), draw(Sampling(logprobs=2)),
             draw(Sampling(logit_bias={4: 50.0}, logprobs=0))]
    together = choose(LOGITS.expand(4, -1), draws)
    for number, one in enumerate(draws):
        alone = choose(LOGITS, [one])
        assert alone.ids == [together.ids[number]] and alone.top_logprobs == [together.top_logprobs[number]]
    assert together.ids[3] == 4 and together.top_logprobs[3] == [] and together.top_logprobs[0] is None
    assert [id for id, _ in together.top_logprobs[2]] == [0, 6]


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = np.array([[uniform(seed, place) for place in range(200)] for seed in range(200)])
    assert 0 < numbers.min() and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 86  # 0.999 of chi-square with 49 degrees of freedom
    for one, other in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert uniform(3, 4) == uniform(3, 4)


def test_a_seed_fixes_the_text() -> None:
    samplings = [Sampling(max_tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (engine().generate_ids(PROMPTS, sampling) for sampling in samplings)
    assert one == same != other
    free = [engine().generate_ids(PROMPTS, Sampling(max_tokens=20, temperature=1.0, seed=None)) for _ in range(2)]
    assert free[0] != free[1]


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
