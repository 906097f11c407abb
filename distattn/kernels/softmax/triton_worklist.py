"""Work lists of the Triton kernels: a table of tiles as ranges of columns per block of rows, on the host.

The forward and dq kernels take queries as rows and keys as columns, the dk/dv kernel keys as rows and queries as columns.
A block of rows never crosses the edge of a tile, so that every range of a block concerns all of its rows, and only ranges
on a tile's diagonal edges need a mask (B, boundary). All others are FULL: whole column blocks, without a mask.

    rows of one block      ◥ █ █ █ █ █ ◣      B: [v0, l)    FULL: [l, l + n·BLOCK_C)    B: [l + n·BLOCK_C, v1)
                           · ◥ █ █ █ █ █

Blocks are ordered by falling cost, so that the longest start first: within their head, whose keys lie in L2 then, also where
heads have blocks of their own, but for blocks so long that the device would wait for them at the end, which start first of all
heads. Ranges of a block are ordered by
where they stand, so that the order of the tiles does not change the order of the sums, and with it the last bits of a result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distattn.errors import InputError
from distattn.kernels.block_plan import BlockOperand
from distattn.kernels.protocol import T_H0, T_H1, T_K1, T_Q1, T_SHIFT, TILE_COLUMNS
from distattn.kernels.tiles import clip_tiles, head_spans

BLOCK_COLUMNS = ("row0", "row1", "full", "boundary", "end", "h0", "h1", "cost")
"""Rows [row0, row1) of the block; its ranges: FULL [full, boundary), boundary [boundary, end); its row heads [h0, h1)."""
RANGE_COLUMNS = ("start", "stop", "lo", "hi", "h0", "h1", "shift", "steps")
"""Columns [start, stop) on the diagonals lo ≤ column − row ≤ hi, for query heads [h0, h1). steps: column blocks from this
range to the block's last one of the same kind, counted for every query head of one row head."""
PLAN_RANGE_COLUMNS = ("start", "stop", "lo", "hi", "h0", "h1", "shift", "column_offset", "head_offset")
"""Ranges under a block plan: offsets lead from columns and query heads to those of the plan."""

LONG_SHARE = 1 / 1056
"""A program with more than this share of all work is long: an eighth of what each of 132 processors does."""

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
    num_rows: int
    """Rows of all blocks, each counted for every one of its row heads."""
    num_long: int
    """Blocks, from the first on, that start before all others, for all heads."""
    costs: np.ndarray
    """float64 [num_blocks]: what a program of each block costs, in one unit (column blocks; columns under a plan)."""
    busiest: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Kept for whoever shares the blocks out among persistent programs."""


def query_work(tiles: np.ndarray, block_q: int, block_k: int, device: torch.device) -> WorkList | None:
    """Blocks of query rows with the ranges of keys that they see, or None if the tiles are empty."""
    return _remembered(table_bytes(tiles), block_q, block_k, 0, str(device))


def key_work(tiles: np.ndarray, block_k: int, block_q: int, group: int, device: torch.device) -> WorkList | None:
    """Blocks of keys, for KV heads, with the ranges of query rows that see them, or None if the tiles are empty."""
    return _remembered(table_bytes(tiles), block_k, block_q, group, str(device))


def table_bytes(tiles: np.ndarray) -> bytes:
    """What a table is remembered by."""
    return np.ascontiguousarray(tiles, dtype=np.int64).tobytes()


@lru_cache(maxsize=256)
def _remembered(table: bytes, block_rows: int, block_columns: int, group: int, device: str) -> WorkList | None:
    """group 0: rows are queries. Layers and steps replay the same tables, so tables on the device are kept."""
    tiles = np.frombuffer(table, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))
    return _on_device(*build(tiles, block_rows, block_columns, group), device)


def plan_query_work(tiles: np.ndarray, operand: BlockOperand, block_q: int, device: torch.device) -> WorkList | None:
    """``query_work`` under a block plan: a range for each tile, and blocks that lie in one query block of the plan."""
    return _remembered_plan(table_bytes(tiles), table_bytes(operand.offsets_of(tiles)), block_q, 0, str(device))


def plan_key_work(tiles: np.ndarray, operand: BlockOperand, block_k: int, group: int, device: torch.device) -> WorkList | None:
    """``key_work`` under a block plan: a range for each tile, and blocks that lie in one key block of the plan."""
    return _remembered_plan(table_bytes(tiles), table_bytes(operand.offsets_of(tiles)), block_k, group, str(device))


@lru_cache(maxsize=256)
def _remembered_plan(table: bytes, offsets: bytes, block_rows: int, group: int, device: str) -> WorkList | None:
    tiles = np.frombuffer(table, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))
    return _on_device(*build_for_plan(tiles, np.frombuffer(offsets, np.int64).reshape(-1, 3), block_rows, group), device)


def _on_device(blocks: np.ndarray, ranges: np.ndarray, device: str) -> WorkList | None:
    if not len(blocks):
        return None
    num_heads = int((blocks[:, 6] - blocks[:, 5]).max())
    num_rows = int(((blocks[:, 1] - blocks[:, 0]) * (blocks[:, 6] - blocks[:, 5])).sum())
    costs = blocks[:, 7] / (blocks[:, 6] - blocks[:, 5])
    _, num_long = order_of_blocks(*blocks[:, 5:].T)
    # A line more: a pipelined loop looks at the range behind its last one.
    ranges = np.concatenate((ranges, np.zeros_like(ranges[:1])))
    blocks_there, ranges_there = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (blocks, ranges))
    return WorkList(blocks_there, ranges_there, len(blocks), num_heads, num_rows, num_long, costs)


def build(tiles: np.ndarray, block_rows: int, block_columns: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(blocks int64 [NB, 8], ranges int64 [NR, 8]) of a table of tiles.

    tiles int64 [N, 9]. group: query heads per KV head where rows are keys, or 0 where rows are queries.
    Raises InputError if a position does not fit the kernels' 32-bit tables.
    """
    sides = _checked_sides(tiles, group)
    if not len(sides):
        return np.zeros((0, len(BLOCK_COLUMNS)), np.int64), np.zeros((0, len(RANGE_COLUMNS)), np.int64)
    block, side = _blocks_and_tiles(sides, block_rows)
    return _ranges(block, sides[side], block_columns)


