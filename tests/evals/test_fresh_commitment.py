"""Commit and reveal: what was promised can be checked, and every way to cheat is found. And the contamination index."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from moonbase.errors import UserError
from moonbase.evals.fresh import commitment, scripted
from moonbase.evals.fresh.contamination import contamination_index, scores_of
from moonbase.evals.fresh.itemset import Configuration, problems
from moonbase.evals.proof.signing import generate_key
from moonbase.evals.records import Record, digest, read_records, write_records

CONFIGURATION = Configuration(families=("maths", "logic"), difficulties=(1, 3), count=3)
MODELS = ("replay/one", "moonbase/two")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    generate_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


def record_of(problem, model: str, **changes) -> Record:
    fields = {"suite": "fresh", "task": problem.family, "item": problem.item, "model": model,
              "condition": {"language": problem.language, "difficulty": str(problem.difficulty)},
              "group": problem.family, "cluster": problem.item, "input_digest": digest(problem.prompt),
              "target_digest": digest(problem.target_text), "output": "I do not know.", "scores": {"accuracy": 0.0}}
    # The first item, and no other, is solved.
    if problem.index == 0 and problem.difficulty == 1:
        fields |= {"output": scripted.wording(problem, True, None), "scores": {"accuracy": 1.0}}
    fields["output_digest"] = digest(fields["output"])
    return Record(**{**fields, **changes})


def changed(record: Record, **fields) -> Record:
    return record.model_copy(update=fields)


@pytest.fixture
def folder(tmp_path: Path, key: Path) -> Path:
    """An evaluation as it should be."""
    folder, opening = tmp_path / "run", commitment.Opening.new()
    folder.mkdir()
    promised = commitment.commit(CONFIGURATION, opening, key)
    seed = commitment.effective_seed(opening, MODELS)
    opening.write(tmp_path / "opening.json")
    commitment.write(folder, commitment.COMMITMENT, promised)
    commitment.write(folder, commitment.REVEAL, commitment.reveal(promised, opening, MODELS, key))
    write_records(folder / "records.jsonl", (record_of(problem, model) for model in MODELS
                                             for problem in problems(CONFIGURATION, seed)))
    return folder


def rewrite(folder: Path, change) -> None:
    records = list(read_records(folder / "records.jsonl"))
    write_records(folder / "records.jsonl", change(records))


def test_an_honest_evaluation_is_accepted(folder: Path) -> None:
    assert commitment.check(folder) == []
    assert len(list(read_records(folder / "records.jsonl"))) == 2 * 2 * 2 * 3 * 2


@pytest.mark.parametrize(("change", "said"), [
    (lambda rows: rows[1:], "no record of 1 of 24"),
    (lambda rows: rows + rows[:1], "two records"),
    (lambda rows: [rows[0].model_copy(update={"input_digest": digest("other")}), *rows[1:]], "asked something else"),
    (lambda rows: [rows[0].model_copy(update={"target_digest": digest("other")}), *rows[1:]], "another answer"),
    (lambda rows: [rows[0].model_copy(update={"item": "maths-00000000-1-00000"}), *rows[1:]], "does not come from"),
    (lambda rows: [rows[0].model_copy(update={"model": "replay/three"}), *rows[1:]], "was not named"),
    (lambda rows: [row for row in rows if row.model == MODELS[0]], "no record of 24 of 24"),
    (lambda rows: [changed(rows[0], condition={"language": "en", "difficulty": "3"}), *rows[1:]], "under difficulty 3"),
    (lambda rows: [changed(rows[0], condition={"language": "zh"}), *rows[1:]], "asked something else"),
    (lambda rows: [changed(rows[0], group="logic"), *rows[1:]], "filed under group logic"),
    (lambda rows: [changed(rows[0], task="logic"), *rows[1:]], "under task"),
    (lambda rows: [changed(rows[0], cluster="all"), *rows[1:]], "filed under cluster"),
    (lambda rows: [changed(rows[0], sample=1), *rows[1:]], "sample 1: 1 were committed to"),
    (lambda rows: [*rows, changed(rows[0], sample=1)], "sample 1: 1 were committed to"),
    (lambda rows: [changed(rows[0], scores={"accuracy": 0.0}), *rows[1:]], "score is 1, the record says 0"),
    (lambda rows: [changed(rows[0], scores={}, status="unscored"), *rows[1:]], "can be scored has no score"),
    (lambda rows: [changed(rows[0], output="Answer: 7"), *rows[1:]], "not the text that its digest is of"),
    (lambda rows: [changed(rows[0], output=rows[-1].output, output_digest=rows[-1].output_digest), *rows[1:]],
     "score is 0, the record says 1"),
])
def test_every_change_of_the_records_is_found(folder: Path, change, said: str) -> None:
    rewrite(folder, change)
    assert any(said in finding.text for finding in commitment.check(folder)), commitment.check(folder)


def test_every_changed_byte_of_the_documents_is_found(folder: Path) -> None:
    for name in (commitment.COMMITMENT, commitment.REVEAL):
        path = folder / name
        whole = path.read_bytes()
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert commitment.check(folder), (name, place)
        path.write_bytes(whole)
    assert commitment.check(folder) == []


def test_the_key_can_be_asked_for(folder: Path, tmp_path: Path, key: Path) -> None:
    ours = (tmp_path / "key.pem.pub").read_text().strip()
    assert commitment.check(folder, ours) == []
    other = generate_key(tmp_path / "other.pem")
    assert "signature" in commitment.check(folder, other)[0].text


def test_another_secret_or_key_cannot_be_revealed(folder: Path, tmp_path: Path, key: Path) -> None:
    promised = (folder / commitment.COMMITMENT).read_bytes()
    with pytest.raises(UserError, match="not the one that was committed"):
        commitment.reveal(promised, commitment.Opening.new(), MODELS, key)
    generate_key(tmp_path / "other.pem")
    with pytest.raises(UserError, match="another key"):
        commitment.reveal(promised, commitment.Opening.read(tmp_path / "opening.json"), MODELS, tmp_path / "other.pem")
    with pytest.raises(UserError, match="randomness"):
        commitment.reveal(promised, commitment.Opening.read(tmp_path / "opening.json"), MODELS, key,
                          public_randomness="9")


def test_a_reveal_of_other_models_asks_other_questions(folder: Path, tmp_path: Path, key: Path) -> None:
    """Whoever adds or drops a model after the run gets another seed."""
    promised = (folder / commitment.COMMITMENT).read_bytes()
    opening = commitment.Opening.read(tmp_path / "opening.json")
    (folder / commitment.REVEAL).write_bytes(commitment.reveal(promised, opening, MODELS[:1], key))
    rewrite(folder, lambda rows: [row for row in rows if row.model == MODELS[0]])
    assert any("does not come from" in finding.text for finding in commitment.check(folder))


def test_samples_are_promised_and_none_is_left_out_or_asked_once_more(tmp_path: Path, key: Path) -> None:
    opening, folder = commitment.Opening.new(), tmp_path / "twice"
    folder.mkdir()
    twice = CONFIGURATION.model_copy(update={"samples": 2, "families": ("maths",)})
    promised = commitment.commit(twice, opening, key)
    commitment.write(folder, commitment.COMMITMENT, promised)
    commitment.write(folder, commitment.REVEAL, commitment.reveal(promised, opening, MODELS, key))
    rows = [record_of(problem, model, sample=sample) for model in MODELS for sample in (0, 1)
            for problem in problems(twice, commitment.effective_seed(opening, MODELS))]
    write_records(folder / "records.jsonl", rows)
    assert commitment.check(folder) == []
    # Of each item the better of two: the other one is missing.
    write_records(folder / "records.jsonl", rows[:12] + rows[24:])
    assert [finding.text for finding in commitment.check(folder)] == [f"model {MODELS[0]}: no record of 12 of 24 items"]
    write_records(folder / "records.jsonl", [*rows, rows[0].model_copy(update={"sample": 2})])
    assert "2 were committed to" in commitment.check(folder)[0].text


def test_another_spelling_of_names_or_draws_gives_no_other_items(folder: Path, tmp_path: Path) -> None:
    opening = commitment.Opening.read(tmp_path / "opening.json")
    seed = commitment.effective_seed(opening, ["moonbase/runs/one", "openai/x"], "3f9a2c11")
    for models, draw in ((["openai/x", "moonbase/runs/one"], "3f9a2c11"),
                         (["OpenAI/X", "moonbase/./runs//one/"], "3F9A2C11"),
                         ([" openai/ｘ ", "moonbase/runs/one", "OPENAI/x"], " 3f9a2c11\n")):
        assert commitment.effective_seed(opening, models, draw) == seed
    assert commitment.effective_seed(opening, ["moonbase/runs/on", "openai/x"], "3f9a2c11") != seed
    assert commitment.folded("/models/A/../b") == "/models/a/../b"


def test_the_draw_can_be_asked_for(tmp_path: Path, key: Path) -> None:
    opening, folder = commitment.Opening.new(), tmp_path / "drawn"
    folder.mkdir()
    promised = commitment.commit(CONFIGURATION, opening, key, randomness_source="drand round 7")
    commitment.write(folder, commitment.COMMITMENT, promised)
    commitment.write(folder, commitment.REVEAL, commitment.reveal(promised, opening, MODELS, key,
                                                                  public_randomness="77aa"))
    write_records(folder / "records.jsonl", (record_of(problem, model) for model in MODELS for problem in problems(
        CONFIGURATION, commitment.effective_seed(opening, MODELS, "77aa"))))
    assert commitment.check(folder) == commitment.check(folder, public_randomness="77AA") == []
    assert "not '78aa'" in commitment.check(folder, public_randomness="78aa")[0].text


def test_answers_under_the_other_models_name_are_found_by_weights_and_else_cannot_be(folder: Path) -> None:
    def swapped(rows: list[Record], places: range) -> list[Record]:
        return [changed(row, model=MODELS[1 - MODELS.index(row.model)]) if place % 24 in places else row
                for place, row in enumerate(rows)]

    def with_weights(rows: list[Record]) -> list[Record]:
        return [changed(row, call=row.call.model_copy(update={"weights_digest": f"sha256:{row.model}"}))
                for row in rows]

    rewrite(folder, lambda rows: swapped(rows, range(12)))
    assert commitment.check(folder) == []
    rewrite(folder, lambda rows: swapped(with_weights(rows), range(12)))
    assert {finding.text.partition(": ")[2] for finding in commitment.check(folder)} == {
        "answered with other weights than before"}


def test_a_suite_with_a_seed_of_its_own_cannot_be_promised() -> None:
    from moonbase.evals.suite import load_suite

    suite = load_suite("fresh")
    own = suite.tasks[0].model_copy(update={"params": {**suite.tasks[0].params, "seed": 1}})
    with pytest.raises(UserError, match="seed of its own"):
        commitment.configuration_of(suite.model_copy(update={"tasks": (own,)}))


def test_another_generator_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = commitment.generator()
    changed = {**real, "digest": "sha256:" + "0" * 64, "files": {**real["files"], "evals/fresh/maths.py": "sha256:1"}}
    monkeypatch.setattr(commitment, "generator", lambda: changed)
    assert "evals/fresh/maths.py" in commitment.check(folder)[0].text


def test_the_formulas_are_those_of_the_documentation(folder: Path, tmp_path: Path) -> None:
    """Computed here with hashlib and json alone, as a stranger would."""
    secrets = json.loads((tmp_path / "opening.json").read_text())
    told, shown = (json.loads(base64.b64decode(json.loads((folder / name).read_bytes())["payload"]))["predicate"]
                   for name in (commitment.COMMITMENT, commitment.REVEAL))
    sealed = hashlib.sha256(b"moonbase fresh commitment\0" + bytes.fromhex(secrets["salt"])
                            + bytes.fromhex(secrets["secret"]))
    assert told["seed"] == f"sha256:{sealed.hexdigest()}"
    message = json.dumps({"models": sorted(MODELS), "public_randomness": None}, separators=(",", ":"), sort_keys=True)
    assert shown["seed"] == hmac.new(bytes.fromhex(secrets["secret"]), message.encode(),
                                     hashlib.sha256).hexdigest()[:32]
    for name, found in told["generator"]["files"].items():
        content = (Path(commitment.__file__).resolve().parents[2] / name).read_bytes()
        assert found == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert secrets["secret"] not in json.dumps(told) and secrets["salt"] not in json.dumps(told)


def test_the_secret_is_private_and_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    assert (tmp_path / "opening.json").stat().st_mode & 0o077 == 0
    with pytest.raises(UserError, match="exists already"):
        commitment.Opening.new().write(tmp_path / "opening.json")
    with pytest.raises(UserError, match="exists already"):
        commitment.write(folder, commitment.COMMITMENT, b"")
    (tmp_path / "bad.json").write_text('{"secret": "xyz"}')
    with pytest.raises(UserError, match="not the opening"):
        commitment.Opening.read(tmp_path / "bad.json")


def test_the_effective_seed_depends_on_everything_and_not_on_the_order() -> None:
    opening, other = commitment.Opening("11" * 32, "22" * 32), commitment.Opening("12" * 32, "22" * 32)
    seed = commitment.effective_seed
    assert seed(opening, ["a", "b"]) == seed(opening, ["b", "a", "a"])
    assert len({seed(opening, ["a", "b"]), seed(opening, ["a"]), seed(other, ["a", "b"]), seed(opening, ["ab"]),
                seed(opening, ["a", "b"], "round 7"), seed(opening, ["a", "b"], "round 8")}) == 6


def test_our_suite_of_fresh_problems_can_be_committed_to() -> None:
    from moonbase.evals.suite import load_suite

    found = commitment.configuration_of(load_suite("fresh"), limit=10)
    assert found == Configuration(difficulties=(1, 2, 3), count=8, limit=10) and len(list(problems(
        found.model_copy(update={"families": ("maths", "tools")}), 1))) == 20
    with pytest.raises(UserError, match="no task of fresh problems"):
        commitment.configuration_of(load_suite("refusal"))


def test_a_folder_without_documents_is_said() -> None:
    assert commitment.check(Path("nowhere"))[0].where == commitment.COMMITMENT


# Contamination


def test_the_index_is_the_mean_paired_difference() -> None:
    public = {f"q{i}": float(i % 10 < 8) for i in range(100)}
    twins = {f"q{i}": f"t{i}" for i in range(100)}
    fresh = {f"t{i}": float(i % 10 < 5) for i in range(100)}
    found = contamination_index(public, fresh, twins)
    assert (found.public, found.fresh, found.n, found.unpaired) == (0.8, 0.5, 100, 0)
    assert found.index == pytest.approx(0.3)
    assert found.p_value == pytest.approx(binomtest(30, 30, 0.5).pvalue)
    assert 0.2 < found.low < 0.3 < found.high < 0.4 and found.suspicious


def test_no_difference_is_not_suspicious_and_missing_scores_are_counted() -> None:
    public = {f"q{i}": float(i % 2) for i in range(40)} | {"alone": 1.0, "lost": 1.0}
    fresh = {f"q{i}": float((i // 2) % 2) for i in range(40)} | {"lost": None}
    found = contamination_index(public, fresh)
    assert found.index == 0.0 and not found.suspicious
    assert (found.n, found.unpaired) == (40, 2)
    with pytest.raises(UserError, match="no public item"):
        contamination_index({"a": 1.0}, {"b": 1.0})


def test_scores_of_records_are_means_over_samples() -> None:
    problem = next(problems(CONFIGURATION, 1))
    rows = [record_of(problem, "m", sample=sample, scores={"accuracy": score}) for sample,
            score in enumerate((1.0, 0.0))]
    assert scores_of(rows) == {problem.item: 0.5}
    assert scores_of([*rows, record_of(problem, "m", sample=2, scores={"accuracy": None})]) == {problem.item: None}
