"""The command line as a user meets it: help, exit codes, one-line errors, JSON that is alone on standard output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moonbase import cli, cli_results
from moonbase.errors import CheckpointError, TrainingStopped, TryAgain, UserError
from moonbase.presets import preset_config
from moonbase.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("info", "train", "quickstart", "convert", "bench", "chat", "serve", "swarm", "trace", "eval", "compare",
         "diff-ft", "seal", "key", "verify", "challenge", "commit", "reveal")


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | extra


def moonbase(*arguments: str, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "moonbase", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command inside this process: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        out, err = capfd.readouterr()
        return left.value.code, out, err

    return call


@pytest.fixture
def verb() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Adds a verb `probe` for the length of a test, to see how `main` treats what verbs do."""
    known = list(cli.app.registered_commands)

    def add(work: Callable[[], Any]) -> None:
        cli.app.command("probe", hidden=True)(work)

    yield add
    cli.app.registered_commands[:] = known


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_lists_exactly_the_verbs(run: Callable) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    listed = [line.strip("│ ").split()[0] for line in out.split("Commands")[1].splitlines() if line.startswith("│ ")]
    assert [word for word in listed if word in VERBS] == [name for name in listed if name.islower() and name in VERBS]
    assert sorted(set(listed) & set(VERBS)) == sorted(VERBS)
    assert len(cli.app.registered_commands) == len(VERBS)
    assert "--install-completion" in out


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_has_an_example(name: str, flag: str, run: Callable) -> None:
    code, out, err = run(name, flag)
    assert (code, err) == (0, "")
    assert "Example" in out and f"moonbase {name} " in out.split("Example")[1]


def test_help_names_every_bench_and_every_preset(run: Callable) -> None:
    from moonbase import bench, presets

    for name in bench._BENCHES:
        assert name in run("bench", "--help")[1]
    for name in presets.preset_names():
        assert f" {name}" in " ".join(run("info", "--help")[1].replace("│", " ").split())


def test_alone_it_shows_the_help_and_counts_as_a_mistake(run: Callable) -> None:
    code, out, err = run()
    assert code == 2
    assert out.count("Usage:") == 1
    assert err == ""


def test_version_names_torch_and_device() -> None:
    import torch

    import moonbase as package

    answer = moonbase("--version")
    assert answer.returncode == 0 and answer.stderr == ""
    lines = answer.stdout.splitlines()
    assert lines[0] == f"moonbase {package.__version__}"
    assert lines[1] == f"torch {torch.__version__}"
    assert lines[3].startswith("device ")


def test_shell_completion() -> None:
    answer = moonbase("--show-completion", "bash", SHELL="/bin/bash")
    extra = {"_MOONBASE_COMPLETE": "complete_bash", "COMP_WORDS": "moonbase info kimi", "COMP_CWORD": "2"}
    assert answer.returncode == 0 or "Shell" in answer.stderr
    completed = moonbase(**extra)
    assert completed.stdout.split() == ["kimi-k2", "kimi-k2.5"]


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_as_json(run: Callable) -> None:
    code, out, err = run("info", "kimi-k2", "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    facts = json.loads(out)
    assert facts["parameters"] == 1_026_408_232_448
    assert facts["active_parameters"] == 32_861_500_928
    assert facts["kv_bytes_per_token"] == 70_272
    assert facts["train_flops_per_token"] > 6 * 30e9 and facts["decode_flops_per_token"] > 2 * 30e9
    assert set(facts["weight_bytes"]) == {"bf16", "fp8", "int4"}


def test_info_for_people(run: Callable) -> None:
    code, out, err = run("info", "kimi-k2")
    assert (code, err) == (0, "")
    for shown in ("1,026,408,232,448", "32.86 G", "101,124,096", "44,040,192", "70,272 B", "594.21 GB", "553.40 GiB",
                  "8.58 GiB", "sequences of 4,096"):
        assert shown in out
    assert max(map(len, out.splitlines())) <= 80


def test_info_needs_no_torch() -> None:
    code = "import sys; from moonbase import cli_info; cli_info.describe('kimi-k2'); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"
    code = "import sys, atexit; from moonbase.cli import main; " \
           "atexit.register(lambda: print('torch' in sys.modules)); main(['info', 'kimi-k2', '--json'])"
    answer = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "False"


def test_info_context(run: Callable) -> None:
    short, long = (json.loads(run("info", "kimi-k2", "--json", "--context", size)[1]) for size in ("1024", "131072"))
    assert long["decode_flops_per_token"] > short["decode_flops_per_token"]
    assert long["context"] == 131_072
    assert long["parameters"] == short["parameters"]


def test_info_reads_presets_files_checkpoints_and_runs(tmp_path: Path, run: Callable) -> None:
    checkpoint, folder = tmp_path / "checkpoint [1]", tmp_path / "run"
    checkpoint.mkdir()
    folder.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(preset_config("pico").to_hf()), encoding="utf-8")
    (checkpoint / "model-00001-of-00001.safetensors").write_bytes(b"x" * 5_000_000)
    (folder / "config.yaml").write_text(load_recipe("pico").to_yaml(), encoding="utf-8")
    targets = ("pico", "preset:pico", checkpoint / "config.json", checkpoint, folder, folder / "config.yaml")
    answers = [json.loads(run("info", str(target), "--json")[1]) for target in targets]
    assert len({answer["parameters"] for answer in answers}) == 1
    assert answers[3]["stored_bytes"] == 5_000_000
    code, out, _ = run("info", str(checkpoint))
    assert code == 0 and "checkpoint [1]" in out.replace("\n", "") and "5.00 MB" in out


