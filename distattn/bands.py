"""Algebra of banded rectangles: what every mask, box and tile of a schedule is made of.

A row ``q0, q1, k0, k1, lo, hi`` of an int64 [R, 6] array stands for the pairs (query i, key j) with ``q0 <= i < q1``,
``k0 <= j < k1`` and ``lo <= j - i <= hi``. A set of pairs is a union of disjoint rows. Everything here is array algebra
over whole tables, so a million tokens in ten thousand documents take milliseconds, and no S×S array ever exists.

Positions lie in 0 … ``MAX_LENGTH``, which keeps every area below 2^62.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from distattn.errors import MaskError

UNBOUNDED = 1 << 40
"""A band edge that binds nowhere: ``-UNBOUNDED`` as ``lo``, ``UNBOUNDED`` as ``hi``."""

MAX_LENGTH = 1 << 30
"""Longest axis, in tokens."""

MAX_PIECES = 1 << 22
"""Most pieces that one operation may make (200 MB); the worst unions and cuts grow with the square of their inputs."""

_COALESCE_ROUNDS = 8

_STRIDE = 1 << 31  # (strip, position) pairs become one sortable integer, strip * _STRIDE + position


def area(bands: np.ndarray) -> np.ndarray:
    """Number of pairs in each row, int64 [R], in closed form; rows without pairs give 0.

    Pairs with ``j - i <= h`` are counted by query: the row at distance x from the first one that sees a key sees
    clamp(x, 0, num_keys) keys, and a sum of clamps is a triangle plus a rectangle.
    """
    q0, q1, k0, k1, lo, hi = bands.T
    num_keys = np.maximum(k1 - k0, 0)
    num_queries = np.maximum(q1 - q0, 0)

    def sum_of_clamps(x: np.ndarray) -> np.ndarray:
        x = np.maximum(x, 0)
        ramp = np.minimum(x, num_keys + 1)
        return ramp * (ramp - 1) // 2 + (x - ramp) * num_keys

    def pairs_up_to(h: np.ndarray) -> np.ndarray:
        first = q0 + np.clip(h, k0 - q1, k1 - q0) + 1 - k0  # keys that the first query sees, before clamping
        return sum_of_clamps(first + num_queries) - sum_of_clamps(first)

    some = (num_keys > 0) & (num_queries > 0) & (lo <= hi)
    return np.where(some, pairs_up_to(hi) - pairs_up_to(lo - 1), 0)


def tighten(bands: np.ndarray) -> np.ndarray:
    """Shrink every box to the queries and keys that its band reaches, and drop empty rows. The pairs stay the same."""
    q0, q1, k0, k1, lo, hi = bands.T
    tight = np.stack(
        [np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo), np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi), lo, hi], 1
    )
    return tight[(tight[:, 0] < tight[:, 1]) & (tight[:, 2] < tight[:, 3]) & (lo <= hi)]


def open_edges(bands: np.ndarray) -> np.ndarray:
    """Replace band edges that bind nowhere in their box by ``∓UNBOUNDED``. The pairs stay the same."""
    opened = bands.copy()
    q0, q1, k0, k1, lo, hi = bands.T
    opened[:, 4] = np.where(lo <= k0 - (q1 - 1), -UNBOUNDED, lo)
    opened[:, 5] = np.where(hi >= (k1 - 1) - q0, UNBOUNDED, hi)
    return opened


def transpose(bands: np.ndarray) -> np.ndarray:
    """Swap queries and keys: (i, j) is in a row exactly if (j, i) is in the transposed row."""
    turned = bands[:, [2, 3, 0, 1, 5, 4]]
    turned[:, 4:] *= -1
    return turned


def clip(bands: np.ndarray, q0: int, q1: int, k0: int, k1: int) -> np.ndarray:
    """Keep the pairs inside a box, same coordinates; rows that lose everything become empty and stay."""
    clipped = bands.copy()
    clipped[:, :2] = clipped[:, :2].clip(q0, q1)
    clipped[:, 2:4] = clipped[:, 2:4].clip(k0, k1)
    return clipped


def cut_axis(bands: np.ndarray, breaks: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut every row at positions of one axis.

    bands: any int64 [R, 6+] table, of which only columns ``axis`` and ``axis + 1`` are changed; breaks: sorted distinct
    int64 [B]; axis: 0 cuts queries, 2 cuts keys. Returns (pieces [N, 6+], source row of each [N], strip of each [N])
    in the order of the source rows; strip s lies between breaks[s-1] and breaks[s], strips 0 and B are open outwards.
    Pieces may have no pairs (the band may miss them). Raises MaskError above ``MAX_PIECES``.
    """
    first, count = _strips_spanned(bands, breaks, axis)
    source, offset = _expand(count)
    pieces = bands[source]
    strip = first[source] + offset
    edges = np.concatenate([[-UNBOUNDED], breaks, [UNBOUNDED]])
    pieces[:, axis] = np.maximum(pieces[:, axis], edges[strip])
    pieces[:, axis + 1] = np.minimum(pieces[:, axis + 1], edges[strip + 1])
    return pieces, source, strip


