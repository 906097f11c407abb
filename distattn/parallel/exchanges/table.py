"""An exchange as data: hops that carry states or maps between ranks, and folds that compute with them.

Registers hold a state, or a map, or a part of one (heads × columns). Register i below ``num_links`` is link i's own map, on its
rank, from the start; every other is written once. At each stage a rank waits for the hops that are due, folds in table order,
and posts the hops that are issued.

Hop      register ``source`` of rank ``src`` becomes ``target`` of rank ``dst``: all of the map, or only its state
Fold     ``target`` = map ∘ state, or map ∘ map (compose)
Output   the state that enters a link, in parts

A scheduler of exchanges (``distattn.parallel.exchanges.EXCHANGES``) turns ``Chains`` into such a table and touches no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distattn.errors import VerifyError
from distattn.parallel.exchanges.stream import Chains

HOP_COLUMNS = ("issue", "due", "src", "dst", "source", "target", "h0", "h1", "v0", "v1", "whole")
FOLD_COLUMNS = ("stage", "rank", "target", "map", "state", "h0", "h1", "v0", "v1", "compose")
OUTPUT_COLUMNS = ("rank", "link", "register", "h0", "h1", "v0", "v1")
ISSUE, DUE, SRC, DST, SOURCE, TARGET, HOP_H0 = range(7)
WHOLE = 10
STAGE, RANK, OUT, MAP, STATE, FOLD_H0 = range(6)
COMPOSE = 9


@dataclass(frozen=True, eq=False)
class Table:
    """Hops, folds and outputs of all ranks, int64. heads, columns: of the whole state."""

    exchange: str
    chains: Chains
    heads: int
    columns: int
    hops: np.ndarray
    folds: np.ndarray
    outputs: np.ndarray

    @property
    def num_links(self) -> int:
        return len(self.chains.rank_of)

    @cached_property
    def num_stages(self) -> int:
        """Stages 0 … num_stages; nothing is issued in the last."""
        return int(max(self.hops[:, DUE].max(initial=0), self.folds[:, STAGE].max(initial=0)))

    @cached_property
    def posts(self) -> np.ndarray:
        """Distinct (issue, due), in the order in which every rank posts them: int64 [n, 2]."""
        return np.unique(self.hops[:, [ISSUE, DUE]], axis=0)

    def bytes_sent(self, state_bytes: float, transition_bytes: float) -> np.ndarray:
        """Bytes that each rank sends, float64 [P]. state_bytes: of a head's column; transition_bytes: of a head."""
        h = self.hops
        heads, columns = h[:, HOP_H0 + 1] - h[:, HOP_H0], h[:, HOP_H0 + 3] - h[:, HOP_H0 + 2]
        size = heads * columns * state_bytes + h[:, WHOLE] * heads * transition_bytes
        return np.bincount(h[:, SRC], weights=size, minlength=self.chains.num_ranks)


def verify_table(table: Table) -> None:
    """Prove, without running, that each link gets the composition of the maps before it in its chain, in order, whole.

    Raises VerifyError that names the row and what is wrong with it.
    """
    chains = table.chains
    proof = _Proof(table)
    for stage in range(table.num_stages + 1):
        for row in table.hops[table.hops[:, DUE] == stage]:
            proof.arrive(row)
        for row in table.folds[table.folds[:, STAGE] == stage]:
            proof.fold(row)
        for row in table.hops[table.hops[:, ISSUE] == stage]:
            proof.depart(row)
    area = dict.fromkeys(chains.links[~chains.first].tolist(), 0)
    position = {int(link): i for i, link in enumerate(chains.links) if not chains.first[i]}
    for rank, link, register, *extent in table.outputs.tolist():
        begin, end, _ = proof.read(rank, register, extent, f"output of link {link}")
        chain = int(chains.chain_of[position[link]])
        if chains.rank_of[link] != rank or (begin, end) != (int(chains.ptr[chain]), position[link]):
            raise VerifyError(f"output of link {link} on rank {rank} holds links {begin} to {end}, not all before it")
        area[link] += (extent[1] - extent[0]) * (extent[3] - extent[2])
    short = [link for link, size in area.items() if size != table.heads * table.columns]
    if short:
        raise VerifyError(f"links {short} do not get each head and column of their state exactly once")


class _Proof:
    """What each register holds: the composition of the chain entries [begin, end), and which heads and columns of it."""

    def __init__(self, table: Table) -> None:
        self.table, c = table, table.chains
        whole = [0, table.heads, 0, table.columns]
        self.held = {
            (int(c.rank_of[link]), link): (i, i + 1, whole) for i, link in enumerate(c.links.tolist()) if not c.last[i]
        }
        self.flying: dict[tuple[int, ...], tuple[int, int]] = {}

    def read(self, rank: int, register: int, extent: list[int], where: str) -> tuple[int, int, bool]:
        """(begin, end, whether it is a state) of a register."""
        if (rank, register) not in self.held:
            raise VerifyError(f"{where}: rank {rank} has no register {register} yet")
        begin, end, held = self.held[rank, register]
        if not (held[0] <= extent[0] < extent[1] <= held[1] and held[2] <= extent[2] < extent[3] <= held[3]):
            raise VerifyError(f"{where}: register {register} of rank {rank} does not hold heads and columns {extent}")
        return begin, end, bool(self.table.chains.first[begin])

    def depart(self, row: np.ndarray) -> None:
        issue, due, src, dst, source, _, *extent, whole = row.tolist()
        where = f"hop {issue} to {due} from rank {src} to {dst}"
        begin, end, state = self.read(src, source, extent, where)
        if due <= issue or src == dst:
            raise VerifyError(f"{where}: a hop takes at least a stage and leaves its rank")
        if bool(whole) == state:
            raise VerifyError(f"{where}: maps are sent whole and states are not, register {source} is the other")
        self.flying[tuple(row.tolist())] = (begin, end)

    def arrive(self, row: np.ndarray) -> None:
        begin, end = self.flying.pop(tuple(row.tolist()))
        self._write(int(row[DST]), int(row[TARGET]), begin, end, row[HOP_H0 : HOP_H0 + 4].tolist())

    def fold(self, row: np.ndarray) -> None:
        stage, rank, target, right, left, *extent, compose = row.tolist()
        where = f"fold at stage {stage} of rank {rank}"
        begin, middle, state = self.read(rank, left, extent, where)
        other, end, begins = self.read(rank, right, extent, where)
        if other != middle or begins or bool(compose) == state:
            raise VerifyError(f"{where}: links {begin} to {middle} and {other} to {end} do not follow one another from a start")
        self._write(rank, target, begin, end, extent)

    def _write(self, rank: int, register: int, begin: int, end: int, extent: list[int]) -> None:
        if (rank, register) in self.held:
            raise VerifyError(f"register {register} of rank {rank} is written twice")
        self.held[rank, register] = (begin, end, extent)