def build_for_plan(tiles: np.ndarray, offsets: np.ndarray, block_rows: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(blocks int64 [NB, 8], ranges int64 [NR, 9]) of a table of tiles under a block plan.

    offsets int64 [N, 3]: of the tiles' queries, keys and query heads. Blocks are those of ``build`` with the plan's row of
    their row 0 in place of ``boundary``, and ranges [full, end); no block crosses a multiple of ``block_rows`` in the plan.
    """
    sides = _checked_sides(tiles, group, offsets)
    if not len(sides):
        return np.zeros((0, len(BLOCK_COLUMNS)), np.int64), np.zeros((0, len(PLAN_RANGE_COLUMNS)), np.int64)
    block, line = _blocks_and_tiles(sides, block_rows, in_plan=True)
    side = sides[line]
    start = np.maximum(side[:, S_C0], block[:, 0] + side[:, S_LO])
    stop = np.minimum(side[:, S_C1], block[:, 1] + side[:, S_HI])
    order = np.lexsort((side[:, S_SHIFT], side[:, S_H0], stop, start, block[:, 0], block[:, 2]))
    block, side, start, stop = (x[order] for x in (block, side, start, stop))
    is_first = _first_of_block(block)
    cost = np.bincount(np.cumsum(is_first) - 1, weights=(stop - start) * (block[:, 3] - block[:, 2])).astype(np.int64)
    begin = np.flatnonzero(is_first)
    end, unique = np.append(begin[1:], len(block)), block[is_first]
    row = unique[:, 0] + side[is_first, S_ROW]
    blocks = np.stack((*unique[:, :2].T, begin, row, end, *unique[:, 2:].T, cost), axis=1)
    ranges = np.stack((start, stop, *side[:, [S_LO, S_HI, S_H0, S_H1, S_SHIFT, S_COLUMN, S_HEAD]].T), axis=1)
    return blocks[order_of_blocks(*blocks[:, 5:].T)[0]], ranges


# A tile as rows and columns: rows, columns, diagonals (column − row), row heads, the query heads and shift of the tile, and
# what leads to the rows, columns and query heads of a block plan.
S_R0, S_R1, S_C0, S_C1, S_LO, S_HI, S_G0, S_G1, S_H0, S_H1, S_SHIFT, S_ROW, S_COLUMN, S_HEAD = range(14)


def _checked_sides(tiles: np.ndarray, group: int, offsets: np.ndarray | None = None) -> np.ndarray:
    """int64 [M, 14]: tiles that are not empty, with queries as rows, or with keys as rows and KV heads as row heads."""
    offsets = np.zeros((len(tiles), 3), np.int64) if offsets is None else offsets
    tiles = clip_tiles(np.concatenate((tiles, offsets), axis=1))
    if len(tiles) and tiles[:, [T_Q1, T_K1]].max() >= MAX_POSITION:
        raise InputError(f"tiles hold row {tiles[:, [T_Q1, T_K1]].max()}; the triton kernel takes rows below {MAX_POSITION}.")
    q0, q1, k0, k1, lo, hi, h0, h1, shift, row, column, head = tiles.T
    bound = MAX_POSITION - 1
    lo, hi = np.maximum(lo, -bound), np.minimum(hi, bound)
    if not group:
        return np.stack((q0, q1, k0, k1, lo, hi, h0, h1, h0, h1, shift, row, column, head), axis=1)
    sides = np.stack((k0, k1, q0, q1, -hi, -lo, h0, h1, h0, h1, shift, column, row, head), axis=1)
    # Cut where the query heads of a tile do not fill a group, so that all KV heads of a side have equally many.
    kinds, kind = np.unique(tiles[:, [T_H0, T_H1, T_SHIFT]], axis=0, return_inverse=True)
    spans = [head_spans(*heads, group) for heads in kinds.tolist()]
    flat = np.array([span for x in spans for span in x], np.int64).reshape(-1, 4)
    count = np.array([len(x) for x in spans], np.int64)
    source, step = expand(count[kind.ravel()])
    sides = sides[source]
    sides[:, [S_H0, S_H1, S_G0, S_G1]] = flat[(np.cumsum(count) - count)[kind.ravel()[source]] + step]
    return sides


def expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, step): every index i repeated counts[i] times, with 0 … counts[i] − 1 beside it."""
    source = np.repeat(np.arange(len(counts)), counts)
    return source, np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)


