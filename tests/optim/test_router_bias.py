"""The selection bias: both published rules worked out by hand, and what they are for."""

from __future__ import annotations

import pytest
import torch

from moonbase.optim.router_bias import reduce_load, update_router_bias_


def test_deepseek_rule() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 1.0])
    update_router_bias_(bias, torch.tensor([10, 2, 6, 6]), 0.001, "deepseek")
    torch.testing.assert_close(bias, torch.tensor([0.499, 0.001, -0.5, 1.0]), atol=0, rtol=1e-6)


def test_moonlight_rule_keeps_the_mean() -> None:
    bias = torch.zeros(4)
    update_router_bias_(bias, torch.tensor([15, 3, 3, 3]), 0.001, "moonlight")
    # signs (-1, 1, 1, 1), mean 0.5
    torch.testing.assert_close(bias, torch.tensor([-0.0015, 0.0005, 0.0005, 0.0005]))
    assert bias.sum().abs() < 1e-8


@pytest.mark.parametrize("rule", ["deepseek", "moonlight"])
def test_no_load_changes_nothing_and_layers_are_independent(rule: str) -> None:
    start = torch.randn(2, 4)
    load = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 6]])
    stacked, separate = start.clone(), [start[0].clone(), start[1].clone()]
    update_router_bias_(stacked, load, 0.01, rule)
    update_router_bias_(separate, load, 0.01, rule)
    assert torch.equal(stacked[0], start[0]) and not torch.equal(stacked[1], start[1])
    assert torch.equal(torch.stack(separate), stacked)
    alone = start[1].clone()
    update_router_bias_(alone, load[1], 0.01, rule)
    assert torch.equal(alone, stacked[1])


def test_equal_large_loads_are_ties() -> None:
    # A mean of 33 333 333.33 in fp32 would round to a value that differs from none or all of them.
    bias = torch.zeros(3)
    update_router_bias_(bias, torch.tensor([33_333_333, 33_333_333, 33_333_334]), 1.0, "deepseek")
    assert bias.tolist() == [1.0, 1.0, -1.0]
    bias.zero_()
    update_router_bias_(bias, torch.tensor([33_333_333] * 3), 1.0, "deepseek")
    assert bias.tolist() == [0.0, 0.0, 0.0]


def test_repeated_updates_balance_a_skewed_router() -> None:
    torch.manual_seed(0)
    scores = torch.sigmoid(torch.randn(512, 8) + torch.linspace(-1, 1, 8))
    bias = torch.zeros(8)

    def load() -> torch.Tensor:
        return torch.bincount((scores + bias).topk(2).indices.flatten(), minlength=8)

    before = load().max() / load().float().mean()
    for _ in range(300):
        update_router_bias_(bias, load(), 2e-3, "moonlight")
    assert before > 1.8
    assert load().max() / load().float().mean() < 1.1


def test_wrong_rule_and_reduction_without_processes() -> None:
    with pytest.raises(ValueError, match="moonlight"):
        update_router_bias_(torch.zeros(2), torch.ones(2), 0.1, "kimi")  # type: ignore[arg-type]
    assert torch.equal(reduce_load([torch.tensor([1, 2]), torch.tensor([3, 4])]), torch.tensor([[1, 2], [3, 4]]))
