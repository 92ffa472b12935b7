"""A small evaluation of fresh items, and a bundle of it, for the tests of proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moonbase.evals.fresh import generate, verify
from moonbase.evals.proof import chain, signing
from moonbase.evals.proof.canonical import canonical
from moonbase.evals.proof.folder import file_digest, walk
from moonbase.evals.proof.seal import RECORDS, STATEMENT, unsealed
from moonbase.evals.records import ModelCall, Record, digest, read_records, write_records

SEED = 7
MODELS = ("strong", "weak")
WEIGHTS = "sha256:" + "ab" * 32


def suite_json(**changes: Any) -> dict[str, Any]:
    suite = {"schema": "moonbase.suite/1", "name": "tiny", "title": "Tiny", "metric": "accuracy",
             "tasks": [{"name": "sums", "source": "builtin:fresh/maths"}]}
    return {"suite": suite | changes, "models": list(MODELS), "seed": SEED,
            "price": {model: [0, 250] for model in MODELS}}


def records(items: int) -> Iterator[Record]:
    """Both models, both languages. The strong one is right except at every fourth item; the weak one at every third."""
    for model in MODELS:
        for language in ("en", "zh"):
            for index in range(items):
                problem = generate("maths", SEED, 1, index, language)
                right = index % 4 != 0 if model == "strong" else index % 3 == 0
                output = f"Answer: {problem.target if right else 'none'}"
                score, remark = verify(problem, output)
                yield Record(
                    suite="tiny", task="sums", item=problem.item, model=model, input_digest=problem.input_digest,
                    group="maths", cluster=problem.item, condition={"language": language, "difficulty": "1"},
                    target_digest=problem.target_digest, output=output,
                    output_digest=digest(output), scores={"accuracy": score}, output_tokens=4, cost=0.001,
                    call=ModelCall(provider="moonbase", weights_digest=WEIGHTS, decoding={"temperature": 0.0}),
                    details={"remark": remark, "seed": 2**60})


def write_evaluation(folder: Path, items: int = 6, change: Callable[[Record], Record | None] | None = None,
                     **suite: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "suite.json").write_text(json.dumps(suite_json(**suite)), encoding="utf-8")
    changed = [record if change is None else change(record) for record in records(items)]
    write_records(folder / RECORDS, [record for record in changed if record is not None])
    return folder


def copy_of(bundle: Path, target: Path) -> Path:
    shutil.copytree(bundle, target, symlinks=True)
    return target


def edit(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path.name}"
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def forge_chain(bundle: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the records and chain them anew, as a publisher can who has the key."""
    values = [record.canonical() for record in read_records(bundle / RECORDS)]
    values = change(values) or values
    head, lines = chain.genesis(json.loads((bundle / "suite.json").read_bytes())), []
    for value in values:
        line, head = chain.link(head, value)
        lines.append(line + b"\n")
    (bundle / RECORDS).write_bytes(b"".join(lines))


def sign_again(bundle: Path, key: Path) -> None:
    """Sign whatever the bundle holds now, as a publisher can who has the key."""
    signer, tree, head = signing.load_key(key), chain.MerkleTree(), ""
    for link in chain.read_links(bundle, RECORDS, ""):
        head = link.digest
        tree.append(chain.leaf_of(head))
    subjects = [{"name": name, "digest": {"sha256": file_digest(bundle, name)}, "annotations": {"size": size}}
                for name, size in walk(bundle).items() if not unsealed(name)]
    predicate = {"schema": "moonbase.bundle/1", "key": signing.public_text(signer),
                 "records": {"count": tree.size, "head": head, "root": "sha256:" + tree.root().hex()}}
    payload = signing.statement(signing.BUNDLE_PREDICATE, subjects, predicate)
    (bundle / STATEMENT).write_bytes(signing.sign(payload, signer))


def write_canonical(path: Path, value: Any) -> None:
    path.write_bytes(canonical(value) + b"\n")
