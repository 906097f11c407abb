"""Our planner: take work from the rank that is furthest over its share, cheapest bytes first, until none is.

    repeat   donor     = the rank with the highest load (work ÷ share)
             receivers = the least loaded ranks, and the least loaded of those that hold the donor's keys
             boxes     = the whole task | some of its KV heads | the fewest heads × a range of rows | … × a range of keys
             move the box with the fewest bytes per unit of work; what is left of the task stays

A task's bytes are its query rows (q out, o back) and the key rows that the receiver does not hold. Heads come first because
they divide both; rows or keys cut only what whole heads cannot express. Everything is integers with fixed tie-breaks, so that
all ranks find the same plan.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from distattn.parallel.disaggregation.caps import Caps, Usage
from distattn.parallel.disaggregation.residency import Residency
from distattn.parallel.disaggregation.tasks import HomeTasks, Task
from distattn.parallel.layout import Layout

_RELIEVED = 4
_LAUNCH_ROWS = 64
"""What a move costs besides its bytes, in rows of K and V of all heads: tiny tasks are not worth a message."""

_CROWDED = 1.25
"""A rank takes no more work once it fetches this many times the keys of the rank that fetches most for its own rows, as long
as another can take it: the busiest link is then one that no plan spares, or the way back of a long document's results."""


@dataclass(frozen=True)
class Limits:
    """What a plan must keep.

    tolerance: a rank may exceed its share by this fraction; align: rows and keys are cut at multiples of it (a kernel's tile);
    caps: what a rank may receive and hold, and what a query row weighs against a key row. costliest: tasks of a donor that are
    looked at. return_weight: how much more a result's way back counts than other bytes: those of a giant document all meet at
    its home.
    """

    tolerance: float
    align: int
    caps: Caps
    max_moves_per_rank: int = 8
    costliest: int = 2
    return_weight: float = 4.0


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who computes what: the home tasks that stayed whole (``stays``, bool [N]) and all others as (server, task)."""

    home: HomeTasks
    stays: np.ndarray = field(repr=False)
    placed: list[tuple[int, Task]] = field(repr=False)
    share: np.ndarray = field(repr=False)
    work: np.ndarray = field(repr=False)
    moves: int
    stopped_by: str
    usage: Usage | None = None
    refused_by: str = ""
    """The cap that ruled out moves of a rank that was left over its share, if one did."""

    @property
    def imbalance(self) -> float:
        """The highest load: work ÷ share of the worst rank; 1 is perfect."""
        busy = self.share > 0
        return float((self.work[busy] / self.share[busy]).max(initial=0.0)) if self.work.any() else 1.0


class _Ranks:
    """The state of all ranks while tasks move."""

    def __init__(self, home: HomeTasks, layout: Layout, share: np.ndarray) -> None:
        self.home, self.layout, self.share = home, layout, share
        num_ranks = layout.num_ranks
        self.work = np.zeros(num_ranks)
        np.add.at(self.work, home.home, home.pairs.astype(np.float64) * home.kv_heads)
        self.load = _ratio(self.work, share)
        self.enter(np.ones(num_ranks, bool))
        # The tasks of a rank, costliest first, become objects only when the rank is a donor.
        self.order = np.lexsort((-home.pairs, home.home))
        self.next = np.searchsorted(home.home[self.order], np.arange(num_ranks))
        self.end = np.searchsorted(home.home[self.order], np.arange(num_ranks), "right")
        self.stays = np.ones(len(home.home), bool)
        self.opened: list[list[tuple[int, int, Task]]] = [[] for _ in range(num_ranks)]
        self.sequence = 0
        self.residency = Residency(layout, home.kv_heads)
        # Key rows that came for each rank's tasks; those of tasks that moved on stay counted.
        self.arrived = np.zeros(num_ranks)
        self._fetch_home_needs()
        order = np.argsort(layout.ranges[:, 0], kind="stable")
        self.range_starts: list[int] = layout.ranges[order, 0].tolist()
        self.range_ranks = layout.range_owner[order]

    def enter(self, pool: np.ndarray) -> None:
        """From now on only ranks of this pool receive. pool: bool [P]."""
        self.pool = pool
        self.receiver_load = np.where(pool & (self.share > 0), self.load, np.inf)

    def _fetch_home_needs(self) -> None:
        """The keys of other ranks that the home layout fetches."""
        home, layout = self.home, self.layout
        first = np.searchsorted(np.sort(layout.ranges[:, 0]), home.box[:, 2], "right")
        last = np.searchsorted(np.sort(layout.ranges[:, 0]), home.box[:, 3] - 1, "right")
        owner = layout.range_owner[np.argsort(layout.ranges[:, 0], kind="stable")]
        remote = np.flatnonzero((first != last) | (owner[first - 1] != home.home)) if len(first) else first
        self.remote = remote
        for rank, k0, k1 in zip(
            home.home[remote].tolist(), home.box[remote, 2].tolist(), home.box[remote, 3].tolist(), strict=True
        ):
            self.arrived[rank] += self.residency.missing(rank, k0, k1, 0, home.kv_heads)
            self.residency.fetch(rank, k0, k1, 0, home.kv_heads)

    def adopt(self, start: Assignment) -> None:
        """Take over what another planner placed."""
        self.stays = start.stays.copy()
        for server, task in start.placed:
            self.put(server, task)
            self.arrived[server] += self.residency.missing(server, task.k0, task.k1, task.g0, task.g1)
            self.residency.fetch(server, task.k0, task.k1, task.g0, task.g1)
        self.work = start.work.copy()
        self.load[:] = _ratio(self.work, self.share)
        self.enter(self.pool)

    def costliest(self, rank: int, count: int) -> list[tuple[int, int, Task]]:
        """The rank's costliest tasks, first is greatest; opens as many of the home's as may be among them."""
        opened = self.opened[rank]
        while self.next[rank] < self.end[rank]:
            index = int(self.order[self.next[rank]])
            work = int(self.home.pairs[index]) * self.home.kv_heads
            if len(opened) >= count and work <= -opened[count - 1][0]:
                break
            self.next[rank] += 1
            if not self.stays[index]:
                continue
            self.stays[index] = False
            self.put(rank, self.home.task(index))
        return opened[:count]

    def put(self, rank: int, task: Task) -> None:
        insort(self.opened[rank], (-task.work, self.sequence, task))
        self.sequence += 1

    def change_work(self, rank: int, amount: float) -> None:
        self.work[rank] += amount
        share = self.share[rank]
        if share > 0:
            self.load[rank] = self.receiver_load[rank] = self.work[rank] / share
        else:
            self.load[rank] = math.inf if self.work[rank] > 0 else 0.0

    def holders(self, task: Task) -> np.ndarray:
        """Ranks whose own rows are among the task's keys."""
        return self.range_ranks[bisect_right(self.range_starts, task.k0) - 1 : bisect_left(self.range_starts, task.k1)]


