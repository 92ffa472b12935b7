"""Attention over paged latents: the fast form against the reference, and both against plain softmax attention."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moonbase.ops.attention import attention_reference
from moonbase.ops.latent_attention import latent_attention, latent_attention_reference
from tests.ops.paged import paged

cases = dict(
    heads=st.integers(1, 5), rank=st.integers(1, 40), rope=st.integers(1, 16), seed=st.integers(0, 999),
    sequences=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
)


@given(**cases)
@settings(max_examples=60, deadline=None)
def test_fast_equals_reference(heads, rank, rope, seed, sequences) -> None:
    lengths = [length for length, _ in sequences]
    case = paged(heads, rank, rope, lengths, [min(new, length) for length, new in sequences], seed)
    found, expected = (form(*case, 0.3, rank) for form in (latent_attention, latent_attention_reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(heads=st.integers(1, 4), rank=st.integers(1, 20), rope=st.integers(1, 8), length=st.integers(1, 50))
@settings(max_examples=30, deadline=None)
def test_it_is_attention_with_one_shared_key(heads, rank, rope, length) -> None:
    query, store, tables, sequence, position = paged(heads, rank, rope, [length], [length], seed=length, padding=0)
    rows = store[tables[0].long()].flatten(0, 1)[:length]
    shared = rows[None, :, None].expand(-1, -1, heads, -1)
    expected, _ = attention_reference(query[None], shared, shared[..., :rank], 0.3)
    found = latent_attention(query, store, tables, sequence, position, 0.3, rank)
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


def test_nothing_but_its_own_slots_is_read() -> None:
    """What other blocks and later slots hold does not matter, not even NaN."""
    case = paged(3, 10, 6, [20, 37], [2, 5])
    query, store, tables, sequence, position = case
    expected = latent_attention(*case, 0.3, 10)
    own = {int(block) * 16 + slot for row, length in enumerate((20, 37))
           for number, block in enumerate(tables[row]) for slot in range(16) if number * 16 + slot < length}
    spoilt = store.flatten(0, 1).clone()
    spoilt[[slot for slot in range(spoilt.shape[0]) if slot not in own]] = torch.nan
    found = latent_attention(query, spoilt.view_as(store), tables, sequence, position, 0.3, 10)
    assert torch.equal(found, expected)


def test_padding_gets_zeros() -> None:
    case = paged(3, 10, 6, [20], [1], padding=7)
    found = latent_attention(*case, 0.3, 10)
    assert found.shape == (8, 3, 10) and not found[1:].any() and found[0].any()


def test_half_precision_keeps_its_dtype_and_sums_in_fp32() -> None:
    query, store, *rest = paged(4, 32, 16, [60, 9], [1, 1])
    query, store = query.bfloat16(), store.bfloat16()
    found = latent_attention(query, store, *rest, 0.3, 32)
    expected = latent_attention_reference(query.float(), store.float(), *rest, 0.3, 32)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
