"""One rank's executable form of a Program: local indices, message contents and tile tables, computed once and replayed.

Slots of one rank, kind and head count share an *arena*: one tensor whose rows are handed out by lifetime, so that all the
Attends of a stage on the same pair of arenas are one backend call. Arenas 0 and 1 are the rank's home: the user's own tensors.
A slot has rows from its first arrival until its last use; what is still in flight lives in message buffers. A ring therefore
comes out at one chunk in the arena plus one in flight.

Within time t: rows arrive (phase 0), messages are packed and same-rank Moves are done (phase 1), tiles are computed (phase 2).
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch

from distattn.mask import Mask
from distattn.parallel.alone import gradients_alone, results_alone
from distattn.parallel.csr import expand
from distattn.parallel.program import (
    ATTEND_H0,
    ATTEND_H1,
    ATTEND_KV,
    ATTEND_KV_ROWS,
    ATTEND_Q,
    ATTEND_Q_ROWS,
    ATTEND_STAGE,
    KV,
    MOVE_DST,
    MOVE_DUE,
    MOVE_ISSUE,
    MOVE_KIND,
    MOVE_ROWS,
    MOVE_SRC,
    Q_OUT,
    SLOT_H0,
    SLOT_H1,
    SLOT_KIND,
    SLOT_RANK,
    SLOT_ROWS,
    Program,
    Q,
)
from distattn.parallel.tiling import build_tiles

HOME_Q, HOME_KV = 0, 1
ARRIVE, POST, COMPUTE = range(3)
NUM_PHASES = 3
_CACHE_SIZE = 64


@dataclass(frozen=True)
class Arena:
    """Rows that slots of one kind and head count share. ``num_rows`` of the home arenas is the rank's share of the layout.

    turns: its slots all fill it, one after the other, so that each may have tensors of its own: what arrives is not copied
    into place, and what leaves need not be out before the next one comes.
    """

    kind: int
    num_heads: int
    num_rows: int
    turns: bool = False


class Rows:
    """Rows of an arena in message order: a slice where they are consecutive, else an index tensor."""

    __slots__ = ("_index", "count", "slice")

    def __init__(self, segments: np.ndarray) -> None:
        """segments: int64 [n, 2], first row and count of each run."""
        self.count = int(segments[:, 1].sum())
        self.slice: slice | None = None
        self._index: dict[torch.device, torch.Tensor] = {}
        ends = segments[:, 0] + segments[:, 1]
        if np.array_equal(ends[:-1], segments[1:, 0]):
            start = int(segments[0, 0]) if len(segments) else 0
            self.slice = slice(start, start + self.count)
        else:
            _, flat = expand(segments[:, 0], segments[:, 1])
            self._index[torch.device("cpu")] = torch.from_numpy(flat)

    def index(self, device: torch.device) -> torch.Tensor:
        """int64 [count] on the device (copied there once); only where ``slice`` is None."""
        if device not in self._index:
            self._index[device] = self._index[torch.device("cpu")].to(device)
        return self._index[device]


@dataclass(frozen=True, eq=False)
class Part:
    """One end of a Move: rows and heads of an arena."""

    arena: int
    rows: Rows
    h0: int
    h1: int


@dataclass(frozen=True, eq=False)
class Item:
    """One Move inside a message. ``alone``: these rows and heads get no other result, so out may travel in the input dtype."""

    move: int
    kind: int
    part: Part
    alone: bool


@dataclass(frozen=True, eq=False)
class LocalMove:
    """A Move whose two slots are on this rank."""

    move: int
    kind: int
    src: Part
    dst: Part
    alone: bool


@dataclass(frozen=True, eq=False)
class Exchange:
    """Everything that leaves at ``issue`` and is awaited at ``due``, over all ranks: one collective call.

    sends, receives: (peer, items in table order), peers ascending; both may be empty on this rank.
    """

    issue: int
    due: int
    sends: tuple[tuple[int, tuple[Item, ...]], ...]
    receives: tuple[tuple[int, tuple[Item, ...]], ...]


@dataclass(frozen=True, eq=False)
class Group:
    """One backend call: tiles (columns of distattn.kernels.protocol) over a query arena and a KV arena."""

    q_arena: int
    kv_arena: int
    tiles: np.ndarray


@dataclass(eq=False)
class Step:
    """What the rank does at one time. ``born``: per phase, (arena, rows) of slots whose accumulators start here."""

    waits: list[int] = field(default_factory=list)
    posts: list[int] = field(default_factory=list)
    local: list[LocalMove] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    born: tuple[list[tuple[int, Rows]], ...] = field(default_factory=lambda: ([], [], []))


@dataclass(frozen=True, eq=False)
class Lowered:
    """See the module's docstring.

    last_work: after this time no rank computes or posts, so that only waiting is left. out_alone: the home query slot only
    receives finished results and needs no carry. home_results: how many results the home query slot gets, from kernel calls and
    from other ranks. wire: message layouts by tensor shape, filled by the executor.
    """

    rank: int
    num_ranks: int
    group: int
    backward: bool
    keep: bool
    last_work: int
    arenas: tuple[Arena, ...]
    steps: tuple[Step, ...]
    exchanges: tuple[Exchange, ...]
    out_alone: bool
    home_results: int = 0
    wire: dict = field(default_factory=dict, repr=False)


_cache: OrderedDict[tuple, Lowered] = OrderedDict()
_cache_lock = threading.Lock()


def lower(program: Program, mask: Mask, rank: int, *, keep: bool = False) -> Lowered:
    """The executable form of ``program`` on ``rank``; cached by value.

    keep: every slot has rows of its own for the whole call, in slot order, so that a backward with ``program.keep`` finds
    what the forward received.
    """
    keep = keep or program.keep
    key = (program.digest, mask.digest, rank, keep)
    with _cache_lock:
        if key in _cache:
            _cache.move_to_end(key)
            return _cache[key]
    lowered = _Lowering(program, rank, keep).run(mask)
    with _cache_lock:
        _cache[key] = lowered
        if len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return lowered


def locate(rows: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Where global ranges lie in the storage of a slot that holds them.

    rows, within: int64 [n, 2], [m, 2] disjoint ranges in storage order. Returns int64 [k, 3] in the order of ``rows``: first
    global row, first local row, count.
    """
    order = np.argsort(within[:, 0], kind="stable")
    starts = within[order, 0]
    sizes = within[:, 1] - within[:, 0]
    offsets = np.cumsum(sizes) - sizes
    first = np.searchsorted(starts, rows[:, 0], "right") - 1
    last = np.searchsorted(starts, rows[:, 1], "left") - 1
    which, flat = expand(first, last - first + 1)
    held = order[flat]
    start = np.maximum(rows[which, 0], within[held, 0])
    stop = np.minimum(rows[which, 1], within[held, 1])
    return np.stack([start, offsets[held] + start - within[held, 0], stop - start], 1)


