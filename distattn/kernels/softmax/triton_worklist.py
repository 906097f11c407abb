"""Work lists of the Triton kernels: a table of tiles as ranges of columns per block of rows, on the host.

The forward and dq kernels take queries as rows and keys as columns, the dk/dv kernel keys as rows and queries as columns.
A block of rows never crosses the edge of a tile, so that every range of a block concerns all of its rows, and only ranges
on a tile's diagonal edges need a mask (B, boundary). All others are FULL: whole column blocks, without a mask.

    rows of one block      ◥ █ █ █ █ █ ◣      B: [v0, l)    FULL: [l, l + n·BLOCK_C)    B: [l + n·BLOCK_C, v1)
                           · ◥ █ █ █ █ █

Blocks are ordered by falling cost, so that the longest start first; ranges within a block by where they stand, so that
the order of the tiles does not change the order of the sums, and with it the last bits of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distattn.errors import InputError
from distattn.kernels.protocol import T_K1, T_Q1, TILE_COLUMNS
from distattn.kernels.tiles import clip_tiles

BLOCK_COLUMNS = ("row0", "row1", "full", "boundary", "end", "h0", "h1", "cost")
"""Rows [row0, row1) of the block; its ranges: FULL [full, boundary), boundary [boundary, end); its row heads [h0, h1)."""
RANGE_COLUMNS = ("start", "stop", "lo", "hi", "h0", "h1", "shift", "unused")
"""Columns [start, stop) on the diagonals lo ≤ column − row ≤ hi, for query heads [h0, h1)."""

MAX_POSITION = 1 << 30
"""Rows and columns must lie below it, so that differences fit int32."""


@dataclass(frozen=True)
class WorkList:
    """One kernel's work: int32 tables on the device, ``blocks [num_blocks, 8]`` and ``ranges [num_ranges, 8]``."""

    blocks: Tensor
    ranges: Tensor
    num_blocks: int
    num_heads: int
    """The most row heads that a block has."""


def query_work(tiles: np.ndarray, block_q: int, block_k: int, device: torch.device) -> WorkList | None:
    """Blocks of query rows with the ranges of keys that they see, or None if the tiles are empty."""
    return _remembered(_table_bytes(tiles), block_q, block_k, 0, str(device))


def key_work(tiles: np.ndarray, block_k: int, block_q: int, group: int, device: torch.device) -> WorkList | None:
    """Blocks of keys, for KV heads, with the ranges of query rows that see them, or None if the tiles are empty."""
    return _remembered(_table_bytes(tiles), block_k, block_q, group, str(device))


def _table_bytes(tiles: np.ndarray) -> bytes:
    return np.ascontiguousarray(tiles, dtype=np.int64).tobytes()


@lru_cache(maxsize=256)
def _remembered(table: bytes, block_rows: int, block_columns: int, group: int, device: str) -> WorkList | None:
    """group 0: rows are queries. Layers and steps replay the same tables, so tables on the device are kept."""
    tiles = np.frombuffer(table, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))
    blocks, ranges = build(tiles, block_rows, block_columns, group)
    if not len(blocks):
        return None
    num_heads = int((blocks[:, 6] - blocks[:, 5]).max())
    on_device = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (blocks, ranges))
    return WorkList(*on_device, num_blocks=len(blocks), num_heads=num_heads)


def build(tiles: np.ndarray, block_rows: int, block_columns: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(blocks int64 [NB, 8], ranges int64 [NR, 8]) of a table of tiles.

    tiles int64 [N, 9]. group: query heads per KV head where rows are keys, or 0 where rows are queries.
    Raises InputError if a position does not fit the kernels' 32-bit tables.
    """
    tiles = clip_tiles(tiles)
    if not len(tiles):
        return np.zeros((0, len(BLOCK_COLUMNS)), np.int64), np.zeros((0, len(RANGE_COLUMNS)), np.int64)
    if tiles[:, [T_Q1, T_K1]].max() >= MAX_POSITION:
        raise InputError(f"tiles hold row {tiles[:, [T_Q1, T_K1]].max()}; the triton kernel takes rows below {MAX_POSITION}.")
    sides = _sides(tiles, group)
    block, side = _blocks_and_tiles(sides, block_rows)
    return _ranges(block, sides[side], block_columns)


# A tile as rows and columns: rows, columns, diagonals (column − row), row heads, and the query heads and shift of the tile.
S_R0, S_R1, S_C0, S_C1, S_LO, S_HI, S_G0, S_G1, S_H0, S_H1, S_SHIFT = range(11)


def _sides(tiles: np.ndarray, group: int) -> np.ndarray:
    """int64 [N, 11]: the tiles with queries as rows, or with keys as rows and KV heads as row heads."""
    q0, q1, k0, k1, lo, hi, h0, h1, shift = tiles.T
    bound = 2 * MAX_POSITION - 1
    lo, hi = np.maximum(lo, -bound), np.minimum(hi, bound)
    if group:
        sides = (k0, k1, q0, q1, -hi, -lo, (h0 + shift) // group, (h1 - 1 + shift) // group + 1, h0, h1, shift)
    else:
        sides = (q0, q1, k0, k1, lo, hi, h0, h1, h0, h1, shift)
    return np.stack(sides, axis=1)


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, step): every index i repeated counts[i] times, with 0 … counts[i] − 1 beside it."""
    source = np.repeat(np.arange(len(counts)), counts)
    return source, np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)


