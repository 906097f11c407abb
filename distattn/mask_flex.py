"""Bands to and from the BlockMask of torch's FlexAttention, block by block; whole sequences never become S×S.

FlexAttention knows a mask as lists of full blocks, lists of partial blocks, and a function
``mask_mod(b, h, q_idx, kv_idx)`` that decides single pairs of the partial ones.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from distattn.bands import UNBOUNDED, area, clip, coalesce, cut_axis, intersection, tighten
from distattn.errors import MaskError

MAX_BLOCKS = 1 << 27
"""Most entries of a BlockMask's block table that we fill (half a gigabyte each of its four tables)."""

MAX_KEY_RANGES = 64
"""Most separate key ranges that one query may see in a ``mask_mod``, which looks at each of them."""

MAX_BLOCK_SIZE = 1 << 15

_PAIRS_AT_ONCE = 1 << 22


def to_block_mask(num_queries: int, num_keys: int, bands: np.ndarray, device: str | torch.device, block_size: int) -> BlockMask:
    """A BlockMask [1, 1, ceil(num_queries / block_size), ceil(num_keys / block_size)] of the pairs in ``bands``.

    As torch does it, a block is full if all of its block_size² pairs exist and are allowed, so ragged last blocks are
    partial. Raises MaskError where the tables would be too large.
    """
    if not 1 <= block_size <= MAX_BLOCK_SIZE or not num_queries or not num_keys:
        raise MaskError(
            f"a BlockMask of {num_queries}x{num_keys} in blocks of {block_size} was asked for: it needs at least one "
            f"query and key, and blocks of 1 to {MAX_BLOCK_SIZE}"
        )
    num_blocks = -(-num_queries // block_size) * -(-num_keys // block_size)
    if num_blocks > MAX_BLOCKS:
        raise MaskError(
            f"a BlockMask of {num_queries}x{num_keys} in blocks of {block_size} has {num_blocks} blocks and at most "
            f"{MAX_BLOCKS} are allowed: take a larger block_size"
        )
    covered = torch.from_numpy(_area_per_block(num_queries, num_keys, bands, block_size)).to(device)
    full = covered == block_size * block_size
    partial = (covered > 0) & ~full
    return BlockMask.from_kv_blocks(
        *block_lists(partial),
        *block_lists(full),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(num_queries, bands, device),
        seq_lengths=(num_queries, num_keys),
    )


def from_block_mask(block_mask: BlockMask) -> tuple[int, int, np.ndarray]:
    """(num_queries, num_keys, bands) of a BlockMask; raises MaskError if its batch entries or heads differ."""
    if not isinstance(block_mask, BlockMask):
        raise MaskError(f"from_flex takes a torch.nn.attention.flex_attention.BlockMask, and got {type(block_mask)}")
    num_queries, num_keys = (int(n) for n in block_mask.seq_lengths)
    num_batch, num_heads = (1, 1, *block_mask.kv_indices.shape[:-2])[-2:]
    first = _bands_of_entry(block_mask, 0, 0)
    for b in range(num_batch):
        for h in range(num_heads):
            other = first if b == h == 0 else _bands_of_entry(block_mask, b, h)
            total = int(area(first).sum())
            if total != area(other).sum() or total != area(intersection(first, other)).sum():
                raise MaskError(
                    f"this BlockMask allows other pairs at batch entry {b}, head {h} than at 0, 0, and a Mask holds "
                    "for every head and batch entry: pass one BlockMask per pattern, built with B=None and H=None"
                )
    return num_queries, num_keys, first


def _area_per_block(num_queries: int, num_keys: int, bands: np.ndarray, block_size: int) -> np.ndarray:
    """Allowed pairs in each block, int32 [query blocks, key blocks].

    A piece of one block row covers a range of key blocks in full breadth: those are two entries of a difference table.
    Only the few blocks at its ends are measured one by one.
    """
    num_rows, num_columns = -(-num_queries // block_size), -(-num_keys // block_size)
    pieces = tighten(cut_axis(bands, np.arange(1, num_rows) * block_size, 0)[0])
    q0, q1, k0, k1, lo, hi = pieces.T
    end = -(-k1 // block_size)
    broad_begin = -(-np.maximum(k0, lo + q1 - 1) // block_size)
    broad_end = np.minimum(k1, hi + q0 + 1) // block_size
    none = broad_begin >= broad_end
    broad_begin, broad_end = np.where(none, end, broad_begin), np.where(none, end, broad_end)

    covered = np.zeros((num_rows, num_columns + 1), np.int32)
    pairs = ((q1 - q0) * block_size).astype(np.int32)
    np.add.at(covered, (q0 // block_size, broad_begin), pairs)
    np.add.at(covered, (q0 // block_size, broad_end), -pairs)
    np.cumsum(covered, axis=1, out=covered)

    left, right = pieces.copy(), pieces.copy()
    left[:, 3] = np.minimum(k1, broad_begin * block_size)
    right[:, 2] = np.maximum(k0, broad_end * block_size)
    ends = cut_axis(np.concatenate([left, right]), np.arange(1, num_columns) * block_size, 2)[0]
    np.add.at(covered, (ends[:, 0] // block_size, ends[:, 2] // block_size), area(ends).astype(np.int32))
    return covered[:, :num_columns]


def block_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of chosen blocks in each row [1, 1, rows] and their indices first [1, 1, rows, columns], int32."""
    counts = chosen.sum(1, dtype=torch.int32)
    indices = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], indices[None, None]


def _mask_mod(
    num_queries: int, bands: np.ndarray, device: str | torch.device
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """A ``mask_mod`` that compares the key with the ranges [first, end) of keys that the query sees."""
    tables = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in key_ranges(num_queries, bands)]
    ranges = [(first.to(device), end.to(device)) for first, end in tables]

    def mask_mod(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        first, end = ranges[0]
        allowed = (kv_idx >= first[q_idx]) & (kv_idx < end[q_idx])
        for first, end in ranges[1:]:
            allowed = allowed | ((kv_idx >= first[q_idx]) & (kv_idx < end[q_idx]))
        return allowed

    return mask_mod


def key_ranges(num_queries: int, bands: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ranges of keys that each query sees, as pairs (first, end) of int32 [num_queries] tables; at least one pair.

    Table t holds the t-th range of every query; an absent one is empty (first = end = 0).
    """
    pieces, _, strip = cut_axis(bands, np.unique(bands[:, :2]), 0)
    order = np.lexsort((pieces[:, 2], strip))
    pieces, strip = pieces[order], strip[order]
    place = np.arange(len(strip)) - np.searchsorted(strip, strip, "left")
    num_ranges = int(place.max(initial=0)) + 1
    if num_ranges > MAX_KEY_RANGES:
        raise MaskError(
            f"a query of this mask sees {num_ranges} separate ranges of keys and a mask_mod looks at no more than "
            f"{MAX_KEY_RANGES}: a pattern that fine needs another kernel than FlexAttention's"
        )
    tables = []
    for t in range(num_ranges):
        q0, q1, k0, k1, lo, hi = pieces[place == t].T
        height = q1 - q0
        of_row = np.repeat(np.arange(len(height)), height)
        rows = np.arange(len(of_row)) + (q0 - np.cumsum(height) + height)[of_row]
        first, end = np.zeros(num_queries, np.int32), np.zeros(num_queries, np.int32)
        first[rows] = np.maximum(k0[of_row], rows + lo[of_row])
        end[rows] = np.minimum(k1[of_row], rows + hi[of_row] + 1)
        tables.append((first, end))
    return tables


def _bands_of_entry(block_mask: BlockMask, b: int, h: int) -> np.ndarray:
    """Bands of one batch entry and head."""
    num_queries, num_keys = (int(n) for n in block_mask.seq_lengths)
    size_q, size_k = block_mask.BLOCK_SIZE
    partial = _listed_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, b, h)
    if block_mask.full_kv_num_blocks is None or block_mask.full_kv_indices is None:
        full = np.zeros((0, 2), np.int64)
    else:
        full = _listed_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, b, h)
    both = np.concatenate([partial, full])
    if len(np.unique(both, axis=0)) < len(both):
        raise MaskError("this BlockMask lists a block twice, and a mask counts each pair once: list every block once")

    row, column = full.T
    far = np.full(len(full), UNBOUNDED)
    boxes = np.stack([row * size_q, (row + 1) * size_q, column * size_k, (column + 1) * size_k, -far, far], 1)
    found = [clip(boxes, 0, num_queries, 0, num_keys)]
    at_once = max(1, _PAIRS_AT_ONCE // (size_q * size_k))
    for begin in range(0, len(partial), at_once):
        corners = partial[begin : begin + at_once] * np.array([size_q, size_k])
        found.append(_bands_of_tiles(_evaluate(block_mask, b, h, corners), corners))
    return coalesce(np.concatenate(found))


def _listed_blocks(counts: torch.Tensor, indices: torch.Tensor, b: int, h: int) -> np.ndarray:
    """(row, column) of the blocks listed for one batch entry and head, int64 [N, 2]."""
    table = indices.reshape(-1, *(1, 1, *indices.shape)[-3:])[b, h].cpu().numpy()
    count = counts.reshape(-1, *(1, 1, *counts.shape)[-2:])[b, h].cpu().numpy()
    row, place = np.nonzero(np.arange(table.shape[1]) < count[:, None])
    return np.stack([row, table[row, place]], 1).astype(np.int64)


def _evaluate(block_mask: BlockMask, b: int, h: int, corners: np.ndarray) -> np.ndarray:
    """What ``mask_mod`` says inside blocks, bool [N, BLOCK_Q, BLOCK_K]; False beyond the sequence lengths.

    corners: first query and key of each block, int64 [N, 2]. torch's own ``create_mask`` maps the function over
    scalars, so anything that FlexAttention accepts works; its batch index numbers our blocks.
    """
    num_queries, num_keys = (int(n) for n in block_mask.seq_lengths)
    device = block_mask.kv_indices.device
    first_query, first_key = torch.from_numpy(corners.T.copy()).to(device)
    entry, head = torch.tensor(b, device=device), torch.tensor(h, device=device)

    def inside_block(block: torch.Tensor, _: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q_idx, kv_idx = first_query[block] + q, first_key[block] + k
        # Look-ups in mask_mod may have no entry beyond the sequence.
        allowed = block_mask.mask_mod(entry, head, q_idx.clamp(max=num_queries - 1), kv_idx.clamp(max=num_keys - 1))
        return allowed & (q_idx < num_queries) & (kv_idx < num_keys)

    size_q, size_k = block_mask.BLOCK_SIZE
    return create_mask(inside_block, len(corners), 1, size_q, size_k, device)[:, 0].cpu().numpy()


def _bands_of_tiles(allowed: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Bands of dense tiles: each row's runs of keys, then runs of rows that make one band.

    allowed: bool [N, BLOCK_Q, BLOCK_K]; corners: first query and key of each tile, int64 [N, 2].
    """
    edge = np.zeros((*allowed.shape[:2], 1), bool)
    begins = np.nonzero(allowed & ~np.concatenate([edge, allowed[..., :-1]], 2))
    ends = np.nonzero(allowed & ~np.concatenate([allowed[..., 1:], edge], 2))
    tile, row, begin = begins
    if not len(tile):
        return np.zeros((0, 6), np.int64)
    line = tile * allowed.shape[1] + row
    place = np.arange(len(line)) - np.searchsorted(line, line, "left")  # the how-maniest run of its row
    query, first, end = corners[tile, 0] + row, corners[tile, 1] + begin, corners[tile, 1] + ends[2] + 1
    order = np.lexsort((row, place, tile))
    tile, place, query, first, end = (x[order] for x in (tile, place, query, first, end))

    step_first, step_end = np.diff(first), np.diff(end)
    joined = (np.diff(tile) == 0) & (np.diff(place) == 0) & (np.diff(query) == 1)
    joined &= (step_first >= 0) & (step_first <= 1) & (step_end >= 0) & (step_end <= 1)
    starts = np.flatnonzero(np.concatenate([[True], _begins_anew(joined, step_first, step_end)]))
    last = np.append(starts[1:], len(query)) - 1
    # The first key steps along the lower edge of the band at the end of a run, if at all; the last key at its beginning.
    steps_first = (last > starts) & (np.append(0, step_first)[last] == 1)
    steps_end = (last > starts) & (np.append(step_end, 0)[starts] == 1)
    lo = np.where(steps_first, first[last] - query[last], -UNBOUNDED)
    hi = np.where(steps_end, end[starts] - 1 - query[starts], UNBOUNDED)
    return np.stack([query[starts], query[last] + 1, first[starts], end[last], lo, hi], 1)


def _begins_anew(joined: np.ndarray, step_first: np.ndarray, step_end: np.ndarray) -> np.ndarray:
    """Whether a new band begins after each step from row to row, bool: where rows don't join, or no band turns like that.

    Within a band the first key stands still (left of the box), then steps; the last key steps, then stands still. The row
    after another turn starts afresh, so its own step turns nothing; hence every second one of a run of such turns.
    """
    turns = np.zeros(len(joined), bool)
    turns[1:] = joined[1:] & joined[:-1] & ((step_first[1:] < step_first[:-1]) | (step_end[1:] > step_end[:-1]))
    index = np.arange(len(joined))
    no_turn_before = np.maximum.accumulate(np.where(turns, -1, index))
    return ~joined | (turns & ((index - no_turn_before) % 2 == 1))
