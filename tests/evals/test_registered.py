"""Tasks of other packages: a suite's parameters, limits, roles and local copies hold for them."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moonbase.errors import UserError
from moonbase.evals.suite import Suite, load_suite, suite_names

pytest.importorskip("inspect_ai", reason="Inspect is not installed (moonbase[evals])")

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, ModelUsage, modelapi
from inspect_ai.scorer import Score, Scorer, Target, scorer
from inspect_ai.solver import TaskState, generate

from moonbase.evals.tasks import registered

ROOT = Path(__file__).resolve().parents[2]


@modelapi(name="barista")
class Barista(ModelAPI):
    """Says yes. Without its counts Inspect would count tokens, with a vocabulary from the network."""

    def __init__(self, model_name: str, base_url: str | None = None, api_key: str | None = None,
                 config: GenerateConfig = GenerateConfig(), **_: Any) -> None:
        super().__init__(model_name, base_url, api_key, [], config)

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        output = ModelOutput.from_content(self.model_name, "Yes.")
        output.usage = ModelUsage(input_tokens=3, output_tokens=2, total_tokens=5)
        return output


@scorer(metrics=[], name="graded")
def graded(grader: str | None) -> Scorer:
    async def score(state: TaskState, target: Target) -> Score:
        return Score(value={"score": "C" if state.sample_id == "tea" else "I", "confidence": 80})

    return score


@task
def drinks(size: int = 3, grader: str | None = None) -> Task:
    """Reads a copy as the `datasets` library does: a folder that is called as the set is."""
    names = json.loads(Path("kitchen/drinks/test.json").read_text())[:size]
    samples = [Sample(id=name, input=f"Is {name} a drink?", target="yes", metadata={"condition": "hot", "item": 7})
               for name in names]
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=graded(grader), metadata={"asked": grader})


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a copy of the set, and a package `kitchen` whose task it is."""
    package = SimpleNamespace(name="kitchen", load=lambda: SimpleNamespace(drinks=drinks))
    monkeypatch.setattr(registered, "entry_points", lambda group: [package])
    folder = tmp_path / "sets" / "huggingface" / "kitchen" / "drinks"
    folder.mkdir(parents=True)
    (folder / "test.json").write_text('["tea", "coffee", "water"]')
    return tmp_path / "sets"


def suite_of(**spec: Any) -> Suite:
    return Suite.model_validate({"name": "s", "title": "s", "metric": "accuracy", "tasks": [
        {"name": "mine", "source": "kitchen/drinks", "scores": {"accuracy": "score"}, **spec}]})


def test_a_suite_decides_over_the_task_of_another_package(data: Path) -> None:
    from moonbase.evals.tasks import build_tasks

    before = Path.cwd()
    suite = suite_of(params={"size": 2, "grader": "role:grader"})
    built = build_tasks(suite, data, limit=1, roles={"grader": "openai/judge"})[0]
    assert (built.name, len(built.dataset), built.metadata["asked"]) == ("mine", 1, "openai/judge")
    assert Path.cwd() == before
    with pytest.raises(UserError, match="--role grader=MODEL"):
        build_tasks(suite, data)


