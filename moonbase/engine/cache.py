"""The paged latent cache: kv_lora_rank + qk_rope_head_dim values per token and layer, never expanded into heads.

Memory is cut into blocks of a few tokens. A sequence owns a table of blocks; sequences that begin alike share the
blocks of what they have in common, found by a hash of the tokens. A block that nobody uses any more keeps its content
until its room is needed, the longest unused first.

Shapes: N new tokens, H heads, C kv latent, R rope dims, X = C + R, P blocks, Z tokens per block, B sequences, M blocks
of the longest sequence.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moonbase.config import ModelConfig
from moonbase.ops.latent_attention import latent_attention

BLOCK_TOKENS = 16
"""Tokens per block: small enough that a prompt's last, unshared block wastes little."""


@dataclass
class Batch:
    """The tokens of one forward pass: whose they are, and where their latents go."""

    sequence_N: Tensor
    """int32: row of `tables_BM`; -1 for padding."""
    position_N: Tensor
    """int32."""
    slot_N: Tensor
    """int64: block · Z + place in the block. Padding goes to block 0, which nobody owns."""
    tables_BM: Tensor
    """int32: the blocks of every sequence, in order."""


class LatentCache:
    """The tensors, for all layers (MTP modules count as layers too), and the attention that reads them."""

    def __init__(self, config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank = config.kv_lora_rank
        layers = config.num_hidden_layers + min(1, config.num_nextn_predict_layers)
        width = config.kv_lora_rank + config.qk_rope_head_dim
        # Not filled: memory is taken when it is first written, and only written slots are ever read.
        self.store = torch.empty(layers, num_blocks, BLOCK_TOKENS, width, dtype=dtype, device=device)
        self.batch: Batch | None = None
        """Set before each forward pass."""

    def attend(
        self, layer: int, query_NHX: Tensor, latent_NC: Tensor, key_rope_NR: Tensor, scale: float
    ) -> Tensor:
        """See `model.mla.LatentCache`."""
        batch, store_PZX = self.batch, self.store[layer]
        assert batch is not None
        store_PZX.view(-1, store_PZX.shape[-1]).index_copy_(0, batch.slot_N, torch.cat([latent_NC, key_rope_NR], -1))
        return latent_attention(query_NHX, store_PZX, batch.tables_BM, batch.sequence_N, batch.position_N, scale,
                                self.rank)


class BlockPool:
    """Who owns which block, and which tokens a block's content stands for. Block 0 belongs to nobody."""

    def __init__(self, num_blocks: int, prefix_cache: bool = True) -> None:
        assert num_blocks > 1
        self.num_blocks = num_blocks - 1
        self.prefix_cache = prefix_cache
        self._free = list(range(num_blocks - 1, 0, -1))
        self._owners = [0] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Blocks without an owner whose content is still known, the longest unused first."""

    @property
    def available(self) -> int:
        """Blocks that can be had now."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - self.available

    def allocate(self) -> int | None:
        """A block with undefined content, or None where all have owners."""
        if self._free:
            block = self._free.pop()
        elif self._unused:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._owners[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a table. Its end is forgotten before its beginning, which more sequences can share."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0, f"block {block} was released twice"
            if self._owners[block] == 0:
                if block in self._key_of:
                    self._unused[block] = None
                else:
                    self._free.append(block)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks that already hold a beginning of these keys' tokens; the caller becomes one of their owners."""
        found = []
        for key in keys if self.prefix_cache else ():
            block = self._block_of.get(key)
            if block is None:
                break
            self._owners[block] += 1
            self._unused.pop(block, None)
            found.append(block)
        return found

    def publish(self, block: int, key: bytes) -> None:
        """`block` is full and holds what `key` stands for; whoever begins alike may share it from now on."""
        if self.prefix_cache and key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget_all(self) -> None:
        """Nothing that is stored may be shared any more: the weights have changed."""
        for block in list(self._key_of):
            self._forget(block)
        self._free.extend(self._unused)
        self._unused.clear()

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]


def block_keys(ids: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
    """One key per full block of `ids`, each a hash of all tokens up to the block's end; `known`: those of the first."""
    keys = list(known)
    for start in range(len(keys) * BLOCK_TOKENS, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        content = array("q", ids[start : start + BLOCK_TOKENS]).tobytes()
        keys.append(hashlib.blake2b((keys[-1] if keys else b"") + content, digest_size=16).digest())
    return keys
