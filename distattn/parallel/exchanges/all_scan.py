"""Hand the state on in K blocks of columns, so that the links work at the same time: ZeCO's All-Scan (arXiv 2507.01004).

           stage 0      stage 1      stage 2      stage 3
rank 0     b0 ──▶ 1     b1 ──▶ 1     b2 ──▶ 1
rank 1                  b0 ──▶ 2     b1 ──▶ 2     b2 ──▶ 2
rank 2                               b0 ──▶ 3     b1 ──▶ 3   …

A link multiplies each block by its own A, which never travels: a rank sends one state, whatever the transition. Cutting along
the columns, and not along the rows, is what makes that legal for dense transitions too. Time (P − 2 + K)(latency + n / K).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.parallel.exchanges.stream import Chains
from distattn.parallel.exchanges.table import Table


@dataclass(frozen=True)
class AllScanOptions:
    """blocks: K; at most the state's columns are used."""

    blocks: int = 4

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise PlanError(f"all_scan needs blocks of at least 1, got {self.blocks}")


def plan(chains: Chains, heads: int, columns: int, options: AllScanOptions | None = None) -> Table:
    """The table of a pipelined scan."""
    return pipeline("all_scan", chains, heads, columns, blocks=(options or AllScanOptions()).blocks)


def pipeline(name: str, chains: Chains, heads: int, columns: int, *, blocks: int) -> Table:
    """Link i works on block b at stage i + b; neighbours on one rank hand over without a stage."""
    blocks = max(1, min(blocks, columns))
    cuts = np.arange(blocks + 1) * columns // blocks
    entry = np.arange(len(chains.links))
    link, rank = chains.links, chains.rank_of[chains.links]
    remote = np.zeros(len(entry), bool)  # whether the state comes to this entry over a wire
    remote[1:] = (rank[1:] != rank[:-1]) & ~chains.first[1:]
    depth = np.cumsum(remote)
    stage = depth - depth[chains.ptr[:-1]][chains.chain_of]
    # Two registers an entry and block: what enters, if it comes over a wire, and what leaves, if it is computed.
    base = len(chains.rank_of)
    entry, block = (x.ravel() for x in np.meshgrid(entry, np.arange(blocks), indexing="ij"))
    arrives = base + 2 * (entry * blocks + block)
    leaves = np.where(chains.first[entry], link[entry], arrives + 1)
    before = np.concatenate([np.zeros(blocks, np.int64), leaves[: -blocks or None]])[: len(entry)]
    enters = np.where(remote[entry], arrives, before)
    at = stage[entry] + block
    extent = np.stack([np.zeros_like(entry), np.full_like(entry, heads), cuts[block], cuts[block + 1]], 1)
    zero = np.zeros_like(entry)

    hop = remote[entry]
    source = rank[entry - 1]
    hops = np.column_stack([at - 1, at, source, rank[entry], before, arrives, extent, zero])[hop]
    fold = ~chains.first[entry] & ~chains.last[entry]
    folds = np.column_stack([at, rank[entry], leaves, link[entry], enters, extent, zero])[fold]
    late = ~chains.first[entry]
    outputs = np.column_stack([rank[entry], link[entry], enters, extent])[late]
    folds = folds[np.argsort(folds[:, 0], kind="stable")]
    return Table(name, chains, heads, columns, hops[np.lexsort((hops[:, 1], hops[:, 0]))], folds, outputs)
