"""All-gather: every rank fetches all the keys and values that its queries need, then attends (Llama 3, arXiv 2407.21783).

    stage 0   rank r attends to its own chunk      while the needed rows of the nearest other ranks arrive in a slot
    stage 1   rank r attends to that slot          while those of the next nearest arrive in another
    …                                              pieces in all; 1 by default: everything in one exchange

Few exchanges instead of P − 1 hops, at the price of holding everything that was gathered. Rows that no query of the rank sees
are not sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.csr import expand, pointers, segment_starts
from distattn.parallel.layout import Layout
from distattn.parallel.need import analyse
from distattn.parallel.program import KV, KV_IN, Program, ProgramBuilder
from distattn.parallel.schedulers.ring import add_home_attends


@dataclass(frozen=True)
class AllGatherOptions:
    """pieces: exchanges in which the keys are gathered, each computed with while the next one flies."""

    pieces: int = 1

    def __post_init__(self) -> None:
        if self.pieces < 1:
            raise PlanError(f"pieces must be at least 1, got {self.pieces}")


def variants(heads: int, kv_heads: int, num_ranks: int, ranks_per_node: int) -> list[AllGatherOptions]:
    """One exchange, and a few."""
    return [AllGatherOptions(x) for x in (1, 2, 4) if x < max(num_ranks, 2)]


def plan(
    mask: Mask,
    layout: Layout,
    heads: int,
    kv_heads: int,
    options: AllGatherOptions | None = None,
    key_layout: Layout | None = None,
) -> Program:
    """All-gather attention over any mask and layout."""
    pieces = min((options or AllGatherOptions()).pieces, max(layout.num_ranks - 1, 1))
    need = analyse(mask, layout, key_layout)
    builder = ProgramBuilder(layout, heads, kv_heads, key_layout)
    add_home_attends(builder, need.area)
    away = np.flatnonzero(need.owner != need.consumer)
    distance = (need.consumer - need.owner) % layout.num_ranks
    piece = (distance - 1) * pieces // max(layout.num_ranks - 1, 1)
    # A slot keeps global order, so that documents cut over ranks are whole in it again.
    away = away[np.lexsort((need.k0[away], piece[away], need.consumer[away]))]
    owner, ranges = need.owner[away], np.stack([need.k0[away], need.k1[away]], 1)
    gather = need.consumer[away] * pieces + piece[away]
    gathers = np.unique(gather)
    ranks, stage = gathers // pieces, gathers % pieces + 1
    gathered = builder.add_row_sets(pointers(np.searchsorted(gathers, gather), len(gathers)), ranges)
    slots = np.zeros((len(gathers), 5), np.int64)
    slots[:, 0], slots[:, 1], slots[:, 3], slots[:, 4] = ranks, KV, kv_heads, gathered
    ids = builder.add_slots(slots)
    zero = 0 * ranks
    builder.add_attends(np.stack([stage, 2 * ranks, ids, builder.home_rows[ranks], gathered, zero, zero + heads], 1))
    by_pair = np.lexsort((owner, gather))
    gather, owner, ranges = gather[by_pair], owner[by_pair], ranges[by_pair]
    first = segment_starts(gather, owner)
    counts = np.diff(np.append(first, len(gather)))
    _, flat = expand(first, counts)
    parts = builder.add_row_sets(np.concatenate([[0], np.cumsum(counts)]), ranges[flat])
    at = np.searchsorted(gathers, gather[first])
    kind = np.full(len(first), KV_IN)
    builder.add_moves(np.stack([kind, 2 * owner[first] + 1, ids[at], parts, stage[at] - 1, stage[at]], 1))
    return builder.build()
