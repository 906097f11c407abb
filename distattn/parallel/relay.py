"""Chunks that travel from rank to rank: who passes which rows on to whom, when.

A chunk starts at its owner (the *root* stop) and is handed on from stop to stop, a tree. A stop brings the rows that its own
rank or any rank further along needs, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distattn import bands as band_algebra
from distattn.errors import PlanError
from distattn.parallel.csr import expand, pointers, segment_starts
from distattn.parallel.layout import Layout
from distattn.parallel.need import Need
from distattn.parallel.program import ProgramBuilder


@dataclass(frozen=True, eq=False)
class Path:
    """Stops of all chunks, each root first and every stop before those that it passes the chunk to (depth first).

    owner, holder: the chunk's rank and the stop's; source: stop that it comes from, itself at a root; end: one past the last
    stop that gets the chunk through this one; issue, due: stages in between which it is in flight (0, 0 at a root).
    """

    owner: np.ndarray
    holder: np.ndarray
    source: np.ndarray
    end: np.ndarray
    issue: np.ndarray
    due: np.ndarray

    @property
    def is_root(self) -> np.ndarray:
        return self.owner == self.holder


@dataclass(frozen=True, eq=False)
class Stops:
    """A path and the rows that each stop brings: ``num_rows[i]`` of them, ``ranges[ptr[row_set[i]]:ptr[row_set[i] + 1]]``, in
    the owner's order.

    Stops that bring the same rows as their source share its row set.
    """

    path: Path
    row_set: np.ndarray
    num_rows: np.ndarray
    ptr: np.ndarray = field(repr=False)
    ranges: np.ndarray = field(repr=False)

    def add_row_sets(self, builder: ProgramBuilder, layout: Layout | None = None, home: np.ndarray | None = None) -> np.ndarray:
        """Row set id of each stop, int64 [N]. layout, home: where given, the id home[owner] stands for all rows of an owner."""
        ids = builder.add_row_sets(self.ptr, self.ranges)[self.row_set]
        if layout is None or home is None:
            return ids
        return np.where(self.num_rows == layout.counts[self.path.owner], home[self.path.owner], ids)


def pairs(need: Need) -> tuple[np.ndarray, np.ndarray]:
    """(owner, consumer) of all chunks that somebody needs rows of, and every owner with itself; int64 [N]."""
    ranks = need.layout.num_ranks
    own = np.arange(ranks) * (ranks + 1)
    both = np.unique(np.concatenate([own, need.owner * ranks + need.consumer]))
    return both // ranks, both % ranks


def relay(need: Need, path: Path) -> Stops:
    """Rows that each stop must bring: exactly those that it or a stop beyond it needs."""
    keys, ranks, num_stops = need.keys, need.layout.num_ranks, len(path.owner)
    # Rows are counted in the owners' storage order, in which those of a rank are consecutive.
    sizes = keys.ranges[:, 1] - keys.ranges[:, 0]
    base = np.cumsum(sizes) - sizes
    shift = (base - keys.ranges[:, 0])[need.key_range]
    first, last = need.k0 + shift, need.k1 + shift
    edges = np.unique(np.concatenate([first, last]))
    stop_of = np.zeros(ranks * ranks, np.int64)
    stop_of[path.owner * ranks + path.holder] = np.arange(num_stops)
    begin = np.searchsorted(edges, first)
    which, segment = expand(begin, np.searchsorted(edges, last) - begin)
    stop = stop_of[need.owner * ranks + need.consumer][which]
    wanted = np.sort(segment * (num_stops + 1) + stop)
    held = np.searchsorted(edges, np.append(0, np.cumsum(keys.counts)))
    count = (held[1:] - held[:-1])[path.owner]
    if count.sum() > band_algebra.MAX_PIECES:
        raise PlanError(
            f"this mask and layout make {int(count.sum())} parts of travelling chunks; use a layout with fewer ranges a rank "
            "(contiguous or zigzag)"
        )
    stop, segment = expand(held[path.owner], count)
    key = segment * (num_stops + 1)
    brings = np.searchsorted(wanted, key + stop) < np.searchsorted(wanted, key + path.end[stop])
    stop, segment = stop[brings], segment[brings]
    start, stop_row = edges[segment], edges[np.minimum(segment + 1, len(edges) - 1)]
    of_range = np.searchsorted(base, start, "right") - 1
    back = keys.ranges[of_range, 0] - base[of_range]
    return _shared(path, stop, np.stack([start + back, stop_row + back], 1))


def _shared(path: Path, stop: np.ndarray, pieces: np.ndarray) -> Stops:
    """Join neighbouring pieces of each stop, and let a stop that brings all of its source's rows share its row set."""
    num_stops = len(path.owner)
    fresh = np.ones(len(stop), bool)
    fresh[1:] = (stop[1:] != stop[:-1]) | (pieces[1:, 0] != pieces[:-1, 1])
    head = np.flatnonzero(fresh)
    tail = np.append(head[1:], len(stop))[: len(head)] - 1
    stop, ranges = stop[head], np.stack([pieces[head, 0], pieces[tail, 1]], 1)
    rows = np.bincount(stop, weights=ranges[:, 1] - ranges[:, 0], minlength=num_stops).astype(np.int64)
    # What a stop brings is a part of what its source brought, so equal counts mean equal rows.
    origin = np.where(rows == rows[path.source], path.source, np.arange(num_stops))
    while not np.array_equal(further := origin[origin], origin):
        origin = further
    kept, row_set = np.unique(origin, return_inverse=True)
    ptr = pointers(stop, num_stops)
    which, flat = expand(ptr[kept], ptr[kept + 1] - ptr[kept])
    return Stops(path, row_set.reshape(-1), rows, pointers(which, len(kept)), ranges[flat])


def chain(owner: np.ndarray, holder: np.ndarray, lane: np.ndarray, due: np.ndarray) -> Path:
    """Each chunk goes along every lane of its own (roots are in lane 0), from stop to stop in the order of ``due``."""
    order = np.lexsort((due, lane, owner))
    owner, holder, lane, due = owner[order], holder[order], lane[order], due[order]
    index, root = np.arange(len(owner)), owner == holder
    head = np.zeros(len(owner), bool)
    head[segment_starts(owner, lane)] = True
    root_of = np.maximum.accumulate(np.where(root, index, 0))
    source = np.where(head, root_of, index - 1)
    ends = np.append(np.flatnonzero(head)[1:], len(owner))
    end = ends[np.cumsum(head) - 1]
    ends = np.append(np.flatnonzero(root)[1:], len(owner))
    end = np.where(root, ends[np.cumsum(root) - 1], end)
    return Path(owner, holder, source, end, np.maximum(due - 1, 0), due)
