"""Which global token rows each rank holds, as ordered ranges.

A rank stores its rows in the order of its ranges. Layouts place tokens and nothing else: any layout is correct under any
mask; it decides balance and traffic. Row counts may differ between ranks and may be zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distattn.errors import LayoutError

MAX_STRIPES_PER_RANK = 32


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


def _least_loaded(lengths: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Longest first, each to the rank that holds the fewest rows so far."""
    import heapq

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
