"""Generation against the plainest loop there is and transformers; that nobody notices the others."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from moonbase.engine import Engine, Sampling
from moonbase.errors import UserError
from tests.engine.tiny import PROMPTS, Bytes, by_hand, engine
from tests.model.tiny import hf_config, tiny_model


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=None, n_group=4, topk_group=2, rope_scaling=None)])
def test_greedy_equals_the_loop_without_a_cache(changes) -> None:
    ours = engine(**changes)
    found = ours.generate_ids(PROMPTS, Sampling(max_tokens=25))
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        assert continuation == by_hand(ours.model, prompt, 25)
        assert ours.generate_ids([prompt], Sampling(max_tokens=25)) == [continuation]
    assert len({tuple(continuation) for continuation in found}) > 1


@pytest.mark.parametrize("seed", range(6))
def test_greedy_equals_transformers(seed: int) -> None:
    """On random tiny models; the tokens of its `generate`, whatever ours does with blocks, chunks and guesses."""
    from transformers import DeepseekV3ForCausalLM

    chance = random.Random(seed)
    changes = dict(
        q_lora_rank=chance.choice([None, 14]), n_shared_experts=chance.choice([1, 2]), first_k_dense_replace=seed % 3,
        num_attention_heads=chance.choice([1, 3]), n_group=chance.choice([1, 4]), topk_group=1,
        num_experts_per_tok=chance.choice([1, 2]), num_nextn_predict_layers=seed % 2,
    )
    ours = engine(options=dict(cache_tokens=160, chunk_tokens=7, max_running=3), **changes)
    theirs = DeepseekV3ForCausalLM(hf_config(ours.model.config)).eval()
    state = {name: tensor for name, tensor in ours.model.state_dict().items() if not name.startswith("mtp.")}
    theirs.load_state_dict(state)
    prompts = [[chance.randrange(61) for _ in range(chance.randrange(1, 40))] for _ in range(5)]
    found = ours.generate_ids(prompts, Sampling(max_tokens=30))
    for prompt, ids in zip(prompts, found, strict=True):
        asked = torch.tensor([prompt])
        expected = theirs.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=30, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)
        assert ids == expected[0, len(prompt) :].tolist()


def test_a_pass_computes_no_more_prompt_tokens_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = engine().generate_ids(PROMPTS, Sampling(max_tokens=12))
    for chunk in (4, 9, 11):
        ours, widths = engine(options=dict(chunk_tokens=chunk, max_running=4)), []
        decode = ours.model.decode
        monkeypatch.setattr(ours.model, "decode",
                            lambda tokens, *rest, widths=widths, decode=decode: (
                                widths.append(len(tokens)) or decode(tokens, *rest)))
        assert ours.generate_ids(PROMPTS, Sampling(max_tokens=12)) == whole
        assert max(widths) <= max(8, chunk)


def test_it_stops_before_a_stop_id() -> None:
    free = engine().generate_ids(PROMPTS, Sampling(max_tokens=20))
    stop = free[0][6]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert any(len(one) < len(other) for one, other in zip(cut, free, strict=True))
    assert engine(stop_ids=[stop]).generate_ids(PROMPTS, Sampling(max_tokens=20)) == cut
    assert engine().generate_ids(PROMPTS, Sampling(max_tokens=20, stop_ids=(stop,))) == cut
    # The configuration's own ids count too, one or several.
    assert engine(eos_token_id=[stop, 999]).generate_ids(PROMPTS, Sampling(max_tokens=20)) == cut
    assert engine(eos_token_id=stop).generate_ids(PROMPTS, Sampling(max_tokens=20)) == cut
    assert engine(eos_token_id=stop).generate_ids(PROMPTS, Sampling(max_tokens=20, ignore_eos=True)) == free
    output = engine(eos_token_id=stop).complete(PROMPTS[:1], Sampling(max_tokens=20))[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_lengths() -> None:
    for count in (1, 2, 7):
        outputs = engine().complete(PROMPTS, Sampling(max_tokens=count))
        assert [len(output.ids) for output in outputs] == [count] * 4
        assert {output.finish_reason for output in outputs} == {"length"}
    assert engine().generate_ids([]) == [] and engine().generate([]) == []


def test_the_context_is_the_limit_of_each_prompt_by_itself() -> None:
    small = engine(max_position_embeddings=16)
    together = small.generate_ids(PROMPTS, Sampling(max_tokens=100))
    assert [len(prompt) + len(ids) for prompt, ids in zip(PROMPTS, together, strict=True)] == [16] * 4
    assert together == [small.generate_ids([prompt], Sampling(max_tokens=100))[0] for prompt in PROMPTS]
    assert len(small.generate_ids([[1] * 15], Sampling(max_tokens=100))[0]) == 1
    with pytest.raises(UserError, match="16 tokens; the model's context is 16"):
        small.generate_ids([[1], [1] * 16])
    assert not small.busy, "nothing of a refused call is left in the queue"


def test_the_cache_is_a_limit_too() -> None:
    small = engine(options=dict(cache_tokens=32))
    assert len(small.generate_ids([[1] * 10], Sampling(max_tokens=100))[0]) == 22
    with pytest.raises(UserError, match="40 tokens; the cache is 32"):
        small.generate_ids([[1] * 40])
    with pytest.raises(UserError, match=r"cache_tokens=1000000000000 needs .* at most"):
        engine(options=dict(cache_tokens=10**12)).generate_ids([[1]])


def test_the_default_cache_is_what_can_be_used_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two layers of ten and eight fp32 numbers a token; two sequences of 256 tokens are all that can run.
    for free, least, expected in ((1 << 30, 0, 512), (1 << 30, 144 * 1600, 1600), (1 << 30, 144 * 100, 512),
                                  (144 * 2000, 1 << 30, 800), (144 * 1000, 0, 400)):
        monkeypatch.setattr("moonbase.engine.engine.free_memory_bytes", lambda free=free: free)
        assert engine(options=dict(max_running=2, least_cache_bytes=least)).capacity == expected


def test_prompts_that_are_none() -> None:
    with pytest.raises(UserError, match="empty prompt"):
        engine(vocab_size=300).generate(["a", ""])
    with pytest.raises(UserError, match="empty prompt"):
        list(engine(vocab_size=300).stream(""))
    with pytest.raises(UserError, match="token id 61 is not in the model's vocabulary of 61"):
        engine().generate_ids([[3, 61]])
    with pytest.raises(UserError, match="token id -1"):
        engine().generate_ids([[3]], Sampling(logit_bias={-1: 1.0}))


# --- nobody notices the others ----------------------------------------------------------------------------------------


def random_prompts(seed: int, count: int) -> list[list[int]]:
    """Some begin alike, so that blocks are shared."""
    chance = random.Random(seed)
    shared = [chance.randrange(61) for _ in range(40)]
    return [shared[: chance.choice([0, 16, 23, 40])] + [chance.randrange(61) for _ in range(chance.randrange(1, 50))]
            for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(prefix_cache=False), dict(max_running=2), dict(max_running=4, chunk_tokens=4),
     dict(cache_tokens=176), dict(cache_tokens=176, chunk_tokens=5, max_running=3)],
    ids=str,
)
def test_a_request_gets_the_same_tokens_in_any_company(options, temperature: float) -> None:
    """Alone or in a batch, whole or in chunks, preempted or not, with a warm or a cold cache."""
    prompts, sampling = random_prompts(5, 12), [Sampling(20, temperature, seed=n) for n in range(12)]
    # A request of its own is number 0 of its call.
    alone = [engine(options=dict(prefix_cache=False)).complete([ids], one)[0] for ids, one in
             zip(prompts, sampling, strict=True)]
    ours = engine(options=options)
    requests = [ours.request(ids, one) for ids, one in zip(prompts, sampling, strict=True)]
    for _ in range(2):
        for request in requests:
            ours.submit(request)
        while ours.busy:
            ours.step()
        assert [request.output_ids for request in requests] == [output.ids for output in alone]
        assert ours.statistics.blocks_used == 0
        requests = [ours.request(ids, one) for ids, one in zip(prompts, sampling, strict=True)]
    if options == dict(cache_tokens=176):
        assert ours.statistics.preemptions > 0, "this cache is small enough to make some give way"
    assert (ours.statistics.cached_tokens > 0) == options.get("prefix_cache", True)


def test_requests_may_come_and_go_at_any_time() -> None:
    prompts = random_prompts(1, 10)
    expected = engine().generate_ids(prompts, Sampling(max_tokens=15))
    ours, chance = engine(options=dict(max_running=3, cache_tokens=320)), random.Random(0)
    waiting = [ours.request(ids, Sampling(max_tokens=15)) for ids in prompts]
    submitted, cancelled = [], set()
    while waiting or ours.busy:
        if waiting and chance.random() < 0.3:
            submitted.append(waiting.pop(0))
            ours.submit(submitted[-1])
        if submitted and chance.random() < 0.05:
            one = chance.choice(submitted)
            ours.cancel(one)
            cancelled.add(one)
        ours.step()
    for request, ids in zip(submitted, expected, strict=True):
        if request.finish_reason == "cancelled":
            assert request in cancelled and request.output_ids == ids[: len(request.output_ids)]
        else:
            assert request.output_ids == ids
    assert ours.statistics.blocks_used == 0


def test_a_cancelled_request_frees_its_blocks_at_once() -> None:
    ours = engine()
    pieces = ours.pieces([1] * 40, Sampling(max_tokens=100))
    next(pieces)
    assert ours.statistics.blocks_used == 3 and ours.statistics.running == 1
    pieces.close()
    assert ours.statistics.blocks_used == 0 and ours.statistics.running == 0 and not ours.busy
    assert ours.statistics.finished == {"stop": 0, "length": 0, "cancelled": 1, "failed": 0}


def test_an_error_in_a_pass_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine()
    with monkeypatch.context() as patch:
        patch.setattr(ours.model, "decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours.generate_ids(PROMPTS)
    assert not ours.busy and ours.statistics.blocks_used == 0
    assert ours.generate_ids(PROMPTS, Sampling(max_tokens=9)) == engine().generate_ids(PROMPTS, Sampling(max_tokens=9))


def test_a_repeated_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, computed = engine(), []
    decode = ours.model.decode
    monkeypatch.setattr(ours.model, "decode",
                        lambda tokens, *rest: computed.append(len(tokens)) or decode(tokens, *rest))
    first, again = (ours.complete([list(range(50))], Sampling(max_tokens=1))[0] for _ in range(2))
    assert first.ids == again.ids and first.logprobs == pytest.approx(again.logprobs, abs=1e-5)
    # Three full blocks are known; the last two tokens of the prompt are not (and a pass has at least eight rows).
    assert computed == [50, 8] and (first.cached_tokens, again.cached_tokens) == (0, 48)
    # What was generated is known as well: the next turn of a conversation begins with it.
    longer = ours.complete([list(range(50))], Sampling(max_tokens=40))[0]
    turn = ours.complete([[*range(50), *longer.ids, 3]], Sampling(max_tokens=1))[0]
    assert turn.cached_tokens == 80


def test_new_weights_forget_what_was_cached() -> None:
    ours, prompt = engine(), list(range(50))
    ours.generate_ids([prompt], Sampling(max_tokens=5))
    ours.model.load_state_dict(tiny_model(seed=1, rope_scaling=None).state_dict())
    ours.weights_changed()
    assert ours.generate_ids([prompt], Sampling(max_tokens=12)) == [by_hand(ours.model, prompt, 12)]
    assert ours.statistics.blocks_used == 0 and ours.statistics.cached_tokens == 0


# --- multi-token prediction -------------------------------------------------------------------------------------------


class Knowing:
    """Makes a module's guesses right with a given chance: what happens then must not depend on how good it is."""

    def __init__(self, ours: Engine, reference: dict[tuple[int, ...], int], chance: float) -> None:
        self.further, self.reference = ours._forward.further, reference
        self.random, self.chance = random.Random(0), chance

    def __call__(self, parts, hidden_ND, rows) -> torch.Tensor:
        logits_BV = self.further(parts, hidden_ND, rows)
        for row_V, part in zip(logits_BV, parts, strict=True):
            known = self.reference.get(tuple(part.request.ids))
            if known is not None and self.random.random() < self.chance:
                row_V[known] = 1e9
        return logits_BV