def balance(
    home: HomeTasks,
    layout: Layout,
    share: np.ndarray,
    limits: Limits,
    pools: np.ndarray | None = None,
    start: Assignment | None = None,
) -> Assignment:
    """Move work until no rank exceeds (1 + tolerance) × its share, nor a cap.

    share: float64 [P], work that each rank should do, summing to that of its pool; 0 for a rank that computes nothing.
    pools: int64 [P], the pool of each rank, which no work leaves; None: one. start: another planner's, to be finished. Stops
    also when no move helps, or at a bound on their number: ``stopped_by`` says which.
    """
    ranks = _Ranks(home, layout, share)
    if start is not None:
        ranks.adopt(start)
    groups = [ranks.pool] if pools is None else [pools == pool for pool in range(int(pools.max()) + 1)]
    moves = 0
    for pool in groups:
        if (share[pool] <= 0).any():
            moves += _deal(ranks, pool)
    usage = _open_remote(ranks, limits.caps) if limits.caps.bind else None
    stopped_by = "balanced"
    for pool in groups:
        ranks.enter(pool)
        in_pool, reason = _settle(ranks, limits, usage)
        moves += in_pool
        stopped_by = stopped_by if reason == "balanced" else reason
    placed = [(rank, task) for rank, opened in enumerate(ranks.opened) for _, _, task in opened]
    refused_by = "" if usage is None else usage.binding
    return Assignment(home, ranks.stays, placed, share, ranks.work, moves, stopped_by, usage, refused_by)


