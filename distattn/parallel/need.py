"""Which rows of which rank each rank's queries see: one cut of the mask by the layouts, then grouped look-ups."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distattn import bands as band_algebra
from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.csr import expand, pointers, segment_starts
from distattn.parallel.layout import Layout


@dataclass(frozen=True, eq=False)
class Need:
    """Needed key rows of every (consumer rank, range of the keys' layout), sorted by (key range, consumer, first row).

    consumer, key_range, k0, k1: int64 [N]: rank ``consumer`` needs rows [k0, k1) of range ``key_range``; disjoint, exact.
    area: int64 [P, P]: allowed pairs of (consumer's queries, owner's keys). layout: of the queries; keys: of the keys.
    """

    layout: Layout
    keys: Layout
    consumer: np.ndarray = field(repr=False)
    key_range: np.ndarray = field(repr=False)
    k0: np.ndarray = field(repr=False)
    k1: np.ndarray = field(repr=False)
    area: np.ndarray = field(repr=False)

    @property
    def owner(self) -> np.ndarray:
        """Rank that holds each needed range, int64 [N]."""
        return self.keys.range_owner[self.key_range]


def analyse(mask: Mask, layout: Layout, key_layout: Layout | None = None) -> Need:
    """Cut the mask at the borders of the layouts' ranges; unite what remains by (consumer, key range)."""
    keys = key_layout or layout
    check_rows(mask, layout, key_layout)
    num_ranks = layout.num_ranks
    if not len(layout.ranges) or not len(keys.ranges) or not len(mask.bands):
        empty = np.zeros(0, np.int64)
        return Need(layout, keys, empty, empty, empty, empty, np.zeros((num_ranks, num_ranks), np.int64))
    query_starts, query_owner, _ = _by_start(layout)
    key_starts, key_owner, key_order = _by_start(keys)
    pieces = band_algebra.tighten(band_algebra.cut_axis(mask.bands, query_starts[1:], 0)[0])
    spans = np.searchsorted(key_starts, pieces[:, 3], "left") - np.searchsorted(key_starts, pieces[:, 2], "right") + 1
    if spans.sum() > band_algebra.MAX_PIECES:
        raise PlanError(
            f"this mask falls into {int(spans.sum())} pieces over a layout of {len(layout.ranges)} ranges; use a layout with "
            "fewer ranges a rank (contiguous or zigzag)"
        )
    pieces = band_algebra.tighten(band_algebra.cut_axis(pieces, key_starts[1:], 2)[0])
    consumer = query_owner[np.searchsorted(query_starts, pieces[:, 0], "right") - 1]
    key_range = np.searchsorted(key_starts, pieces[:, 2], "right") - 1
    area = np.zeros(num_ranks * num_ranks, np.int64)
    np.add.at(area, consumer * num_ranks + key_owner[key_range], band_algebra.area(pieces))
    group, k0, k1 = _united(key_order[key_range] * num_ranks + consumer, pieces[:, 2], pieces[:, 3], mask.num_keys)
    return Need(layout, keys, group % num_ranks, group // num_ranks, k0, k1, area.reshape(num_ranks, num_ranks))


@dataclass(frozen=True, eq=False)
class RowParts:
    """Row sets cut by owner, sorted by (row set, owner): part i is rows ``ranges[ptr[i]:ptr[i + 1]]`` of set ``row_set[i]``."""

    row_set: np.ndarray
    owner: np.ndarray
    ptr: np.ndarray
    ranges: np.ndarray


def _by_start(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first row, owner, index) of the layout's ranges in the order of their rows."""
    order = np.argsort(layout.ranges[:, 0], kind="stable")
    return layout.ranges[order, 0], layout.range_owner[order], order


def _united(group: np.ndarray, first: np.ndarray, last: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Union of intervals [first, last) within each group: (group, first, last) of what remains, sorted."""
    stride = limit + 1
    start, stop = group * stride + first, group * stride + last
    order = np.argsort(start, kind="stable")
    start, stop = start[order], np.maximum.accumulate(stop[order])
    fresh = np.ones(len(start), bool)
    # Groups are a stride apart, so an interval never reaches into the next group; ones that touch are joined.
    fresh[1:] = (start[1:] > stop[:-1]) | (start[1:] // stride != start[:-1] // stride)
    begin = np.flatnonzero(fresh)
    end = np.append(begin[1:], len(start))[: len(begin)] - 1
    group = start[begin] // stride
    return group, start[begin] - group * stride, stop[end] - group * stride


def rows_in(layout: Layout, intervals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each rank's rows that lie in any of the intervals, as row sets in ascending order: (ptr [P + 1], ranges [n, 2]).

    intervals: int64 [m, 2], in any order, may overlap.
    """
    _, first, last = _united(np.zeros(len(intervals), np.int64), intervals[:, 0], intervals[:, 1], layout.num_rows)
    parts = split_by_owner(layout, np.array([0, len(first)]), np.stack([first, last], 1))
    return pointers(np.repeat(parts.owner, np.diff(parts.ptr)), layout.num_ranks), parts.ranges


def split_by_owner(layout: Layout, ptr: np.ndarray, ranges: np.ndarray) -> RowParts:
    """Cut row sets by the rank that owns the rows.

    ptr, ranges: row sets in CSR form. Each part keeps the set's order.
    """
    starts, owners, order = _by_start(layout)
    ends = layout.ranges[order, 1]
    row_set = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    low = np.searchsorted(starts, ranges[:, 0], "right") - 1
    high = np.searchsorted(starts, ranges[:, 1], "left")
    piece, at = expand(low, high - low)
    pieces = np.stack([np.maximum(ranges[piece, 0], starts[at]), np.minimum(ranges[piece, 1], ends[at])], 1)
    row_set, owner = row_set[piece], owners[at]
    by = np.lexsort((owner, row_set))
    row_set, owner, pieces = row_set[by], owner[by], pieces[by]
    first = segment_starts(row_set, owner)
    return RowParts(row_set[first], owner[first], np.append(first, len(pieces)), pieces)


def check_rows(mask: Mask, layout: Layout, key_layout: Layout | None = None) -> None:
    """Queries and keys of a plan are the layouts' rows, over the same ranks."""
    keys = key_layout or layout
    if mask.num_queries != layout.num_rows or mask.num_keys != keys.num_rows:
        held = f"the layout holds {layout.num_rows} rows; all three must be equal"
        if key_layout is not None:
            held = f"the layouts hold {layout.num_rows} and {keys.num_rows} rows; they must be equal"
        raise PlanError(f"the mask is over {mask.num_queries} queries and {mask.num_keys} keys, but {held}")
    if keys.num_ranks != layout.num_ranks:
        raise PlanError(
            f"the layout is for {layout.num_ranks} ranks and the keys' layout for {keys.num_ranks}; both must agree"
        )