def _blocks_and_tiles(sides: np.ndarray, block_rows: int, *, in_plan: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of rows and heads that no tile's edge crosses, one line per block and tile that covers it.

    They begin at tiles' edges, or, in a block plan, at those and at multiples of ``block_rows`` in its coordinates.
    Returns (block int64 [M, 4] row0, row1, h0, h1; side int64 [M], the tile's index).
    """
    # Heads: between two neighbouring edges of tiles every head has the same tiles.
    edges = np.unique(sides[:, [S_G0, S_G1]])
    first = np.searchsorted(edges, sides[:, S_G0])
    side, step = expand(np.searchsorted(edges, sides[:, S_G1]) - first)
    span = first[side] + step
    # Rows likewise, for each span of heads by itself: one sorted list of (span, edge).
    key = span * MAX_POSITION
    keys = np.unique(np.concatenate((key + sides[side, S_R0], key + sides[side, S_R1])))
    first = np.searchsorted(keys, key + sides[side, S_R0])
    line, step = expand(np.searchsorted(keys, key + sides[side, S_R1]) - first)
    segment, side, span = first[line] + step, side[line], span[line]
    row0, row1 = keys[segment] % MAX_POSITION, keys[segment + 1] % MAX_POSITION
    first = row0 - (row0 + sides[side, S_ROW]) % block_rows if in_plan else row0
    line, step = expand(-(-(row1 - first) // block_rows))
    start = np.maximum(first[line] + step * block_rows, row0[line])
    stop = np.minimum(first[line] + (step + 1) * block_rows, row1[line])
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
    is_first = _first_of_block(block)
    index = np.cumsum(is_first) - 1
    heads = (side[:, S_H1] - side[:, S_H0]) // (side[:, S_G1] - side[:, S_G0])
    steps = -(-(stop - start) // block_columns) * heads
    cost = np.bincount(index, weights=steps * (block[:, 3] - block[:, 2])).astype(np.int64)
    num_boundary = np.bincount(index, weights=boundary).astype(np.int64)
    begin = np.flatnonzero(is_first)
    end = np.append(begin[1:], len(block))
    unique = block[is_first]
    blocks = np.stack((*unique[:, :2].T, begin, end - num_boundary, end, *unique[:, 2:].T, cost), axis=1)
    # Steps to the last range of the same kind: the sum to the end of the table less what lies behind that range.
    is_first[1:] |= boundary[1:] != boundary[:-1]
    kind = np.cumsum(is_first) - 1
    to_end = np.append(np.cumsum(steps[::-1])[::-1], 0)
    behind = to_end[np.append(np.flatnonzero(is_first)[1:], len(steps))]
    steps = to_end[:-1] - behind[kind]
    ranges = np.stack((start, stop, *side[:, [S_LO, S_HI, S_H0, S_H1, S_SHIFT]].T, steps), axis=1)
    return blocks[order_of_blocks(*blocks[:, 5:].T)[0]], ranges


def order_of_blocks(h0: np.ndarray, h1: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, int]:
    """(order int64 [NB], how many are long): those first, as the device would wait for one of their programs; then head by
    head; by falling cost among these."""
    is_long = cost > LONG_SHARE * cost.sum() * (h1 - h0)
    return np.lexsort((-cost, np.where(is_long, 0, h0), ~is_long)), int(is_long.sum())


def _first_of_block(block: np.ndarray) -> np.ndarray:
    """Which lines are the first of their block: lines int64 [M, 4], block by block."""
    is_first = np.ones(len(block), dtype=bool)
    is_first[1:] = (block[1:, [0, 2]] != block[:-1, [0, 2]]).any(1)
    return is_first
