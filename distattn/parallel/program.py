"""A schedule of attention over ranks, as three integer tables: Slots, Moves and Attends.

A *Slot* is a set of rows and heads that a rank holds for a while: query slots hold q and one partial result, KV slots hold
k and v. A *Move* copies rows from a slot into another (``Q_IN``, ``KV_IN``) or reduces a partial result into another
(``Q_OUT`` merges by log-sum-exp, ``KV_OUT`` adds); it is in flight from stage ``issue`` to stage ``due``. An *Attend*
computes, at a stage, the pairs *mask ∩ (q_rows × kv_rows)* of a query slot and a KV slot of one rank.

At time t = 0…S a rank waits for the Moves with ``due == t``, posts those with ``issue == t``, then computes stage t.

Tables are global (all ranks), immutable int64 arrays with these columns:

====================  =======================================================================
``slots``             rank, kind (Q | KV), h0, h1, rows        heads [h0, h1) are query heads in Q slots, KV heads in KV slots
``moves``             kind, src, dst, rows, issue, due
``attends``           stage, q_slot, kv_slot, q_rows, kv_rows, h0, h1      heads are query heads
``row_ptr/ranges``    row set i is ``row_ranges[row_ptr[i]:row_ptr[i+1]]``: disjoint half-open global ranges, in storage order
====================  =======================================================================

Slots 2r and 2r+1 are rank r's home: the rows of the layout, with all heads. Heads of a Move are those of the narrower slot.
In cross attention keys have a layout of their own, and row sets of KV slots count key rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from distattn.errors import PlanError
from distattn.parallel.layout import Layout

if TYPE_CHECKING:
    from distattn.mask import Mask
    from distattn.parallel.verify import Report

VERSION = 1

Q, KV = 0, 1
Q_IN, KV_IN, Q_OUT, KV_OUT = 0, 1, 2, 3

SLOT_RANK, SLOT_KIND, SLOT_H0, SLOT_H1, SLOT_ROWS = range(5)
MOVE_KIND, MOVE_SRC, MOVE_DST, MOVE_ROWS, MOVE_ISSUE, MOVE_DUE = range(6)
ATTEND_STAGE, ATTEND_Q, ATTEND_KV, ATTEND_Q_ROWS, ATTEND_KV_ROWS, ATTEND_H0, ATTEND_H1 = range(7)


@dataclass(frozen=True)
class RoundBudget:
    """num_bytes: most that a rank sends, and receives, in the transfers of one stage, for heads of ``head_dim`` features of
    ``element_bytes`` each and batch 1."""

    num_bytes: int
    head_dim: int
    element_bytes: int


@dataclass(frozen=True, eq=False)
class Program:
    """See the module's docstring. ``backward`` marks a program derived by ``derive_backward``.

    layout: of the queries, and of the keys where ``keys`` is None; keys: the keys' own layout, in cross attention. rounds: the
    budget that its transfers keep, and its backward's are to keep; None: no budget.
    """

    heads: int
    kv_heads: int
    layout: Layout
    row_ptr: np.ndarray = field(repr=False)
    row_ranges: np.ndarray = field(repr=False)
    slots: np.ndarray = field(repr=False)
    moves: np.ndarray = field(repr=False)
    attends: np.ndarray = field(repr=False)
    num_stages: int
    backward: bool = False
    keep: bool = False
    version: int = VERSION
    keys: Layout | None = None
    rounds: RoundBudget | None = None

    def __post_init__(self) -> None:
        for name, columns in (("row_ranges", 2), ("slots", 5), ("moves", 6), ("attends", 7)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.int64).reshape(-1, columns))
        object.__setattr__(self, "row_ptr", np.ascontiguousarray(self.row_ptr, np.int64))
        for name in ("row_ptr", "row_ranges", "slots", "moves", "attends"):
            getattr(self, name).flags.writeable = False

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    @property
    def key_layout(self) -> Layout:
        """Which key rows each rank holds."""
        return self.keys or self.layout

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @cached_property
    def row_counts(self) -> np.ndarray:
        """Rows of each row set, int64 [N]."""
        total = np.concatenate([[0], np.cumsum(self.row_ranges[:, 1] - self.row_ranges[:, 0])])
        return total[self.row_ptr[1:]] - total[self.row_ptr[:-1]]

    @cached_property
    def digest(self) -> str:
        """Hash of the tables; equal on all ranks that planned the same."""
        h = hashlib.blake2b(digest_size=16)
        h.update(repr((self.version, self.heads, self.kv_heads, self.num_stages, self.backward, self.keep)).encode())
        h.update(self.layout.digest.encode())
        if self.keys is not None:
            h.update(self.keys.digest.encode())
        if self.rounds is not None:
            h.update(repr(self.rounds).encode())
        for table in (self.row_ptr, self.row_ranges, self.slots, self.moves, self.attends):
            h.update(table.tobytes())
        return h.hexdigest()

    def rows(self, row_set: int) -> np.ndarray:
        """Ranges of one row set in storage order, int64 [k, 2]."""
        return self.row_ranges[self.row_ptr[row_set] : self.row_ptr[row_set + 1]]

    def move_heads(self) -> np.ndarray:
        """Heads [h0, h1) of each Move, int64 [m, 2]: those of the narrower slot."""
        src, dst = self.slots[self.moves[:, MOVE_SRC]], self.slots[self.moves[:, MOVE_DST]]
        return np.stack([np.maximum(src[:, SLOT_H0], dst[:, SLOT_H0]), np.minimum(src[:, SLOT_H1], dst[:, SLOT_H1])], axis=1)

    def verify(self, mask: Mask, *, max_rows_per_rank: int | None = None) -> Report:
        """Prove the invariants without running: every allowed (query, key, head) once, every slot filled once before its
        use, every partial result home once. Raises VerifyError naming the invariant; returns what was counted."""
        from distattn.parallel.verify import verify

        return verify(self, mask, max_rows_per_rank=max_rows_per_rank)


class ProgramBuilder:
    """Collects tables. Schedulers append whole arrays; a Python loop over rank pairs is a bug."""

    def __init__(self, layout: Layout, heads: int, kv_heads: int, key_layout: Layout | None = None) -> None:
        """key_layout: of the keys, where they are not the queries' rows. home_rows, home_keys: row set of each rank, [P]."""
        check_heads(heads, kv_heads)
        self.layout, self.heads, self.kv_heads, self.keys = layout, heads, kv_heads, key_layout
        self._sets: list[np.ndarray] = []
        self._num_sets = 0
        self._set_lengths: list[np.ndarray] = []
        self._slots: list[np.ndarray] = []
        self._num_slots = 0
        self._moves: list[np.ndarray] = []
        self._attends: list[np.ndarray] = []
        self.home_rows = self.home_keys = self.add_row_sets(layout.ptr, layout.ranges)
        if key_layout is not None:
            self.home_keys = self.add_row_sets(key_layout.ptr, key_layout.ranges)
        home = np.zeros((layout.num_ranks, 2, 5), np.int64)
        home[:, :, SLOT_RANK] = np.arange(layout.num_ranks)[:, None]
        home[:, 1, SLOT_KIND] = KV
        home[:, 0, SLOT_H1], home[:, 1, SLOT_H1] = heads, kv_heads
        home[:, 0, SLOT_ROWS], home[:, 1, SLOT_ROWS] = self.home_rows, self.home_keys
        self.add_slots(home.reshape(-1, 5))

    def add_row_sets(self, ptr: np.ndarray, ranges: np.ndarray) -> np.ndarray:
        """Row sets in CSR form; returns their ids, int64 [N]. Equal sets may be added twice; ids then differ."""
        count = len(ptr) - 1
        self._sets.append(np.asarray(ranges, np.int64).reshape(-1, 2))
        self._set_lengths.append(np.diff(ptr))
        self._num_sets += count
        return np.arange(self._num_sets - count, self._num_sets)

    def add_row_set(self, ranges: Sequence[tuple[int, int]] | np.ndarray) -> int:
        """One row set; returns its id."""
        flat = np.asarray(ranges, np.int64).reshape(-1, 2)
        return int(self.add_row_sets(np.array([0, len(flat)]), flat)[0])

    def add_slots(self, slots: np.ndarray) -> np.ndarray:
        """Rows of the slot table; returns their ids, int64 [n]."""
        slots = np.asarray(slots, np.int64).reshape(-1, 5)
        self._slots.append(slots)
        self._num_slots += len(slots)
        return np.arange(self._num_slots - len(slots), self._num_slots)

    def add_moves(self, moves: np.ndarray) -> None:
        self._moves.append(np.asarray(moves, np.int64).reshape(-1, 6))

    def add_attends(self, attends: np.ndarray) -> None:
        self._attends.append(np.asarray(attends, np.int64).reshape(-1, 7))

    def build(self) -> Program:
        """Sorts Moves by (issue, due) and Attends by stage, drops Moves and Attends without rows, and freezes."""
        lengths = np.concatenate([*self._set_lengths])
        row_ptr = np.concatenate([[0], np.cumsum(lengths)])
        moves = np.concatenate([np.zeros((0, 6), np.int64), *self._moves])
        attends = np.concatenate([np.zeros((0, 7), np.int64), *self._attends])
        filled = lengths[moves[:, MOVE_ROWS]] > 0
        moves = moves if filled.all() else moves[filled]
        attends = attends[
            (lengths[attends[:, ATTEND_Q_ROWS]] > 0)
            & (lengths[attends[:, ATTEND_KV_ROWS]] > 0)
            & (attends[:, ATTEND_H0] < attends[:, ATTEND_H1])
        ]
        latest = int(moves[:, MOVE_DUE].max(initial=0)) + 1
        moves = moves.take(np.argsort(moves[:, MOVE_ISSUE] * latest + moves[:, MOVE_DUE], kind="stable"), 0)
        attends = attends[np.argsort(attends[:, ATTEND_STAGE], kind="stable")]
        stages = max(int(attends[:, ATTEND_STAGE].max(initial=-1)) + 1, int(moves[:, MOVE_DUE].max(initial=0)))
        return Program(
            heads=self.heads,
            kv_heads=self.kv_heads,
            layout=self.layout,
            row_ptr=row_ptr,
            row_ranges=np.concatenate(self._sets),
            slots=np.concatenate(self._slots),
            moves=moves,
            attends=attends,
            num_stages=stages,
            keys=self.keys,
        )


def check_heads(heads: int, kv_heads: int) -> None:
    """Query heads must be a positive multiple of KV heads."""
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise PlanError(f"heads must be a positive multiple of kv_heads, got heads={heads} and kv_heads={kv_heads}")
