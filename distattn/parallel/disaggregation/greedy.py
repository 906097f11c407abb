"""The published planner, for comparison: fill the neediest rank first (DistCA, arXiv 2510.18121, scheduling of CA-tasks).

    for each rank below (1 − tolerance) × share, neediest first
        while it lacks more than tolerance × share
            price every task of every rank above its share: work that can move ÷ bytes (its rows, the keys of all its prefix)
            move the best, whole, or the rows around its middle: work is then proportional to rows

It bounds how little the least loaded rank does, not how much the busiest has left to do.
"""

from __future__ import annotations

import numpy as np

from distattn.parallel.disaggregation.balance import Assignment, Limits
from distattn.parallel.disaggregation.tasks import HomeTasks, Task

_CONSIDERED = 64


def greedy_balance(home: HomeTasks, share: np.ndarray, limits: Limits) -> Assignment:
    """Arguments as in ``balance``; no caps, no heads, no key ranges, no credit for keys that are already there."""
    tolerance, align, query_cost = limits.tolerance, limits.align, limits.caps.query_cost
    num_ranks = len(share)
    work = np.zeros(num_ranks)
    np.add.at(work, home.home, home.pairs.astype(np.float64) * home.kv_heads)
    stays = np.ones(len(home.home), bool)
    # Only costly tasks are worth a look: small ones never pay for their keys.
    order = np.lexsort((-home.pairs, home.home))
    place = np.arange(len(order)) - np.searchsorted(home.home[order], home.home[order])
    pool: list[tuple[int, Task]] = []
    for index in np.sort(order[place < _CONSIDERED]).tolist():
        stays[index] = False
        pool.append((int(home.home[index]), home.task(index)))
    moves = 0
    table = _Table(pool)
    for recipient in np.argsort(work / np.maximum(share, 1e-9), kind="stable").tolist():
        while work[recipient] < (1 - tolerance) * share[recipient]:
            found = table.best(work, share, recipient, tolerance, query_cost)
            if found is None:
                break
            index, movable = found
            donor, task = pool[index]
            part = _middle(task, movable, align)
            if part is None:
                table.retire(index)
                continue
            pool[index] = (recipient, part)
            table.set(index, recipient, part)
            for q0, q1 in ((task.q0, part.q0), (part.q1, task.q1)):
                left = task.clip(q0, q1, task.k0, task.k1, task.g0, task.g1) if q0 < q1 else None
                if left is not None:
                    pool.append((donor, left))
                    table.append(donor, left)
            work[donor] -= part.work
            work[recipient] += part.work
            moves += 1
    return Assignment(home, stays, pool, share, work, moves, "every recipient was visited")


class _Table:
    """Server, work, rows and keys of the tasks in the pool, as arrays that grow."""

    def __init__(self, pool: list[tuple[int, Task]]) -> None:
        self.length = len(pool)
        self.columns = np.zeros((4, max(2 * len(pool), 1024)))
        for index, (server, task) in enumerate(pool):
            self.set(index, server, task)

    def set(self, index: int, server: int, task: Task) -> None:
        heads = task.g1 - task.g0
        self.columns[:, index] = server, task.work, (task.q1 - task.q0) * heads, (task.k1 - task.k0) * heads

    def append(self, server: int, task: Task) -> None:
        if self.length == self.columns.shape[1]:
            self.columns = np.concatenate([self.columns, np.zeros_like(self.columns)], 1)
        self.set(self.length, server, task)
        self.length += 1

    def retire(self, index: int) -> None:
        """No more to be had of this task."""
        self.columns[1, index] = 0.0

    def best(
        self, work: np.ndarray, share: np.ndarray, recipient: int, tolerance: float, query_cost: float
    ) -> tuple[int, float] | None:
        """(task, work to move): the most work per byte among the tasks of ranks above their share."""
        server, total, rows, keys = self.columns[:, : self.length]
        donor = server.astype(np.int64)
        surplus = (work - share)[donor]
        movable = np.minimum(np.minimum(total, surplus), share[recipient] - work[recipient])
        fraction = np.divide(movable, total, out=np.zeros_like(total), where=total > 0)
        bytes_moved = query_cost * rows * fraction + keys
        able = (surplus > tolerance * share[donor]) & (movable > 0) & (donor != recipient)
        if not able.any():
            return None
        priority = np.where(able, movable / bytes_moved, 0.0)
        index = int(priority.argmax())
        return index, float(movable[index])


def _middle(task: Task, movable: float, align: int) -> Task | None:
    """The rows around the task's middle with this much work, or the whole task."""
    if task.work <= movable:
        return task
    rows = round((task.q1 - task.q0) * movable / task.work / align) * align
    start = task.q0 + (task.q1 - task.q0 - rows) // 2
    return task.clip(start, start + rows, task.k0, task.k1, task.g0, task.g1) if rows else None