def test_info_of_the_published_k25_file(shared_data: Path, run: Callable) -> None:
    code, out, _ = run("info", str(shared_data / "kimi-k25-tokenizer" / "config.json"), "--json")
    assert code == 0
    assert json.loads(out)["parameters"] == 1_026_408_232_448


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a few kilobytes in a folder whose name tries to be markup."""
    import torch

    from moonbase.checkpoint import save_weights
    from moonbase.model import Transformer

    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
             "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = preset_config("pico").model_copy(update=small)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "[bold]small"
    save_weights(Transformer(config).initialize(), folder, config)
    return folder


@pytest.mark.parametrize("to", ["hf", "hf-int4", "hf-fp8"])
def test_convert(to: str, small_checkpoint: Path, tmp_path: Path, run: Callable) -> None:
    code, out, err = run("convert", str(small_checkpoint), str(tmp_path / "made"), "--format", to, "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["format"] == to and made["destination"] == str(tmp_path / "made")
    assert made["bytes"] == sum(shard.stat().st_size for shard in (tmp_path / "made").glob("*.safetensors")) > 0
    assert json.loads((tmp_path / "made" / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 64


@pytest.mark.parametrize(
    ("options", "dtype", "stored"),
    [
        ([], "bfloat16", "BF16"),
        (["--dtype", "bf16"], "bfloat16", "BF16"),
        (["--dtype", "fp32"], "float32", "F32"),
        (["--dtype", "keep"], "float32", "F32"),
        (["--dtype", "fp32", "--format", "hf-int4"], "float32", "F32"),
        (["--format", "hf-fp8"], "bfloat16", "BF16"),
    ],
)
def test_convert_says_and_writes_the_dtype(
    options: list[str], dtype: str, stored: str, small_checkpoint: Path, tmp_path: Path, run: Callable
) -> None:
    """The source is fp32, as training writes it."""
    from safetensors import safe_open

    code, out, err = run("convert", str(small_checkpoint), str(tmp_path / "made"), *options, "--json")
    assert code == 0, err
    assert json.loads(out)["dtype"] == dtype
    (shard,) = (tmp_path / "made").glob("*.safetensors")
    with safe_open(shard, "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == stored
        assert file.get_slice("model.layers.1.mlp.gate.e_score_correction_bias").get_dtype() == "F32"


def test_convert_for_people(small_checkpoint: Path, tmp_path: Path, run: Callable) -> None:
    code, out, _ = run("convert", str(small_checkpoint), str(tmp_path / "made"))
    assert code == 0 and out.startswith(f"{tmp_path / 'made'}: ") and out.endswith(", hf, bfloat16\n")
    code, _, err = run("convert", str(small_checkpoint), str(tmp_path / "made"))
    assert code == 2 and str(tmp_path / "made") in err and err.splitlines()[-1].startswith("moonbase: error: ")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "no-such"], "no-such: neither a preset"),
        (["info", "preset:no-such"], "no preset 'no-such'"),
        (["info", "[bold]x[/bold]"], "[bold]x[/bold]: neither a preset"),
        (["info", "[/nonsense]"], "[/nonsense]: "),
        (["info", "x" * 300], ": neither a preset"),
        (["info", ""], "neither"),
        (["info", "a\nb"], "a b: neither"),
        (["info", "https://example.org/v1"], "neither a preset"),
        (["info", str(ROOT / "tests")], "neither a run folder (config.yaml) nor a checkpoint folder (config.json)"),
        (["info", str(ROOT / "constraints.txt")], "not valid JSON at line 1"),
        (["info", "pico", "--context", "0"], "--context"),
        (["info", "pico", "--context", "many"], "--context"),
        (["info"], "Missing argument"),
        (["info", "pico", "--no-such"], "--no-such"),
        (["inof", "pico"], "inof"),
        (["train", "no-such"], "no-such: neither a preset"),
        (["train", "pico", "stepz=3"], "stepz: unknown field"),
        (["train", "pico", "steps"], "key=value"),
        (["train", "pico", "optimizer.lr=fast"], "optimizer.lr: "),
        (["convert", "a", "b", "--format", "gguf"], "gguf"),
        (["convert", "a", "b", "--dtype", "fp16"], "fp16"),
        (["convert", "a", "b", "--dtype", "keep", "--format", "hf-fp8"], "--dtype keep goes with --format hf"),
        (["convert", "no-such-folder", "b"], "no-such-folder: no such folder"),
        (["quickstart", "--minutes", "0"], "--minutes"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], said: str, run: Callable) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("moonbase: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert said in err
    assert "Traceback" not in err


def test_a_mistake_with_json_prints_no_json(run: Callable) -> None:
    code, out, err = run("info", "no-such", "--json")
    assert (code, out) == (2, "") and err.startswith("moonbase: error: ")


def test_a_run_folder_is_not_overwritten_by_accident(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "config.yaml").write_text(load_recipe("pico").to_yaml(), encoding="utf-8")
    code, _, err = run("train", str(tmp_path))
    assert code == 2 and "--resume" in err and "--out" in err


def _raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a: [red]hidden_size[/red]\n  is wrong"), 2, "error: a: [red]hidden_size[/red] is wrong"),
        (CheckpointError("tensor x is missing"), 2, "error: tensor x is missing"),
        (TrainingStopped("10 bad steps"), 1, "error: 10 bad steps"),
        (TryAgain("the hub is busy"), 75, "error: the hub is busy"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error: BaseException, code: int, line: str, verb: Callable, run: Callable) -> None:
    verb(_raises(error))
    assert run("probe") == (code, "", f"moonbase: {line}\n")


def test_debug_shows_where_a_mistake_was_found(verb: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONBASE_DEBUG", "1")
    verb(_raises(UserError("wrong")))
    code, _, err = run("probe")
    assert code == 2 and "Traceback" in err and err.endswith("moonbase: error: wrong\n")


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    code = """
from moonbase import cli
@cli.app.command("probe")
def probe():
    assert 1 == 2, "ours"
