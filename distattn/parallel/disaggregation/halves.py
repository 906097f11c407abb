"""A stream in two halves with as many tokens, each on all ranks: which rows are in which, what the second sees of the first.

    documents go whole to one half or the other        where that leaves both with nearly the same tokens
    else one document is cut                           its rows in the first half come again in the second, for their keys

So one giant document can be cut as well as thousands of short ones, and only of the giant does anything travel twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distattn import bands as band_algebra
from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.layout import Layout

WHOLE_DOCUMENTS = 1 / 32
"""By how much of all tokens halves of whole documents may miss an even share, before one document is cut instead."""

_MAX_SEGMENTS = 4096


@dataclass(frozen=True, eq=False)
class Arrangement:
    """A stream with its documents in an order in which it can be cut at row ``cut``: its mask, and the row of the stream of
    each of its rows, int64 [n] (None: as it was)."""

    mask: Mask
    cut: int
    order: np.ndarray | None


def arrange(mask: Mask) -> Arrangement | None:
    """Where and how to cut a square mask in two halves; None where rows look ahead and there is no row that no pair crosses."""
    n = mask.num_queries
    half = (n + 1) // 2
    edges = mask.segments()
    if half in edges:
        return Arrangement(mask, half, None)
    if len(edges) == 2:
        return None if _looks_ahead(mask, half) else Arrangement(mask, half, None)
    edges = np.unique(np.append(edges[:: -(-len(edges) // _MAX_SEGMENTS)], n))
    sizes = np.diff(edges)
    in_first, (first, second) = _deal(sizes)
    if max(first, second) - half > n * WHOLE_DOCUMENTS:
        # Mostly since one document is more than half: the others come first, so that little of it is handed on.
        in_first = np.arange(len(sizes)) != sizes.argmax()
        first = half
    chosen = np.argsort(~in_first, kind="stable")
    if np.array_equal(chosen, np.arange(len(chosen))):
        arranged, order = mask, None
    else:
        arranged = _reordered(mask, edges, chosen)
        bounds = edges.tolist()
        order = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in chosen.tolist()])
    if _looks_ahead(arranged, first):
        first = int(sizes[in_first].sum())
    return Arrangement(arranged, first, order)


def _deal(sizes: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Longest first, each to the part that has less: whether each is in the first part, bool [n], and both parts' tokens."""
    in_first, tokens = np.zeros(len(sizes), bool), [0, 0]
    for i in np.argsort(-sizes, kind="stable").tolist():
        part = int(tokens[1] < tokens[0])
        in_first[i] = part == 0
        tokens[part] += int(sizes[i])
    return in_first, (tokens[0], tokens[1])


def _reordered(mask: Mask, edges: np.ndarray, chosen: np.ndarray) -> Mask:
    """The mask of the stream whose segments, which no pair leaves, come in the order ``chosen``."""
    sizes = np.diff(edges)[chosen]
    shift = np.zeros(len(chosen), np.int64)
    shift[chosen] = np.cumsum(sizes) - sizes - edges[chosen]
    pieces, _, segment = band_algebra.cut_axis(mask.bands, edges[1:-1], 0)
    pieces[:, 2] = np.maximum(pieces[:, 2], edges[segment])
    pieces[:, 3] = np.minimum(pieces[:, 3], edges[segment + 1])
    pieces[:, :4] += shift[segment][:, None]
    return Mask.from_bands(pieces[pieces[:, 2] < pieces[:, 3]], mask.num_queries, mask.num_keys)


def check_cut(mask: Mask, at: int) -> int:
    if not 0 < at < mask.num_queries:
        raise PlanError(f"at={at} must leave rows on both sides: choose it from 1 to {mask.num_queries - 1}")
    if _looks_ahead(mask, at):
        raise PlanError(f"at={at} is no place to cut: rows before it see rows behind it; give another row, or None")
    return at


def _looks_ahead(mask: Mask, at: int) -> bool:
    return mask.cut(0, at, at, mask.num_keys).area > 0


def _window(mask: Mask, first: int, stop: int, key: int) -> Mask:
    """The pairs of rows [first, stop) with keys from ``key`` on, as a square mask whose row 0 is row ``key``."""
    size = stop - key
    bands = mask.cut(first, stop, key, stop).shift(-key, -key).bands
    return Mask.from_bands(bands, size, size)


@dataclass(frozen=True, eq=False)
class SecondHalf:
    """The second half's mask and layout, over the rows of the first that it sees and then its own.

    seen: row of the arranged stream at which the mask begins. own_rows: int64 [P], of each rank; joined: int64 [P], rows that
    are put together for attention, 0 on ranks to which nothing is handed on.
    """

    mask: Mask
    layout: Layout
    seen: int
    own_rows: np.ndarray = field(repr=False)
    joined: np.ndarray = field(repr=False)


def first_mask(found: Arrangement) -> Mask:
    """Of the first half, from its row 0."""
    return _window(found.mask, 0, found.cut, 0)


def own_mask(found: Arrangement) -> Mask:
    """Of the second half's own rows and keys alone: what its layout has to balance."""
    return _window(found.mask, found.cut, found.mask.num_queries, found.cut)


def second_half(found: Arrangement, first: Layout, own: Layout) -> SecondHalf:
    """first: layout of the first half; own: of the second half's own rows."""
    cut, n = found.cut, found.mask.num_queries
    later = found.mask.cut(cut, n, 0, n)
    seen = min(cut, int(later.bands[:, 2].min(initial=cut)))
    layout = _with_carried(first, own, seen, cut)
    joined = np.where(layout.counts > own.counts, layout.counts, 0)
    return SecondHalf(_window(later, seen, n, seen), layout, seen, own.counts, joined)


def _with_carried(first: Layout, own: Layout, seen: int, cut: int) -> Layout:
    """Rows [seen, n) of the stream, counted from ``seen``: on each rank what it holds of the first half, then its own."""
    ranges = []
    for rank in range(first.num_ranks):
        kept = np.maximum(first.rank_ranges(rank), seen) - seen
        ranges.append([*kept.tolist(), *(own.rank_ranges(rank) + (cut - seen)).tolist()])
    return Layout.given(ranges, name=f"{own.name}, second half")