def _settle(ranks: _Ranks, limits: Limits, usage: Usage | None) -> tuple[int, str]:
    """Move work within the pool that the ranks are in; (moves, what ended it)."""
    stuck = ~ranks.pool
    crowded = _CROWDED * float(ranks.arrived.max(initial=0.0)) or math.inf
    live_load = np.where(ranks.pool, ranks.load, -1.0)
    stopped_by, moves, last = "balanced", 0, limits.max_moves_per_rank * int(ranks.pool.sum())
    while moves < last:
        donor = int(live_load.argmax())
        if usage is not None:
            usage.refused = ""
        if live_load[donor] > 1 + limits.tolerance:
            move = _best_move(ranks, donor, limits, usage, crowded) or _best_move(ranks, donor, limits, usage, math.inf)
        elif usage is not None:
            donor, excess = usage.worst(stuck)
            if excess <= 1:
                break
            move = _best_relief(ranks, donor, limits, usage)
        else:
            break
        if move is None:
            stuck[donor], live_load[donor] = True, -1.0
            stopped_by = "no further move helps"
            if usage is not None:
                usage.binding = usage.refused or usage.binding
            continue
        _apply(ranks, donor, *move, usage)
        moves += 1
        for rank in (donor, move[0]):
            live_load[rank] = -1.0 if stuck[rank] else ranks.load[rank]
    else:
        stopped_by = "the bound on moves"
    return moves, stopped_by


def _open_remote(ranks: _Ranks, caps: Caps) -> Usage:
    """Make objects of all tasks that use rows of other ranks, and count them."""
    usage = Usage(caps, ranks.residency, ranks.layout.num_ranks)
    home = ranks.home
    for index in ranks.remote.tolist():
        if ranks.stays[index]:
            ranks.stays[index] = False
            ranks.put(int(home.home[index]), home.task(index))
    for rank, opened in enumerate(ranks.opened):
        for _, _, task in opened:
            if task.home != rank:
                usage.note_return(task.home, (task.q1 - task.q0) * (task.g1 - task.g0))
        usage.refresh(rank, (task for _, _, task in opened))
    return usage


def _deal(ranks: _Ranks, pool: np.ndarray) -> int:
    """Give the tasks of ranks without a share to those with one, in order of rows, so that neighbours share keys; how many."""
    home, share = ranks.home, ranks.share
    leaving = np.flatnonzero((share[home.home] <= 0) & pool[home.home])
    room = np.where(pool, np.maximum(share - ranks.work, 0.0), 0.0)
    servers = np.flatnonzero(room > 0)
    if not len(leaving) or not len(servers):
        return 0
    leaving = leaving[np.argsort(home.box[leaving, 0], kind="stable")]
    work = home.pairs[leaving].astype(np.float64) * home.kv_heads
    middle = np.cumsum(work) - work / 2
    edges = np.cumsum(room[servers]) * (work.sum() / room[servers].sum())
    chosen = servers[np.minimum(np.searchsorted(edges, middle, "left"), len(servers) - 1)]
    for index, server in zip(leaving.tolist(), chosen.tolist(), strict=True):
        task = home.task(index)
        ranks.stays[index] = False
        ranks.put(server, task)
        ranks.residency.fetch(server, task.k0, task.k1, 0, home.kv_heads)
        ranks.work[task.home] -= task.work
        ranks.work[server] += task.work
    ranks.load[:] = _ratio(ranks.work, share)
    return len(leaving)


def _ratio(work: np.ndarray, share: np.ndarray) -> np.ndarray:
    return np.divide(work, share, out=np.where(work > 0, np.inf, 0.0), where=share > 0)


Entry = tuple[int, int, Task]


