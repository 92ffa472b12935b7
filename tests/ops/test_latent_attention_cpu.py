"""The CPU kernel of attention over paged latents against the reference, and its bits against those of other batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops import native
from moonbase.ops.latent_attention import latent_attention_reference
from moonbase.ops.latent_attention_cpu import latent_attention_cpu, takes

pytestmark = pytest.mark.skipif(not native.available(), reason="no CPU kernels here (no C compiler)")


def inputs(lengths: list[tuple[int, int]], heads: int, rank: int, page: int, seed: int = 0):
    """`lengths`: of each sequence how many tokens are new, and how many there are with them."""
    generator = torch.Generator().manual_seed(seed)
    pages = -(-max(total for _, total in lengths) // page)
    tables = torch.randperm(len(lengths) * pages, generator=generator).view(len(lengths), pages).int()
    store = torch.full((len(lengths) * pages, page, rank + 16), torch.nan)
    for table, (_, total) in zip(tables.long(), lengths, strict=True):
        # Slots that were never written hold anything.
        rows = torch.full((pages * page, rank + 16), torch.nan)
        rows[:total] = torch.randn(total, rank + 16, generator=generator)
        store[table] = rows.view(pages, page, -1)
    sequence = torch.cat([torch.full((new,), number) for number, (new, _) in enumerate(lengths)]).int()
    position = torch.cat([torch.arange(total - new, total) for new, total in lengths]).int()
    query = torch.randn(len(sequence), heads, rank + 16, generator=generator)
    return query, store, tables, sequence, position, 0.2, rank


@st.composite
def lengths(draw) -> list[tuple[int, int]]:
    totals = draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    return [(draw(st.integers(1, min(total, 40))), total) for total in totals]


@given(lengths=lengths(), heads=st.sampled_from([1, 4, 5, 64]), rank=st.sampled_from([16, 48, 64]),
       page=st.sampled_from([1, 3, 16]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_equals_the_reference(lengths, heads, rank, page, seed) -> None:
    tensors = inputs(lengths, heads, rank, page, seed)
    assert takes(*tensors[:2], rank)
    torch.testing.assert_close(latent_attention_cpu(*tensors), latent_attention_reference(*tensors), rtol=1e-4,
                               atol=1e-5)


@pytest.mark.parametrize("heads", [4, 64])
def test_a_token_has_the_same_bits_alone_in_company_and_in_any_chunk(heads: int) -> None:
    query, store, tables, sequence, position, scale, rank = inputs([(1, 5), (30, 290), (1, 129), (7, 7)], heads, 48, 16)
    together = latent_attention_cpu(query, store, tables, sequence, position, scale, rank)
    for parts in (range(len(query) + 1), (0, 3, 17, 20, len(query))):
        for start, stop in itertools.pairwise(parts):
            part = slice(start, stop)
            alone = latent_attention_cpu(query[part], store, tables, sequence[part], position[part], scale, rank)
            assert torch.equal(alone, together[part])
    torch.set_num_threads(3)
    assert torch.equal(latent_attention_cpu(query, store, tables, sequence, position, scale, rank), together)


def test_padding_gets_zeros() -> None:
    query, store, tables, sequence, position, scale, rank = inputs([(3, 20), (2, 9)], 4, 16, 16)
    sequence[[2, 4]] = -1
    found = latent_attention_cpu(query, store, tables, sequence, position, scale, rank)
    assert not found[[2, 4]].any()
    torch.testing.assert_close(found, latent_attention_reference(query, store, tables, sequence, position, scale, rank))