cli.main(["probe"])
"""
    answer = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr and "AssertionError: ours" in answer.stderr


def test_ctrl_c_ends_with_one_line_and_130() -> None:
    code = """
import time
from moonbase import cli
@cli.app.command("probe")
def probe():
    print("ready", flush=True)
    # Short ones: a signal just before a long sleep would be heard after it.
    for _ in range(600):
        time.sleep(0.1)
cli.main(["probe"])
"""
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment(), text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "moonbase: interrupted\n"


def test_ctrl_c_before_the_first_step_says_how_to_go_on(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the corpus is made, say: in the loop itself a Ctrl-C is no exception."""
    monkeypatch.setattr("moonbase.train.run.train", lambda *_, **__: _raises(KeyboardInterrupt())())
    folder = tmp_path / "my run"
    code, out, err = run("train", "pico", "data=x", "--out", str(folder))
    assert (code, out) == (130, "")
    assert err == "nothing is saved yet; to start again: the same command\nmoonbase: interrupted\n"
    checkpoint = folder / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (checkpoint / name).write_text("{}")
    code, _, err = run("train", "pico", "data=x", "--out", str(folder))
    assert code == 130 and err == f"to go on: moonbase train '{folder}' --resume\nmoonbase: interrupted\n"
    monkeypatch.setenv("RANK", "1")
    assert run("train", "pico", "data=x", "--out", str(folder)) == (130, "", "moonbase: interrupted\n")


@pytest.mark.parametrize("arguments", [["info", "kimi-k2"], ["info", "kimi-k2", "--json"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "moonbase", *arguments]
    answer = subprocess.run(command, cwd=ROOT, env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert answer.stderr == ""


def test_a_terminal_without_unicode_still_works() -> None:
    answer = moonbase("--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert answer.returncode == 0 and "quickstart" in answer.stdout


# --- results ----------------------------------------------------------------------------------------------------------


def test_json_stands_alone_whatever_the_work_prints(verb: Callable, run: Callable) -> None:
    import numpy
    import torch

    def work() -> dict[str, Any]:
        print("step 1")
        numbers = {"loss": float("nan"), "pair": (1, numpy.float32(0.5)), "tensor": torch.ones(2)}
        return numbers | {"path": Path("a"), 3: None}

    verb(lambda: cli_results.deliver(True, work))
    code, out, err = run("probe")
    assert code == 0 and err == "step 1\n"
    assert json.loads(out) == {"loss": None, "path": "a", "pair": [1, 0.5], "tensor": [1.0, 1.0], "3": None}
    assert out.count("\n") == 1


def test_of_several_processes_the_first_reports(verb: Callable, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    verb(lambda: cli_results.deliver(True, lambda: {"rank": os.environ["RANK"]}))
    monkeypatch.setenv("RANK", "1")
    assert run("probe") == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert run("probe") == (0, '{"rank": "0"}\n', "")


def test_bench_table(verb: Callable, run: Callable) -> None:
    rows = [{"shape": "8x512 [pico]", "unit": "tokens/s", "ours": 12345.6, "peer": 6000, "peer_name": "transformers",
             "ratio": 2.0576, "roof_share": 0.41}, {"shape": "alone", "unit": "ms", "ours": 1.25}]
    verb(lambda: cli_results.show_bench({"name": "train", "machine": "2 cores", "rows": rows}))
    code, out, _ = run("probe")
    assert code == 0
    for shown in ("8x512 [pico]", "12,346", "6,000", "transformers", "2.06x", "41%", "alone", "1.25"):
        assert shown in out
