"""Tiles cut into what vendor kernels can do: full rectangles, square causal triangles, and bands for the rest.

    one upper bound            two bounds (a sliding window), cut into query blocks
    █ █ █ ◣ · · ·              ◥ █ █ ◣ · · · ·      ◥  band with a lower bound
    █ █ █ █ ◣ · ·              · ◥ █ █ ◣ · · ·      █  full
    █ █ █ █ █ ◣ ·              · · ◥ █ █ ◣ · ·      ◣  square causal: key j is seen from query i when j ≤ i
    █ █ █ █ █ █ █              · · · ◥ █ █ ◣ ·

Every row of a piece sees at least one of its keys. Backends rely on that: they need not ask a kernel which rows were
empty, and kernels disagree in how they mark them (−inf, +inf, 0).
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from distattn.kernels.protocol import T_H0, T_H1, T_HI, T_K0, T_K1, T_LO, T_Q0, T_Q1, TILE_COLUMNS

UNBOUNDED = 1 << 40
"""A diagonal bound that excludes nothing, as in the bands of a mask."""


class Kind(IntEnum):
    FULL = 0
    CAUSAL = 1
    BAND = 2


class Piece(NamedTuple):
    """A tile of one kind. CAUSAL is square, with its diagonal from corner to corner; BAND is any other bounded tile."""

    kind: Kind
    q0: int
    q1: int
    k0: int
    k1: int
    lo: int
    hi: int
    h0: int
    h1: int
    shift: int


class HeadSpan(NamedTuple):
    """Query heads ``h0 ≤ h < h1`` that share the KV heads ``kv0 ≤ g < kv1`` evenly."""

    h0: int
    h1: int
    kv0: int
    kv1: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return (self.h1 - self.h0) // (self.kv1 - self.kv0)


def clip_tiles(tiles: np.ndarray) -> np.ndarray:
    """The same pairs in the smallest rectangles: empty tiles dropped, bounds that exclude nothing set to ±UNBOUNDED.

    tiles int64 [N, 9]; returns int64 [M, 9], M ≤ N, in the same order. Every row and every key of a clipped tile has a
    partner in it.
    """
    q0, q1, k0, k1, lo, hi = tiles[:, : T_HI + 1].T
    q0, q1 = np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo)
    k0, k1 = np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi)
    lo = np.where(k0 - (q1 - 1) >= lo, -UNBOUNDED, lo)
    hi = np.where((k1 - 1) - q0 <= hi, UNBOUNDED, hi)
    clipped = tiles.copy()
    clipped[:, : T_HI + 1] = np.stack((q0, q1, k0, k1, lo, hi), axis=1)
    inside = (q0 < q1) & (k0 < k1) & (tiles[:, T_LO] <= tiles[:, T_HI]) & (tiles[:, T_H0] < tiles[:, T_H1])
    return clipped[inside]


def decompose(tiles: np.ndarray, *, block: int | None) -> tuple[Piece, ...]:
    """Cut tiles into disjoint pieces that cover exactly the same pairs.

    tiles int64 [N, 9]. block: how many queries a BAND piece may have at most, or None to leave bands whole, as
    ``windows`` does. The result is remembered: layers and steps replay the same tables.
    """
    tiles = np.ascontiguousarray(tiles, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))
    return _decompose(tiles.tobytes(), block)


@lru_cache(maxsize=1024)
def _decompose(table: bytes, block: int | None) -> tuple[Piece, ...]:
    tiles = clip_tiles(np.frombuffer(table, dtype=np.int64).reshape(-1, len(TILE_COLUMNS)))
    tiles = _cut_tall(tiles) if block is None else _cut_bands(tiles, block)
    kind = _classify(tiles)
    corners = _split_upper_bound(tiles[kind == Kind.CAUSAL])
    pieces = np.concatenate((tiles[kind != Kind.CAUSAL], corners))
    return tuple(Piece(Kind(k), *row) for k, row in zip(_classify(pieces).tolist(), pieces.tolist()))


def windows(tiles: np.ndarray) -> tuple[Piece, ...]:
    """Tiles as the fewest rectangles for a kernel whose windows are aligned to the bottom right corner.

    Such a kernel sees key j from query i, both counted from the piece's corner, when
    ``−left ≤ j − i − (keys − queries) ≤ right``. In these pieces ``0 ≤ left, right < keys`` wherever the bound exists, and
    those with a lower bound alone have at most ``keys + 1`` queries.
    """
    tiles = np.ascontiguousarray(tiles, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))
    return _windows(tiles.tobytes())


@lru_cache(maxsize=1024)
def _windows(table: bytes) -> tuple[Piece, ...]:
    tiles = _cut_tall(clip_tiles(np.frombuffer(table, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))))
    bounded = (tiles[:, T_LO] > -UNBOUNDED) | (tiles[:, T_HI] < UNBOUNDED)
    return tuple(Piece(Kind.BAND if b else Kind.FULL, *row) for b, row in zip(bounded.tolist(), tiles.tolist()))


def _cut_tall(tiles: np.ndarray) -> np.ndarray:
    """Cut off the rows that a bound hides nothing from, in tiles with many more queries than keys.

    Above the rows that a lower bound reaches, and below those that an upper bound reaches, ``left`` and ``right`` would have
    to be larger than the keys are many; a kernel takes ``right ≥ keys`` for unbounded, and an unbounded right for ``keys``.
    """
    right = tiles[:, T_HI] - (tiles[:, T_K1] - tiles[:, T_Q1])
    tall = (tiles[:, T_HI] < UNBOUNDED) & (right >= tiles[:, T_K1] - tiles[:, T_K0])
    tiles = _cut_rows(tiles, tall, tiles[:, T_K1] - 1 - tiles[:, T_HI])
    tall = tiles[:, T_Q1] - tiles[:, T_Q0] > tiles[:, T_K1] - tiles[:, T_K0] + 1
    tall &= (tiles[:, T_LO] > -UNBOUNDED) & (tiles[:, T_HI] >= UNBOUNDED)
    return _cut_rows(tiles, tall, tiles[:, T_K0] - tiles[:, T_LO] + 1)


def _cut_rows(tiles: np.ndarray, which: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Cut the tiles ``which`` (bool) above ``row`` (one of each tile), and clip the halves."""
    halves = (_with(tiles[which], q1=row[which]), _with(tiles[which], q0=row[which]))
    return np.concatenate((tiles[~which], clip_tiles(np.concatenate(halves))))