def _blocks_and_tiles(sides: np.ndarray, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of rows and heads that no tile's edge crosses, one line per block and tile that covers it.

    Returns (block int64 [M, 4] row0, row1, h0, h1; side int64 [M], the tile's index).
    """
    # Heads: between two neighbouring edges of tiles every head has the same tiles.
    edges = np.unique(sides[:, [S_G0, S_G1]])
    first = np.searchsorted(edges, sides[:, S_G0])
    side, step = _expand(np.searchsorted(edges, sides[:, S_G1]) - first)
    span = first[side] + step
    # Rows likewise, for each span of heads by itself: one sorted list of (span, edge).
    key = span * MAX_POSITION
    keys = np.unique(np.concatenate((key + sides[side, S_R0], key + sides[side, S_R1])))
    first = np.searchsorted(keys, key + sides[side, S_R0])
    line, step = _expand(np.searchsorted(keys, key + sides[side, S_R1]) - first)
    segment, side, span = first[line] + step, side[line], span[line]
    row0, row1 = keys[segment] % MAX_POSITION, keys[segment + 1] % MAX_POSITION
    line, step = _expand(-(-(row1 - row0) // block_rows))
    start = row0[line] + step * block_rows
    stop = np.minimum(start + block_rows, row1[line])
    block = np.stack((start, stop, edges[span[line]], edges[span[line] + 1]), axis=1)
    return block, side[line]


def _ranges(block: np.ndarray, side: np.ndarray, block_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut each tile's columns, as a block of rows sees them, into boundary and FULL ranges, and gather them by block.

    block [M, 4], side [M, 11]: line by line. Returns the tables of ``build``.
    """
    row0, row1 = block[:, 0], block[:, 1]
    seen0 = np.maximum(side[:, S_C0], row0 + side[:, S_LO])
    seen1 = np.minimum(side[:, S_C1], row1 + side[:, S_HI])
    common0 = np.maximum(side[:, S_C0], row1 - 1 + side[:, S_LO])
    common1 = np.minimum(side[:, S_C1], row0 + side[:, S_HI] + 1)
    # The left edge takes whole column blocks, so that the part in the middle is not cut short on both sides.
    left = seen0 + -(-(common0 - seen0) // block_columns) * block_columns
    num_full = np.maximum(common1 - left, 0) // block_columns
    left = np.where(num_full > 0, left, seen0)
    right = left + num_full * block_columns
    starts, stops = np.stack((seen0, left, right), axis=1), np.stack((left, right, seen1), axis=1)
    line, part = np.nonzero(starts < stops)
    start, stop, boundary = starts[line, part], stops[line, part], part != 1
    block, side = block[line], side[line]

    # Canonical order: block by block, FULL before boundary, then by position.
    order = np.lexsort((side[:, S_SHIFT], side[:, S_H0], stop, start, boundary, block[:, 0], block[:, 2]))
    block, side, start, stop, boundary = (x[order] for x in (block, side, start, stop, boundary))
    is_first = np.ones(len(block), dtype=bool)
    is_first[1:] = (block[1:, [0, 2]] != block[:-1, [0, 2]]).any(1)
    index = np.cumsum(is_first) - 1
    heads = side[:, S_H1] - side[:, S_H0]
    cost = np.bincount(index, weights=-(-(stop - start) // block_columns) * heads).astype(np.int64)
    num_boundary = np.bincount(index, weights=boundary).astype(np.int64)
    begin = np.flatnonzero(is_first)
    end = np.append(begin[1:], len(block))
    unique = block[is_first]
    blocks = np.stack((*unique[:, :2].T, begin, end - num_boundary, end, *unique[:, 2:].T, cost), axis=1)
    unused = np.zeros_like(start)
    ranges = np.stack((start, stop, *side[:, [S_LO, S_HI, S_H0, S_H1, S_SHIFT]].T, unused), axis=1)
    return blocks[np.argsort(-cost, kind="stable")], ranges