@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guessing_changes_the_work_and_not_the_text(chance: float, temperature: float, monkeypatch) -> None:
    sampling = Sampling(max_tokens=25, temperature=temperature, logprobs=2)
    plain = engine(num_nextn_predict_layers=1, options=dict(speculate=False)).complete(PROMPTS, sampling)
    reference = {(*prompt, *output.ids[:count]): id for prompt, output in zip(PROMPTS, plain, strict=True)
                 for count, id in enumerate(output.ids)}
    ours = engine(num_nextn_predict_layers=1)
    ours._ready()
    monkeypatch.setattr(ours._forward, "further", Knowing(ours, reference, chance))
    found = ours.complete(PROMPTS, sampling)
    assert [output.ids for output in found] == [output.ids for output in plain]
    for one, other in zip(found, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        ids, others = ([[id for id, _ in top] for top in output.top_logprobs] for output in (one, other))
        assert ids == others
    numbers = ours.statistics
    if chance == 1.0:
        # Every pass but the last ones makes two tokens.
        assert numbers.accepted_tokens == numbers.drafted_tokens and numbers.passes <= 14
    assert numbers.accepted_tokens <= numbers.drafted_tokens and numbers.blocks_used == 0


def test_the_module_sees_what_it_was_trained_on() -> None:
    """Its guess equals what the training form predicts one token further on."""
    ours = engine(num_nextn_predict_layers=1)
    request = ours.request([5, 9, 11, 3, 60, 2, 7, 8, 8, 1], Sampling(max_tokens=6))
    ours.submit(request)
    model = ours.model
    while ours.busy:
        ours.step()
        if request.finish_reason is None:
            ids = torch.tensor([request.ids])
            with torch.no_grad():
                hidden, rotation, _ = model._hidden(ids[:, :-1], None, None)
                further, _ = model.mtp[0](hidden, model.model.embed_tokens(ids[:, 1:]), *rotation)
                assert request.draft == int(model.lm_head(further[0, -1]).argmax())


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_real_models_stream_equals_its_text() -> None:
    ours = engine(vocab_size=256)
    for seed in range(3):
        sampling = Sampling(max_tokens=40, temperature=1.5, seed=seed)
        assert "".join(ours.stream("häh", sampling)) == ours.generate(["häh"], sampling)[0]


def test_a_stop_string_ends_the_reply_and_is_not_part_of_it() -> None:
    ours = engine(vocab_size=128)
    (free,) = ours.generate(["hello"], Sampling(max_tokens=40))
    stop = free[17:20]
    sampling = Sampling(max_tokens=40, stop=("never there", stop))
    assert ours.generate(["hello"], sampling) == [free[: free.index(stop)]]
    output = ours.complete([list(b"hello")], sampling)[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert len(output.ids) == free.index(stop) + 3


def test_logprobs_are_the_models_own() -> None:
    ours = engine()
    output = ours.complete([PROMPTS[2]], Sampling(max_tokens=8, temperature=0.7, top_p=0.5, logprobs=3))[0]
    ids = torch.tensor([[*PROMPTS[2], *output.ids]])
    with torch.no_grad():
        expected = ours.model(ids)[0].log_softmax(-1)[len(PROMPTS[2]) - 1 : -1]
    chosen = expected.gather(-1, ids[0, len(PROMPTS[2]) :, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(output.logprobs), chosen, rtol=1e-4, atol=1e-4)
    values, tokens = expected.topk(3)
    for found, value, token in zip(output.top_logprobs, values, tokens, strict=True):
        assert [id for id, _ in found] == token.tolist()
        torch.testing.assert_close(torch.tensor([score for _, score in found]), value, rtol=1e-4, atol=1e-4)


def test_replies_may_be_read_side_by_side() -> None:
    ours = engine(vocab_size=128)
    sampling = Sampling(max_tokens=20)
    expected = ours.generate(["one", "another"], sampling)
    streams = [ours.stream(prompt, sampling) for prompt in ("one", "another")]
    said = ["", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        said = [text + piece for text, piece in zip(said, pieces, strict=True)]
    assert said == expected


def test_stop_strings_of_a_batch_run_together_and_draw_for_themselves() -> None:
    ours = engine(vocab_size=128)
    texts = ours.generate(["ab"] * 4, Sampling(max_tokens=20, temperature=1.0, stop=("never there",)))
    assert len(set(texts)) == 4 and ours.statistics.passes == 20


def test_the_end_token_has_a_log_probability() -> None:
    prompt = PROMPTS[0]
    stop = engine().generate_ids([prompt], Sampling(max_tokens=7))[0][6]
    ours = engine(stop_ids=[stop])
    output = ours.complete([prompt], Sampling(max_tokens=20))[0]
    with torch.no_grad():
        expected = ours.model(torch.tensor([[*prompt, *output.ids]]))[0, -1].log_softmax(-1)[stop].item()
    assert output.end_logprob == pytest.approx(expected, abs=1e-4)
    assert ours.complete([prompt], Sampling(max_tokens=2))[0].end_logprob is None


@pytest.mark.parametrize("options", [{}, dict(chunk_tokens=7, max_running=3), dict(cache_tokens=64)], ids=str)
def test_a_score_is_what_the_training_form_gives(options) -> None:
    ours = engine(options=options)
    for prompt in (list(range(40)), [7, 7], [3], list(range(40))):
        with torch.no_grad():
            expected = ours.model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)
        chosen = expected.gather(-1, torch.tensor(prompt[1:])[:, None]).squeeze(-1)
        found = ours.score(prompt, top=3)
        torch.testing.assert_close(torch.tensor(found.logprobs), chosen, rtol=1e-4, atol=1e-4)
        for place, likely in zip(expected, found.top_logprobs, strict=True):
            ids, values = zip(*likely, strict=True)
            assert ids == tuple(place.argsort(descending=True)[:3].tolist())
            assert values == pytest.approx(place[list(ids)].tolist(), abs=1e-4)
        assert ours.score(prompt).top_logprobs == [[]] * (len(prompt) - 1)
    assert ours.statistics.blocks_used == 0


def test_who_is_preempted_while_being_scored_is_scored_once() -> None:
    alone, ours = engine(), engine(options=dict(cache_tokens=96, chunk_tokens=16, max_running=4))
    prompts = [[n % 61 for n in range(start, start + 60)] for start in range(4)]
    requests = [ours.request(prompt, Sampling(max_tokens=20, logprobs=2), score=True) for prompt in prompts]
    ours._finish_all(requests)
    assert ours.statistics.preemptions > 0
    for request, prompt in zip(requests, prompts, strict=True):
        expected = alone.score(prompt, top=2)
        assert request.scores.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert len(request.scores.top_logprobs) == 59


def test_who_arrives_together_with_the_same_beginning_computes_it_once() -> None:
    shared = [n % 61 for n in range(100)]
    prompts = [[*shared, n] for n in range(4)]
    expected = engine(options=dict(prefix_cache=False)).generate_ids(prompts, Sampling(max_tokens=9))
    for chunk in (512, 40):
        ours = engine(options=dict(chunk_tokens=chunk, max_running=4))
        assert ours.generate_ids(prompts, Sampling(max_tokens=9)) == expected
        assert ours.statistics.cached_tokens == 3 * 96, "six full blocks, once"


class Faulty:
    """A grammar with a fault, after some tokens."""

    done = cut_short = ignores_stop = False

    def __init__(self, where: str) -> None:
        self.where, self.count = where, 0

    def mask(self, remaining: int) -> None:
        if self.where == "mask" and self.count == 3:
            raise RecursionError("a text that nobody should read")

    def accept(self, token: int) -> None:
        self.count += 1
        if self.where == "accept" and self.count == 3:
            raise RecursionError("a text that nobody should read")


@pytest.mark.parametrize("where", ["mask", "accept"])
def test_a_faulty_grammar_ends_its_own_request_only(where: str) -> None:
    ours, sampling = engine(), Sampling(max_tokens=12)
    good = [ours.request(prompt, sampling) for prompt in PROMPTS]
    bad = ours.request([4, 4], sampling, lambda: Faulty(where))
    for request in [*good[:2], bad, *good[2:]]:
        ours.submit(request)
    while ours.busy:
        ours.step()
    assert bad.finish_reason == "failed" and isinstance(bad.error, RecursionError)
    assert [request.output_ids for request in good] == engine().generate_ids(PROMPTS, sampling)
    assert ours.statistics.blocks_used == 0 and ours.statistics.finished["failed"] == 1
    with pytest.raises(RecursionError):
        ours.complete([[4]], sampling, lambda: Faulty(where))


class Quoting(Faulty):
    """Writes something that must not be cut, from its second to its sixth token."""

    @property
    def ignores_stop(self) -> bool:
        return 1 <= self.count < 6


def test_stop_strings_do_not_cut_what_must_be_whole() -> None:
    ours = engine(vocab_size=128)
    (free,) = ours.generate(["hello"], Sampling(max_tokens=20))
    for stop in (free[2], free[8]):
        sampling = Sampling(max_tokens=20, stop=(stop,))
        request = ours.request(list(b"hello"), sampling, lambda: Quoting("nowhere"), text=True)
        ours._finish_all([request])
        said = "".join(piece.text for piece in request.inbox)
        ends = [place for place in range(len(free)) if free[place] == stop and not 1 <= place < 6]
        assert said == (free[: ends[0]] if ends else free)


def test_ends_that_are_ignored_reach_neither_grammar_nor_reader() -> None:
    ours = engine(stop_ids=range(0, 128, 2), vocab_size=128)
    request = ours.request([5], Sampling(max_tokens=30, ignore_eos=True), lambda: Faulty("nowhere"), text=True)
    ours._finish_all([request])
    odd = [id for id in request.output_ids if id % 2]
    assert len(request.output_ids) == 30 and request.constraint.count == len(odd) < 30
    assert "".join(piece.text for piece in request.inbox) == Bytes().decode(odd)


def test_what_a_finished_request_leaves_is_whole_for_guesses_too() -> None:
    """The module's latents of every shared block are written before anyone can find the block."""
    ours = engine(num_nextn_predict_layers=1)
    ours._ready()
    ours._forward.cache.store.fill_(torch.nan)
    first = ours.complete([list(range(40))], Sampling(max_tokens=30))[0]
    again = ours.request([*range(40), *first.ids, 5], Sampling(max_tokens=20), None)
    ours.submit(again)
    ours.step()
    layer = ours.model.config.num_hidden_layers
    used = ours._forward.cache.store[layer][again.blocks].flatten(0, 1)[: again.computed - 1]
    assert again.cached_tokens >= 48 and not used.isnan().any()


def test_the_tokenizer_of_these_tests_is_one() -> None:
    assert Bytes().decode(Bytes().encode("häh")) == "häh"
