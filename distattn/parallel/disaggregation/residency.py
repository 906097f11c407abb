"""Which key rows a rank holds already: its own, and those that its tasks fetch. What is resident costs nothing to use again."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

import numpy as np

from distattn.parallel.layout import Layout


class Intervals:
    """Disjoint half-open intervals of rows, joined where they touch."""

    __slots__ = ("ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []

    def add(self, a: int, b: int) -> None:
        """Join [a, b) with what is there."""
        i, j = bisect_left(self.ends, a), bisect_right(self.starts, b)
        if i < j:
            a, b = min(a, self.starts[i]), max(b, self.ends[j - 1])
        self.starts[i:j] = [a]
        self.ends[i:j] = [b]

    def overlap(self, a: int, b: int) -> int:
        """Rows of [a, b) that are inside."""
        starts, ends = self.starts, self.ends
        i, j = bisect_right(ends, a), bisect_left(starts, b)
        if i >= j:
            return 0
        # All of the intervals between, less what the first and the last of them have outside.
        inside = ends[i] - starts[i] if j == i + 1 else sum(ends[i:j]) - sum(starts[i:j])
        return inside - max(0, a - starts[i]) - max(0, ends[j - 1] - b)

    def total(self) -> int:
        return sum(self.ends) - sum(self.starts)


class Residency:
    """Rows of K and V that each rank holds, per KV head."""

    def __init__(self, layout: Layout, kv_heads: int) -> None:
        self.kv_heads = kv_heads
        self._home = [_sorted_home(layout, rank) for rank in range(layout.num_ranks)]
        # Fetched rows: by all heads (None) as the home layout does, or by single heads.
        self._fetched: list[dict[int | None, Intervals]] = [{} for _ in range(layout.num_ranks)]

    def own_rows(self, rank: int, k0: int, k1: int) -> int:
        """Rows of [k0, k1) that the layout gives to the rank."""
        return self._home[rank].overlap(k0, k1)

    def missing(self, rank: int, k0: int, k1: int, g0: int, g1: int) -> int:
        """Rows × KV heads of [k0, k1) × [g0, g1) that the rank does not hold."""
        fetched = self._fetched[rank]
        absent = k1 - k0 - self._home[rank].overlap(k0, k1)
        if not absent or not fetched:
            return absent * (g1 - g0)
        everywhere = fetched.get(None)
        if everywhere is not None:
            absent = max(0, absent - everywhere.overlap(k0, k1))
        total = absent * (g1 - g0)
        for g in range(g0, g1):
            if g in fetched:
                total -= min(absent, fetched[g].overlap(k0, k1))
        return total

    def fetch(self, rank: int, k0: int, k1: int, g0: int, g1: int) -> None:
        """Note that the rank now holds these rows."""
        fetched = self._fetched[rank]
        heads = (None,) if g1 - g0 == self.kv_heads else range(g0, g1)
        home = self._home[rank]
        # Cut around the rank's own rows, so that those are never counted twice.
        i, j = bisect_right(home.ends, k0), bisect_left(home.starts, k1)
        borders = [k0, *(x for r in range(i, j) for x in (home.starts[r], home.ends[r])), k1]
        for a, b in zip(borders[::2], borders[1::2], strict=True):
            if a < b:
                for g in heads:
                    fetched.setdefault(g, Intervals()).add(a, b)


def _sorted_home(layout: Layout, rank: int) -> Intervals:
    ranges = layout.rank_ranges(rank)
    home = Intervals()
    for a, b in ranges[np.argsort(ranges[:, 0], kind="stable")].tolist():
        home.add(a, b)
    return home
