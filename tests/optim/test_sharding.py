"""Sharded parameters get the update of the unsharded ones: 2 and 3 gloo processes, rows that do not divide evenly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moonbase.config import ModelConfig
from moonbase.optim import (
    AttentionWeights,
    MuonClip,
    clip_gradients_,
    grad_norm,
    qk_clip_,
    reduce_load,
    reduce_max_logits,
)
from moonbase.optim.sharding import RowShard

# (shape, splits, kind): rows that leave short and empty shards, heads across borders and along them, uneven stacks,
# gains.
PARAMETERS = [
    ((8, 6), 1, "muon"), *[((7, 6), 1, "muon")] * 7, ((2, 9), 1, "muon"), ((5, 11), 1, "muon"),
    ((12, 5), 4, "muon"), *[((12, 5), 3, "muon")] * 4, ((12, 5), 2, "muon"), ((15, 4), 3, "muon"),
    ((5, 8, 6), 2, "muon"), ((2, 8, 6), 1, "muon"), ((4, 6, 8), 1, "muon"),
    ((9, 4), 1, "adamw"), ((7,), 1, "adamw"), ((1,), 1, "adamw"),
]
STEPS = 3


def whole_tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape, _, _ in PARAMETERS]


def build(params: list[nn.Parameter], **options: object) -> MuonClip:
    groups = [{"params": [parameter], "names": [f"p{index}"], "splits": splits, "kind": kind}
              for index, (parameter, (_, splits, kind)) in enumerate(zip(params, PARAMETERS, strict=True))]
    return MuonClip(groups, lr=0.05, **options)


def train(params: list[nn.Parameter], optimizer: MuonClip, mesh: DeviceMesh | None, steps: range) -> list[Tensor]:
    """Steps with clipped gradients; returns norms and update RMS."""
    measured = []
    for step in steps:
        for parameter, gradient in zip(params, whole_tensors(10 + step), strict=True):
            parameter.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, parameter.placements)
        norm = grad_norm(params)
        clip_gradients_(params, 5.0, norm)
        optimizer.step(measure_update=True)
        measured += [norm, optimizer.update_rms(), optimizer.update_rms()]
    return measured


def check_update(mesh: DeviceMesh, placements: list, workspace_bytes: int | None = None) -> None:
    plain = [nn.Parameter(tensor) for tensor in whole_tensors(0)]
    reference = build(plain)
    expected = train(plain, reference, None, range(STEPS))
    sharded = [nn.Parameter(distribute_tensor(tensor, mesh, placements)) for tensor in whole_tensors(0)]
    optimizer = build(sharded, workspace_bytes=workspace_bytes)
    found = train(sharded, optimizer, mesh, range(STEPS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(sharded, plain, strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs.data, atol=2e-5, rtol=1e-5)

    # State written by these processes continues on one, and the other way round.
    tensors, scalars = optimizer.named_state()
    tensors = {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}
    for name, tensor in reference.named_state()[0].items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-5)
    resumed = [nn.Parameter(parameter.full_tensor().detach()) for parameter in sharded]
    second = build(resumed)
    second.load_named_state(tensors, scalars)
    train(resumed, second, None, range(STEPS, STEPS + 1))
    optimizer.load_named_state(tensors, scalars)
    train(sharded, optimizer, mesh, range(STEPS, STEPS + 1))
    for ours, theirs in zip(sharded, resumed, strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs.data, atol=2e-5, rtol=1e-5)


def check_layout_is_that_of_fully_shard(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2, bias=False))
    twin = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2, bias=False))
    twin.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh)
    inputs = torch.randn(4, 5)
    for network in (model, twin):
        groups = [{"params": [p for p in network.parameters() if p.ndim == 2]},
                  {"params": [p for p in network.parameters() if p.ndim == 1], "kind": "adamw"}]
        optimizer = MuonClip(groups, lr=0.1)
        for _ in range(2):
            network(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        shard = RowShard(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        assert ours.to_local().shape[0] == len(range(*shard.rows(len(theirs)).indices(len(theirs))))
        torch.testing.assert_close(ours.full_tensor(), theirs.data, atol=1e-5, rtol=1e-5)


def check_fewer_experts_than_processes(mesh: DeviceMesh) -> None:
    stack = torch.randn(1, 6, 4)
    sharded, plain = nn.Parameter(distribute_tensor(stack, mesh, [Shard(0)])), nn.Parameter(stack.clone())
    sharded.grad, plain.grad = distribute_tensor(stack.sin(), mesh, [Shard(0)]), stack.sin()
    measured = []
    for parameter in (sharded, plain):
        optimizer = MuonClip([parameter], lr=0.1)
        optimizer.step(measure_update=True)
        measured.append(optimizer.update_rms())
    torch.testing.assert_close(measured[0], measured[1])
    torch.testing.assert_close(sharded.full_tensor(), plain.data)


def check_clip(mesh: DeviceMesh) -> None:
    config = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=8, moe_intermediate_size=6,
                         num_hidden_layers=1, num_attention_heads=3, q_lora_rank=4, kv_lora_rank=4, qk_nope_head_dim=5,
                         qk_rope_head_dim=2, v_head_dim=3, n_routed_experts=4, num_experts_per_tok=2,
                         max_position_embeddings=16)
    rank = dist.get_rank()
    query, key_value = torch.randn(21, 4), torch.randn(24, 4)
    # Every process has seen other tokens; only their joint maximum [250, 90, 110] is right.
    seen = torch.tensor([250.0, 90.0, -5.0]) if rank == 0 else torch.tensor([10.0, -2.0, 110.0])
    maxima = reduce_max_logits([seen])
    sharded = AttentionWeights(*(distribute_tensor(t.clone(), mesh, [Shard(0)]) for t in (query, key_value)))
    clipped = qk_clip_([sharded], maxima, 100.0, config)
    plain = AttentionWeights(query.clone(), key_value.clone())
    qk_clip_([plain], torch.tensor([[250.0, 90.0, 110.0]]), 100.0, config)
    assert clipped.tolist() == [2]
    assert torch.equal(sharded.query.full_tensor(), plain.query)
    assert torch.equal(sharded.key_value.full_tensor(), plain.key_value)
    bad = reduce_max_logits([torch.tensor([torch.nan if rank == 1 else 300.0])])
    assert bad.isinf().all()
    world = dist.get_world_size()
    assert torch.equal(reduce_load([torch.tensor([1, rank])]), torch.tensor([[world, world * (world - 1) // 2]]))


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (world_size,))
    check_update(mesh, [Shard(0)])
    check_update(mesh, [Shard(0)], workspace_bytes=700)  # one shape then takes several exchanges
    check_layout_is_that_of_fully_shard(mesh)
    check_fewer_experts_than_processes(mesh)
    check_clip(mesh)
    if world_size == 2:
        replicated = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
        check_update(replicated, [Replicate(), Shard(0)])
        check_update(mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_equals_unsharded(world_size: int, tmp_path: Path) -> None:
    mp.spawn(worker, (world_size, str(tmp_path)), nprocs=world_size)


def test_rows_cover_everything_once_and_know_whole_blocks() -> None:
    for total in range(1, 12):
        for world_size in range(1, 6):
            shard = RowShard(0, world_size, None)  # type: ignore[arg-type]
            rows = [row for rank in range(world_size) for row in range(total)[shard.rows(total, rank)]]
            assert rows == list(range(total))
            sizes = [len(chunk) for chunk in torch.arange(total).chunk(world_size)]
            found = [len(range(total)[shard.rows(total, rank)]) for rank in range(world_size)]
            assert found[:len(sizes)] == sizes and not any(found[len(sizes):])
    assert RowShard(0, 2, None).whole(12, 3) and not RowShard(0, 2, None).whole(12, 4)  # type: ignore[arg-type]
