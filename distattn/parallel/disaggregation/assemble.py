"""From who computes what to a Program.

    stage 0   every rank attends to what is all its own      while queries and keys travel to their servers
    stage 1   servers attend for others                      each key row came once, whatever tasks use it
    stage 2   own queries, fetched keys                      while partial results travel home and merge

A server holds foreign queries and fetched keys in one slot per run of heads that the same tasks use; keys that it owns are read
where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distattn.parallel.csr import expand, pointers, segment_starts
from distattn.parallel.disaggregation.balance import Assignment
from distattn.parallel.disaggregation.caps import Caps
from distattn.parallel.layout import Layout
from distattn.parallel.program import KV, KV_IN, Q_IN, Q_OUT, Program, ProgramBuilder, Q

_FOREIGN_STAGE, _FETCHED_STAGE = 1, 2
_STRIDE = 1 << 31


@dataclass(frozen=True, eq=False)
class TaskTable:
    """All tasks as arrays. box: int64 [N, 4] (q0, q1, k0, k1); heads: int64 [N, 2] (g0, g1); home, server: int64 [N]."""

    box: np.ndarray = field(repr=False)
    heads: np.ndarray = field(repr=False)
    home: np.ndarray = field(repr=False)
    server: np.ndarray = field(repr=False)


def task_table(assignment: Assignment) -> TaskTable:
    """Home tasks that stayed, then placed ones."""
    home, stays = assignment.home, assignment.stays
    placed = np.array(
        [(t.q0, t.q1, t.k0, t.k1, t.g0, t.g1, t.home, server) for server, t in assignment.placed], np.int64
    ).reshape(-1, 8)
    count = int(stays.sum())
    heads = np.zeros((count, 2), np.int64)
    heads[:, 1] = home.kv_heads
    return TaskTable(
        np.concatenate([home.box[stays], placed[:, :4]]),
        np.concatenate([heads, placed[:, 4:6]]),
        np.concatenate([home.home[stays], placed[:, 6]]),
        np.concatenate([home.home[stays], placed[:, 7]]),
    )


def assemble(tasks: TaskTable, layout: Layout, heads: int, kv_heads: int) -> Program:
    """The program in which each server computes its tasks."""
    builder = ProgramBuilder(layout, heads, kv_heads)
    borders = _Borders(layout)
    local = _undisturbed(tasks, borders, kv_heads)
    _attend_at_home(builder, tasks, local)
    tasks = _split_heads(_select(tasks, ~local), layout.num_ranks, kv_heads)
    part, k0, k1, owner = borders.cut(tasks.box[:, 2], tasks.box[:, 3])
    fetched = owner != tasks.server[part]
    key_slots = _fetch_keys(builder, tasks, part[fetched], k0[fetched], k1[fetched], borders)
    query_slots = _fetch_queries(builder, tasks)
    _attend(builder, tasks, part, k0, k1, fetched, key_slots, query_slots)
    return builder.build()


def received(tasks: TaskTable, layout: Layout, kv_heads: int, caps: Caps) -> np.ndarray:
    """What each rank receives in a forward, in key rows as in ``Caps``, float64 [P]: as counted of the program, but results
    count as partial ones also where a home computes nothing."""
    ranks, borders = layout.num_ranks, _Borders(layout)
    tasks = _split_heads(tasks, ranks, kv_heads)
    width = (tasks.heads[:, 1] - tasks.heads[:, 0]).astype(np.float64)
    slot = tasks.server * (kv_heads + 1) + tasks.heads[:, 0]
    width_of = np.zeros(ranks * (kv_heads + 1))
    width_of[slot] = width
    part, k0, k1, owner = borders.cut(tasks.box[:, 2], tasks.box[:, 3])
    fetched = owner != tasks.server[part]
    keys, first, last = _union(slot[part[fetched]], k0[fetched], k1[fetched])
    total = np.zeros(ranks)
    total += np.bincount(keys // (kv_heads + 1), weights=(last - first) * width_of[keys], minlength=ranks)
    foreign = tasks.server != tasks.home
    key, first, last = _union((slot * ranks + tasks.home)[foreign], tasks.box[foreign, 0], tasks.box[foreign, 1])
    rows = (last - first) * width_of[key // ranks]
    total += caps.query_in * np.bincount(key // ranks // (kv_heads + 1), weights=rows, minlength=ranks)
    total += caps.query_out * np.bincount(key % ranks, weights=rows, minlength=ranks)
    return total


def _select(tasks: TaskTable, chosen: np.ndarray) -> TaskTable:
    return TaskTable(tasks.box[chosen], tasks.heads[chosen], tasks.home[chosen], tasks.server[chosen])


def _undisturbed(tasks: TaskTable, borders: _Borders, kv_heads: int) -> np.ndarray:
    """Tasks at home with all heads and all keys, whose rows no other kind of task touches, bool [N]: a rank's whole share of
    these is one box."""
    first = np.searchsorted(borders.starts, tasks.box[:, 2], "right") - 1
    within = (tasks.box[:, 3] <= borders.ends[first]) & (borders.owner[first] == tasks.home)
    local = within & (tasks.server == tasks.home) & (tasks.heads[:, 1] - tasks.heads[:, 0] == kv_heads)
    while True:
        _, start, end = _union(np.zeros(int((~local).sum()), np.int64), tasks.box[~local, 0], tasks.box[~local, 1])
        reaches = np.searchsorted(start, tasks.box[:, 1], "left") > np.searchsorted(end, tasks.box[:, 0], "right")
        if not (local & reaches).any():
            return local
        # A task that is disturbed disturbs those that share rows with it.
        local &= ~reaches


def _attend_at_home(builder: ProgramBuilder, tasks: TaskTable, local: np.ndarray) -> None:
    """One Attend a rank for its undisturbed tasks."""
    sets = []
    for column in (0, 2):
        rank, start, end = _union(tasks.home[local], tasks.box[local, column], tasks.box[local, column + 1])
        ranks = np.unique(rank)
        sets.append(builder.add_row_sets(pointers(np.searchsorted(ranks, rank), len(ranks)), np.stack([start, end], 1)))
    ranks = np.unique(tasks.home[local])
    zero = 0 * ranks
    builder.add_attends(np.stack([zero, 2 * ranks, 2 * ranks + 1, *sets, zero, zero + builder.heads], 1))


def _split_heads(tasks: TaskTable, num_ranks: int, kv_heads: int) -> TaskTable:
    """Cut tasks at the head borders of their server's tasks, so that slots of a server have equal or disjoint heads."""
    is_border = np.zeros((num_ranks, kv_heads + 1), bool)
    is_border[:, [0, kv_heads]] = True
    is_border[tasks.server, tasks.heads[:, 0]] = True
    is_border[tasks.server, tasks.heads[:, 1]] = True
    rank, border = np.nonzero(is_border)
    key = rank * (kv_heads + 1) + border
    first = np.searchsorted(key, tasks.server * (kv_heads + 1) + tasks.heads[:, 0])
    last = np.searchsorted(key, tasks.server * (kv_heads + 1) + tasks.heads[:, 1])
    source, at = expand(first, last - first)
    return TaskTable(tasks.box[source], np.stack([border[at], border[at + 1]], 1), tasks.home[source], tasks.server[source])


