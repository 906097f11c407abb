"""Which global token rows each rank holds, as ordered ranges.

A rank stores its rows in the order of its ranges. Layouts place tokens and nothing else: any layout is correct under any
mask; it decides balance and traffic. Row counts may differ between ranks and may be zero.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distattn import bands as band_algebra
from distattn.errors import LayoutError
from distattn.mask import Mask
from distattn.parallel.csr import expand

MAX_STRIPES_PER_RANK = 32

UNEVEN_ROWS = 1 / 512
"""By how much of the mean a rank's rows may exceed it, for documents to stay whole: all that is not attention waits for it."""

UNEVEN_AREA = 1.25
"""A document with more area than this times a rank's mean is not kept whole."""

_MAX_DOCUMENTS = 65_536
"""More are not dealt one by one: planning would take longer than that of all other layouts."""

_LITTLE_AREA = 1 / 32
"""Documents with this share of all area, the shortest, are dealt by rows instead of area."""

_DEALS, _EVEN_AREA = 4, 1.005
"""Documents are dealt so often, or until no rank has more than this times the mean area: a rank that got most of those that are
dealt by rows gets less area next time."""

_FINE_BALANCE = 1.02
"""Busiest rank over the mean at which finer chunks are not worth their cuts."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Ranges of all ranks: those of rank r are ``ranges[ptr[r]:ptr[r+1]]``, half open, in storage order.

    ptr: int64 [P+1]; ranges: int64 [M, 2]; num_rows: global rows, each owned exactly once.
    """

    name: str
    num_rows: int
    ptr: np.ndarray = field(repr=False)
    ranges: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ptr", np.ascontiguousarray(self.ptr, np.int64))
        object.__setattr__(self, "ranges", np.ascontiguousarray(self.ranges, np.int64).reshape(-1, 2))
        ranges = self.ranges[np.argsort(self.ranges[:, 0], kind="stable")]
        ends = np.concatenate([[0], ranges[:, 1]])
        starts = np.concatenate([ranges[:, 0], [self.num_rows]])
        if (ranges[:, 0] >= ranges[:, 1]).any() or not np.array_equal(ends, starts):
            raise LayoutError(
                f"a layout must own each of its {self.num_rows} rows exactly once: these ranges overlap, leave rows out, "
                "or are empty"
            )
        self.ptr.flags.writeable = False
        self.ranges.flags.writeable = False

    @property
    def num_ranks(self) -> int:
        return len(self.ptr) - 1

    @cached_property
    def counts(self) -> np.ndarray:
        """Rows of each rank, int64 [P]."""
        total = np.concatenate([[0], np.cumsum(self.ranges[:, 1] - self.ranges[:, 0])])
        return total[self.ptr[1:]] - total[self.ptr[:-1]]

    @cached_property
    def range_owner(self) -> np.ndarray:
        """Rank of each range, int64 [M]."""
        return np.repeat(np.arange(self.num_ranks), np.diff(self.ptr))

    @cached_property
    def digest(self) -> str:
        h = hashlib.blake2b(digest_size=16)
        h.update(self.ptr.tobytes())
        h.update(self.ranges.tobytes())
        return h.hexdigest()

    def rank_ranges(self, rank: int) -> np.ndarray:
        """Ranges of one rank in storage order, int64 [m, 2]."""
        return self.ranges[self.ptr[rank] : self.ptr[rank + 1]]

    def rows(self, rank: int) -> np.ndarray:
        """Global row of each local row, int64 [num_local]."""
        parts = [np.arange(a, b) for a, b in self.rank_ranges(rank).tolist()]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def grouped(self, group: np.ndarray) -> Layout:
        """What groups of ranks hold together, in ascending order; group: int64 [P], the group of each rank."""
        owner = np.asarray(group)[self.range_owner]
        num_groups = int(np.max(group)) + 1
        return _from_owned(self.name, self.num_rows, num_groups, self.ranges[:, 0], self.ranges[:, 1], owner)

    def reordered(self, order: Sequence[int] | np.ndarray) -> Layout:
        """The same shares on other ranks: rank ``order[i]`` holds what rank i held."""
        share = np.argsort(order)
        parts = [self.rank_ranges(int(i)) for i in share]
        ptr = np.concatenate([[0], np.cumsum([len(x) for x in parts])])
        return Layout(self.name, self.num_rows, ptr, np.concatenate(parts))

    def extended(self, num_ranks: int) -> Layout:
        """The same shares on the first of ``num_ranks`` ranks; the others hold no rows."""
        if num_ranks < self.num_ranks:
            raise LayoutError(f"a layout over {self.num_ranks} ranks cannot be extended to {num_ranks}: give at least as many")
        ptr = np.concatenate([self.ptr, np.full(num_ranks - self.num_ranks, self.ptr[-1])])
        return Layout(self.name, self.num_rows, ptr, self.ranges)

    @classmethod
    def given(cls, ranges: Sequence[Iterable[tuple[int, int]]], *, name: str = "given") -> Layout:
        """The ranges of each rank as the caller has them (another framework's placement); empty ranges are dropped."""
        per_rank = [[(int(a), int(b)) for a, b in rank if a < b] for rank in ranges]
        if not per_rank:
            raise LayoutError("a layout needs at least one rank")
        flat = np.array([x for rank in per_rank for x in rank], np.int64).reshape(-1, 2)
        ptr = np.concatenate([[0], np.cumsum([len(rank) for rank in per_rank])])
        return cls(name, int((flat[:, 1] - flat[:, 0]).sum()), ptr, flat)

    @classmethod
    def contiguous(cls, num_rows: int, num_ranks: int) -> Layout:
        """Rank r holds rows [n·r/P, n·(r+1)/P)."""
        _check(num_rows, num_ranks)
        cuts = np.arange(num_ranks + 1) * num_rows // num_ranks
        return _from_owned("contiguous", num_rows, num_ranks, cuts[:-1], cuts[1:], np.arange(num_ranks))

    @classmethod
    def zigzag(cls, num_rows: int, num_ranks: int) -> Layout:
        """2P chunks; rank r holds chunks r and 2P-1-r, which balances a causal mask."""
        _check(num_rows, num_ranks)
        cuts = np.arange(2 * num_ranks + 1) * num_rows // (2 * num_ranks)
        chunk = np.arange(2 * num_ranks)
        owner = np.minimum(chunk, 2 * num_ranks - 1 - chunk)
        return _from_owned("zigzag", num_rows, num_ranks, cuts[:-1], cuts[1:], owner)

    @classmethod
    def per_document_zigzag(cls, lengths: Sequence[int] | np.ndarray, num_ranks: int, *, min_cut: int = 128) -> Layout:
        """Zigzag within each document of at least ``min_cut``·2P rows; shorter ones go whole to the rank with fewest rows.

        Cutting every short document would give a rank thousands of ranges, and each range costs tiles and messages.
        """
        lengths = np.asarray(lengths, np.int64)
        num_rows = int(lengths.sum())
        _check(num_rows, num_ranks)
        if (lengths < 0).any():
            raise LayoutError(f"document lengths must not be negative, got {int(lengths.min())}")
        starts = np.cumsum(lengths) - lengths
        long = lengths >= max(min_cut, 1) * 2 * num_ranks
        part = np.arange(2 * num_ranks)
        owner = np.minimum(part, 2 * num_ranks - 1 - part)
        cuts = starts[long, None] + np.arange(2 * num_ranks + 1) * lengths[long, None] // (2 * num_ranks)
        q0, q1 = cuts[:, :-1].ravel(), cuts[:, 1:].ravel()
        ranks = np.tile(owner, int(long.sum()))
        held = np.bincount(ranks, weights=q1 - q0, minlength=num_ranks).astype(np.int64)
        short = np.flatnonzero(~long & (lengths > 0))
        chosen = _least_loaded(lengths[short], held)
        q0 = np.concatenate([q0, starts[short]])
        q1 = np.concatenate([q1, starts[short] + lengths[short]])
        return _from_owned("per_document_zigzag", num_rows, num_ranks, q0, q1, np.concatenate([ranks, chosen]))

    @classmethod
    def balanced(cls, mask: Mask, num_ranks: int) -> Layout:
        """Equal rows and nearly equal mask area on every rank: chunks dealt by area (after MagiAttention, arXiv 2505.13211).

        Documents that the mask keeps apart stay whole where they are small; the others are cut into equal chunks, as few as
        balance allows. The largest chunk comes first, each to the rank with the least area that has room; what does not fit
        is cut. Of a causal mask this makes the zigzag layout.
        """
        _check(mask.num_queries, num_ranks)
        best: tuple[int, Layout] | None = None
        for chunks_per_rank in (2, 4, 8, 16):
            layout = _dealt(mask, num_ranks, chunks_per_rank)
            busiest = int(area_per_rank(mask, layout).max(initial=0))
            if best is None or busiest < best[0]:
                best = busiest, layout
            if best[0] * num_ranks <= _FINE_BALANCE * mask.area:
                break
        assert best is not None
        return best[1]

    @classmethod
    def whole_documents(cls, mask: Mask, num_ranks: int, edges: np.ndarray) -> Layout | None:
        """Documents uncut, so that nothing is sent, where rows and area are nearly even then; else None.

        edges: where the mask can be cut, ``mask.segments()``. The largest area comes first, each to the rank with the
        least that has room; those that have nearly none in all go where rows are missing.
        """
        _check(mask.num_queries, num_ranks)
        starts, rows = edges[:-1], np.diff(edges)
        room = math.ceil((1 + UNEVEN_ROWS) * mask.num_queries / num_ranks)
        if not num_ranks < len(rows) <= _MAX_DOCUMENTS or rows.max() > room:
            return None
        area = _area_between(mask, starts)
        if area.max() * num_ranks > UNEVEN_AREA * mask.area:
            return None
        best: tuple[int, np.ndarray] | None = None
        surplus = np.zeros(num_ranks, np.int64)
        for _ in range(_DEALS):
            owner = _into_room(rows, area, surplus, room)
            if owner is None:
                break
            load = np.zeros(num_ranks, np.int64)
            np.add.at(load, owner, area)
            if best is None or load.max() < best[0]:
                best = int(load.max()), owner
            if best[0] * num_ranks <= _EVEN_AREA * mask.area:
                break
            surplus += load - mask.area // num_ranks
        return best and _from_owned("whole_documents", mask.num_queries, num_ranks, starts, edges[1:], best[1])

    @classmethod
    def striped(cls, num_rows: int, num_ranks: int, *, block: int = 1) -> Layout:
        """Blocks of ``block`` rows dealt round robin; at most 32 blocks a rank, larger blocks otherwise."""
        _check(num_rows, num_ranks)
        if block < 1:
            raise LayoutError(f"a stripe needs at least one row, got block={block}")
        block = max(block, -(-num_rows // (num_ranks * MAX_STRIPES_PER_RANK)))
        starts = np.arange(0, num_rows, block)
        ends = np.minimum(starts + block, num_rows)
        return _from_owned("striped", num_rows, num_ranks, starts, ends, np.arange(len(starts)) % num_ranks)


def _check(num_rows: int, num_ranks: int) -> None:
    if num_rows < 0 or num_ranks < 1:
        raise LayoutError(f"a layout needs rows >= 0 and ranks >= 1, got {num_rows} rows and {num_ranks} ranks")


def area_per_rank(mask: Mask, layout: Layout) -> np.ndarray:
    """Allowed pairs of each rank's queries, int64 [P]: the balance of a layout, from one cut along the queries."""
    order = np.argsort(layout.ranges[:, 0], kind="stable")
    area = np.zeros(layout.num_ranks, np.int64)
    np.add.at(area, layout.range_owner[order], _area_between(mask, layout.ranges[order, 0]))
    return area


def _area_between(mask: Mask, starts: np.ndarray) -> np.ndarray:
    """Allowed pairs of the queries from each start to the next, int64; starts: sorted, the first is 0."""
    pieces, _, strip = band_algebra.cut_axis(mask.bands, starts[1:], 0)
    area = np.zeros(len(starts), np.int64)
    np.add.at(area, strip, band_algebra.area(pieces))
    return area


def _dealt(mask: Mask, num_ranks: int, chunks_per_rank: int) -> Layout:
    """``Layout.balanced`` for one size of chunks: at most 1/chunks_per_rank of a rank's rows, and as much area twice over."""
    n = mask.num_queries
    edges = mask.segments() if mask.num_queries == mask.num_keys else np.array([0, n])
    starts, lengths = edges[:-1], np.diff(edges)
    if not len(starts):
        return Layout.contiguous(n, num_ranks)
    # Of a causal document cut into k equal chunks the last has nearly 2/k of the area.
    share = _area_between(mask, starts) * (num_ranks * chunks_per_rank) / max(mask.area, 1)
    cuts = np.ceil(np.maximum(lengths * (num_ranks * chunks_per_rank) / n, share)).astype(np.int64)
    cuts = np.clip(cuts, 1, lengths)
    document, part = expand(0 * cuts, cuts)
    first = starts[document] + part * lengths[document] // cuts[document]
    rows = np.diff(np.append(first, n))
    owner, begin, count = _fill(rows, _area_between(mask, first), np.diff(np.arange(num_ranks + 1) * n // num_ranks))
    chunk = np.repeat(np.arange(len(rows)), count)
    start = first[chunk] + begin
    stop = np.append(start[1:], n)
    return _from_owned("balanced", n, num_ranks, start, stop, owner)


def _fill(rows: np.ndarray, area: np.ndarray, room: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deal chunks to ranks, the largest area first, each to the rank with the least area that has room left.

    Returns, chunk by chunk: (rank of each part, its first row within the chunk), and the number of parts of each chunk.
    """
    left = room.tolist()
    heap = [(0.0, r) for r, free in enumerate(left) if free]
    heapq.heapify(heap)
    parts: list[list[tuple[int, int]]] = [[] for _ in range(len(rows))]
    for i in np.lexsort((-rows, -area)).tolist():
        done, size = 0, int(rows[i])
        while done < size:
            load, r = heapq.heappop(heap)
            taken = min(size - done, left[r])
            parts[i].append((r, done))
            done += taken
            left[r] -= taken
            if left[r]:
                heapq.heappush(heap, (load + float(area[i]) * taken / size, r))
    flat = np.array([x for part in parts for x in part], np.int64).reshape(-1, 2)
    return flat[:, 0], flat[:, 1], np.array([len(x) for x in parts], np.int64)


def _into_room(rows: np.ndarray, area: np.ndarray, surplus: np.ndarray, room: int) -> np.ndarray | None:
    """The rank of each document, int64; None where one finds none with room. surplus: int64 [P], the area by which each rank
    was above the mean before."""
    num_ranks = len(surplus)
    order = np.lexsort((-rows, -area))
    later = int(np.searchsorted(-np.cumsum(area[order][::-1])[::-1], -_LITTLE_AREA * area.sum()))
    owner, left = np.zeros(len(rows), np.int64), [room] * num_ranks
    heap: list[tuple[int, int]] = []
    for r, i in enumerate(order[:num_ranks].tolist()):  # whatever a rank's surplus: it comes of what it begins with
        owner[i], left[r] = r, room - int(rows[i])
        heapq.heappush(heap, (int(area[i] + surplus[r]), r))
    for i in order[num_ranks:later].tolist():
        size, too_full = int(rows[i]), []
        while heap and left[heap[0][1]] < size:
            too_full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, r = heap[0]
        owner[i], left[r] = r, left[r] - size
        heapq.heapreplace(heap, (load + int(area[i]), r))
        for entry in too_full:
            heapq.heappush(heap, entry)
    little = order[max(later, num_ranks) :]
    little = little[np.argsort(-rows[little], kind="stable")]
    owner[little] = _least_loaded(rows[little], room - np.array(left))
    return owner if np.bincount(owner, weights=rows, minlength=num_ranks).max() <= room else None


def _least_loaded(lengths: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Longest first, each to the rank that holds the fewest rows so far."""
    heap = [(int(n), r) for r, n in enumerate(held)]
    heapq.heapify(heap)
    chosen = np.zeros(len(lengths), np.int64)
    for i in np.argsort(-lengths, kind="stable").tolist():
        n, r = heap[0]
        chosen[i] = r
        heapq.heapreplace(heap, (n + int(lengths[i]), r))
    return chosen


def _from_owned(name: str, num_rows: int, num_ranks: int, q0: np.ndarray, q1: np.ndarray, owner: np.ndarray) -> Layout:
    """Ranges with their owners, in any order: sorted by (owner, start), neighbours of one owner joined."""
    keep = q0 < q1
    q0, q1, owner = q0[keep], q1[keep], owner[keep]
    order = np.lexsort((q0, owner))
    q0, q1, owner = q0[order], q1[order], owner[order]
    first = np.concatenate([[True], (owner[1:] != owner[:-1]) | (q0[1:] != q1[:-1])])[: len(q0)]
    last = np.concatenate([first[1:], [True]])[: len(q0)]
    ptr = np.searchsorted(owner[first], np.arange(num_ranks + 1))
    return Layout(name, num_rows, ptr, np.stack([q0[first], q1[last]], 1))
