"""Counter-statements: who is drawn, what agreement means, what raises a level and what does not; and one real run
through Inspect, sealed, verified against its logs, and challenged by asking the model again."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from moonbase.errors import UserError
from moonbase.evals.proof import challenge as challenging
from moonbase.evals.proof import seal, signing, verify
from moonbase.evals.proof.canonical import BundleError, canonical
from moonbase.evals.records import Record, digest
from tests.evals import proof_samples as samples

NONCE = "drand-round-4711"


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("challenge")
    for name in ("key", "other"):
        signing.generate_key(place / name)
    samples.write_evaluation(place / "run", items=8)
    seal.seal(place / "run", place / "key", out=place / "bundle")
    return place


@pytest.fixture
def bundle(sealed: Path, tmp_path: Path) -> Path:
    return samples.copy_of(sealed / "bundle", tmp_path / "bundle")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.Verification, "_write_again", lambda self: None)


def faithful(bundle: Path, records: list[Record], model: str, work: Path) -> Iterable[Record]:
    assert list(work.iterdir()) == []
    return [record.model_copy(update={"model": model, "seconds": 9.0}) for record in records]


def checked(bundle: Path) -> verify.Verification:
    checking = verify.Verification(bundle, None)
    checking.run()
    assert not verify.failures(checking.findings)
    return checking


def lines(checking: verify.Verification) -> str:
    return "\n".join(str(finding) for finding in checking.findings if finding.check == "challenges")


def test_agreement_by_another_key_raises_the_level(sealed: Path, bundle: Path) -> None:
    path = challenging.challenge(bundle, 12, "strong", sealed / "other", nonce=NONCE, run=faithful)
    assert path.parent == bundle / "challenges"
    checking = checked(bundle)
    assert "strong run again: 12 of 12 outputs are the same" in lines(checking)
    assert checking.levels["sums/strong/accuracy"] == 4
    assert checking.levels["sums/weak/accuracy"] == 3
    differences = [name for name in checking.figures if checking.figures[name]["spec"]["versus"]
                   and "model" in checking.figures[name]["spec"]["versus"]]
    assert differences and all(checking.levels[name] == 3 for name in differences)
    challenging.challenge(bundle, 12, "weak", sealed / "other", nonce=NONCE, run=faithful)
    assert set(checked(bundle).levels.values()) == {4}


def test_a_bundle_with_a_counter_statement_is_still_as_signed(sealed: Path, bundle: Path) -> None:
    challenging.challenge(bundle, 12, "strong", sealed / "other", nonce=NONCE, run=faithful)
    (bundle / "challenges" / "note.txt").write_text("x", encoding="utf-8")
    assert [str(line) for line in verify.failures(verify.verify(bundle))] == [
        "failed: files: challenges/note.txt is not covered by the signature: it was added after sealing"]


def test_the_draw_is_the_smallest_hashes(bundle: Path) -> None:
    """Drawn here once more by sorting all of them."""
    root = checked(bundle).root
    seed = hashlib.sha256(b"moonbase challenge\0" + root.encode() + b"\0" + NONCE.encode()).digest()
    strong = range(16)  # the strong model's records come first
    ranked = sorted(strong, key=lambda number: hashlib.sha256(seed + number.to_bytes(8, "big")).digest())
    drawn = challenging.draw(bundle, "strong", 5, root, NONCE)
    assert [one.index for one in drawn] == sorted(ranked[:5])
    assert {one.record.model for one in drawn} == {"strong"}
    assert [one.index for one in challenging.draw(bundle, "strong", 5, root, NONCE + "x")] != sorted(ranked[:5])
    assert len(challenging.draw(bundle, "strong", 500, root, NONCE)) == 16


def other_answers(share: int) -> Any:
    """A model that answers every so-many-th item in other words, with the same score."""
    def run(bundle: Path, records: list[Record], model: str, work: Path) -> Iterable[Record]:
        for number, record in enumerate(records):
            text = record.output + " " if number % share == 0 else record.output
            yield record.model_copy(update={"output": text, "output_digest": digest(text)})
    return run


def worse(count: int, **changes: Any) -> Any:
    """A model that fails `count` of the items that the sealed one solved."""
    def run(bundle: Path, records: list[Record], model: str, work: Path) -> Iterable[Record]:
        left = count
        for record in records:
            call = record.call.model_copy(update=changes)
            if left and record.scores["accuracy"] == 1:
                left -= 1
                record = record.model_copy(update={"scores": {"accuracy": 0.0}, "output": "?",
                                                   "output_digest": digest("?")})
            yield record.model_copy(update={"call": call})
    return run


def but_one(rest: Any) -> Any:
    """A model of which the first answer names no weights, and the others are as `rest` gives them."""
    def run(bundle: Path, records: list[Record], model: str, work: Path) -> Iterable[Record]:
        first, *others = rest(bundle, records, model, work)
        return [records[0].model_copy(update={"call": first.call.model_copy(update={"weights_digest": None})}), *others]
    return run


@pytest.mark.parametrize(("run", "n", "level", "words"), [
    (but_one(worse(0)), 16, 4, "15 of 15 outputs and 1 of 1 scores are the same"),
    # One that cannot be compared to the letter does not excuse the others.
    (but_one(other_answers(5)), 16, 3, "12 of 15 outputs and 1 of 1 scores are the same: DISAGREES"),
    (other_answers(5), 16, 3, "12 of 16 outputs are the same: DISAGREES"),
    (worse(1), 16, 3, "15 of 16 outputs are the same: DISAGREES"),
    # Other weights are another model, however it scores; a host that names none, or another temperature: scores.
    (worse(0, weights_digest="sha256:" + "cd" * 32), 16, 3, "the same; other weights answered than the sealed ones"),
    (worse(2, weights_digest=None), 16, 4, "14 of 16 scores are the same"),
    (worse(0, decoding={"temperature": 0.0, "seed": 5}), 16, 4, "16 of 16 outputs are the same"),
    (worse(2, decoding={"temperature": 0.7}), 16, 4, "14 of 16 scores are the same"),
    (worse(9, decoding={"temperature": 0.7}), 16, 3, "7 of 16 scores are the same: DISAGREES"),
    (worse(4, decoding={"temperature": 0.7}), 16, 3, "12 of 16 scores are the same: DISAGREES"),
    (faithful, 3, 3, "too few to count"),
    (faithful, 9_999, 4, "16 of 16 outputs"),
    (lambda bundle, records, model, work: [], 16, 3, "0 of 16 scores are the same: DISAGREES"),
    (lambda bundle, records, model, work: [record.model_copy(update={"input_digest": digest("other")})
                                           for record in records], 16, 3, "DISAGREES"),
])
def test_what_agreement_is(sealed: Path, bundle: Path, run: Any, n: int, level: int, words: str) -> None:
    challenging.challenge(bundle, n, "strong", sealed / "other", nonce=NONCE, run=run)
    checking = checked(bundle)
    assert words in lines(checking)
    assert checking.levels["sums/strong/accuracy"] == level


@pytest.mark.parametrize(("ups", "downs"), [(0, 0), (1, 0), (0, 6), (3, 5), (5, 3), (10, 0), (40, 41)])
def test_the_sign_test_is_that_of_scipy(ups: int, downs: int) -> None:
    wanted = binomtest(ups, ups + downs).pvalue if ups + downs else 1.0
    assert challenging.sign_test(ups, downs) == pytest.approx(wanted)


def test_the_publisher_cannot_replicate_himself(sealed: Path, bundle: Path) -> None:
    with pytest.raises(UserError, match="somebody else's"):
        challenging.challenge(bundle, 12, "strong", sealed / "key", nonce=NONCE, run=faithful)
    path = challenging.challenge(bundle, 12, "strong", sealed / "other", nonce=NONCE, run=faithful)
    resign(path, sealed / "key", lambda predicate: None)
    checking = checked(bundle)
    assert "signed by the publisher's own key" in lines(checking)
    assert checking.levels["sums/strong/accuracy"] == 3


def resign(path: Path, key: Path, change: Any) -> None:
    statement, _ = signing.open_envelope(path.read_bytes(), signing.CHALLENGE_PREDICATE, None)
    signer = signing.load_key(key)
    statement["predicate"]["key"] = signing.public_text(signer)
    change(statement["predicate"])
    path.write_bytes(signing.sign(statement, signer))


def favourable(predicate: dict[str, Any]) -> None:
    predicate["samples"] = predicate["samples"][:10]


def misquoted(predicate: dict[str, Any]) -> None:
    predicate["samples"][0]["sealed"]["scores"]["accuracy"] = 0.5


LIES = {
    "fewer samples than drawn": (favourable, "not those that root and nonce choose"),
    "another nonce": (lambda predicate: predicate.update(nonce="another-nonce"), "not those that root and nonce"),
    "a misquoted score": (misquoted, "misquotes record"),
    "another model": (lambda predicate: predicate.update(model="nobody"), "does not have"),
    "another root": (lambda predicate: predicate.update(root="sha256:" + "0" * 64), "another bundle"),
    "no samples": (lambda predicate: predicate.pop("samples"), "not a counter-statement"),
    "endless n": (lambda predicate: predicate.update(n=10**9), "not a counter-statement"),
    "a word for a number": (lambda predicate: predicate.update(n="12"), "not a counter-statement"),
    "truth for a score": (lambda predicate: predicate["samples"][0]["again"]["scores"].update(accuracy=True),
                          "a score is no number"),
    "no result": (lambda predicate: predicate["samples"][0].update(again=7), "not a counter-statement"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_false_counter_statement_does_not_count(sealed: Path, bundle: Path, lie: str) -> None:
    path = challenging.challenge(bundle, 12, "strong", sealed / "other", nonce=NONCE, run=faithful)
    change, words = LIES[lie]
    resign(path, sealed / "other", change)
    checking = checked(bundle)
    assert words in lines(checking) and "does not count" in lines(checking)
    assert checking.levels["sums/strong/accuracy"] == 3


def test_a_counter_statement_of_another_bundle_or_with_a_changed_byte_does_not_count(
    sealed: Path, bundle: Path, tmp_path: Path
) -> None:
    path = challenging.challenge(bundle, 12, "strong", sealed / "other", nonce=NONCE, run=faithful)
    samples.write_evaluation(tmp_path / "run", items=7)
    second = seal.seal(tmp_path / "run", sealed / "key")
    (second / "challenges").mkdir()
    (second / "challenges" / path.name).write_bytes(path.read_bytes())
    assert "it is about another bundle" in lines(checked(second))
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        assert "does not count" in lines(checked(bundle))
        break
    with pytest.raises(BundleError):
        challenging.check_counter_statement(bundle, canonical({"payload": 1}))


@pytest.mark.parametrize(("changes", "problem"), [
    ({"n": 0}, "from 1 to"), ({"n": 10**7}, "from 1 to"), ({"nonce": "short"}, "nonce"),
    ({"nonce": "white space"}, "nonce"), ({"model": "new"}, "strong, weak"),
])
def test_a_challenge_that_cannot_be(sealed: Path, changes: dict[str, Any], problem: str) -> None:
    settings = {"n": 12, "model": "strong", "nonce": NONCE, "run": faithful} | changes
    with pytest.raises(UserError, match=problem):
        challenging.challenge(sealed / "bundle", settings.pop("n"), settings.pop("model"), sealed / "other", **settings)


def test_a_spoilt_bundle_is_not_challenged(sealed: Path, bundle: Path) -> None:
    samples.edit(bundle / "report.html", "</data>", "1</data>")
    with pytest.raises(UserError, match="nothing to challenge"):
        challenging.challenge(bundle, 12, "strong", sealed / "other", nonce=NONCE, run=faithful)


# Through Inspect

MODEL = "steady/one"


def register_model() -> None:
    """A provider whose one model answers with a number made of the question; it names no weights and no decoding."""
    from inspect_ai.model import ModelAPI, ModelOutput, modelapi

    class Steady(ModelAPI):
        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
            number = int(hashlib.sha256(input[-1].text.encode()).hexdigest()[:2], 16)
            return ModelOutput.from_content("one", f"Steady. Answer: {number}")

    modelapi(name="steady")(Steady)


@pytest.fixture(scope="session")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`: MODEL on fresh sums; `key`, `other`; `bundle`."""
    from moonbase.evals.run import run_suite
    from moonbase.evals.suite import Suite

    place = tmp_path_factory.mktemp("asked")
    for name in ("key", "other"):
        signing.generate_key(place / name)
    suite = Suite.model_validate(samples.suite_json(tasks=[
        {"name": "sums", "source": "builtin:fresh/maths", "params": {"count": 6, "difficulties": [1]}}])["suite"])
    register_model()
    run_suite(suite, [MODEL], place / "run", seed=samples.SEED, quiet=True)
    seal.seal(place / "run", place / "key", out=place / "bundle")
    return place


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A folder with `key`, `other` and `bundle`; the names of the two models in it, of one kind and other weights.

    Greedy, by the real engine; what random weights say is wrong, so that scores alone could not tell them apart.
    """
    from inspect_ai.model import GenerateConfig

    from moonbase.checkpoint import save_weights
    from moonbase.evals.providers.engines import close_engines
    from moonbase.evals.run import run_suite
    from moonbase.evals.suite import Suite
    from tests.agents import tiny_chat
    from tests.model.tiny import randomise

    place = tmp_path_factory.mktemp("engines")
    for name in ("key", "other"):
        signing.generate_key(place / name)
    tiny_chat.save(place / "one")
    other = randomise(tiny_chat.model(), seed=1)
    save_weights(other, place / "two", other.config)
    tiny_chat.tokenizer().save(place / "two")
    models = [f"moonbase/{place / name}" for name in ("one", "two")]
    suite = Suite.model_validate(samples.suite_json(tasks=[
        {"name": "sums", "source": "builtin:fresh/maths", "params": {"count": 10, "difficulties": [1]}}])["suite"])
    greedy = {"style": "kimi-k2", "config": GenerateConfig(temperature=0, max_tokens=8)}
    run_suite(suite, models, place / "run", seed=samples.SEED, model_args=dict.fromkeys(models, greedy), quiet=True)
    seal.seal(place / "run", place / "key", out=place / "bundle")
    yield place, models
    asyncio.run(close_engines())


def test_real_weights_are_replicated_and_others_are_found_out(
    engines: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place, (one, two)), home = engines, tmp_path / "home"
    bundle = samples.copy_of(place / "bundle", tmp_path / "bundle")
    assert set(checked(bundle).levels.values()) == {3}
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    challenging.challenge(bundle, 20, one, place / "other", nonce=NONCE)
    assert [path for path in home.rglob("*") if "inspect" in path.name] == []
    found = checked(bundle)
    assert f"{one} run again: 20 of 20 outputs are the same" in lines(found)
    for name, figure in found.figures.items():
        alone = figure["model"] == one and "model" not in (figure["spec"]["versus"] or {})
        assert found.levels[name] == (4 if alone else 3), name
    path = challenging.challenge(bundle, 20, one, place / "other", nonce=NONCE, sealed_model=two)
    found = checked(bundle)
    assert f"{two} run again: 20 of 20 scores are the same; other weights answered than the sealed ones: DISAGREES" \
        in lines(found)
    assert found.levels[f"sums/{two}/accuracy"] == 3
    # Who lies about the weights is contradicted by the outputs.
    resign(path, place / "other", lambda predicate: [sample["again"].update(weights=sample["sealed"]["weights"])
                                                     for sample in predicate["samples"]])
    assert "outputs are the same: DISAGREES" in lines(checked(bundle))


def test_a_counter_statement_that_another_contradicts_raises_nothing(sealed: Path, bundle: Path) -> None:
    """A liar can say that outputs were the same; whoever runs the same samples says that they are not."""
    challenging.challenge(bundle, 12, "strong", sealed / "other", nonce=NONCE, run=faithful)
    signing.generate_key(bundle.parent / "third")
    challenging.challenge(bundle, 12, "strong", bundle.parent / "third", nonce=NONCE, run=other_answers(5))
    found = checked(bundle)
    assert "one counter-statement agrees and another does not" in lines(found)
    assert found.levels["sums/strong/accuracy"] == 3


def test_records_are_compared_with_the_logs(asked: Path, tmp_path: Path) -> None:
    findings = verify.verify(asked / "bundle", asked / "key.pub")
    assert not verify.failures(findings), findings
    words = "\n".join(map(str, findings))
    assert "ok: logs: 12 records follow from Inspect's logs" in words
    assert "items made again from the seed: 12" in words and "(L2)" in words
    assert not (asked / "bundle" / "private").exists()

    def invent(values: list[dict[str, Any]]) -> None:
        values[0]["output_tokens"] += 5
        values[1]["seconds"] = 0.0

    spoilt = samples.copy_of(asked / "bundle", tmp_path / "spoilt")
    samples.forge_chain(spoilt, invent)
    samples.sign_again(spoilt, asked / "key")
    found = [str(line) for line in verify.failures(verify.verify(spoilt)) if line.check == "logs"]
    assert found == ["failed: logs: records.jsonl, line 1: the logs have another output_tokens",
                     "failed: logs: records.jsonl, line 2: the logs have another seconds"]
    samples.forge_chain(spoilt, lambda values: values[:-1])
    samples.sign_again(spoilt, asked / "key")
    assert "has fewer records than the logs" in str(verify.failures(verify.verify(spoilt)))


def test_a_log_that_is_none_is_named(asked: Path, tmp_path: Path) -> None:
    spoilt = samples.copy_of(asked / "bundle", tmp_path / "spoilt")
    log = next((spoilt / "logs").iterdir())
    log.write_bytes(log.read_bytes()[:200])
    samples.sign_again(spoilt, asked / "key")
    found = [str(line) for line in verify.failures(verify.verify(spoilt))]
    assert len(found) == 1 and "not a log of Inspect" in found[0]


def test_the_model_is_asked_again_through_inspect(asked: Path, tmp_path: Path) -> None:
    bundle = samples.copy_of(asked / "bundle", tmp_path / "bundle")
    path = challenging.challenge(bundle, 10, MODEL, asked / "other", nonce=NONCE)
    statement, _ = signing.open_envelope(path.read_bytes(), signing.CHALLENGE_PREDICATE, None)
    assert all(sample["again"]["output"] == sample["sealed"]["output"] for sample in statement["predicate"]["samples"])
    # No weights are named, so scores are what is compared, and no figure is raised: level 3 comes before level 4.
    checking = checked(bundle)
    assert "10 of 10 scores are the same" in lines(checking) and set(checking.levels.values()) == {2}
    assert "Steady" not in json.dumps(statement)