def _classify(tiles: np.ndarray) -> np.ndarray:
    """FULL without bounds, CAUSAL with an upper bound alone, else BAND. The tiles are clipped."""
    lower, upper = tiles[:, T_LO] > -UNBOUNDED, tiles[:, T_HI] < UNBOUNDED
    return np.where(lower, Kind.BAND, np.where(upper, Kind.CAUSAL, Kind.FULL))


def _with(tiles: np.ndarray, **columns: np.ndarray | int) -> np.ndarray:
    changed = tiles.copy()
    for name, value in columns.items():
        changed[:, TILE_COLUMNS.index(name)] = value
    return changed


def _split_upper_bound(tiles: np.ndarray) -> np.ndarray:
    """Clipped tiles with an upper bound alone: the square on the diagonal, the keys left of it, the rows below it."""
    q0, k0, k1, hi = tiles[:, T_Q0], tiles[:, T_K0], tiles[:, T_K1], tiles[:, T_HI]
    corner = q0 + hi  # the last key that row q0 sees
    below = q0 + (k1 - corner)  # the first row that has the whole square above it
    square = _with(tiles, k0=corner, q1=below)
    left = _with(tiles, q1=below, k1=corner, hi=UNBOUNDED)
    under = _with(tiles, q0=below, hi=UNBOUNDED)
    assert (corner >= k0).all()
    return clip_tiles(np.concatenate((square, left, under)))


def _cut_bands(tiles: np.ndarray, block: int) -> np.ndarray:
    """Cut tiles that have a lower bound into blocks of queries, and the keys that a whole block sees out of each."""
    band = tiles[:, T_LO] > -UNBOUNDED
    rest, tiles = tiles[~band], tiles[band]
    blocks = -(-(tiles[:, T_Q1] - tiles[:, T_Q0]) // block)
    source = np.repeat(np.arange(len(tiles)), blocks)
    step = np.arange(len(source)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    start = tiles[source, T_Q0] + step * block
    tiles = _with(tiles[source], q0=start, q1=np.minimum(start + block, tiles[source, T_Q1]))
    tiles = clip_tiles(tiles)
    common0 = np.maximum(tiles[:, T_K0], tiles[:, T_Q1] - 1 + tiles[:, T_LO])
    common1 = np.minimum(tiles[:, T_K1], tiles[:, T_Q0] + tiles[:, T_HI] + 1)
    # A part in the middle costs two more merges, so it must be worth at least a block of keys.
    worth = (tiles[:, T_LO] > -UNBOUNDED) & (common1 - common0 >= block)
    wide, common0, common1 = tiles[worth], common0[worth], common1[worth]
    parts = (
        _with(wide, k1=common0, hi=UNBOUNDED),
        _with(wide, k0=common0, k1=common1, lo=-UNBOUNDED, hi=UNBOUNDED),
        _with(wide, k0=common1, lo=-UNBOUNDED),
    )
    return np.concatenate((rest, tiles[~worth], clip_tiles(np.concatenate(parts))))


@lru_cache(maxsize=1024)
def head_spans(h0: int, h1: int, shift: int, group: int) -> tuple[HeadSpan, ...]:
    """Query heads [h0, h1) in at most three spans, each of which shares its KV heads evenly.

    Head h uses KV head ``(h + shift) // group``. A range that begins or ends inside a group gives that group's part
    a span of its own.
    """
    first_whole = min(h1, h0 + -(h0 + shift) % group)
    last_whole = max(first_whole, h1 - (h1 + shift) % group)
    cuts = ((h0, first_whole), (first_whole, last_whole), (last_whole, h1))
    return tuple(HeadSpan(a, b, (a + shift) // group, (b - 1 + shift) // group + 1) for a, b in cuts if a < b)
