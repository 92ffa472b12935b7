"""Fine-tuning on dialogues: what is learnt, the style that is kept, exact resumption, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moonbase import chat
from moonbase.cli import main
from moonbase.data import DialogueCorpus, PackedStream, load_tokenizer
from moonbase.data.packing import IGNORED
from moonbase.errors import UserError
from moonbase.recipe import Recipe, load_next_recipe, load_recipe, style_of
from moonbase.synth import make_dialogues, write_dialogues
from moonbase.train.sft import chat_style, renderer
from tests.train.tiny import MODEL, checkpoints, content, facts, go_on, metrics, run, stop_after

Recipes = Callable[..., Recipe]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short dialogues with tools, and one line that is none."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    write_dialogues(path, 40, seed=3)
    path.write_text(path.read_text(encoding="utf-8") + '{"messages": [{"role": "robot", "content": "x"}]}\n')
    return path


@pytest.fixture(scope="session")
def base(texts: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with room for a dialogue."""
    from tests.train.tiny import write_yaml

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    model = {**MODEL, "max_position_embeddings": 1024}
    recipe = load_recipe(str(write_yaml(folder, texts, tokenizer, model=model, sequence_length=512, batch_size=2,
                                        steps=3, validate_every=3)))
    run(recipe, folder / "run")
    return folder / "run"


def sft(base: Path, chats: Path, *overrides: str) -> Recipe:
    return load_next_recipe(str(base), ["stage=sft", f"data={chats}", "steps=8", "checkpoint.every_steps=3",
                                        "checkpoint.keep_last=9", *overrides])