@pytest.mark.parametrize(("spec", "complaint"), [
    ({"params": {"sizes": 2}}, "no parameter 'sizes' (did you mean 'size'?)"),
    ({"source": "kitchen/drink"}, "no task 'drink' (did you mean 'drinks'?)"),
    ({"source": "cellar/wines"}, "the package cellar is not installed"),
    ({"params": {"size": "all"}}, "cannot be had (TypeError"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(spec: dict[str, Any], complaint: str, data: Path) -> None:
    from moonbase.evals.tasks import build_tasks

    with pytest.raises(UserError) as raised:
        build_tasks(suite_of(**spec), data)
    assert complaint in str(raised.value) and "task mine" in str(raised.value) and "\n" not in str(raised.value)


def test_an_absent_copy_is_said_to_be_absent(data: Path, tmp_path: Path) -> None:
    from moonbase.evals.tasks import build_tasks

    with pytest.raises(UserError, match="needs a local copy"):
        build_tasks(suite_of(), tmp_path)


def test_records_have_the_items_and_the_suite_s_names(data: Path, tmp_path: Path) -> None:
    from moonbase.evals.records import read_records
    from moonbase.evals.run import run_suite

    suite = suite_of()
    found = run_suite(suite, ["barista/sure"], tmp_path / "out", data=data, quiet=True)
    assert (found.records, found.errors) == (3, 0)
    records = list(read_records(tmp_path / "out" / "records.jsonl"))
    assert [(record.task, record.item, record.scores["accuracy"]) for record in records] == [
        ("mine", "tea", 1.0), ("mine", "coffee", 0.0), ("mine", "water", 0.0)]
    # What another package calls an item or a condition is none of ours.
    assert all(record.condition == {} and record.status == "scored" for record in records)


# --- the package itself -----------------------------------------------------------------------------------------------

PROGRAM = """
import inspect, json, sys
from pathlib import Path
import inspect_evals._registry as package
import tests.evals.test_registered
from moonbase.evals.run import run_suite
from moonbase.evals.suite import Suite, load_suite, suite_names
from moonbase.evals.tasks.registered import ROLE
checked = 0
for suite in map(load_suite, suite_names()):
    for spec in suite.tasks:
        kind, _, name = spec.source.partition("/")
        if kind == "inspect_evals":
            known = inspect.signature(getattr(package, name)).parameters
            assert not spec.params.keys() - known.keys(), (spec.name, list(known))
            assert known.get("shuffle") is None or known["shuffle"].default is False or name.startswith("mmlu_0") \\
                or spec.params.get("shuffle") is False, f"{spec.name}: another order every time"
            checked += 1
data, out = map(Path, sys.argv[1:])
suite = Suite.model_validate({"name": "s", "title": "s", "metric": "accuracy", "tasks": [
    {"name": "gsm8k", "source": "inspect_evals/gsm8k", "params": {"fewshot": 2}},
    {"name": "airline", "source": "inspect_evals/tau2_airline", "params": {"shuffle": False, "message_limit": 4}}]})
for _ in range(2):
    found = run_suite(suite, ["barista/sure"], out, data=data, limit=3, quiet=True, roles={"user": "barista/guest"})
print(json.dumps([checked, found.records, found.errors]))
"""


def _package_folder() -> str:
    """Where inspect_evals is, for PYTHONPATH; it is in no environment of ours. Skips where there is none."""
    if importlib.util.find_spec("inspect_evals") is not None:
        return ""
    for folder in filter(None, (os.environ.get("MOONBASE_INSPECT_EVALS"), str(ROOT / ".venv" / "inspect-evals"))):
        if (Path(folder) / "inspect_evals").is_dir():
            return folder
    pytest.skip("inspect_evals is absent: pip install --no-deps --target .venv/inspect-evals inspect-evals==0.26.0 "
                "backoff toml (or set MOONBASE_INSPECT_EVALS)")


@pytest.mark.slow
def test_real_tasks_run_from_local_copies(tmp_path: Path, shared_data: Path) -> None:
    """Every task that a suite of ours names is there with the parameters that it gives; two of them run."""
    from moonbase.evals.records import digest, read_records

    folder = _package_folder()
    copy = tmp_path / "sets" / "huggingface" / "openai" / "gsm8k" / "main"
    copy.mkdir(parents=True)
    for part in ("test", "train"):
        (copy / f"{part}.jsonl.gz").write_bytes((shared_data / "gsm8k" / f"{part}.jsonl.gz").read_bytes())
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "sets"), str(tmp_path / "out")], capture_output=True, text=True,
        timeout=300, cwd=ROOT, env={**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH":
                                    os.pathsep.join(filter(None, (folder, str(ROOT))))})  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    named = sum(task.source.startswith("inspect_evals/") for name in suite_names() for task in load_suite(name).tasks)
    assert json.loads(result.stdout.splitlines()[-1]) == [named, 6, 0]
    with gzip.open(copy / "test.jsonl.gz", "rt") as lines:
        questions = [json.loads(line) for line, _ in zip(lines, range(3), strict=False)]
    records = [record for record in read_records(tmp_path / "out" / "records.jsonl") if record.task == "gsm8k"]
    assert [record.input_digest for record in records] == [digest(row["question"]) for row in questions]
    assert [record.target_digest for record in records] == [
        digest(row["answer"].rpartition("####")[2].strip()) for row in questions]
