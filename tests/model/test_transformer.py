"""The whole network: losses against the plain formula, multi-token prediction, recomputation, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moonbase.errors import UserError
from moonbase.model import Losses, Transformer
from moonbase.ops.attention import Documents
from moonbase.train.speed import recompute_blocks
from tests.model.tiny import random_documents, tiny_config, tiny_model, yarn


def batch(seed: int = 0, rows: int = 3, time: int = 19, packed: bool = True, masked: bool = True):
    """Tokens, targets and documents as the data room makes them. Of a cut document the last target is known."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (rows, time), generator=generator)
    ids = random_documents(generator, rows, time) if packed else torch.zeros(rows, time, dtype=torch.int32)
    targets = torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], dim=1)
    last = torch.cat([ids[:, 1:] != ids[:, :-1], torch.ones(rows, 1, dtype=torch.bool)], dim=1)
    cut = last & (torch.rand(rows, time, generator=generator) < 0.5)
    beyond = torch.randint(0, 61, (rows, time), generator=generator)
    targets = torch.where(last, torch.where(cut, beyond, -100), targets)
    if masked:
        targets[torch.rand(rows, time, generator=generator) < 0.2] = -100
    return tokens, targets, ids


def total(losses: Losses) -> torch.Tensor:
    return losses.loss_sum + 0.3 * losses.mtp_loss_sum + 0.01 * losses.balance_loss


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_loss_and_gradients_equal_the_plain_formula(packed: bool) -> None:
    tokens, targets, ids = batch(packed=packed)
    model = tiny_model(rope_scaling=yarn(8), n_group=2)
    losses = model.loss(tokens, targets, Documents.from_ids(ids))
    losses.loss_sum.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(tokens, ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    expected.backward()
    torch.testing.assert_close(losses.loss_sum, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_gradient_points_where_the_loss_changes() -> None:
    """Numeric slopes: what every hand-written backward pass together amounts to."""
    tokens, targets, ids = batch(rows=2, time=11)
    model = tiny_model(width=0.2, num_nextn_predict_layers=1)
    documents = Documents.from_ids(ids)
    total(model.loss(tokens, targets, documents)).backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            continue  # a step may change which experts are chosen; test_moe compares these gradients
        direction = torch.randn(parameter.shape, generator=generator)
        direction /= direction.norm()
        expected = (parameter.grad * direction).sum().item()
        values = []
        with torch.no_grad():
            for step in (2e-3, -4e-3, 2e-3):
                parameter += step * direction
                values.append(total(model.loss(tokens, targets, documents)).item())
        assert (values[0] - values[1]) / 4e-3 == pytest.approx(expected, rel=0.05, abs=0.08), name


@torch.no_grad()
def test_packed_documents_equal_each_alone() -> None:
    tokens, _, ids = batch()
    model = tiny_model(num_hidden_layers=3)
    packed = model(tokens, ids)
    assert packed.dtype == torch.float32
    for row in range(3):
        for number in ids[row].unique():
            here = torch.nonzero(ids[row] == number).flatten()
            alone = model(tokens[row : row + 1, here])
            torch.testing.assert_close(packed[row, here], alone[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_logits_do_not_know_the_future() -> None:
    model = tiny_model()
    tokens, _, _ = batch(packed=False)
    before = model(tokens)
    tokens[:, 12:] = (tokens[:, 12:] + 1) % 61
    torch.testing.assert_close(model(tokens)[:, :12], before[:, :12], rtol=0, atol=1e-5)


def test_all_targets_ignored_is_no_loss_and_no_gradient() -> None:
    tokens, targets, ids = batch()
    model = tiny_model(num_nextn_predict_layers=1)
    losses = model.loss(tokens, torch.full_like(targets, -100), Documents.from_ids(ids))
    (losses.loss_sum + losses.mtp_loss_sum).backward()
    assert losses.loss_sum == 0 and losses.mtp_loss_sum == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def mtp_by_hand(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor, ids: torch.Tensor) -> float:
    """Document after document, with the module's parts: position i at depth k reads token i+k, is asked for i+k+1.

    A document's text is its tokens, and where it was cut the one known token after them. A position counts where all
    targets up to its own are wanted. Several depths count as their mean.
    """
    total = 0.0
    for row in range(tokens.shape[0]):
        for number in ids[row].unique():
            here = torch.nonzero(ids[row] == number).flatten()
            text, wanted = tokens[row, here], targets[row, here]
            hidden, (cos, sin), _ = model._hidden(text[None], None, None)
            if wanted[-1] != -100:
                text = torch.cat([text, wanted[-1:]])
            for depth, module in enumerate(model.mtp, start=1):
                count = len(text) - depth
                if count <= 0:
                    break
                count = min(count, len(here))
                hidden = hidden[:, :count]
                embedded = model.model.embed_tokens(text[None, depth : depth + count])
                hidden, _ = module(hidden, embedded, cos[:count], sin[:count])
                logits = model.lm_head(hidden)[0].log_softmax(-1)
                for i in range(count):
                    steps = wanted[i : i + depth + 1]
                    if len(steps) == depth + 1 and (steps != -100).all():
                        total -= logits[i, steps[-1]].item()
    return total / len(model.mtp)


@torch.no_grad()
@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["all wanted", "prompts masked"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_mtp_loss_equals_its_definition(modules: int, masked: bool, packed: bool) -> None:
    model = tiny_model(num_nextn_predict_layers=modules)
    for seed in range(3):
        tokens, targets, ids = batch(seed, packed=packed, masked=masked)
        found = model.loss(tokens, targets, Documents.from_ids(ids)).mtp_loss_sum.item()
        expected = mtp_by_hand(model, tokens, targets, ids)
        assert expected > 10 and found == pytest.approx(expected, rel=1e-4)


def test_mtp_learns() -> None:
    tokens, targets, ids = batch(masked=False)
    model = Transformer(tiny_config(num_nextn_predict_layers=1, initializer_range=0.05)).initialize(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    documents, history = Documents.from_ids(ids), []
    for _ in range(40):
        losses = model.loss(tokens, targets, documents)
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        history.append(losses.mtp_loss_sum.item())
    assert history[-1] < 0.3 * history[0]


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("modules", [0, 1])
def test_recomputation_changes_nothing(modules: int, kind: str) -> None:
    tokens, targets, ids = batch()
    results = []
    for recompute in ("none", kind):
        model = tiny_model(num_nextn_predict_layers=modules, num_hidden_layers=3)
        recompute_blocks(model, recompute)
        losses = model.loss(tokens, targets, Documents.from_ids(ids), clip_threshold=1.0)
        total(losses).backward()
        results.append((losses, [parameter.grad for parameter in model.parameters()], dict(model.named_buffers())))
    (plain, plain_grads, plain_buffers), (again, again_grads, again_buffers) = results
    assert total(plain).item() == total(again).item()
    assert all(torch.equal(one, other) for one, other in zip(plain_grads, again_grads, strict=True))
    assert all(torch.equal(plain_buffers[name], again_buffers[name]) for name in plain_buffers)
    for one, other in zip(plain.statistics, again.statistics, strict=True):
        assert torch.equal(one.max_logit, other.max_logit) and torch.equal(one.expert_load, other.expert_load)
        assert not len(other.expert_load) or other.expert_load.sum() == tokens.numel() * 2


def test_statistics_have_one_entry_per_block() -> None:
    tokens, targets, _ = batch()
    model = tiny_model(num_nextn_predict_layers=1, num_hidden_layers=3, first_k_dense_replace=2)
    losses = model.loss(tokens, targets)
    assert [len(entry.expert_load) for entry in losses.statistics] == [0, 0, 8, 8]
    assert all(entry.max_logit.shape == (3,) and not entry.max_logit.requires_grad for entry in losses.statistics)
    assert sum(entry.balance_loss for entry in losses.statistics).item() == pytest.approx(losses.balance_loss.item())
    assert len(list(model.blocks())) == 4


def test_looking_changes_nothing() -> None:
    """Evaluation, training pass and decoding leave every parameter and buffer as it was."""
    tokens, targets, ids = batch()
    model = tiny_model(num_nextn_predict_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.loss(tokens, targets, Documents.from_ids(ids)).loss_sum.backward()
    with torch.no_grad():
        quiet = model.eval().loss(tokens, targets, Documents.from_ids(ids), math.inf)
        model(tokens)
    assert not quiet.loss_sum.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_same_input_twice_gives_the_same_bits() -> None:
    tokens, targets, ids = batch()
    results = []
    for _ in range(2):
        model = tiny_model(num_nextn_predict_layers=1)
        losses = model.loss(tokens, targets, Documents.from_ids(ids), 1.0)
        total(losses).backward()
        results.append([total(losses), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_initialisation_is_a_function_of_the_seed() -> None:
    config = tiny_config(initializer_range=0.02, num_nextn_predict_layers=1, vocab_size=2000)
    one, same, other = (Transformer(config).initialize(seed).state_dict() for seed in (3, 3, 4))
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name]), name
        if "bias" in name:
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            assert not torch.equal(tensor, other[name]), name
    assert one["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    half = Transformer(config).to(torch.bfloat16).initialize(3).state_dict()
    assert torch.equal(half["lm_head.weight"], one["lm_head.weight"].bfloat16())


def test_sparse_attention_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="index_topk"):
        Transformer(tiny_config(model_type="deepseek_v32", index_n_heads=2, index_head_dim=8, index_topk=4))


def test_model_code_holds_no_other_concern() -> None:
    """The house's first law: distribution, quantisation, logging and files wrap the model from outside."""
    import ast
    from pathlib import Path

    import moonbase.model

    assert moonbase.model.__file__
    allowed = {"__future__", "collections", "typing", "math", "torch", "moonbase"}
    rooms = {"config", "errors", "model", "ops"}
    for path in Path(moonbase.model.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                assert parts[0] in allowed, f"{path.name} imports {name}"
                assert parts[0] != "moonbase" or parts[1] in rooms, f"{path.name} imports {name}"
                assert parts[:2] not in (["torch", "distributed"], ["torch", "ao"]), f"{path.name} imports {name}"
        assert "print(" not in path.read_text(encoding="utf-8")
