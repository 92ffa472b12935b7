"""MuonClip against torch.optim.Muon, torch.optim.AdamW and one matrix at a time."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from moonbase.config import ModelConfig
from moonbase.errors import CheckpointError
from moonbase.optim import MuonClip, clip_gradients_, grad_norm, parameter_groups
from moonbase.optim.muonclip import muon_reference
from moonbase.recipe import OptimizerConfig

DOUBLE = torch.float64


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = DOUBLE, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
        parameter.grad = gradient.to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 4, start: int = 0) -> list[Tensor]:
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


# --- oracles ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_equals_torch_muon(shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch always iterates in bf16; let it iterate in fp64 so that the comparison is exact.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())
    ours, theirs = parameters(shape, shape), parameters(shape, shape)
    found = run(MuonClip(ours, lr=0.02, weight_decay=0.1, nesterov=nesterov, ns_dtype=DOUBLE), ours)
    muon = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    for ours_after, theirs_after in zip(found, run(muon, theirs), strict=True):
        torch.testing.assert_close(ours_after, theirs_after, atol=1e-12, rtol=1e-10)


def test_bfloat16_iteration_equals_torch_muon_to_rounding() -> None:
    ours, theirs = parameters((12, 36), dtype=torch.float32), parameters((12, 36), dtype=torch.float32)
    before = ours[0].detach().clone()
    run(MuonClip(ours, lr=0.02, weight_decay=0.0, ns_dtype=torch.bfloat16), ours, steps=1)
    run(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), theirs, steps=1)
    difference = (ours[0] - theirs[0]).norm() / (theirs[0] - before).norm()
    assert difference < 0.03


@pytest.mark.parametrize("lr_as_tensor", [False, True])
def test_equals_torch_adamw(lr_as_tensor: bool) -> None:
    shapes = [(5, 7), (9,), ()]
    ours, theirs = parameters(*shapes, dtype=torch.float32), parameters(*shapes, dtype=torch.float32)
    lr = torch.tensor(3e-3) if lr_as_tensor else 3e-3
    optimizer = MuonClip([{"params": ours, "kind": "adamw"}], lr=lr, weight_decay=0.05, adam_lr_ratio=2.0)
    found = run(optimizer, ours, 10)
    oracle = torch.optim.AdamW(theirs, lr=6e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for ours_after, theirs_after in zip(found, run(oracle, theirs, 10), strict=True):
        torch.testing.assert_close(ours_after, theirs_after, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 15), (15, 6)])
@pytest.mark.parametrize("options", [{}, dict(nesterov=False, mu=0.5), dict(coefficients="polar_express", steps=6),
                                     dict(update_rms=0.4, weight_decay=0.0)])
def test_equals_the_published_update(shape: tuple[int, int], options: dict) -> None:
    [parameter] = parameters(shape)
    weight, momentum = parameter.detach().clone(), torch.zeros_like(parameter)
    names = {"mu": "momentum", "steps": "ns_steps", "coefficients": "ns_coefficients"}
    optimizer = MuonClip([parameter], lr=0.01, ns_dtype=DOUBLE, **{names.get(k, k): v for k, v in options.items()})
    for step in range(3):
        give_gradients([parameter], step)
        weight, momentum = muon_reference(weight, parameter.grad, momentum, 0.01, **options)
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), weight, atol=1e-12, rtol=0)
    torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum)


def test_the_reference_equals_torch_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())
    [parameter] = parameters((6, 15))
    weight, momentum = parameter.detach().clone(), torch.zeros_like(parameter)
    oracle = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give_gradients([parameter], step)
        weight, momentum = muon_reference(weight, parameter.grad, momentum, 0.02)
        oracle.step()
    # torch keeps (1 - μ) times this momentum; the orthogonalisation does not see a factor.
    torch.testing.assert_close(parameter.detach(), weight, atol=1e-12, rtol=1e-10)


# --- batching ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workspace_bytes", [None, 20_000])
def test_stacks_and_splits_equal_each_matrix_alone(workspace_bytes: int | None) -> None:
    shapes = [(5, 12, 8), (4, 12, 8), (12, 8), (6, 8), (8, 12)]
    stacked = parameters(*shapes)
    splits = [2, 1, 3, 1, 1]
    groups = [{"params": [parameter], "splits": split} for parameter, split in zip(stacked, splits, strict=True)]
    together = MuonClip(groups, lr=0.02, ns_dtype=DOUBLE, workspace_bytes=workspace_bytes)

    alone, pieces_of = [], []
    for parameter, split in zip(parameters(*shapes), splits, strict=True):
        rows = parameter.shape[-2] // split
        pieces = [nn.Parameter(piece.clone()) for piece in parameter.detach().reshape(-1, rows, parameter.shape[-1])]
        alone.append([MuonClip([piece], lr=0.02, ns_dtype=DOUBLE) for piece in pieces])
        pieces_of.append(pieces)
    for step in range(3):
        give_gradients(stacked, step)
        together.step()
        for parameter, pieces, optimizers in zip(stacked, pieces_of, alone, strict=True):
            gradients = parameter.grad.reshape(-1, *pieces[0].shape)
            for piece, gradient, optimizer in zip(pieces, gradients, optimizers, strict=True):
                piece.grad = gradient.clone()
                optimizer.step()
    for parameter, pieces in zip(stacked, pieces_of, strict=True):
        expected = torch.stack([piece.detach() for piece in pieces]).view_as(parameter)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-12, rtol=0)


def test_groups_of_one_shape_keep_their_own_options() -> None:
    both = parameters((6, 9), (6, 9))
    run(MuonClip([{"params": both[:1], "lr": 0.1, "weight_decay": 0.0}, {"params": both[1:], "momentum": 0.5}], lr=0.01,
                 ns_dtype=DOUBLE), both)
    separate = parameters((6, 9), (6, 9))
    first = MuonClip(separate[:1], lr=0.1, weight_decay=0.0, ns_dtype=DOUBLE)
    second = MuonClip(separate[1:], lr=0.01, momentum=0.5, ns_dtype=DOUBLE)
    for step in range(4):
        give_gradients(separate, step)
        first.step()
        second.step()
    for ours, theirs in zip(both, separate, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-12, rtol=0)


def test_scratch_memory_is_bounded() -> None:
    parameter = parameters((64, 16, 16), dtype=torch.float32)[0]
    optimizer = MuonClip([parameter], lr=0.01, workspace_bytes=8 * 7 * 16 * 16 * 4)
    give_gradients([parameter], 0)
    optimizer.step()
    largest = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    for event in profile.events():
        largest = max(largest, event.cpu_memory_usage)
    assert largest <= 2 * optimizer.workspace_bytes < parameter.numel() * 4 * 2


# --- rates, missing and odd gradients ---------------------------------------------------------------------------------

def test_learning_rate_may_be_a_tensor() -> None:
    plain, tensor = parameters((6, 9), (3, 4, 5), (7,)), parameters((6, 9), (3, 4, 5), (7,))

    def build(params: list[nn.Parameter], lr: float | Tensor) -> MuonClip:
        groups = [{"params": params[:2]}, {"params": params[2:], "kind": "adamw"}]
        return MuonClip(groups, lr=lr, adam_lr_ratio=0.5, ns_dtype=DOUBLE)

    first, second = build(plain, 0.5), build(tensor, torch.tensor(0.5, dtype=DOUBLE))
    for optimizer, params in ((first, plain), (second, tensor)):
        optimizer.set_learning_rate(0.02)
        run(optimizer, params)
    assert [float(group["lr"]) for group in second.param_groups] == pytest.approx([0.02, 0.01])
    for ours, theirs in zip(plain, tensor, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-12, rtol=0)


def test_parameters_without_gradient_are_left_alone() -> None:
    params = parameters((4, 6), (4, 6), (5,), (5,))
    optimizer = MuonClip([{"params": params[:2]}, {"params": params[2:], "kind": "adamw"}], lr=0.1)
    before = [parameter.detach().clone() for parameter in params]
    give_gradients(params, 0)
    params[0].grad = params[2].grad = None
    optimizer.step()
    assert torch.equal(params[0], before[0]) and torch.equal(params[2], before[2])
    assert not torch.equal(params[1], before[1]) and not torch.equal(params[3], before[3])
    assert set(optimizer.named_state()[0]) == {"1/momentum", "3/step", "3/exp_avg", "3/exp_avg_sq"}


def test_expert_without_gradient_only_decays() -> None:
    [stack] = parameters((3, 4, 6))
    before = stack.detach().clone()
    optimizer = MuonClip([stack], lr=0.1, weight_decay=0.5, ns_dtype=DOUBLE)
    give_gradients([stack], 0)
    stack.grad[1] = 0
    optimizer.step()
    torch.testing.assert_close(stack.detach()[1], before[1] * 0.95)


def test_transposed_and_bfloat16_gradients() -> None:
    [ours], [theirs] = parameters((4, 6, 10), dtype=torch.float32), parameters((4, 6, 10), dtype=torch.float32)
    gradient = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours.grad_dtype = None
    ours.grad = gradient.mT
    theirs.grad = gradient.mT.float().contiguous()
    for parameter in (ours, theirs):
        MuonClip([{"params": [parameter], "splits": 2}], lr=0.1).step()
    assert torch.equal(ours, theirs)
    [gain], [oracle] = parameters((5,), dtype=torch.float32), parameters((5,), dtype=torch.float32)
    gain.grad_dtype = None
    gain.grad = gradient[0, 0, :5].clone()
    oracle.grad = gain.grad.float()
    MuonClip([{"params": [gain], "kind": "adamw"}], lr=0.1).step()
    torch.optim.AdamW([oracle], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1).step()
    torch.testing.assert_close(gain, oracle)


@pytest.mark.parametrize(("group", "message"), [
    ({"params": [nn.Parameter(torch.zeros(3))]}, "no matrix"),
    ({"params": [nn.Parameter(torch.zeros(3, 2))], "splits": 2}, "equal blocks"),
    ({"params": [nn.Parameter(torch.zeros(3, 2))], "kind": "sgd"}, "adamw"),
    ({"params": [nn.Parameter(torch.zeros(3, 2))], "names": ["a", "b"]}, "2 names"),
])
def test_impossible_groups_are_refused(group: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonClip([group])


# --- what is measured -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(32, 32), (16, 96), (96, 16), (4, 48, 24)])
def test_update_rms_is_about_a_fifth_for_any_full_rank_shape(shape: tuple[int, ...], coefficients: str) -> None:
    [parameter] = parameters(shape, dtype=torch.float32)
    before = parameter.detach().clone()
    optimizer = MuonClip([parameter], lr=0.5, weight_decay=0.0, ns_coefficients=coefficients)
    give_gradients([parameter], 0)
    optimizer.step(measure_update=True)
    true = ((parameter.detach() - before) / 0.5).square().mean().sqrt()
    assert optimizer.update_rms().item() == pytest.approx(true.item(), rel=1e-4)
    assert 0.15 < true < 0.23


def test_update_rms_without_matrices_and_without_measuring() -> None:
    [gain] = parameters((5,))
    optimizer = MuonClip([{"params": [gain], "kind": "adamw"}])
    give_gradients([gain], 0)
    optimizer.step(measure_update=True)
    assert optimizer.update_rms() == 0
    optimizer.step()
    with pytest.raises(AssertionError, match="measure_update"):
        optimizer.update_rms()


def test_gradient_norm_and_clipping_equal_torch() -> None:
    ours, theirs = parameters((4, 6), (3, 2, 5), (7,), dtype=torch.float32), parameters((4, 6), (3, 2, 5), (7,),
                                                                                        dtype=torch.float32)
    give_gradients(ours, 0)
    give_gradients(theirs, 0)
    norm = grad_norm(ours)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 2.0))
    clip_gradients_(ours, 2.0, norm)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    kept = [parameter.grad.clone() for parameter in ours]
    clip_gradients_(ours, 100.0, grad_norm(ours))
    assert all(torch.equal(parameter.grad, before) for parameter, before in zip(ours, kept, strict=True))
    ours[0].grad[0, 0] = torch.nan
    assert grad_norm(ours).isnan()
    assert grad_norm(parameters((2,))) == 0


# --- state ------------------------------------------------------------------------------------------------------------

SHAPES = [(6, 9), (3, 8, 5), (7,), (10, 4)]


def build(params: list[nn.Parameter], **options: object) -> MuonClip:
    groups = [{"params": params[:1], "names": ["a"]}, {"params": params[1:2], "names": ["b"], "splits": 2},
              {"params": params[2:], "names": ["c", "d"], "kind": "adamw"}]
    return MuonClip(groups, lr=0.05, **options)


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("way", ["state_dict", "named_state"])
def test_a_resumed_run_is_bit_identical(way: str, momentum_dtype: torch.dtype | None) -> None:
    straight = parameters(*SHAPES, dtype=torch.float32)
    optimizer = build(straight, momentum_dtype=momentum_dtype)
    run(optimizer, straight, 3)
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in straight]
    second = build(resumed, momentum_dtype=momentum_dtype)
    if way == "state_dict":
        second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        tensors, scalars = optimizer.named_state()
        second.load_named_state({name: tensor.clone() for name, tensor in tensors.items()},
                                json.loads(json.dumps(scalars)))
    assert optimizer.state[straight[0]]["momentum"].dtype == (momentum_dtype or torch.float32)
    for first, other in zip(run(optimizer, straight, 3, 3), run(second, resumed, 3, 3), strict=True):
        assert torch.equal(first, other)


def test_wrong_state_is_refused_by_name_before_anything_changes() -> None:
    params = parameters(*SHAPES, dtype=torch.float32)
    optimizer = build(params)
    run(optimizer, params, 1)
    good, _ = optimizer.named_state()
    adam = {f"{name}/{item}" for name in "cd" for item in ("step", "exp_avg", "exp_avg_sq")}
    assert set(good) == {"a/momentum", "b/momentum"} | adam
    for change, message in [
        ({"z/momentum": torch.zeros(2)}, "z is no parameter"),
        ({"a/momentum": torch.zeros(9, 6)}, r"a/momentum has shape \(9, 6\)"),
        ({"a/exp_avg": torch.zeros(6, 9)}, "a is updated by muon"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_named_state({**good, **change})
    with pytest.raises(CheckpointError, match="c is updated by adamw"):
        optimizer.load_named_state({name: tensor for name, tensor in good.items() if name != "c/exp_avg"})
    # An update of another kind is found even where there is no state to tell by.
    kinds = {"kinds": {"a": "muon", "b": "adamw", "c": "adamw", "d": "adamw"}}
    with pytest.raises(CheckpointError, match="b is updated by muon here, but was updated by adamw"):
        optimizer.load_named_state({}, kinds)
    after, _ = optimizer.named_state()
    assert all(after[name] is tensor for name, tensor in good.items())


# --- groups -----------------------------------------------------------------------------------------------------------

NAMES = {
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.self_attn.q_a_proj.weight": (4, 8),
    "model.layers.0.self_attn.q_a_layernorm.weight": (4,),
    "model.layers.0.self_attn.q_b_proj.weight": (12, 4),
    "model.layers.0.self_attn.kv_b_proj.weight": (16, 4),
    "model.layers.1.mlp.gate.weight": (4, 8),
    "model.layers.1.mlp.experts.gate_up_proj": (4, 12, 8),
    "model.layers.1.mlp.experts.down_proj": (4, 8, 6),
    "mtp.0.eh_proj.weight": (8, 16),
    "mtp.0.enorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (32, 8),
}


@pytest.mark.parametrize("per_head", [False, True])
def test_groups(per_head: bool) -> None:
    config = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=8, moe_intermediate_size=6,
                         num_hidden_layers=2, num_attention_heads=2, q_lora_rank=4, kv_lora_rank=4, qk_nope_head_dim=4,
                         qk_rope_head_dim=2, v_head_dim=4, n_routed_experts=4, num_experts_per_tok=2,
                         max_position_embeddings=16)
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in NAMES.items()}
    groups = parameter_groups(named.items(), config, OptimizerConfig(per_head=per_head))
    kind = {name: (group["kind"], group["splits"]) for group in groups for name in group["names"]}
    heads = 2 if per_head else 1
    assert kind == {
        "model.embed_tokens.weight": ("adamw", 1), "lm_head.weight": ("adamw", 1), "model.norm.weight": ("adamw", 1),
        "model.layers.0.self_attn.q_a_layernorm.weight": ("adamw", 1), "mtp.0.enorm.weight": ("adamw", 1),
        "model.layers.0.self_attn.q_a_proj.weight": ("muon", 1), "mtp.0.eh_proj.weight": ("muon", 1),
        "model.layers.0.self_attn.q_b_proj.weight": ("muon", heads),
        "model.layers.0.self_attn.kv_b_proj.weight": ("muon", heads),
        "model.layers.1.mlp.gate.weight": ("muon", 1), "model.layers.1.mlp.experts.gate_up_proj": ("muon", 2),
        "model.layers.1.mlp.experts.down_proj": ("muon", 1),
    }
    assert all(named[name] is parameter for group in groups
               for name, parameter in zip(group["names"], group["params"], strict=True))
    optimizer = MuonClip(groups, lr=0.01)
    give_gradients(list(named.values()), 0)
    gain = named["model.norm.weight"].detach().clone()
    named["model.norm.weight"].grad.zero_()
    optimizer.step()
    torch.testing.assert_close(named["model.norm.weight"].detach(), gain * (1 - 0.01 * 0.1))  # gains decay too
    [baseline] = parameter_groups(named.items(), config, OptimizerConfig(name="adamw"))
    assert baseline["kind"] == "adamw" and len(baseline["params"]) == len(NAMES)
