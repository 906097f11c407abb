"""Fold inside each node, scan across nodes: the heads of a state are dealt to the node's ranks, their owners.

            in the node           across nodes                 in the node
node 0      (A, B)[h] ──▶ owner   x = B1…, on h ──▶ node 1     x_p[h] ──▶ rank p
node 1      (A, B)[h] ──▶ owner   A_node x + B_node ──▶ node 2  x_p[h] ──▶ rank p

Each rank receives its share of the heads from all ranks of its node, composes them, and passes one state a node on: nodes − 1
hops of 1/R of a state on R rails, instead of P − 1 hops of a whole one. Transitions travel inside nodes only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.parallel.exchanges.stream import Chains
from distattn.parallel.exchanges.table import Table


@dataclass(frozen=True)
class TwoLevelOptions:
    """ranks_per_node: rank r sits on node r // ranks_per_node."""

    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1:
            raise PlanError(f"two_level needs ranks_per_node of at least 1, got {self.ranks_per_node}")


def plan(chains: Chains, heads: int, columns: int, options: TwoLevelOptions | None = None) -> Table:
    """The table of in-node folds and a scan over nodes."""
    grid = _Grid(chains, heads, columns, (options or TwoLevelOptions()).ranks_per_node)
    return Table("two_level", chains, heads, columns, grid.hops(), grid.folds(), grid.outputs())


class _Grid:
    """One row an entry of the chains and owner of some heads in its node. A *run* is a chain's stay in one node."""

    def __init__(self, chains: Chains, heads: int, columns: int, size: int) -> None:
        size = min(size, chains.num_ranks)
        rank = chains.rank_of[chains.links]
        node = rank // size
        begins = chains.first.copy()
        begins[1:] |= node[1:] != node[:-1]
        run = np.cumsum(begins) - 1
        ends = np.append(begins[1:], True)[: len(begins)]
        in_chain = run - run[chains.ptr[:-1]][chains.chain_of]
        entry, owner = (x.ravel() for x in np.meshgrid(np.arange(len(rank)), np.arange(size), indexing="ij"))
        cuts = np.arange(size + 1) * heads // size
        kept = cuts[owner] < cuts[owner + 1]
        entry, owner = entry[kept], owner[kept]

        self.chains, self.entry, self.owner, self.size = chains, entry, owner, size
        self.rank, self.link = rank[entry], chains.links[entry]
        # The last node may have fewer ranks: some of them own the heads of several rails.
        held = np.minimum(size, chains.num_ranks - node[entry] * size)
        self.at = node[entry] * size + owner % held
        self.extent = np.column_stack([cuts[owner], cuts[owner + 1], np.zeros_like(entry), np.full_like(entry, columns)])
        self.stage = 1 + in_chain[entry]
        self.begins, self.ends = begins[entry], ends[entry]
        self.chain_first, self.chain_last = chains.first[entry], chains.last[entry]
        self.first_run = self.stage == 1
        last_run = in_chain == in_chain[chains.ptr[1:] - 1][chains.chain_of]
        self.last_run = last_run[entry]
        self.run_first = np.flatnonzero(begins)[run][entry]

        self.map = np.where(self.at == self.rank, self.link, self._register(0, entry))
        self.leaves = np.where(self.chain_first, self.map, self._register(1, entry))
        self.total = np.where(self.begins, self.map, self._register(2, entry))
        self.arrives = self._register(3, self.run_first)
        # What the run passes on: the first run knows its states, later ones apply their total.
        self.passed = np.where(self.first_run, self.leaves, self._register(4, entry))
        above = np.arange(len(entry)) - kept.sum() // max(len(rank), 1)  # the entry before, same owner
        self.above = above
        self.enters = np.where(self.begins & ~self.chain_first, self.arrives, self.leaves[above])

    def _register(self, which: int, entry: np.ndarray) -> np.ndarray:
        return len(self.chains.rank_of) + 6 * (entry * self.size + self.owner) + which

    def _rows(self, chosen: np.ndarray, *columns: np.ndarray | int) -> np.ndarray:
        """Columns side by side, a number for all rows alike, of the chosen rows."""
        rows = len(self.entry)
        full = [c if isinstance(c, np.ndarray) else np.full(rows, c) for c in columns]
        return np.column_stack(full)[chosen]

    def hops(self) -> np.ndarray:
        to_owner = ~self.chain_last & (self.at != self.rank)
        whole = (~self.chain_first).astype(np.int64)
        deal = self._rows(to_owner, 0, 1, self.rank, self.at, self.link, self.map, self.extent, whole)
        # Across nodes: from the run's last entry to the next run, which the next entry begins.
        arriving = self.begins & ~self.chain_first
        at_before, passed = self.at[self.above], self.passed[self.above]
        across = self._rows(arriving, self.stage - 1, self.stage, at_before, self.at, passed, self.arrives, self.extent, 0)
        back = ~self.chain_first & (self.at != self.rank)
        home = self._register(5, self.entry)
        give = self._rows(back, self.stage, self.stage + 1, self.at, self.rank, self.enters, home, self.extent, 0)
        hops = np.concatenate([deal, across, give])
        return hops[np.lexsort((hops[:, 1], hops[:, 0]))]

    def folds(self) -> np.ndarray:
        middle = ~self.first_run & ~self.last_run
        total = self._rows(middle & ~self.begins, 1, self.at, self.total, self.map, self.total[self.above], self.extent, 1)
        passed = self._rows(middle & self.ends, self.stage, self.at, self.passed, self.total, self.arrives, self.extent, 0)
        inside = ~self.chain_first & ~self.chain_last & (self.first_run | ~self.ends)
        states = self._rows(inside, self.stage, self.at, self.leaves, self.map, self.enters, self.extent, 0)
        folds = np.concatenate([total, passed, states])
        return folds[np.argsort(folds[:, 0], kind="stable")]

    def outputs(self) -> np.ndarray:
        home = np.where(self.at == self.rank, self.enters, self._register(5, self.entry))
        return self._rows(~self.chain_first, self.rank, self.link, home, self.extent)