class _Lowering:
    """Working state of one ``lower`` call."""

    def __init__(self, program: Program, rank: int, keep: bool) -> None:
        self.program, self.rank, self.keep = program, rank, keep
        self.slots, self.moves, self.attends = program.slots, program.moves, program.attends
        self.src_rank = self.slots[self.moves[:, MOVE_SRC], SLOT_RANK]
        self.dst_rank = self.slots[self.moves[:, MOVE_DST], SLOT_RANK]
        self.mine = np.flatnonzero((self.src_rank == rank) | (self.dst_rank == rank))
        self.my_attends = self.attends[self.slots[self.attends[:, ATTEND_Q], SLOT_RANK] == rank]
        self.heads = program.move_heads()
        self.steps = [Step() for _ in range(program.num_stages + 1)]
        self.arena_of: dict[int, int] = {2 * rank: HOME_Q, 2 * rank + 1: HOME_KV}
        self.base_of: dict[int, int] = {2 * rank: 0, 2 * rank + 1: 0}
        self.located: dict[tuple[int, int], np.ndarray] = {}

    def run(self, mask: Mask) -> Lowered:
        program = self.program
        arenas = self._arenas()
        alone = gradients_alone(program) if program.backward else results_alone(program, self.heads)
        exchanges = self._exchanges(alone)
        self._groups(mask)
        home = 2 * self.rank
        into_home = (self.moves[:, MOVE_DST] == home) & (self.moves[:, MOVE_KIND] == Q_OUT)
        return Lowered(
            rank=self.rank,
            num_ranks=program.num_ranks,
            group=program.group_size,
            backward=program.backward,
            keep=program.keep,
            last_work=int(max(self.moves[:, MOVE_ISSUE].max(initial=0), self.attends[:, ATTEND_STAGE].max(initial=0))),
            arenas=arenas,
            steps=tuple(self.steps),
            exchanges=exchanges,
            home_results=int(into_home.sum()) + sum(g.q_arena == HOME_Q for step in self.steps for g in step.groups),
            out_alone=bool(not program.backward and into_home.any() and alone[into_home].all()),
        )

    def _locate(self, row_set: int, slot: int) -> np.ndarray:
        """Ranges of a row set in a slot, cached: int64 [k, 3] first global row, first arena row, count."""
        held = int(self.slots[slot, SLOT_ROWS])
        key = (row_set, held)
        if key not in self.located:
            rows = self.program.rows(row_set)
            if row_set == held:
                sizes = rows[:, 1] - rows[:, 0]
                self.located[key] = np.stack([rows[:, 0], np.cumsum(sizes) - sizes, sizes], 1)
            else:
                self.located[key] = locate(rows, self.program.rows(held))
        return self.located[key] + np.array([0, self.base_of[slot], 0])

    def _part(self, move: int, slot: int) -> Part:
        first = int(self.slots[slot, SLOT_H0])
        h0, h1 = (self.heads[move] - first).tolist()
        segments = self._locate(int(self.moves[move, MOVE_ROWS]), slot)
        return Part(self.arena_of[slot], Rows(segments[:, 1:]), h0, h1)

    def _arenas(self) -> tuple[Arena, ...]:
        """Give every slot of the rank its rows, and note when its accumulators start."""
        rank, counts = self.rank, self.program.row_counts
        p = self.program
        arenas = [
            Arena(Q, p.heads, int(p.layout.counts[rank])),
            Arena(KV, p.kv_heads, int(p.key_layout.counts[rank])),
        ]
        birth, death = self._lifetimes()
        # All slots where they are kept: those that the backward has no use for too, so that its arenas are the forward's.
        used = np.flatnonzero((self.slots[:, SLOT_RANK] == rank) & ((death >= 0) | self.keep))
        used = used[(used != 2 * rank) & (used != 2 * rank + 1)]
        if self.keep:
            birth[used], death[used] = 0, NUM_PHASES * len(self.steps)
        num_heads = self.slots[used, SLOT_H1] - self.slots[used, SLOT_H0]
        kinds = self.slots[used, SLOT_KIND]
        for kind, heads in sorted(set(zip(kinds.tolist(), num_heads.tolist()))):
            ids = used[(kinds == kind) & (num_heads == heads)]
            sizes = counts[self.slots[ids, SLOT_ROWS]]
            bases, total = share_rows(birth[ids], death[ids], sizes)
            for slot, base, size in zip(ids.tolist(), bases.tolist(), sizes.tolist()):
                self.arena_of[slot], self.base_of[slot] = len(arenas), base
                time, phase = divmod(int(birth[slot]), NUM_PHASES)
                self.steps[time].born[phase].append((len(arenas), Rows(np.array([[base, size]]))))
            arenas.append(Arena(kind, heads, total, turns=not self.keep and bool((sizes == total).all())))
        return tuple(arenas)

    def _lifetimes(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last (time, phase) in which a slot must have rows, as NUM_PHASES·time + phase; death −1: never."""
        num_slots = len(self.slots)
        birth, death = np.full(num_slots, np.iinfo(np.int64).max), np.full(num_slots, -1)

        def note(slot: np.ndarray, when: np.ndarray) -> None:
            np.minimum.at(birth, slot, when)
            np.maximum.at(death, slot, when)

        moves = self.moves[self.mine]
        local = self.src_rank[self.mine] == self.dst_rank[self.mine]
        posted = NUM_PHASES * moves[:, MOVE_ISSUE] + POST
        note(moves[:, MOVE_SRC], posted)
        note(moves[:, MOVE_DST], np.where(local, posted, NUM_PHASES * moves[:, MOVE_DUE] + ARRIVE))
        computed = NUM_PHASES * self.my_attends[:, ATTEND_STAGE] + COMPUTE
        note(self.my_attends[:, ATTEND_Q], computed)
        note(self.my_attends[:, ATTEND_KV], computed)
        return birth, death

    def _exchanges(self, alone: np.ndarray) -> tuple[Exchange, ...]:
        """Number the (issue, due) pairs that any two ranks use, collect this rank's messages, and do local Moves."""
        crossing = self.src_rank != self.dst_rank
        times = self.moves[:, MOVE_ISSUE] * (len(self.steps) + 1) + self.moves[:, MOVE_DUE]
        pairs = np.unique(times[crossing])
        sends: list[dict[int, list[Item]]] = [{} for _ in pairs]
        receives: list[dict[int, list[Item]]] = [{} for _ in pairs]
        number = np.searchsorted(pairs, times)
        for move in self.mine.tolist():
            kind, src, dst, _, issue, _ = self.moves[move].tolist()
            only = bool(alone[move])
            if not crossing[move]:
                local = LocalMove(move, kind, self._part(move, src), self._part(move, dst), only)
                self.steps[issue].local.append(local)
            elif self.src_rank[move] == self.rank:
                item = Item(move, kind, self._part(move, src), only)
                sends[number[move]].setdefault(int(self.dst_rank[move]), []).append(item)
            else:
                item = Item(move, kind, self._part(move, dst), only)
                receives[number[move]].setdefault(int(self.src_rank[move]), []).append(item)
        exchanges = []
        for i, pair in enumerate(pairs.tolist()):
            issue, due = divmod(pair, len(self.steps) + 1)
            self.steps[issue].posts.append(i)
            self.steps[due].waits.append(i)
            exchanges.append(Exchange(issue, due, _by_peer(sends[i]), _by_peer(receives[i])))
        return tuple(exchanges)

    def _groups(self, mask: Mask) -> None:
        """Tile tables of every stage, one group for each pair of arenas."""
        attends = self.my_attends
        if not len(attends):
            return
        q_segments = [self._locate(*x) for x in attends[:, [ATTEND_Q_ROWS, ATTEND_Q]].tolist()]
        kv_segments = [self._locate(*x) for x in attends[:, [ATTEND_KV_ROWS, ATTEND_KV]].tolist()]
        first_q = self.slots[attends[:, ATTEND_Q], SLOT_H0]
        first_kv = self.slots[attends[:, ATTEND_KV], SLOT_H0]
        q_arena = np.array([self.arena_of[slot] for slot in attends[:, ATTEND_Q].tolist()])
        kv_arena = np.array([self.arena_of[slot] for slot in attends[:, ATTEND_KV].tolist()])
        heads = np.stack(
            [
                attends[:, ATTEND_H0] - first_q,
                attends[:, ATTEND_H1] - first_q,
                first_q - first_kv * self.program.group_size,
            ],
            1,
        )
        call = np.stack([attends[:, ATTEND_STAGE], q_arena, kv_arena], 1)
        calls, tables = build_tiles(mask, q_segments, kv_segments, heads, call)
        for (stage, q, kv), tiles in zip(calls.tolist(), tables):
            self.steps[stage].groups.append(Group(q, kv, tiles))


def share_rows(birth: np.ndarray, death: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows for intervals [birth, death] (ends included) such that no two that are alive together overlap.

    First fit in the order of birth. Returns (first row of each, rows in all).
    """
    bases = np.zeros(len(birth), np.int64)
    gaps: list[tuple[int, int]] = []  # (first row, size), ascending, never adjacent
    alive: list[tuple[int, int, int]] = []
    top = 0
    for i in np.argsort(birth, kind="stable").tolist():
        while alive and alive[0][0] < birth[i]:
            _, base, size = heapq.heappop(alive)
            gaps = _joined(gaps, base, size)
        size = int(sizes[i])
        fit = next((g for g, (_, room) in enumerate(gaps) if room >= size), None)
        if fit is not None:
            base, room = gaps[fit]
            gaps[fit : fit + 1] = [(base + size, room - size)] if room > size else []
        elif gaps and sum(gaps[-1]) == top:
            base = gaps.pop()[0]
            top = base + size
        else:
            base, top = top, top + size
        bases[i] = base
        heapq.heappush(alive, (int(death[i]), base, size))
    return bases, top


def _joined(gaps: list[tuple[int, int]], base: int, size: int) -> list[tuple[int, int]]:
    """Gaps with one more, neighbours merged."""
    merged: list[tuple[int, int]] = []
    for start, room in sorted([*gaps, (base, size)]):
        if merged and sum(merged[-1]) == start:
            merged[-1] = (merged[-1][0], merged[-1][1] + room)
        else:
            merged.append((start, room))
    return merged


def _by_peer(messages: dict[int, list[Item]]) -> tuple[tuple[int, tuple[Item, ...]], ...]:
    return tuple((peer, tuple(items)) for peer, items in sorted(messages.items()))
