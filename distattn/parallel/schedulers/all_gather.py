"""All-gather: every rank fetches all the keys and values that its queries need, then attends once (Llama 3, arXiv 2407.21783).

    stage 0   rank r attends to its own chunk   while the needed rows of all other ranks arrive in one slot
    stage 1   rank r attends to that slot

One exchange instead of P − 1 hops, at the price of holding everything that was gathered. Rows that no query of the rank sees
are not sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.mask import Mask
from distattn.parallel.csr import expand, pointers, segment_starts
from distattn.parallel.layout import Layout
from distattn.parallel.need import analyse
from distattn.parallel.program import KV, KV_IN, Program, ProgramBuilder
from distattn.parallel.schedulers.ring import add_home_attends


@dataclass(frozen=True)
class AllGatherOptions:
    """All-gather has nothing to choose."""


def plan(mask: Mask, layout: Layout, heads: int, kv_heads: int, options: AllGatherOptions | None = None) -> Program:
    """All-gather attention over any mask and layout."""
    need = analyse(mask, layout)
    builder = ProgramBuilder(layout, heads, kv_heads)
    add_home_attends(builder, need)
    owner = need.owner
    away = np.flatnonzero(owner != need.consumer)
    # A slot keeps global order, so that documents cut over ranks are whole in it again.
    away = away[np.lexsort((need.k0[away], need.consumer[away]))]
    consumer, owner, ranges = need.consumer[away], owner[away], np.stack([need.k0[away], need.k1[away]], 1)
    ranks = np.unique(consumer)
    gathered = builder.add_row_sets(pointers(np.searchsorted(ranks, consumer), len(ranks)), ranges)
    slots = np.zeros((len(ranks), 5), np.int64)
    slots[:, 0], slots[:, 1], slots[:, 3], slots[:, 4] = ranks, KV, kv_heads, gathered
    ids = builder.add_slots(slots)
    zero = 0 * ranks
    builder.add_attends(np.stack([zero + 1, 2 * ranks, ids, builder.home_rows[ranks], gathered, zero, zero + heads], 1))
    by_pair = np.lexsort((owner, consumer))
    consumer, owner, ranges = consumer[by_pair], owner[by_pair], ranges[by_pair]
    first = segment_starts(consumer, owner)
    counts = np.diff(np.append(first, len(consumer)))
    _, flat = expand(first, counts)
    parts = builder.add_row_sets(np.concatenate([[0], np.cumsum(counts)]), ranges[flat])
    one = np.ones(len(first), np.int64)
    destination = ids[np.searchsorted(ranks, consumer[first])]
    builder.add_moves(np.stack([one * KV_IN, 2 * owner[first] + 1, destination, parts, 0 * one, one], 1))
    return builder.build()
