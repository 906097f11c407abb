"""Core-attention tasks: boxes of query rows × key rows × KV heads, clipped by the mask, and the work in them.

A task is one unit of placement: ``server`` computes the pairs of its bands for KV heads ``g0 ≤ g < g1`` (each with its group of
query heads). Every rank starts with the tasks of its own rows, over all the keys that they see and all heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from distattn import bands as band_algebra
from distattn.mask import Mask
from distattn.parallel.layout import Layout

Band = tuple[int, int, int, int, int, int]


class Task(NamedTuple):
    """One box. home: the rank that owns its rows; pairs: allowed (query, key) pairs, of one head."""

    home: int
    q0: int
    q1: int
    k0: int
    k1: int
    g0: int
    g1: int
    bands: tuple[Band, ...]
    pairs: int

    @property
    def work(self) -> int:
        """Pairs × KV heads."""
        return self.pairs * (self.g1 - self.g0)

    def clip(self, q0: int, q1: int, k0: int, k1: int, g0: int, g1: int) -> Task | None:
        """The part of the task inside a box, shrunk to what its bands reach; None if nothing is left."""
        if g0 >= g1:
            return None
        if len(self.bands) == 1:
            a, b, c, d, lo, hi = self.bands[0]
            part = _tight(max(a, q0), min(b, q1), max(c, k0), min(d, k1), lo, hi)
            pairs = band_pairs(part) if part is not None else 0
            if part is None or not pairs:
                return None
            return Task(self.home, part[0], part[1], part[2], part[3], g0, g1, (part,), pairs)
        kept, pairs = [], 0
        for band in self.bands:
            part = _tight(max(band[0], q0), min(band[1], q1), max(band[2], k0), min(band[3], k1), band[4], band[5])
            if part is not None:
                kept.append(part)
                pairs += band_pairs(part)
        if not pairs:
            return None
        a, b = min(x[0] for x in kept), max(x[1] for x in kept)
        c, d = min(x[2] for x in kept), max(x[3] for x in kept)
        return Task(self.home, a, b, c, d, g0, g1, tuple(kept), pairs)

    def pairs_of_rows(self, q0: int, q1: int) -> int:
        """Pairs of the rows [q0, q1)."""
        if len(self.bands) == 1:
            a, b, c, d, e, f = self.bands[0]
            return band_pairs((max(a, q0), min(b, q1), c, d, e, f))
        return sum(
            band_pairs((max(b[0], q0), min(b[1], q1), b[2], b[3], b[4], b[5])) for b in self.bands if b[0] < q1 and q0 < b[1]
        )

    def start_of_last_rows(self, end: int, pairs: float) -> int:
        """The row q such that the rows [q, end) have about this many pairs (at most one row's more)."""
        if len(self.bands) == 1:
            _, _, k0, k1, lo, hi = self.bands[0]
            seen = end + hi - k0  # keys of the last row, if nothing but hi limits them
            if lo <= k0 - end and seen <= k1 - k0:
                c = seen + 0.5
                return max(self.q0, end - math.ceil(c - math.sqrt(max(c * c - 2 * pairs, 0.0))))
            if lo <= k0 - end and self.q0 + hi >= k1 - 1:
                return max(self.q0, end - math.ceil(pairs / (k1 - k0)))
        low, high = self.q0, end
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.pairs_of_rows(middle, end) <= pairs else (middle, high)
        return low


@dataclass(frozen=True, eq=False)
class HomeTasks:
    """The tasks of the home layout as a table, sorted by home; ``bands[ptr[i]:ptr[i+1]]`` are those of task i.

    box: int64 [N, 4] (q0, q1, k0, k1); home: int64 [N]; pairs: int64 [N].
    """

    kv_heads: int
    box: np.ndarray = field(repr=False)
    home: np.ndarray = field(repr=False)
    pairs: np.ndarray = field(repr=False)
    ptr: np.ndarray = field(repr=False)
    bands: np.ndarray = field(repr=False)

    def task(self, index: int) -> Task:
        q0, q1, k0, k1 = self.box[index].tolist()
        bands = tuple(tuple(row) for row in self.bands[self.ptr[index] : self.ptr[index + 1]].tolist())
        return Task(int(self.home[index]), q0, q1, k0, k1, 0, self.kv_heads, bands, int(self.pairs[index]))


def home_tasks(mask: Mask, layout: Layout, kv_heads: int) -> HomeTasks:
    """One task per band and layout range; bands whose boxes overlap (parallel diagonals) share one."""
    order = np.argsort(layout.ranges[:, 0], kind="stable")
    starts = layout.ranges[order, 0]
    if not len(starts) or not len(mask.bands):
        empty = np.zeros(0, np.int64)
        return HomeTasks(kv_heads, np.zeros((0, 4), np.int64), empty, empty, np.zeros(1, np.int64), np.zeros((0, 6), np.int64))
    pieces, _, strip = band_algebra.cut_axis(mask.bands, starts[1:], 0)
    pieces = np.concatenate([pieces, strip[:, None]], 1)
    q0, q1, k0, k1, lo, hi = pieces[:, :6].T
    tight = np.stack(
        [np.maximum(q0, k0 - hi), np.minimum(q1, k1 - lo), np.maximum(k0, q0 + lo), np.minimum(k1, q1 + hi), lo, hi], 1
    )
    strip, pairs = pieces[:, 6], band_algebra.area(tight)
    keep = pairs > 0
    tight, home, pairs = tight[keep], layout.range_owner[order[strip[keep]]], pairs[keep]
    by_home = np.lexsort((tight[:, 2], tight[:, 0], home))
    tight, home, pairs = tight[by_home], home[by_home], pairs[by_home]
    members = _group_overlapping(tight)
    if members is None:
        return HomeTasks(kv_heads, tight[:, :4].copy(), home, pairs, np.arange(len(tight) + 1), tight)
    order = np.argsort(members, kind="stable")
    first = np.flatnonzero(np.diff(members[order], prepend=-1))
    grouped = tight[order]
    box = np.stack(
        [pick.reduceat(grouped[:, i], first) for i, pick in enumerate((np.minimum, np.maximum, np.minimum, np.maximum))], 1
    )
    ptr = np.append(first, len(order))
    return HomeTasks(kv_heads, box, home[order][first], np.add.reduceat(pairs[order], first), ptr, grouped)


def _group_overlapping(bands: np.ndarray) -> np.ndarray | None:
    """Group number of each band, such that hulls of groups are disjoint boxes; None if the bands' own boxes are."""
    by_row = np.argsort(bands[:, 0], kind="stable")
    if (bands[by_row[1:], 0] >= np.maximum.accumulate(bands[by_row, 1])[:-1]).all():
        return None
    boxes = bands.copy()
    boxes[:, 4:] = -band_algebra.UNBOUNDED, band_algebra.UNBOUNDED
    if band_algebra.first_overlap(boxes) is None:
        return None
    group = np.arange(len(bands))
    while True:
        _, inverse = np.unique(group, return_inverse=True)
        hull = boxes[np.unique(group, return_index=True)[1]].copy()
        for column, pick in enumerate((np.minimum, np.maximum, np.minimum, np.maximum)):
            pick.at(hull[:, column], inverse, boxes[:, column])
        _, i, j = band_algebra.intersect_rows(hull, hull)
        i, j = i[i < j], j[i < j]
        if not len(i):
            return inverse
        # A chain of overlaps joins over the rounds.
        joined = np.arange(len(hull))
        np.minimum.at(joined, j, i)
        group = joined[inverse]


def band_pairs(band: Band) -> int:
    """Pairs of one banded rectangle, in closed form (as ``bands.area``, on Python integers)."""
    q0, q1, k0, k1, lo, hi = band
    rows, keys = q1 - q0, k1 - k0
    if rows <= 0 or keys <= 0 or lo > hi:
        return 0
    if lo <= k0 - q1 + 1:
        return rows * keys if hi >= k1 - 1 - q0 else _pairs_up_to(q0 + hi + 1 - k0, rows, keys)
    above = rows * keys if hi >= k1 - 1 - q0 else _pairs_up_to(q0 + hi + 1 - k0, rows, keys)
    return above - _pairs_up_to(q0 + lo - k0, rows, keys)


def _pairs_up_to(first: int, rows: int, keys: int) -> int:
    """Σ clamp(x, 0, keys) for x = first … first + rows − 1."""
    x0, x1 = max(first, 0), max(first + rows, 0)
    r0, r1 = min(x0, keys + 1), min(x1, keys + 1)
    return (r1 * (r1 - 1) - r0 * (r0 - 1)) // 2 + (x1 - r1 - x0 + r0) * keys


def _tight(q0: int, q1: int, k0: int, k1: int, lo: int, hi: int) -> Band | None:
    q0, q1, k0, k1 = max(q0, k0 - hi), min(q1, k1 - lo), max(k0, q0 + lo), min(k1, q1 + hi)
    return (q0, q1, k0, k1, lo, hi) if q0 < q1 and k0 < k1 else None