def _best_move(
    ranks: _Ranks, donor: int, limits: Limits, usage: Usage | None, crowded: float
) -> tuple[int, Entry, Task] | None:
    """(receiver, the donor's task, the part of it that moves): the fewest bytes per unit of work. crowded: key rows beyond
    which a rank receives no more."""
    work, share = ranks.work, ranks.share
    excess = float(work[donor] - share[donor])
    arrived = ranks.arrived
    load = np.where(arrived < crowded, ranks.receiver_load, np.inf)
    lowest = int(load.argmin())
    room = {lowest: (1 + limits.tolerance / 2) * float(share[lowest]) - float(work[lowest])}
    launch, return_cost = (
        _LAUNCH_ROWS * ranks.home.kv_heads,
        limits.caps.query_in + limits.return_weight * limits.caps.query_out,
    )
    best, best_score = None, math.inf
    for entry in ranks.costliest(donor, limits.costliest):
        task = entry[2]
        owners = ranks.holders(task)
        nearest = int(owners[load[owners].argmin()]) if len(owners) > 1 else lowest
        parts: list[tuple[Box, int]] = []
        cut_for = -1.0
        for receiver in (lowest, nearest) if nearest != lowest and load[nearest] < math.inf else (lowest,):
            if receiver not in room:
                room[receiver] = (1 + limits.tolerance / 2) * float(share[receiver]) - float(work[receiver])
            movable = min(excess, room[receiver])
            if movable <= 0 or receiver == donor:
                continue
            if movable != cut_for:
                parts, cut_for = list(_parts(task, movable, limits)), movable
            per_row = return_cost if receiver != task.home else 0.0
            for box, pairs in parts:
                q0, q1, k0, k1, g0, g1 = box
                rows, amount = (q1 - q0) * (g1 - g0), pairs * (g1 - g0)
                cost = launch + per_row * rows
                if cost >= best_score * amount:  # already without its keys
                    continue
                missing = ranks.residency.missing(receiver, k0, k1, g0, g1)
                score = (cost + missing) / amount
                if (
                    score < best_score
                    and arrived[receiver] + missing < crowded
                    and (usage is None or usage.allows(receiver, task.home, rows, missing))
                ):
                    best, best_score = (receiver, entry, box), score
    if best is None:
        return None
    part = best[1][2].clip(*best[2])
    assert part is not None, "boxes with pairs are not empty"
    return best[0], best[1], part


Box = tuple[int, int, int, int, int, int]


