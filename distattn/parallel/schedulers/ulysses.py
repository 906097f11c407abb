"""Ulysses: heads are dealt over ranks, every rank attends over the whole sequence (DeepSpeed, arXiv 2309.14509).

    stage 0   all-to-all: rank u receives all rows of its H/P query heads and of the KV heads that these use
    stage 1   rank u attends
    stage 2   all-to-all back: every rank receives all heads of its own rows

KV heads fewer than ranks are replicated. Needs query heads that divide by the ranks; ring has no such limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.need import check_rows
from distattn.parallel.program import KV, KV_IN, Q_IN, Q_OUT, Program, ProgramBuilder, Q


@dataclass(frozen=True)
class UlyssesOptions:
    """Ulysses has nothing to choose."""


def why_not(heads: int, num_ranks: int) -> str | None:
    """Why Ulysses cannot split these heads over these ranks, or None."""
    if heads % num_ranks:
        return (
            f"ulysses needs query heads that divide by the ranks, got heads={heads} over {num_ranks} ranks; "
            'use strategy "ring", which has no such limit'
        )
    return None


def plan(mask: Mask, layout: Layout, heads: int, kv_heads: int, options: UlyssesOptions | None = None) -> Program:
    """Ulysses attention over any mask and layout."""
    check_rows(mask, layout)
    reason = why_not(heads, layout.num_ranks)
    if reason:
        raise PlanError(reason)
    builder = ProgramBuilder(layout, heads, kv_heads)
    if layout.num_ranks == 1:
        home = int(builder.home_rows[0])
        builder.add_attends(np.array([[0, 0, 1, home, home, 0, heads]]))
        return builder.build()
    ranks = np.arange(layout.num_ranks)
    h0, h1 = ranks * heads // layout.num_ranks, (ranks + 1) * heads // layout.num_ranks
    group = heads // kv_heads
    everything = builder.add_row_set([(0, layout.num_rows)] if layout.num_rows else [])
    all_rows = np.full(len(ranks), everything)
    queries = builder.add_slots(np.stack([ranks, 0 * ranks + Q, h0, h1, all_rows], 1))
    keys = builder.add_slots(np.stack([ranks, 0 * ranks + KV, h0 // group, (h1 - 1) // group + 1, all_rows], 1))
    home, server = (x.ravel() for x in np.meshgrid(ranks, ranks, indexing="ij"))
    rows, one = builder.home_rows[home], np.ones(len(home), np.int64)
    builder.add_moves(np.stack([one * Q_IN, 2 * home, queries[server], rows, 0 * one, one], 1))
    builder.add_moves(np.stack([one * KV_IN, 2 * home + 1, keys[server], rows, 0 * one, one], 1))
    builder.add_moves(np.stack([one * Q_OUT, queries[server], 2 * home, rows, 2 * one, 3 * one], 1))
    builder.add_attends(np.stack([ranks * 0 + 1, queries, keys, all_rows, all_rows, h0, h1], 1))
    return builder.build()