def match_keys(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with ``a[i] == b[j]``, sorted by i; a, b: int64 [N], [M]. Raises MaskError above ``MAX_PIECES``."""
    order = np.argsort(b, kind="stable")
    ordered = b[order]
    first = np.searchsorted(ordered, a, "left")
    i, offset = _expand(np.searchsorted(ordered, a, "right") - first)
    return i, order[first[i] + offset]


def intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pairs that are in both; each of ``a`` and ``b`` disjoint in itself. The result is disjoint."""
    pieces, _, _ = intersect_rows(a, b)
    return coalesce(pieces)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pairs of ``a`` that are not in ``b``; each disjoint in itself. The result is disjoint."""
    return coalesce(_subtract(a, b))


def union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pairs that are in either; each disjoint in itself. The result is disjoint."""
    return coalesce(np.concatenate([a, _subtract(b, a)]))


def first_overlap(bands: np.ndarray) -> tuple[int, int] | None:
    """Two rows that share a pair, as (i, j) with i < j, or None where the table is disjoint."""
    _, i, j = intersect_rows(bands, bands)
    both = np.flatnonzero(i < j)
    return (int(i[both[0]]), int(j[both[0]])) if len(both) else None


def coalesce(bands: np.ndarray) -> np.ndarray:
    """Merge neighbours of a disjoint table where the result is again one banded rectangle; greedy, never more rows.

    Rows are sorted so that partners lie side by side: along a strip of queries, along a band, along a column of keys.
    A run of rows is merged if its hull has the summed area, which proves the hull to be their union. There is no
    canonical form.
    """
    bands = bands[area(bands) > 0]
    for _ in range(_COALESCE_ROUNDS):
        before = len(bands)
        for columns in ((2, 0), (0, 4, 5), (0, 2)):  # least significant first, as np.lexsort wants them
            if len(bands) > 1:
                keyed = open_edges(bands)
                bands = _merge_runs(bands[np.lexsort([keyed[:, c] for c in columns])])
        if len(bands) >= before - before // 32:  # another round would hardly pay
            break
    return open_edges(tighten(bands))


def _merge_runs(bands: np.ndarray) -> np.ndarray:
    """Merge runs of consecutive rows into their hulls: whole runs where that is exact, else pairs of them."""
    size = area(bands)
    q0, q1, k0, k1, lo, hi = bands.T
    # Edges as the pairs reach them: then the hull of rows contains them, and an equal area makes it equal.
    reach = np.stack([q0, q1, k0, k1, np.maximum(lo, k0 - (q1 - 1)), np.minimum(hi, (k1 - 1) - q0)], 1)
    low, high = np.minimum(reach[:-1], reach[1:]), np.maximum(reach[:-1], reach[1:])
    fits = area(_hull(low, high)) == size[:-1] + size[1:]
    if not fits.any():
        return bands
    starts = np.flatnonzero(np.concatenate([[True], ~fits]))
    length = np.diff(starts, append=len(bands))
    exact = area(_run_hulls(reach, starts)) == np.add.reduceat(size, starts)
    # A run that is not one rectangle as a whole falls apart into pairs, each of which fits.
    run, offset = _expand(np.where(exact, 1, (length + 1) // 2))
    return _run_hulls(reach, starts[run] + 2 * offset)


def _run_hulls(reach: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Hull of each run of rows; a run ends where the next one starts."""
    return _hull(np.minimum.reduceat(reach, starts), np.maximum.reduceat(reach, starts))


def _hull(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Rows whose lower edges come from ``low`` and upper ones from ``high`` (swapped, this is the intersection)."""
    return np.stack([low[:, 0], high[:, 1], low[:, 2], high[:, 3], low[:, 4], high[:, 5]], 1)


def _strips_spanned(bands: np.ndarray, breaks: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """First strip of each row and the number of strips it spans (0 where it is empty along the axis)."""
    first = np.searchsorted(breaks, bands[:, axis], "right")
    count = np.searchsorted(breaks, bands[:, axis + 1], "left") - first + 1
    return first, np.where(bands[:, axis] < bands[:, axis + 1], count, 0)


def _expand(count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each element of ragged rows: (row, offset within it), for ``count`` elements a row."""
    count = np.maximum(count, 0)
    total = int(count.sum())
    _check_count(total)
    row = np.repeat(np.arange(len(count)), count)
    return row, np.arange(total) - np.repeat(np.cumsum(count) - count, count)


def _check_count(num_pieces: int) -> None:
    if num_pieces > MAX_PIECES:
        raise MaskError(
            f"this mask operation makes {num_pieces} pieces and at most {MAX_PIECES} are allowed: a pattern so fine is"
            " not a union of a few banded rectangles; coarsen it, or split the sequence"
        )


class _Strips(NamedTuple):
    """Pieces of a table cut at common breaks: two pieces of one strip have the same query range."""

    pieces: np.ndarray
    source: np.ndarray
    strip: np.ndarray


def _common_strips(a: np.ndarray, b: np.ndarray) -> tuple[_Strips, _Strips, bool]:
    """Cut both tables at all query edges of either, or turn both and do so where key edges make fewer pieces.

    Returns (a's pieces, b's pieces, whether both are transposed). Rows without pairs are left out: their edges may be
    in any order, and what follows relies on it.
    """
    kept_a, kept_b = np.flatnonzero(area(a)), np.flatnonzero(area(b))
    a, b = a[kept_a], b[kept_b]

    def breaks_and_count(axis: int) -> tuple[np.ndarray, int]:
        breaks = np.unique(np.concatenate([a[:, axis : axis + 2].ravel(), b[:, axis : axis + 2].ravel()]))
        return breaks, sum(int(_strips_spanned(bands, breaks, axis)[1].sum()) for bands in (a, b))

    breaks, num_pieces = breaks_and_count(0)
    turned = False
    if num_pieces > 4 * (len(a) + len(b)):  # counting the other way is worth its time only where this way is bad
        key_breaks, num_turned = breaks_and_count(2)
        turned = num_turned < num_pieces
        if turned:
            a, b, breaks = transpose(a), transpose(b), key_breaks
    pieces_a, source_a, strip_a = cut_axis(a, breaks, 0)
    pieces_b, source_b, strip_b = cut_axis(b, breaks, 0)
    return _Strips(pieces_a, kept_a[source_a], strip_a), _Strips(pieces_b, kept_b[source_b], strip_b), turned


_LookUp = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _index_by_first_key(b: _Strips) -> tuple[np.ndarray, np.ndarray, _LookUp, _LookUp]:
    """Sort pieces by (strip, first key); returns (sorted pieces, that order, and two look-ups of places in it).

    skip_past(strip, k): the first piece such that all earlier ones of the strip end at or left of key k;
    starts_before(strip, k): one past the last piece of the strip that starts left of key k.
    """
    start = b.strip * _STRIDE + b.pieces[:, 2]
    order = np.argsort(start, kind="stable")
    start = start[order]
    furthest_end = np.maximum.accumulate(b.strip[order] * _STRIDE + b.pieces[order, 3])

    def skip_past(strip: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.searchsorted(furthest_end, strip * _STRIDE + key, "right")

    def starts_before(strip: np.ndarray, key: np.ndarray) -> np.ndarray:
        return np.searchsorted(start, strip * _STRIDE + key, "left")

    return b.pieces[order], order, skip_past, starts_before


def intersect_rows(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Non-empty intersections of rows of ``a`` with rows of ``b``: (pieces [N, 6], row of a [N], row of b [N])."""
    strips_a, strips_b, turned = _common_strips(a, b)
    pieces_b, order, skip_past, starts_before = _index_by_first_key(strips_b)
    first = skip_past(strips_a.strip, strips_a.pieces[:, 2])
    i, offset = _expand(starts_before(strips_a.strip, strips_a.pieces[:, 3]) - first)
    j = first[i] + offset
    x, y = strips_a.pieces[i], pieces_b[j]
    both = _hull(np.maximum(x, y), np.minimum(x, y))
    some = area(both) > 0
    both = both[some]
    return transpose(both) if turned else both, strips_a.source[i[some]], strips_b.source[order[j[some]]]


def _subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``difference`` in pieces as they fall, some of them empty.

    Within a strip of queries, pieces of ``b`` are taken off in the order of their first key. What lies left of the one
    in turn is finished, so a piece of ``a`` is carried only as far as pieces of ``b`` overlap it.
    """
    strips_a, strips_b, turned = _common_strips(a, b)
    a, strip_a = strips_a.pieces, strips_a.strip
    b, _, skip_past, starts_before = _index_by_first_key(strips_b)
    done, num_done = [np.zeros((0, 6), np.int64)], 0
    turn = skip_past(strip_a, a[:, 2])
    while len(a):
        active = turn < starts_before(strip_a, a[:, 3])
        done.append(a[~active])
        x, y, strip, turn = a[active], b[turn[active]], strip_a[active], turn[active]
        (q0, q1, k0, k1, lo, hi), (_, _, y_k0, y_k1, y_lo, y_hi) = x.T, y.T
        left, right = np.maximum(k0, y_k0), np.maximum(np.minimum(k1, y_k1), k0)
        done.append(np.stack([q0, q1, k0, left, lo, hi], 1))  # no later piece of b starts left of this one
        a = np.concatenate(
            [
                np.stack([q0, q1, right, k1, lo, hi], 1),
                np.stack([q0, q1, left, right, lo, np.minimum(hi, y_lo - 1)], 1),
                np.stack([q0, q1, left, right, np.maximum(lo, y_hi + 1), hi], 1),
            ]
        )
        some = area(a) > 0
        a, strip_a, turn = a[some], np.tile(strip, 3)[some], np.tile(turn + 1, 3)[some]
        turn = np.maximum(turn, skip_past(strip_a, a[:, 2]))
        num_done += len(x) + int((~active).sum())
        _check_count(num_done + len(a))
    rest = np.concatenate(done)
    return transpose(rest) if turned else rest
