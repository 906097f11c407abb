"""``BlockPlan``: which key blocks each query block attends to, per plan head; lists in place of an S×S structure.

    query block 3 of a head:   full 0 2 · ·   partial 3 · · ·        transposed, key block 2:   full 3 5 · ·   partial 2 · · ·

A pair of a listed block attends where the mask allows it. In a *full* block the plan vouches that nothing but the mask's
bands needs testing; in a *partial* one further tests of a call (positions) apply. A plan only removes pairs.

Lists are kept ascending, whatever order they are given in, so that their order changes no bit of a result. They live on
the device of the tensors that the plan is made from; nothing here waits for a GPU except ``check`` and ``digest``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.errors import InputError

BLOCK_SIZES = (64, 128)
_PAST_THE_END = (1 << 31) - 1


class BlockLists(NamedTuple):
    """For every (batch, plan head, block) a list: entries [starts, starts + counts) of ``blocks``, ascending.

    starts int64, counts int32 [b, p, N]; blocks int32 [any].
    """

    starts: Tensor
    counts: Tensor
    blocks: Tensor

    def to(self, device: torch.device) -> BlockLists:
        return BlockLists(*(x.to(device) for x in self))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Made by ``from_lists`` or ``from_blocks``.

    num_queries, num_keys: rows. full, partial: key blocks of each query block, [b, p, ⌈num_queries / block_q⌉]. b is 1 or
    the batch, p divides the query heads: 1, the KV heads, or all of them; query head h of H follows plan head h · p // H.
    """

    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    full: BlockLists
    partial: BlockLists

    @staticmethod
    def from_lists(
        full_counts: Tensor, full_blocks: Tensor, partial_counts: Tensor | None = None,
        partial_blocks: Tensor | None = None, *, num_queries: int, num_keys: int, block_q: int = 128, block_k: int = 128,
        check: bool = True,
    ) -> BlockPlan:  # fmt: skip
        """A plan from padded lists.

        *_counts int [b, p, Nq], *_blocks int [b, p, Nq, C]: the first ``counts`` entries of each list count, in any order;
        what follows is ignored. check: look for entries that are out of range, listed twice, or both full and partial; a
        GPU is waited for. Raises InputError naming the argument.
        """
        shape = _BlockShape.of(full_counts, num_queries, num_keys, block_q, block_k)
        if partial_counts is None or partial_blocks is None:
            partial_counts = torch.zeros_like(full_counts)
            partial_blocks = full_blocks.new_zeros((*full_counts.shape, 0))
        full = shape.lists("full", full_counts, full_blocks)
        partial = shape.lists("partial", partial_counts, partial_blocks)
        made = BlockPlan(num_queries, num_keys, block_q, block_k, full, partial)
        if check:
            _check_entries(made, full_counts, partial_counts)
        return made

    @staticmethod
    def from_blocks(
        listed: Tensor, full: Tensor | None = None, *, num_queries: int, num_keys: int, block_q: int = 128, block_k: int = 128
    ) -> BlockPlan:
        """A plan from booleans [b, p, Nq, Nk], for patterns small enough to be written down.

        listed: blocks that attend. full: those among them that are full, default all. Raises InputError naming the argument.
        """
        _check_sizes(block_q, block_k)
        wanted = [-(-num_queries // block_q), -(-num_keys // block_k)]
        for name, x in (("listed", listed), ("full", listed if full is None else full)):
            if x.ndim != 4 or list(x.shape[2:]) != wanted or x.shape != listed.shape:
                raise InputError(
                    f"{name} must have shape [b, p, {wanted[0]}, {wanted[1]}], one for each pair of blocks, got {list(x.shape)}"
                )
        full = listed if full is None else full & listed
        lists = [_padded_lists(x) for x in (full, listed & ~full)]
        return BlockPlan.from_lists(
            *lists[0], *lists[1], num_queries=num_queries, num_keys=num_keys, block_q=block_q, block_k=block_k, check=False
        )

    @property
    def batch(self) -> int:
        return self.full.counts.shape[0]

    @property
    def heads(self) -> int:
        """Plan heads."""
        return self.full.counts.shape[1]

    @property
    def device(self) -> torch.device:
        return self.full.counts.device

    @cached_property
    def transposed(self) -> tuple[BlockLists, BlockLists]:
        """(full, partial): query blocks of each key block, [b, p, ⌈num_keys / block_k⌉], for dk and dv."""
        num_key_blocks = -(-self.num_keys // self.block_k)
        return _transpose(self.full, num_key_blocks), _transpose(self.partial, num_key_blocks)

    @cached_property
    def digest(self) -> str:
        """Equal exactly if the plans are. Waits for the device once."""
        found = hashlib.sha256(repr((self.num_queries, self.num_keys, self.block_q, self.block_k)).encode())
        for lists in (self.full, self.partial):
            counts, entries = _entries(lists)
            for x in (np.array(counts.shape), counts, entries):
                found.update(np.ascontiguousarray(x, dtype=np.int64).tobytes())
        return found.hexdigest()[:16]

    def to(self, device: torch.device | str) -> BlockPlan:
        """The plan on a device, remembered: layers and steps ask again."""
        device = torch.device(device)
        if device.type == self.device.type and device.index in (None, self.device.index):
            return self
        if device not in self._elsewhere:
            full, partial = self.full.to(device), self.partial.to(device)
            self._elsewhere[device] = BlockPlan(self.num_queries, self.num_keys, self.block_q, self.block_k, full, partial)
        return self._elsewhere[device]

    @cached_property
    def positions(self) -> dict[tuple[object, ...], Tensor]:
        """What backends derive from the lists for a table of tiles, kept as long as the plan."""
        return {}

    @cached_property
    def work_lists(self) -> dict[tuple[object, ...], Any]:
        """Likewise, where a backend makes its work list from the lists."""
        return {}

    @cached_property
    def _elsewhere(self) -> dict[torch.device, BlockPlan]:
        return {}

    def seen(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """(full, partial) as booleans [b, p, stop − first, key blocks] for query blocks first ≤ i < stop."""
        num_key_blocks = -(-self.num_keys // self.block_k)
        return tuple(_as_booleans(x, first, stop, num_key_blocks) for x in (self.full, self.partial))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class BlockOperand:
    """A plan as one call refers to it.

    heads: query heads of the whole model, over which the plan's heads spread. offsets int64 [tiles, 3]: what must be added
    to a tile's arena query rows, key rows and query heads to get the plan's; None: nothing. digest: that of the plan which
    the forward ran with, or None if it is not known.
    """

    plan: BlockPlan
    heads: int
    offsets: np.ndarray | None = None
    digest: str | None = None

    def offsets_of(self, tiles: np.ndarray) -> np.ndarray:
        """int64 [tiles, 3]."""
        return np.zeros((len(tiles), 3), np.int64) if self.offsets is None else self.offsets

    def check(self, tiles: np.ndarray, batch: int) -> None:
        """Raise InputError if the plan is not the expected one, or does not hold the tiles' rows or the batch."""
        plan, offsets = self.plan, self.offsets_of(tiles)
        if self.digest is not None and self.digest != plan.digest:
            raise InputError(
                f"blocks has the digest {plan.digest}, but this call belongs to {self.digest}; pass the block plan of the "
                "forward, unchanged, to the backward and to a recomputation."
            )
        if offsets.shape != (len(tiles), 3):
            raise InputError(f"blocks has offsets {list(offsets.shape)} for {len(tiles)} tiles; it needs [{len(tiles)}, 3].")
        if plan.batch not in (1, batch):
            raise InputError(f"blocks has lists for a batch of {plan.batch}, q has {batch}; it may be 1 or {batch}.")
        if self.heads % plan.heads:
            raise InputError(f"blocks has {plan.heads} plan heads, which must divide the {self.heads} query heads.")
        if not len(tiles):
            return
        for side, size, (first, stop) in (("queries", plan.num_queries, (0, 1)), ("keys", plan.num_keys, (2, 3))):
            offset = offsets[:, first // 2]
            low, high = int((tiles[:, first] + offset).min()), int((tiles[:, stop] + offset).max())
            if low < 0 or high > size:
                raise InputError(f"blocks is over {size} {side}, but the tiles hold rows {low} to {high}.")


class _BlockShape(NamedTuple):
    """Sizes that the lists of one plan share."""

    counts: tuple[int, ...]
    num_key_blocks: int
    device: torch.device

    @staticmethod
    def of(counts: Tensor, num_queries: int, num_keys: int, block_q: int, block_k: int) -> _BlockShape:
        """Raises InputError for block sizes and counts that no plan can have."""
        _check_sizes(block_q, block_k)
        blocks = -(-num_queries // block_q)
        if counts.ndim != 3 or counts.shape[2] != blocks:
            raise InputError(
                f"full_counts must have shape [b, p, {blocks}], one for each query block, got {list(counts.shape)}"
            )
        return _BlockShape(tuple(counts.shape), -(-num_keys // block_k), counts.device)

    def lists(self, name: str, counts: Tensor, blocks: Tensor) -> BlockLists:
        """Padded lists as CSR, ascending."""
        for suffix, x, wanted in (("counts", counts, self.counts), ("blocks", blocks, (*self.counts, blocks.shape[-1]))):
            if tuple(x.shape) != wanted:
                raise InputError(f"{name}_{suffix} must have shape {list(wanted)}, got {list(x.shape)}")
            if x.device != self.device or x.dtype.is_floating_point or x.dtype == torch.bool:
                raise InputError(f"{name}_{suffix} must hold integers on {self.device}, got {x.dtype} on {x.device}")
        capacity = blocks.shape[-1]
        unused = torch.arange(capacity, device=self.device) >= counts.unsqueeze(-1)
        entries = blocks.int().masked_fill(unused, _PAST_THE_END).sort(-1).values.flatten()
        starts = torch.arange(counts.numel(), device=self.device).view(counts.shape) * capacity
        return BlockLists(starts, counts.int().clamp(0, capacity), entries)


def _check_sizes(block_q: int, block_k: int) -> None:
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in BLOCK_SIZES:
            raise InputError(f"{name} is {size}; blocks of a plan have 64 or 128 rows.")


def _padded_lists(listed: Tensor) -> tuple[Tensor, Tensor]:
    """(counts [b, p, Nq], blocks [b, p, Nq, C]) of booleans [b, p, Nq, Nk]."""
    counts = listed.sum(-1)
    order = torch.where(listed, torch.arange(listed.shape[-1], device=listed.device), _PAST_THE_END).sort(-1).values
    return counts, order[..., : int(counts.max()) if counts.numel() else 0]


def _check_entries(plan: BlockPlan, full_counts: Tensor, partial_counts: Tensor) -> None:
    num_key_blocks, found = -(-plan.num_keys // plan.block_k), []
    for name, given, lists in (("full", full_counts, plan.full), ("partial", partial_counts, plan.partial)):
        if not torch.equal(given.int(), lists.counts):
            raise InputError(f"{name}_counts must lie between 0 and the {name}_blocks of a list")
        counts, entries = _entries(lists)
        if len(entries) and (entries.min() < 0 or entries.max() >= num_key_blocks):
            raise InputError(f"{name}_blocks must lie in 0 … {num_key_blocks - 1}, got {entries.min()} … {entries.max()}")
        found.append(np.repeat(np.arange(counts.size), counts.ravel()) * num_key_blocks + entries)
        if len(np.unique(found[-1])) != len(found[-1]):
            raise InputError(f"{name}_blocks lists a block twice for one query block")
    if len(np.intersect1d(*found)):
        raise InputError("partial_blocks lists a block that full_blocks lists for the same query block")


def _entries(lists: BlockLists) -> tuple[np.ndarray, np.ndarray]:
    """(counts int64 [b, p, N], all entries that count, list after list) on the host."""
    counts = lists.counts.cpu().numpy().astype(np.int64)
    starts, blocks = lists.starts.cpu().numpy().ravel(), lists.blocks.cpu().numpy()
    flat = counts.ravel()
    index = np.repeat(starts - (np.cumsum(flat) - flat), flat) + np.arange(flat.sum())
    return counts, blocks[index].astype(np.int64)


def _transpose(lists: BlockLists, num_columns: int) -> BlockLists:
    """Columns' lists of rows, ascending, from rows' lists of columns; no step waits for a GPU.

    A row's entries lie at starts … starts + capacity, as ``_BlockShape.lists`` leaves them.
    """
    batch, heads, num_rows = lists.counts.shape
    num_lists, device = batch * heads * num_rows, lists.counts.device
    capacity = len(lists.blocks) // max(1, num_lists)
    line = torch.arange(num_lists, device=device).unsqueeze(1)
    column = lists.blocks.view(num_lists, capacity).long()
    key = (line // num_rows * num_columns + column) * num_rows + line % num_rows
    unused = torch.arange(capacity, device=device) >= lists.counts.view(-1, 1)
    keys = key.masked_fill(unused, torch.iinfo(torch.int64).max).flatten().sort().values
    edges = torch.searchsorted(keys, torch.arange(batch * heads * num_columns + 1, device=device) * num_rows)
    starts, counts = edges[:-1], edges[1:] - edges[:-1]
    shape = (batch, heads, num_columns)
    return BlockLists(starts.view(shape), counts.int().view(shape), (keys % num_rows).int())


def _as_booleans(lists: BlockLists, first: int, stop: int, num_columns: int) -> Tensor:
    """[b, p, stop − first, columns]."""
    starts, counts = lists.starts[..., first:stop], lists.counts[..., first:stop]
    booleans = torch.zeros((*counts.shape, num_columns), dtype=torch.bool, device=counts.device)
    capacity = int(counts.max()) if counts.numel() else 0
    if not capacity:
        return booleans
    step = torch.arange(capacity, device=counts.device)
    used = step < counts.unsqueeze(-1)
    entries = lists.blocks[(starts.unsqueeze(-1) + step).clamp(max=len(lists.blocks) - 1)].long()
    # Entries past a list's end repeat its first, which is harmless where a list is not empty.
    entries = torch.where(used, entries, torch.where(counts > 0, entries[..., 0], 0).unsqueeze(-1))
    return booleans.scatter_(-1, entries, used[..., :1].expand_as(used).contiguous())
