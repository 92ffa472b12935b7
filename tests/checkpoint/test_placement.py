"""Sharded models: two processes read and write the same files as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from moonbase.checkpoint import load_state, read_config, save_weights
from moonbase.checkpoint.placement import local_part, materialise, named_tensors
from tests.checkpoint.test_writer import disk, fingerprint
from tests.checkpoint.variants import assert_same, load
from tests.ports import free_port

WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from moonbase.checkpoint import load_state, load_weights, read_config, save_state, save_weights
from moonbase.checkpoint.names import model_shapes
from moonbase.errors import UserError

torch.set_num_threads(1)
source, out = Path(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
config = read_config(source)
odd = [Shard(0), Shard(1), Replicate()]
state = {}
for number, (name, shape) in enumerate(model_shapes(config).items()):
    placement = odd[number % 3] if len(shape) > 1 else odd[number % 2 * 2]
    if "e_score" in name:
        state[name] = torch.zeros(shape)  # a plain buffer, the same in every process
    else:
        state[name] = distribute_tensor(torch.zeros(shape), mesh, [placement])
load_weights(state, source, config)
save_weights(state, out / "weights", config, max_shard_bytes=60_000)

# Sharded optimizer state, read back into other placements.
moments = {f"{name}/momentum": tensor * 2 for name, tensor in state.items()} | {"step": torch.tensor(4)}
save_state(out, moments, {"step": 4}, max_shard_bytes=100_000)
dist.barrier()
other = {name: tensor if name == "step" else distribute_tensor(torch.zeros(tensor.shape), mesh, [Shard(0)])
         for name, tensor in moments.items()}
_, facts = load_state(out, into=other)
assert facts == {"step": 4}
for name, tensor in moments.items():
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    again = other[name].full_tensor() if hasattr(other[name], "full_tensor") else other[name]
    assert torch.equal(whole, again), name

# What fails in the writing process fails in all, and nobody waits for ever.
(out / "file").write_text("")
for attempt in (lambda: save_weights(state, out / "file" / "weights", config),
                lambda: save_weights(state, out / "b", config, extra_files={"a": out / "absent"}),
                lambda: save_state(out / "nowhere", moments, {})):
    try:
        attempt()
    except UserError:
        pass
    else:
        raise SystemExit("no error")
dist.destroy_process_group()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("variant", ["moonlight"], indirect=True)
def test_two_processes_equal_one(written, variant: str, tmp_path: Path) -> None:
    source = written(variant)[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, source, tmp_path], stderr=subprocess.PIPE, text=True,
                         env=environment | {"RANK": str(rank)}, cwd=Path(__file__).parents[2])
        for rank in (0, 1)
    ]
    try:
        errors = [worker.communicate(timeout=600)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    state = load(source)
    save_weights(state, tmp_path / "one", read_config(source), max_shard_bytes=60_000)
    assert fingerprint(tmp_path / "weights") == fingerprint(tmp_path / "one")
    assert_same(disk(tmp_path / "weights"), disk(source))
    moments, _ = load_state(tmp_path)
    assert torch.equal(moments["lm_head.weight/momentum"], 2 * state["lm_head.weight"])
    assert not list(tmp_path.glob(".partial-*")) and not (tmp_path / "b").exists()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.inner.weight.requires_grad_(False)
        self.register_buffer("bias", torch.zeros(2))


def test_memory_is_kept_where_it_fits() -> None:
    module = Small()
    weight, bias = module.inner.weight, module.bias
    materialise(module, {"inner.weight", "inner.bias", "bias"}, torch.float32, "cpu", set())
    assert module.inner.weight is weight and module.bias is bias


def test_meta_and_other_dtypes_get_new_memory() -> None:
    with torch.device("meta"):
        module = Small()
    materialise(module, {"inner.weight", "bias"}, torch.bfloat16, None, {"bias"})
    assert module.inner.weight.dtype == torch.bfloat16 and module.inner.weight.device.type == "cpu"
    assert isinstance(module.inner.weight, nn.Parameter) and not module.inner.weight.requires_grad
    assert module.bias.dtype == torch.float32 and not module.bias.is_meta
    assert module.inner.bias.is_meta, "not asked for"


def test_wrappers_do_not_change_names() -> None:
    module = nn.Sequential(torch.compile(Small()))
    assert set(named_tensors(module)) == {"0.inner.weight", "0.inner.bias", "0.bias"}
    materialise(module, {"0.inner.weight"}, torch.bfloat16, None, set())
    assert named_tensors(module)["0.inner.weight"].dtype == torch.bfloat16


def test_a_plain_tensor_is_its_own_part() -> None:
    tensor = torch.ones(2, 3)
    local, offsets = local_part(tensor)
    assert local is tensor and offsets == (0, 0)
