"""What each rank receives and holds under an assignment, counted while tasks move, and the caps on both.

Everything is in key rows: one row of K and V of one KV head counts 1. A query row is one of a KV head's group of query heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from distattn.parallel.disaggregation.residency import Intervals, Residency
from distattn.parallel.disaggregation.tasks import Task


@dataclass(frozen=True)
class Caps:
    """receive, memory: most that a rank may receive in a forward, and hold besides its own rows.

    query_in, query_out, query_held: what one query row weighs on its way (q), on its way back (its partial result), and while
    it is held (both).
    """

    query_in: float
    query_out: float
    query_held: float
    receive: float = math.inf
    memory: float = math.inf

    @property
    def query_cost(self) -> float:
        """There and back."""
        return self.query_in + self.query_out

    @property
    def bind(self) -> bool:
        return math.isfinite(self.receive) or math.isfinite(self.memory)


class Usage:
    """received, held: float64 [P]. refused: the cap for which ``allows`` last said no; binding: one that left a rank stuck."""

    def __init__(self, caps: Caps, residency: Residency, num_ranks: int) -> None:
        self.caps, self.residency = caps, residency
        self.received, self.held = np.zeros(num_ranks), np.zeros(num_ranks)
        self._arrived = np.zeros(num_ranks)
        self._returned = np.zeros(num_ranks)
        self.refused = self.binding = ""

    def refresh(self, rank: int, tasks: Iterable[Task]) -> None:
        """Count anew what the rank's tasks need from elsewhere; tasks: all that use others' rows."""
        per_head: dict[int, Intervals] = {}
        rows = 0
        for task in tasks:
            rows += 0 if task.home == rank else (task.q1 - task.q0) * (task.g1 - task.g0)
            for g in range(task.g0, task.g1):
                per_head.setdefault(g, Intervals()).add(task.k0, task.k1)
        keys = sum(
            b - a - self.residency.own_rows(rank, a, b)
            for union in per_head.values()
            for a, b in zip(union.starts, union.ends, strict=True)
        )
        self._arrived[rank] = keys + self.caps.query_in * rows
        self.held[rank] = keys + self.caps.query_held * rows
        self._sum(rank)

    def note_return(self, home: int, rows: int) -> None:
        """This many more query rows × KV heads of ``home`` are served elsewhere (less, if negative)."""
        self._returned[home] += self.caps.query_out * rows
        self._sum(home)

    def _sum(self, rank: int) -> None:
        self.received[rank] = self._arrived[rank] + self._returned[rank]

    def allows(self, receiver: int, home: int, rows: int, missing: int) -> bool:
        """Whether ``receiver`` may take query rows × heads of ``home`` and ``missing`` key rows, and ``home`` the results."""
        caps, foreign = self.caps, rows if receiver != home else 0
        arrives = missing + caps.query_in * foreign
        if self.received[receiver] + arrives > caps.receive:
            self.refused = "receive_bytes"
        elif self.held[receiver] + missing + caps.query_held * foreign > caps.memory:
            self.refused = "memory_bytes"
        elif receiver != home and self.received[home] + caps.query_out * rows > caps.receive:
            self.refused = "receive_bytes"
        else:
            return True
        return False

    def worst(self, skip: np.ndarray) -> tuple[int, float]:
        """(rank, excess ratio) of the rank furthest over a cap, those in ``skip`` left out."""
        ratio = np.maximum(self.received / self.caps.receive, self.held / self.caps.memory)
        ratio = np.where(skip, 0.0, ratio)
        rank = int(ratio.argmax())
        return rank, float(ratio[rank])
