"""The kernel in CUDA C++ for attention over latents against the reference. Without a GPU it is compiled for the CPU and
run thread by thread (`cuda_on_cpu.h`), with stretches of 64 slots and more."""

from __future__ import annotations

import pytest
import torch

from moonbase.ops import latent_attention_hopper
from moonbase.ops.latent_attention import latent_attention_reference
from tests.ops.cuda_on_cpu import HEADER, fixtures
from tests.ops.paged import paged

SHORT = ["-DSHORTEST_STRETCH=64", "-DLONGEST_STRETCH=128", "-DBUNCH=4"]
# In company, alone: the same stretches are others' work then.
kernels, device = fixtures(latent_attention_hopper._KERNELS, *SHORT, processors=[3, 1],
                           headers=(HEADER, HEADER.with_name("latents_on_cpu.h")))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room that nobody has written yet is NaN, and not what the call before left there."""
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: torch.full(sizes, torch.nan, **options))


def test_products(device: str) -> None:
    """Scores, then values: which of the two is wrong?"""
    generator = torch.Generator().manual_seed(0)
    query, rows = (torch.randn(64, 576, generator=generator).bfloat16() for _ in range(2))
    weights = torch.rand(64, 64, generator=generator).bfloat16()
    scores, values = latent_attention_hopper.try_products(*(each.to(device) for each in (query, rows, weights)))
    torch.testing.assert_close(scores.cpu().double(), query.double() @ rows.double().T, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(values.cpu().double(), weights.double() @ rows[:, :512].double(), rtol=1e-4, atol=1e-2)


def check(device: str, heads: int, lengths: list[int], new_tokens: list[int], block: int = 16, alone: int = 0,
          few: int = 4) -> None:
    query, store, tables, sequence, position = paged(heads, 512, 64, lengths, new_tokens, len(lengths), block)
    query, store = query.bfloat16(), store.bfloat16()
    query[:, :, :64] *= 3  # few slots that count, so that a wrong one shows
    for row, length in enumerate(lengths):  # and the last most of all: what was summed before must shrink
        store[int(tables[row, (length - 1) // block]), (length - 1) % block] *= 5
    expected = latent_attention_reference(query.double(), store.double(), tables, sequence, position, 0.05, 512)
    own = torch.zeros(store.shape[:2], dtype=torch.bool)
    for row, length in enumerate(lengths):
        for slot in range(length):
            own[int(tables[row, slot // block]), slot % block] = True
    store[~own] = torch.nan
    case = [each.to(device) for each in (query, store, tables, sequence, position)]
    found = latent_attention_hopper.latent_attention_hopper(*case, 0.05, 512, few).cpu()
    assert found.isfinite().all()
    assert not found[sequence < 0].any()
    # Weights and result are rounded to bf16: half a unit in the last place of each.
    assert (found - expected).norm() < 4e-3 * expected.norm()
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
    part = slice(alone, alone + 1)
    by_itself = latent_attention_hopper.latent_attention_hopper(
        case[0][part], case[1], case[2], case[3][part], case[4][part], 0.05, 512, few).cpu()
    assert torch.equal(by_itself, found[part]), "the same bits in any company"


@pytest.mark.parametrize(("heads", "lengths", "new_tokens", "block", "alone", "few"), [
    (16, [1, 150], [1, 1], 16, 1, 4),          # three stretches, in one block or in two; a page of one slot
    (64, [330, 70, 60], [1, 2, 1], 24, 0, 4),  # stretches of more than 64 slots; two tokens of one sequence
    (64, [1088], [1], 16, 0, 32),               # seventeen: more than are read at once
    (64, [130, 65, 70], [2, 3, 2], 8, 3, 1),   # more tokens than areas; a page of eight slots
    (100, [65], [1], 16, 0, 4),                # two blocks of heads, the second with few
])
def test_it_is_the_references_attention(
    device: str, heads: int, lengths: list[int], new_tokens: list[int], block: int, alone: int, few: int
) -> None:
    check(device, heads, lengths, new_tokens, block, alone, few)


@pytest.mark.parametrize(("heads", "lengths", "new_tokens", "block"), [
    (64, [1, 4096, 700, 20_000, 131_072], [1, 2, 1, 1, 1], 16), (128, [5000] * 40, [1] * 40, 64),
    (32, [1100] * 150, [1] * 150, 16), (16, [30_000], [3], 24)])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_longer_contexts(heads: int, lengths: list[int], new_tokens: list[int], block: int, kernels: None) -> None:
    for alone, few in ((0, 4), (len(new_tokens) - 1, 1), (0, 128)):
        check("cuda", heads, lengths, new_tokens, block, alone, few)


def test_sizes_that_it_takes() -> None:
    query, store = (torch.zeros(2, 8, 576, dtype=torch.bfloat16) for _ in range(2))
    assert latent_attention_hopper.fits(query, store, 512)
    assert not latent_attention_hopper.fits(query, store, 256)
    assert not latent_attention_hopper.fits(query.float(), store, 512)
    assert not latent_attention_hopper.fits(query, store[:, :4], 512)
    assert not latent_attention_hopper.fits(query, store[..., :320], 512)
    assert not latent_attention_hopper.fits(query, torch.zeros(2, 8, 577, dtype=torch.bfloat16)[..., :576], 512)