@pytest.mark.parametrize("style", chat.STYLES)
def test_targets_are_what_follows_the_generation_prompt(style: str, base: Path, chats: Path, tmp_path: Path) -> None:
    """Turn by turn: what a whole dialogue has beyond the prompt that asks for the turn is what the model must write."""
    result = run(sft(base, chats, f"style={style}", "steps=1", "sequence_length=1024"), tmp_path / "run")
    corpus = DialogueCorpus.open(tmp_path / "run" / "corpus")
    tokenizer = corpus.tokenizer
    assert result["status"] == "finished" and corpus.facts["style"] == style

    def targets_of(dialogue: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        messages, tools = dialogue["messages"], dialogue["tools"]
        whole = chat.render(messages, tools, style, add_generation_prompt=False)
        learnt = [False] * len(whole)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = chat.render(messages[:number], tools, style)
                turn = chat.render(messages[:number + 1], tools, style, add_generation_prompt=False)
                learnt[len(prompt):len(turn)] = [True] * (len(turn) - len(prompt))
        ids, mask, position = [], [], 0
        for part in chat.render_parts(messages, tools, style, add_generation_prompt=False):
            if part.special:
                ids.append(tokenizer.special_tokens[part.text])
                mask.append(learnt[position])
            else:
                for id in tokenizer.encode(part.text):
                    ids.append(id)
                    mask.append(learnt[position])
            position += len(part.text)
        follow = [ids[i + 1] if mask[i + 1] else IGNORED for i in range(len(ids) - 1)]
        return tuple(ids), (*follow, IGNORED)

    wanted = dict(targets_of(dialogue) for dialogue in make_dialogues(40, 3))
    seen = 0
    stream = PackedStream(corpus, "train", 1024, 2, seed=0)
    for _ in range(12):
        batch = next(stream)
        for tokens, targets, documents in zip(batch.tokens, batch.targets, batch.documents, strict=True):
            for document in documents.unique():
                chosen = documents == document
                found = wanted.get(tuple(tokens[chosen].tolist()))
                if found is not None:
                    assert tuple(targets[chosen].tolist()) == found
                    seen += 1
    assert seen > 8


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(base: Path, chats: Path, tmp_path: Path) -> None:
    plan = sft(base, chats)
    run(plan, tmp_path / "whole")
    stopped = run(plan, tmp_path / "cut", on_ready=stop_after(4))
    assert (stopped["status"], stopped["step"]) == ("stopped", 4)
    assert go_on(tmp_path / "cut")["status"] == "finished"
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    for name in checkpoints(tmp_path / "whole"):
        if (tmp_path / "cut" / "checkpoints" / name).exists():
            assert content(tmp_path / "cut/checkpoints" / name) == content(tmp_path / "whole/checkpoints" / name)
    first, last = metrics(tmp_path / "whole")[0], metrics(tmp_path / "whole")[-1]
    assert last["loss"] < first["loss"] and "validation_loss" in last


def test_it_begins_with_the_weights_and_the_tokenizer_of_init(base: Path, chats: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    run(sft(base, chats), tmp_path / "run",
        on_ready=lambda trainer: seen.append(trainer.weights()["model.norm.weight"].clone()))
    from tests.train.tiny import tensors

    assert torch.equal(seen[0], tensors(base / "checkpoints" / "step-000003")["model.norm.weight"])
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert load_tokenizer(newest).digest == load_tokenizer(base / "checkpoints" / "step-000003").digest


def test_the_style_stays_with_the_run(base: Path, chats: Path, tmp_path: Path) -> None:
    run(sft(base, chats, "steps=1"), tmp_path / "plain")
    run(sft(base, chats, "steps=1", "style=kimi-k2.5"), tmp_path / "styled")
    assert yaml.safe_load((tmp_path / "plain" / "config.yaml").read_text())["style"] == "kimi-k2"
    assert style_of(tmp_path / "styled") == style_of(tmp_path / "styled/checkpoints/step-000001") == "kimi-k2.5"
    assert style_of(base) is None and style_of(tmp_path) is None
    again = sft(tmp_path / "styled", chats)
    assert again.style == "kimi-k2.5" and again.name == "tiny-sft-sft"
    bare = again.model_copy(update={"style": None})
    tokenizer = load_tokenizer(tmp_path / "styled/checkpoints/step-000001")
    assert chat_style(bare, tokenizer) == "kimi-k2.5"
    assert chat_style(bare.model_copy(update={"init": str(base)}), tokenizer) == "kimi-k2"


def test_a_bad_line_is_in_the_report_with_its_number(base: Path, chats: Path, tmp_path: Path) -> None:
    run(sft(base, chats, "steps=1"), tmp_path / "run")
    skipped = facts(tmp_path / "run")["corpus"]["skipped"]["not a dialogue"]
    assert skipped["count"] == 1 and skipped["names"][0].startswith(f"{chats}:41: messages[0].role")
    assert f"{chats}:41" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_command(base: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chat"
    with pytest.raises(SystemExit) as end:
        main(["train", str(base), "stage=sft", f"data={chats}", "steps=2", "--out", str(out), "--json"])
    assert end.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["status"], result["step"]) == ("finished", 2)
    recipe = load_recipe(str(out / "config.yaml"))
    assert (recipe.stage, recipe.init, recipe.style, recipe.name) == ("sft", str(base), "kimi-k2", "tiny-sft")
    assert recipe.sequence_length == 512 and recipe.optimizer.lr == 0.01, "as the run has them"
    assert "Hello!" in (out / "samples.txt").read_text(encoding="utf-8")
    checkpoint = out / "checkpoints" / "step-000002"
    further = load_next_recipe(str(checkpoint), ["stage=continue", "data=texts"])
    assert further.init == str(checkpoint) and further.model.hidden_size == recipe.model.hidden_size


@pytest.mark.parametrize(("overrides", "complaint"), [
    (["data.sources=[]"], "nothing to train on. Name .* data=chats.jsonl"), (["data=none.jsonl"], "none.jsonl"),
    (["style=llama"], "style"), (["init=null"], "stage=sft needs init"),
])
def test_mistakes_are_named(overrides: list[str], complaint: str, base: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        run(sft(base, chats, *overrides), tmp_path / "run")


def test_a_model_without_chat_tokens_cannot_be_taught(base: Path, chats: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    for path in copy.rglob("tokenizer.json"):
        path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|other|>"), encoding="utf-8")
    with pytest.raises(UserError, match="no chat tokens"):
        run(sft(copy, chats), tmp_path / "run")


def test_the_renderer_is_the_chat_rooms(tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    dialogue = next(make_dialogues(1))
    ids, mask = renderer(loaded, "kimi-k2")(dialogue["messages"], dialogue["tools"])
    text = chat.render(dialogue["messages"], dialogue["tools"], "kimi-k2", add_generation_prompt=False)
    assert loaded.decode(ids) == text and len(ids) == len(mask)