def _parts(task: Task, movable: float, limits: Limits) -> Iterator[tuple[Box, int]]:
    """(q0, q1, k0, k1, g0, g1) and pairs of boxes of a task that have at most ``movable`` work."""
    if task.work <= movable:
        yield (task.q0, task.q1, task.k0, task.k1, task.g0, task.g1), task.pairs
        return
    heads = int(movable // task.pairs)
    if heads:
        yield (task.q0, task.q1, task.k0, task.k1, task.g1 - heads, task.g1), task.pairs
        yield from _last_rows(task, task.q1, task.g0, movable / (task.g1 - task.g0), limits)
        return
    pairs = movable
    rectangular = len(task.bands) == 1 and task.bands[0][4] <= task.bands[0][2] - task.q1
    for end in _range_ends(task, pairs, limits):
        yield from _last_rows(task, end, task.g1 - 1, pairs, limits)
    if task.g1 - task.g0 > 1:
        yield from _last_rows(task, task.q1, task.g0, movable / (task.g1 - task.g0), limits)
    if rectangular:
        box = _rectangle(task, pairs, limits)
        if box is not None:
            q0, q1, k0, k1 = box
            yield (q0, q1, k0, k1, task.g1 - 1, task.g1), (q1 - q0) * (k1 - k0)


def _last_rows(task: Task, end: int, g0: int, pairs: float, limits: Limits) -> Iterator[tuple[Box, int]]:
    """The rows up to ``end`` with at most so many pairs, for the heads from g0 on."""
    start = task.start_of_last_rows(end, pairs)
    start = min(-(-start // limits.align) * limits.align, end)
    count = task.pairs_of_rows(start, end)
    if 0 < count <= pairs:
        last_key = min(task.k1, end + task.bands[0][5]) if len(task.bands) == 1 else task.k1
        yield (start, end, task.k0, last_key, g0, task.g1), count


def _range_ends(task: Task, pairs: float, limits: Limits) -> Iterator[int]:
    """Where a range of rows should end: at the task's end, or where the sum of query and key bytes is least."""
    yield task.q1
    _, _, k0, k1, lo, hi = task.bands[0]
    if len(task.bands) == 1 and lo <= k0 - task.q1 and task.q1 + hi <= k1:
        # n rows that end at the k-th key have n (2k − n) / 2 pairs; a·n + k is least at n = √(C / (2a + 1)), C = 2·pairs.
        n = math.sqrt(2 * pairs / (2 * limits.caps.query_cost + 1))
        keys = (2 * pairs / n + n) / 2
        end = int(keys) + k0 - hi
        end -= end % limits.align
        if task.q0 < end < task.q1:
            yield end


def _rectangle(task: Task, pairs: float, limits: Limits) -> tuple[int, int, int, int] | None:
    """The last rows × the first keys, all of which they see: a·n + k is least, for n·k = pairs, at k = a·n."""
    q0, q1, k0, k1, _, hi = task.bands[0]
    rows = min(q1 - q0, max(1, math.isqrt(int(pairs / limits.caps.query_cost))))
    start = min(-(-(q1 - rows) // limits.align) * limits.align, q1 - 1)
    end = min(k0 + int(pairs / (q1 - start)), start + hi + 1, k1)
    end -= end % limits.align
    return (start, q1, k0, end) if end > k0 else None


def _best_relief(ranks: _Ranks, donor: int, limits: Limits, usage: Usage) -> tuple[int, Entry, Task] | None:
    """As ``_best_move``, for a rank over a cap: whole tasks or heads of them, the fewest bytes per byte that it is spared."""
    caps, residency = limits.caps, ranks.residency

    def spared(task: Task) -> float:
        # A task at home costs keys, and once it leaves, the way back of its results.
        per_row = caps.query_in if task.home != donor else -caps.query_out
        return task.k1 - task.k0 - residency.own_rows(donor, task.k0, task.k1) + (task.q1 - task.q0) * per_row

    entries = sorted(ranks.opened[donor], key=lambda entry: -spared(entry[2]) * (entry[2].g1 - entry[2].g0))[:_RELIEVED]
    room = (1 + limits.tolerance) * ranks.share - ranks.work
    able = np.flatnonzero((room > 0) & ranks.pool & (np.arange(len(room)) != donor))
    able = able[np.argsort(usage.received[able] + usage.held[able], kind="stable")[:_RELIEVED]]
    best, best_score = None, math.inf
    for entry in entries:
        task = entry[2]
        if spared(task) <= 0:
            continue
        for receiver in able.tolist():
            heads = min(task.g1 - task.g0, int(room[receiver] // task.pairs))
            if not heads:
                continue
            rows = (task.q1 - task.q0) * heads
            missing = residency.missing(receiver, task.k0, task.k1, task.g1 - heads, task.g1)
            score = (missing + caps.query_cost * rows * (receiver != task.home)) / (spared(task) * heads)
            if score < best_score and usage.allows(receiver, task.home, rows, missing):
                best = (receiver, entry, task.clip(task.q0, task.q1, task.k0, task.k1, task.g1 - heads, task.g1))
                best_score = score
    if best is None or best[2] is None:
        return None
    return best[0], best[1], best[2]


def _apply(ranks: _Ranks, donor: int, receiver: int, entry: Entry, part: Task, usage: Usage | None) -> None:
    """Hand ``part`` over; up to five boxes of what is left of the task stay with the donor."""
    task = entry[2]
    ranks.opened[donor].remove(entry)
    for box in (
        (task.q0, task.q1, task.k0, task.k1, task.g0, part.g0),
        (task.q0, part.q0, task.k0, task.k1, part.g0, part.g1),
        (part.q1, task.q1, task.k0, task.k1, part.g0, part.g1),
        (part.q0, part.q1, task.k0, part.k0, part.g0, part.g1),
        (part.q0, part.q1, part.k1, task.k1, part.g0, part.g1),
    ):
        left = task.clip(*box) if box[0] < box[1] and box[2] < box[3] and box[4] < box[5] else None
        if left is not None:
            ranks.put(donor, left)
    ranks.put(receiver, part)
    ranks.arrived[receiver] += ranks.residency.missing(receiver, part.k0, part.k1, part.g0, part.g1)
    ranks.residency.fetch(receiver, part.k0, part.k1, part.g0, part.g1)
    ranks.change_work(donor, -part.work)
    ranks.change_work(receiver, part.work)
    if usage is not None:
        rows = (part.q1 - part.q0) * (part.g1 - part.g0)
        usage.note_return(part.home, rows * ((receiver != part.home) - (donor != part.home)))
        for rank in (donor, receiver):
            usage.refresh(rank, (task for _, _, task in ranks.opened[rank]))
