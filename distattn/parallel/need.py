"""Which rows of which rank each rank's queries see: one cut of the mask by the layout, then grouped look-ups."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distattn import bands as band_algebra
from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.layout import Layout


@dataclass(frozen=True, eq=False)
class Need:
    """Needed key rows of every (consumer rank, layout range), as hulls, sorted by (range, distance, …).

    consumer, key_range, k0, k1: int64 [N]: rank ``consumer`` needs rows [k0, k1) of layout range ``key_range``.
    area: int64 [P, P]: allowed pairs of (consumer's queries, owner's keys).
    """

    layout: Layout
    consumer: np.ndarray = field(repr=False)
    key_range: np.ndarray = field(repr=False)
    k0: np.ndarray = field(repr=False)
    k1: np.ndarray = field(repr=False)
    area: np.ndarray = field(repr=False)

    @property
    def owner(self) -> np.ndarray:
        """Rank that holds each needed range, int64 [N]."""
        return self.layout.range_owner[self.key_range]


def analyse(mask: Mask, layout: Layout) -> Need:
    """Cut the mask at the layout's range borders; group what remains by (consumer, key range)."""
    check_rows(mask, layout)
    order = np.argsort(layout.ranges[:, 0], kind="stable")
    starts = layout.ranges[order, 0]
    num_ranks, num_ranges = layout.num_ranks, len(starts)
    if not num_ranges or not len(mask.bands):
        empty = np.zeros(0, np.int64)
        return Need(layout, empty, empty, empty, empty, np.zeros((num_ranks, num_ranks), np.int64))
    pieces, _, _ = band_algebra.cut_axis(mask.bands, starts[1:], 0)
    pieces = band_algebra.tighten(pieces)
    spans = np.searchsorted(starts, pieces[:, 3], "left") - np.searchsorted(starts, pieces[:, 2], "right") + 1
    if spans.sum() > band_algebra.MAX_PIECES:
        raise PlanError(
            f"this mask falls into {int(spans.sum())} pieces over a layout of {num_ranges} ranges; use a layout with fewer "
            "ranges a rank (contiguous or zigzag)"
        )
    pieces, _, _ = band_algebra.cut_axis(pieces, starts[1:], 2)
    pieces = band_algebra.tighten(pieces)
    areas = band_algebra.area(pieces)
    pieces, areas = pieces[areas > 0], areas[areas > 0]
    query_range = order[np.searchsorted(starts, pieces[:, 0], "right") - 1]
    key_range = order[np.searchsorted(starts, pieces[:, 2], "right") - 1]
    consumer, owner = layout.range_owner[query_range], layout.range_owner[key_range]
    area = np.zeros(num_ranks * num_ranks, np.int64)
    np.add.at(area, consumer * num_ranks + owner, areas)
    by = np.lexsort((consumer, key_range))
    consumer, key_range, pieces = consumer[by], key_range[by], pieces[by]
    first = np.flatnonzero(
        np.concatenate([[True], (consumer[1:] != consumer[:-1]) | (key_range[1:] != key_range[:-1])])[: len(by)]
    )
    return Need(
        layout,
        consumer[first],
        key_range[first],
        np.minimum.reduceat(pieces[:, 2], first) if len(first) else pieces[:0, 2],
        np.maximum.reduceat(pieces[:, 3], first) if len(first) else pieces[:0, 3],
        area.reshape(num_ranks, num_ranks),
    )


def check_rows(mask: Mask, layout: Layout) -> None:
    """Queries and keys of a plan are the layout's rows."""
    if mask.num_queries != layout.num_rows or mask.num_keys != layout.num_rows:
        raise PlanError(
            f"the mask is over {mask.num_queries} queries and {mask.num_keys} keys, but the layout holds {layout.num_rows} "
            "rows; all three must be equal"
        )


def area_per_rank(mask: Mask, layout: Layout) -> np.ndarray:
    """Allowed pairs of each rank's queries, int64 [P]: the balance of a layout, from one cut along the queries."""
    check_rows(mask, layout)
    out = np.zeros(layout.num_ranks, np.int64)
    order = np.argsort(layout.ranges[:, 0], kind="stable")
    starts = layout.ranges[order, 0]
    if len(starts) and len(mask.bands):
        pieces, _, _ = band_algebra.cut_axis(mask.bands, starts[1:], 0)
        owner = layout.range_owner[order[np.searchsorted(starts, pieces[:, 0], "right") - 1]]
        np.add.at(out, owner, band_algebra.area(pieces))
    return out
