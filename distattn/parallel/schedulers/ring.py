"""Ring: queries stay, key/value chunks travel round the ranks (Liu et al., arXiv 2310.01889).

    stage 0   rank r attends to its own chunk            chunk r leaves for the next rank that needs it
    stage s   rank r attends to the chunk of rank r − s   … and is passed on while it is being used

A rank that needs nothing of a chunk is skipped, and a hop carries only the rows that some rank further along needs: under a
sliding window the ring is a halo exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.mask import Mask
from distattn.parallel.csr import expand, pointers, segment_starts
from distattn.parallel.layout import Layout
from distattn.parallel.need import Need, analyse
from distattn.parallel.program import KV, KV_IN, Program, ProgramBuilder


@dataclass(frozen=True)
class RingOptions:
    """The ring has nothing to choose."""


def plan(mask: Mask, layout: Layout, heads: int, kv_heads: int, options: RingOptions | None = None) -> Program:
    """Ring attention over any mask and layout."""
    need = analyse(mask, layout)
    builder = ProgramBuilder(layout, heads, kv_heads)
    hops = _hops(need)
    row_sets = builder.add_row_sets(hops.ptr, hops.ranges)[hops.row_set]
    consumer = (hops.owner + hops.distance) % layout.num_ranks
    slots = np.zeros((len(consumer), 5), np.int64)
    slots[:, 0], slots[:, 1], slots[:, 3], slots[:, 4] = consumer, KV, kv_heads, row_sets
    ids = builder.add_slots(slots)
    first_hop = np.zeros(len(ids), bool)
    first_hop[segment_starts(hops.owner)] = True
    source = np.where(first_hop, 2 * hops.owner + 1, np.concatenate([[0], ids])[: len(ids)])
    one = np.ones(len(ids), np.int64)
    builder.add_moves(np.stack([one * KV_IN, source, ids, row_sets, hops.distance - 1, hops.distance], 1))
    attends = np.stack(
        [hops.distance, 2 * consumer, ids, builder.home_rows[consumer], row_sets, 0 * one, heads * one], 1
    )
    add_home_attends(builder, need)
    builder.add_attends(attends)
    return builder.build()


def add_home_attends(builder: ProgramBuilder, need: Need) -> None:
    """Stage 0: every rank whose queries see keys of their own rank attends to its home chunk."""
    ranks = np.flatnonzero(np.diagonal(need.area) > 0)
    home, zero = builder.home_rows[ranks], 0 * ranks
    builder.add_attends(np.stack([zero, 2 * ranks, 2 * ranks + 1, home, home, zero, zero + builder.heads], 1))


@dataclass(frozen=True, eq=False)
class _Hops:
    """Every stop of every chunk, sorted by (owner, distance), with the rows that it must bring.

    Row sets in CSR form: that of hop i is ``ranges[ptr[row_set[i]]:ptr[row_set[i]+1]]``; hops that bring the same share it.
    """

    owner: np.ndarray
    distance: np.ndarray
    row_set: np.ndarray
    ptr: np.ndarray
    ranges: np.ndarray


def _hops(need: Need) -> _Hops:
    """Rows needed at each distance or beyond: a running union of hulls from the far end of each chunk's way."""
    ranks = need.layout.num_ranks
    owner = need.owner
    distance = (need.consumer - owner) % ranks
    away = distance > 0
    owner, distance, key_range, k0, k1 = (x[away] for x in (owner, distance, need.key_range, need.k0, need.k1))
    stops = np.unique(owner * ranks + distance)
    # Farthest first within each range, so that a running minimum and maximum are the union of what lies beyond.
    order = np.lexsort((-distance, key_range))
    key_range, distance, k0, k1 = key_range[order], distance[order], k0[order], k1[order]
    big = need.layout.num_rows + 1
    k0 = np.minimum.accumulate(k0 - key_range * big) + key_range * big
    k1 = np.maximum.accumulate(k1 + key_range * big) - key_range * big
    # Every stop of an owner brings each of the owner's ranges that is needed at this distance or farther.
    ranges_of = need.layout.ptr
    stop_owner, stop_distance = stops // ranks, stops % ranks
    stop, member = expand(ranges_of[stop_owner], ranges_of[stop_owner + 1] - ranges_of[stop_owner])
    key = key_range * (ranks + 1) + (ranks - distance)
    at = np.searchsorted(key, member * (ranks + 1) + (ranks - stop_distance[stop]), "right") - 1
    found = at >= 0
    found[found] = key_range[at[found]] == member[found]
    stop, at = stop[found], at[found]
    ptr = pointers(stop, len(stops))
    return _shared(stop_owner, stop_distance, ptr, np.stack([k0[at], k1[at]], 1))


def _shared(owner: np.ndarray, distance: np.ndarray, ptr: np.ndarray, ranges: np.ndarray) -> _Hops:
    """Let neighbouring stops of a chunk that bring the same rows share a row set."""
    counts = np.diff(ptr)
    same = np.zeros(len(owner), bool)
    same[1:] = (owner[1:] == owner[:-1]) & (counts[1:] == counts[:-1])
    stop, flat = expand(ptr[:-1], np.where(same, counts, 0))
    differs = (ranges[flat] != ranges[flat - counts[stop]]).any(1)
    same[stop[differs]] = False
    keep = ~same
    kept, flat = expand(ptr[:-1][keep], counts[keep])
    return _Hops(owner, distance, np.cumsum(keep) - 1, pointers(kept, int(keep.sum())), ranges[flat])
