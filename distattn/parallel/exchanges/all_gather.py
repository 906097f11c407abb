"""Send every map to every later rank of its chain; each folds the ones before it: LASP-2 (arXiv 2502.07563).

           stage 0                    stage 1
rank 0     B0 ──▶ 1, 2, 3
rank 1     (A1, B1) ──▶ 2, 3          x1 = B0
rank 2     (A2, B2) ──▶ 3             x2 = A1 B0 + B1
rank 3                                x3 = A2 (A1 B0 + B1) + B2

One stage, P − 1 states a rank, and transitions travel too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.parallel.exchanges.stream import Chains
from distattn.parallel.exchanges.table import Table


@dataclass(frozen=True)
class AllGatherOptions:
    """None."""


def plan(chains: Chains, heads: int, columns: int, options: AllGatherOptions | None = None) -> Table:
    """The table of a gather and local folds."""
    last = _last_of_each_rank(chains)
    # Every entry before a rank's last one of the chain reaches that rank: (reader, entry) pairs.
    first = chains.ptr[:-1][chains.chain_of]
    count = last - first[last]
    reader = np.repeat(np.arange(len(last)), count)
    entry = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first[last], count)
    rank = chains.rank_of[chains.links]
    dst, src = rank[last][reader], rank[entry]
    link = chains.links[entry]
    # Two registers a pair: the map that came, and the state after it.
    came = len(chains.rank_of) + 2 * np.arange(len(reader))
    maps = np.where(src == dst, link, came)
    after = np.where(chains.first[entry], maps, came + 1)
    before = np.concatenate([[0], after[:-1]])[: len(after)]
    extent = np.tile([0, heads, 0, columns], (len(reader), 1))
    zero, one = np.zeros_like(reader), np.ones_like(reader)
    whole = (~chains.first[entry]).astype(np.int64)
    hops = np.column_stack([zero, one, src, dst, link, came, extent, whole])[src != dst]
    folds = np.column_stack([one, dst, after, maps, before, extent, zero])[~chains.first[entry]]
    # The state that enters an entry is what came after the one before it, on that entry's rank.
    mine = np.flatnonzero((rank[entry + 1] == dst) & ~chains.first[entry + 1]) if len(entry) else entry
    outputs = np.column_stack([dst, chains.links[entry + 1], after, extent])[mine] if len(entry) else np.zeros((0, 7), np.int64)
    return Table("all_gather", chains, heads, columns, hops, folds, outputs)


def _last_of_each_rank(chains: Chains) -> np.ndarray:
    """Last entry of each (chain, rank), without those that are their chain's first."""
    rank = chains.rank_of[chains.links]
    key = chains.chain_of * chains.num_ranks + rank
    _, reverse = np.unique(key[::-1], return_index=True)
    last = np.sort(len(key) - 1 - reverse)
    return last[~chains.first[last]]
