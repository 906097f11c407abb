"""What a table of tiles asks of each backend: launches, rows, blocks. From this and measured rates follows a time.

    tiles ─▶ rectangles, a launch or several ─▶ Work ─▶ seconds, with a ``distattn.calibration.KernelRate``

Pairs are counted in blocks of 128 × 128, since kernels compute whole blocks: those that a mask leaves whole, and the dearer
ones that it cuts. A program takes a row of blocks, or a column; where few programs have much of the work, or there are few,
some processors compute while the others wait: a launch takes as long as its busiest one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distattn.kernels.protocol import T_H0, T_H1, T_HI, T_K0, T_K1, T_LO, T_Q0, T_Q1, TILE_COLUMNS
from distattn.kernels.softmax import fa4, torch_cuda
from distattn.kernels.tiles import Piece, clip_tiles, decompose, windows

BLOCK = 128
WHOLE_GROUPS = ("triton", "hopper")
"""Backends whose programs for dk and dv go over all query heads of their KV head, and others compute dq."""

SHARE_OF_DQ = 3 / 7
"""Of the matrix products in their backward."""

PROCESSORS = 132
"""Of an H100 or H200. Elsewhere waits are counted for as many, and what they cost is fitted to times all the same."""

FINISHED_ROW = 0.25
"""What a row costs whose finished result is merged into another, against one that goes through a carry in fp32: the bytes of
three 16-bit rows against those of six 32-bit ones."""


class Work(NamedTuple):
    """Counted over all heads.

    calls of a backend; launches of its kernel; merges of their results, in the forward; rows that are written or merged, but
    for those that a vendor's kernel writes itself; row_steps, column_steps: blocks along each launch's longest row, and
    longest column, of blocks, for as many heads as one program computes; pairs, cut_pairs: (query, key) pairs in whole blocks,
    and in blocks that a bound or an edge cuts; vendor_rows: rows that a vendor's kernel writes itself; row_waits, column_waits:
    blocks that the busiest processor computes beyond the mean of all, where programs take rows, and where they take columns,
    summed over launches.
    """

    calls: float
    launches: float
    merges: float
    rows: float
    row_steps: float
    column_steps: float
    pairs: float
    cut_pairs: float
    vendor_rows: float = 0.0
    row_waits: float = 0.0
    column_waits: float = 0.0

    def __add__(self, other: object) -> Work:
        assert isinstance(other, Work)
        return Work(*(a + b for a, b in zip(self, other)))

    def terms(self, *, backward: bool) -> tuple[float, float, float, float, float, float, float, float]:
        """What the numbers of a ``KernelRate`` multiply: calls, launches, rows, steps, pairs, cut_pairs, vendor_rows, waits.

        Merging a result costs the host about as much as launching its kernel. The forward works along rows; gradients of keys
        wait for the longest column, the longer one where tiles share keys.
        """
        launches = self.launches if backward else self.launches + self.merges
        steps = max(self.row_steps, self.column_steps) if backward else self.row_steps
        waits = self.column_waits if backward else self.row_waits
        return self.calls, launches, self.rows, steps, self.pairs, self.cut_pairs, self.vendor_rows, waits


NOTHING = Work(0, 0, 0, 0, 0, 0, 0, 0)


def work_of(backend: str, tables: Sequence[np.ndarray], *, group: int = 1) -> dict[str, Work]:
    """Work by the kernel that does it, for tables int64 [N, 9], each one call of ``backend``; group: query heads a KV head.

    A backend that hands some tiles to another's kernel has two entries.
    """
    found: dict[str, Work] = {}
    finished = backend in _CUTS and _merges_finished([_CUTS[backend](table) for table in tables])
    for i, table in enumerate(tables):
        if backend not in _CUTS:
            parts, merged = {backend: [clip_tiles(table)]}, None
        else:
            parts = _CUTS[backend](table)
            several = len(tables) > 1 and not (finished and i == 0)
            merged = several or _share_rows([x for launches in parts.values() for x in launches])
        for kernel, launches in parts.items():
            work = count(launches, merged, group=group if kernel in WHOLE_GROUPS else 1)
            if finished:
                work = work._replace(rows=work.rows * FINISHED_ROW)
            if kernel in WHOLE_GROUPS:
                waits = SHARE_OF_DQ * work.row_waits + (1 - SHARE_OF_DQ) * work.column_waits
                work = work._replace(column_waits=waits)
            found[kernel] = found.get(kernel, NOTHING) + work
    return found


def _merges_finished(calls: Sequence[Mapping[str, Sequence[np.ndarray]]]) -> bool:
    """Whether the results of a pass need no carry: one launch has all rows, and other calls are merged into what it gave."""
    launches = [[x for parts in call.values() for x in parts if len(x)] for call in calls]
    return len(calls) > 1 and len(launches[0]) == 1 and not any(_share_rows(x) for x in launches[1:])


def _share_rows(launches: Sequence[np.ndarray]) -> bool:
    if not launches:
        return False
    tiles = np.concatenate(launches)
    return int(_covered_rows(tiles, np.zeros(len(tiles), np.int64)).sum()) < int((tiles[:, T_Q1] - tiles[:, T_Q0]).sum())


def count(launches: Sequence[np.ndarray], merged: bool | None = None, *, group: int = 1) -> Work:
    """Work of one call that makes these launches, each a table of clipped rectangles int64 [N, 9].

    merged: whether results of launches are merged in further kernels, or None where our own kernel writes all there is.
    group: heads that a program goes over which takes a column.
    """
    launches = [x for x in launches if len(x)]
    if not launches:
        return NOTHING
    tiles = np.concatenate(launches)
    of_launch = np.repeat(np.arange(len(launches)), [len(x) for x in launches])
    heads = tiles[:, T_H1] - tiles[:, T_H0]
    tile, _, blocks, whole = _rows_of_blocks(tiles)
    rows = float((_covered_rows(tiles, of_launch) * heads).sum())
    pairs, cut_pairs = ((x * heads[tile]).sum() * BLOCK**2 for x in (whole, blocks - whole))
    num_merges, num_rows = len(launches) * bool(merged), 0.0 if merged is False else rows
    vendor_rows = 0.0 if merged is None else rows
    steps, row_waits = _programs(tiles, of_launch, 1)
    columns, column_waits = _programs(_transposed(tiles), of_launch, group)
    sums = num_rows, steps, columns, float(pairs), float(cut_pairs), vendor_rows, row_waits, column_waits
    return Work(1, len(launches), num_merges, *sums)


def _rows_of_blocks(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of queries of all tiles: the tile, the first query, the key blocks seen, and those that are seen whole."""
    num_blocks = -(-(tiles[:, T_Q1] - tiles[:, T_Q0]) // BLOCK)
    tile = np.repeat(np.arange(len(tiles)), num_blocks)
    step = np.arange(len(tile)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    q0, q1, k0, k1, lo, hi = tiles[tile, : T_HI + 1].T
    first = q0 + step * BLOCK
    last = np.minimum(first + BLOCK, q1) - 1
    seen = np.minimum(k1, last + hi + 1) - np.maximum(k0, first + lo)
    by_all = np.minimum(k1, first + hi + 1) - np.maximum(k0, last + lo)
    blocks = -(-np.maximum(seen, 0) // BLOCK)
    return tile, first, blocks, np.where(last - first == BLOCK - 1, np.maximum(by_all, 0) // BLOCK, 0)


def _programs(tiles: np.ndarray, of_launch: np.ndarray, group: int) -> tuple[float, float]:
    """(most key blocks of a program, blocks of the busiest processor beyond the mean of all), each summed over launches.

    A program computes what a block of queries sees, over all tiles of its launch, for ``group`` heads; the longest begin first.
    Of P processors one has k programs that are no shorter than the one in place (k − 1)·P + 1, for every k.
    """
    tile, first, blocks, _ = _rows_of_blocks(tiles)
    heads, rows = int(tiles[:, T_H0].max(initial=0)) + 1, int(first.max(initial=0)) // BLOCK + 1
    places, index = np.unique((of_launch[tile] * heads + tiles[tile, T_H0]) * rows + first // BLOCK, return_inverse=True)
    length = np.bincount(index, weights=blocks) * group
    num = np.zeros(len(places))  # programs that are alike, one for each head or group of them
    np.maximum.at(num, index, np.maximum((tiles[:, T_H1] - tiles[:, T_H0])[tile] / group, 1))
    launch = places // (heads * rows)
    order = np.lexsort((-length, launch))
    launch, length, num = launch[order], length[order], num[order]
    stop = np.cumsum(num)
    stop -= np.append(0, stop)[np.searchsorted(launch, launch)]
    last_wave = np.ceil(stop / PROCESSORS)
    begins_one = (last_wave - 1) * PROCESSORS >= stop - num
    num_launches = int(of_launch.max()) + 1
    longest, busiest = np.zeros(num_launches), np.zeros(num_launches)
    np.maximum.at(longest, launch, length)
    np.maximum.at(busiest, launch, np.where(begins_one, last_wave * length, 0))
    mean = np.bincount(launch, weights=length * num, minlength=num_launches) / PROCESSORS
    return float(longest.sum()), float(np.maximum(busiest - mean, 0).sum())


def _transposed(tiles: np.ndarray) -> np.ndarray:
    """Keys for queries and queries for keys."""
    turned = tiles.copy()
    turned[:, : T_HI + 1] = tiles[:, [T_K0, T_K1, T_Q0, T_Q1, T_HI, T_LO]]
    turned[:, T_LO : T_HI + 1] *= -1
    return turned


def _covered_rows(tiles: np.ndarray, of_launch: np.ndarray) -> np.ndarray:
    """Rows that each tile adds to those of its launch's earlier ones (of any heads): int64 [N]."""
    order = np.lexsort((tiles[:, T_Q0], tiles[:, T_H0], of_launch))
    q0, q1 = tiles[order, T_Q0], tiles[order, T_Q1]
    # Launches and heads are set apart along one axis, so that one running maximum serves all.
    heads = int(tiles[:, T_H0].max(initial=0)) + 1
    _, apart = np.unique((of_launch * heads + tiles[:, T_H0])[order], return_inverse=True)
    offset = apart * (int(q1.max(initial=0)) + 1)
    ends = np.maximum.accumulate(q1 + offset)
    before = np.concatenate([[0], ends[:-1]])
    added = np.empty(len(tiles), np.int64)
    added[order] = np.maximum(q1 + offset - np.maximum(q0 + offset, before), 0)
    return added


def _flash(table: np.ndarray) -> dict[str, list[np.ndarray]]:
    return {"flash": _each(windows(table))}


def _cudnn(table: np.ndarray) -> dict[str, list[np.ndarray]]:
    """cuDNN's own pieces, and those that flash computes for it."""
    pieces = decompose(table, block=None)
    own = [torch_cuda.suits_cudnn(piece) for piece in pieces]
    return {
        "cudnn": _each([p for p, mine in zip(pieces, own) if mine]),
        "flash": _each([p for p, mine in zip(pieces, own) if not mine]),
    }


def _fa4(table: np.ndarray) -> dict[str, list[np.ndarray]]:
    return {"fa4": [_rectangles(chain) for chain in fa4.chains(table)]}


def _each(pieces: Sequence[Piece]) -> list[np.ndarray]:
    """One launch a piece."""
    return list(_rectangles(pieces)[:, None]) if pieces else []


def _rectangles(pieces: Sequence[Piece]) -> np.ndarray:
    return np.array(pieces, dtype=np.int64).reshape(-1, 1 + len(TILE_COLUMNS))[:, 1:]


_CUTS: Mapping[str, Callable[[np.ndarray], dict[str, list[np.ndarray]]]] = {
    "flash": _flash,
    "cudnn": _cudnn,
    "fa4": _fa4,
}
