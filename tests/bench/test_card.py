"""A card and its picture from results that were never measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from moonbase import bench
from moonbase.bench import card, int4, picture, train
from moonbase.bench.rows import kernel_row
from moonbase.bench.timing import Cost, Roofs
from moonbase.errors import UserError

ROOFS = Roofs(read=4e12, product=8e14)


NO_FIGURE = {"shape": "pico 4x128", "unit": "GiB", "ours": None, "peer": None, "peer_name": None, "ratio": None,
             "roof_share": None}


def made_up(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"name": "moe kimi-k2", "title": "Routed experts", "command": "moonbase bench moe --preset kimi-k2",
            "machine": "NVIDIA H200", "commit": "0123456789abcdef-dirty", "seed": 0, "rows": rows,
            "versions": {"python": "3.12.3", "torch": "2.11.0", "numpy": "2.4"}, **more}


def kernels() -> dict[str, Any]:
    rows = [kernel_row(f"{batch} x 8 of 384 experts", f"{batch} tokens", Cost(batch * 7e8, batch * 1e8),
                       {"ours": batch * 50e-6, "peer": batch * 200e-6}, ROOFS, ours_name=name,
                       peer_name="torch, bf16", peer_cost=Cost(batch * 7e8, batch * 4e8))
            for batch, name in ((1, "CUDA"), (16, "CUDA"), (64, "Triton"))]
    return made_up(rows, method="Medians, in turns.", absent=["vllm: not installed here"],
                   roofs={"bytes_per_second": ROOFS.read, "flops_per_second": ROOFS.product})


def pairs() -> dict[str, Any]:
    return made_up([
        {"shape": f"pico {number}x128", "unit": unit, "ours": 100.0 * number, "peer": peer and 40.0, "ratio": peer,
         "peer_name": f"transformers, {name}" if peer else None, "roof_share": None}
        for number, (unit, peer, name) in enumerate(
            (("tokens/s", 2.5, "eager"), ("tokens/s", 5.0, "grouped_mm"), ("GiB", None, "")), 1)] + [NO_FIGURE])


def written(svg: Path) -> set[str]:
    """The comments that matplotlib leaves beside text drawn as outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return {(node.text or "").strip() for node in ElementTree.parse(svg, parser).iter(ElementTree.Comment)}


def test_a_card_of_kernels(tmp_path: Path) -> None:
    path = tmp_path / "cards" / "moe.md"
    assert card.write(kernels(), path) == [path, path.with_suffix(".svg")]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# Routed experts, kimi-k2, on NVIDIA H200"
    for line in ("| command | `moonbase bench moe --preset kimi-k2` |", "| commit | 0123456 with changes |",
                 "| hardware | NVIDIA H200; python 3.12.3, torch 2.11.0 |", "| seed | 0 |",
                 "| | moonbase | torch, bf16 | ratio | read | computed | share of the roof |",
                 "| 1 × 8 of 384 experts | 50 µs, CUDA | 200 µs | 4 | 2 TB/s | 14 TFLOP/s | 50% |",
                 "| 64 × 8 of 384 experts | 3.2 ms, Triton | 12.8 ms | 4 | 2 TB/s | 14 TFLOP/s | 50% |",
                 "Medians, in turns.",
                 "Peers that are not in the table: vllm: not installed here.",
                 "![Routed experts, kimi-k2, on NVIDIA H200](moe.svg)"):
        assert line in lines
    assert any("4 TB/s read, 800 TFLOP/s" in line for line in lines)
    words = written(path.with_suffix(".svg"))
    assert words >= {"1 tokens", "16 tokens", "50%", "3.2 ms", "4 TB/s measured", "800 TFLOP/s measured",
                     "torch, bf16", "moonbase (CUDA; Triton)", "Routed experts, kimi-k2, on NVIDIA H200"}


def test_a_card_without_a_roofline(tmp_path: Path) -> None:
    path = tmp_path / "train.md"
    card.write(pairs(), path)
    text = path.read_text(encoding="utf-8")
    assert "| | moonbase | peer | which | ratio |" in text
    assert "| pico 2x128, tokens/s | 200 | 40 | transformers, grouped_mm | 5 |" in text
    assert "| pico 3x128, GiB | 300 | | | |\n| pico 4x128, GiB | | | | |\n" in text
    assert written(path.with_suffix(".svg")) >= {"tokens/s", "GiB", "5×", "200", "40", "pico 3x128"}


def test_a_card_of_means_has_their_intervals(tmp_path: Path) -> None:
    rows = [{**pairs()["rows"][0], "unit": unit, "ours": ours, "low": low, "high": high, "peer": None, "ratio": None}
            for unit, ours, low, high in (("nats per token", 2.5, 2.25, 2.75), ("s", 120.0, None, None))]
    card.write(made_up(rows), tmp_path / "int4.md")
    text = (tmp_path / "int4.md").read_text(encoding="utf-8")
    assert "| | moonbase | 95% interval |\n" in text
    assert "| pico 1x128, nats per token | 2.5000 | 2.2500 to 2.7500 |\n| pico 1x128, s | 120 | |\n" in text


def test_the_picture_depends_on_the_result_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture.draw(pairs(), tmp_path / "a.svg")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    picture.draw(json.loads(json.dumps(pairs())), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    picture.draw(pairs(), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_a_kept_result_becomes_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, path = tmp_path / "kept.json", tmp_path / "train.md"
    kept.write_text(json.dumps(pairs() | {"commit": None}), encoding="utf-8")
    card.main([str(kept), str(path), "fedcba9876543210"])
    assert "| commit | fedcba9 |" in path.read_text(encoding="utf-8").splitlines()
    assert capsys.readouterr().out.split() == [str(path), str(path.with_suffix(".svg"))]
    for content, words in (("{", "not a result"), ('{"rows": []}', "not a result"), (None, "No such file")):
        kept.unlink() if content is None else kept.write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit, match=rf"error: .*kept\.json: {words}"):
            card.main([str(kept), str(path)])


def test_a_bench_writes_what_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs()["rows"]
    monkeypatch.setattr(train, "measure", lambda preset, peer: rows)
    result = bench.run("train", "pico", card=tmp_path / "a.md", picture=tmp_path / "b.png")
    assert result["files"] == [str(tmp_path / name) for name in ("a.md", "a.svg", "b.png")]
    assert all(Path(path).stat().st_size for path in result["files"])
    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert text.startswith("# Training, pico, on ") and train.METHOD in text and "| seed | 0 |" in text
    monkeypatch.setattr(int4, "measure", lambda preset, peer: rows)
    assert bench.run("int4")["seed"] == "0, 1, 2", "it has several"
    # Before, not after minutes of measuring.
    monkeypatch.setattr(train, "measure", lambda preset, peer: pytest.fail("measured"))
    (tmp_path / "folder.md").mkdir()
    for path, words in (("a.txt", r"ends with \.md"), ("folder.md", "a folder with this name is in the way"),
                        ("b.png/a.md", "a file with this name is in the way")):
        with pytest.raises(UserError, match=words):
            bench.run("train", "pico", card=tmp_path / path)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a picture is \.svg or \.png, not \.jpg"):
        picture.draw(kernels(), tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"its name ends with \.md"):
        card.write(kernels(), tmp_path / "a.html")
    with pytest.raises(UserError, match="no row has a figure"):
        picture.draw(made_up([{"shape": "x", "ours": -0.1, "peer": None}]), tmp_path / "a.svg")