class _Borders:
    """The layout's ranges in row order, to cut row ranges by owner."""

    def __init__(self, layout: Layout) -> None:
        order = np.argsort(layout.ranges[:, 0], kind="stable")
        self.starts, self.ends = layout.ranges[order].T
        self.owner = layout.range_owner[order]

    def cut(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(index of the range, start, end, owner) of the pieces of row ranges; neighbours of one owner stay cut."""
        first = np.searchsorted(self.starts, start, "right") - 1
        last = np.searchsorted(self.starts, end, "left")
        which, at = expand(first, last - first)
        return which, np.maximum(start[which], self.starts[at]), np.minimum(end[which], self.ends[at]), self.owner[at]


def _union(key: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unions of row ranges with equal keys, sorted by (key, start): (key, start, end)."""
    order = np.lexsort((start, key))
    low, high = key[order] * _STRIDE + start[order], key[order] * _STRIDE + end[order]
    reach = np.maximum.accumulate(high)
    opens = np.flatnonzero(np.concatenate([[True], low[1:] > reach[:-1]])[: len(low)])
    closes = np.append(opens[1:], len(low)) - 1 if len(low) else opens
    return key[order][opens], start[order][opens], reach[closes] % _STRIDE


def _fetch_keys(
    builder: ProgramBuilder, tasks: TaskTable, part: np.ndarray, k0: np.ndarray, k1: np.ndarray, borders: _Borders
) -> _Slots:
    """A KV slot per (server, heads) with the union of the rows that its tasks need from others, and the Moves into it."""
    key = tasks.server[part] * (builder.kv_heads + 1) + tasks.heads[part, 0]
    slots = _Slots(builder, key, tasks.server[part], tasks.heads[part], KV)
    united, start, end = _union(slots.index, k0, k1)
    slots.create(united, start, end)
    which, start, end, owner = borders.cut(start, end)
    _add_copies(builder, slots, KV_IN, united[which], owner, start, end)
    return slots


def _fetch_queries(builder: ProgramBuilder, tasks: TaskTable) -> _Slots:
    """A Q slot per (server, heads) with the rows of other ranks that it serves, and the Moves there and back."""
    foreign = np.flatnonzero(tasks.server != tasks.home)
    key = tasks.server[foreign] * (builder.kv_heads + 1) + tasks.heads[foreign, 0]
    slots = _Slots(builder, key, tasks.server[foreign], tasks.heads[foreign] * (builder.heads // builder.kv_heads), Q)
    # Per home, so that rows of different homes that touch stay apart.
    by_home = slots.index * builder.layout.num_ranks + tasks.home[foreign]
    united, start, end = _union(by_home, tasks.box[foreign, 0], tasks.box[foreign, 1])
    index, home = united // builder.layout.num_ranks, united % builder.layout.num_ranks
    slots.create(index, start, end)
    _add_copies(builder, slots, Q_IN, index, home, start, end)
    return slots


class _Slots:
    """Slots of one kind, one per distinct key."""

    def __init__(self, builder: ProgramBuilder, key: np.ndarray, server: np.ndarray, heads: np.ndarray, kind: int) -> None:
        self.builder, self.kind = builder, kind
        self.keys, first, self.index = np.unique(key, return_index=True, return_inverse=True)
        self.server, self.heads = server[first], heads[first]
        self.ids = self.rows = np.zeros(0, np.int64)

    def create(self, index: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
        """Add the slots, with these rows; index: sorted."""
        self.rows = self.builder.add_row_sets(pointers(index, len(self.keys)), np.stack([start, end], 1))
        kind = np.full(len(self.keys), self.kind)
        self.ids = self.builder.add_slots(np.stack([self.server, kind, self.heads[:, 0], self.heads[:, 1], self.rows], 1))

    def find(self, key: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.keys, key)


def _add_copies(
    builder: ProgramBuilder,
    slots: _Slots,
    kind: int,
    index: np.ndarray,
    owner: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
) -> None:
    """One Move per (slot, owner) with all its rows; queries also go back. index, start: sorted."""
    order = np.argsort(index * builder.layout.num_ranks + owner, kind="stable")
    index, owner, start, end = index[order], owner[order], start[order], end[order]
    first = segment_starts(index, owner)
    sets = builder.add_row_sets(np.append(first, len(index)), np.stack([start, end], 1))
    here, there, one = slots.ids[index[first]], 2 * owner[first] + (kind == KV_IN), np.ones(len(first), np.int64)
    builder.add_moves(np.stack([one * kind, there, here, sets, 0 * one, one], 1))
    if kind == Q_IN:
        due = one * (_FOREIGN_STAGE + 2)
        builder.add_moves(np.stack([one * Q_OUT, here, there, sets, due - 1, due], 1))


def _attend(
    builder: ProgramBuilder,
    tasks: TaskTable,
    part: np.ndarray,
    k0: np.ndarray,
    k1: np.ndarray,
    fetched: np.ndarray,
    key_slots: _Slots,
    query_slots: _Slots,
) -> None:
    """An Attend per task and side of its keys: those that the server owns, and those that it fetched."""
    group = builder.heads // builder.kv_heads
    order = np.lexsort((k0, fetched, part))
    part, k0, k1, fetched = part[order], k0[order], k1[order], fetched[order]
    first = segment_starts(part, fetched)
    sets = builder.add_row_sets(np.append(first, len(part)), np.stack([k0, k1], 1))
    task, fetched = part[first], fetched[first]
    server, key = tasks.server[task], tasks.server[task] * (builder.kv_heads + 1) + tasks.heads[task, 0]
    foreign = server != tasks.home[task]
    rows = builder.add_row_sets(np.arange(len(tasks.box) + 1), tasks.box[:, :2])[task]
    q_slot, kv_slot = 2 * server, 2 * server + 1
    q_slot[foreign] = query_slots.ids[query_slots.find(key[foreign])]
    kv_slot[fetched] = key_slots.ids[key_slots.find(key[fetched])]
    stage = np.where(foreign, _FOREIGN_STAGE, np.where(fetched, _FETCHED_STAGE, 0))
    heads = tasks.heads[task] * group
    builder.add_attends(np.stack([stage, q_slot, kv_slot, rows, sets, heads[:, 0], heads[:, 1]], 1))
