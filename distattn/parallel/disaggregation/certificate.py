"""How good an assignment is, against what no assignment can beat.

    level          work ÷ speed if all ranks shared all work:       nobody can have less on the busiest rank
    indivisible    the work of one tile of one head ÷ the fastest:   nor less than this
    pooling loss   the worst pool's level ÷ the level of all
    planning loss  the busiest rank ÷ its pool's level
    byte floor     what a rank over its share must at least send away and get back: (rows out and back) that carry its excess,
                   if each row sees as many keys as any does

Loads are multiples of the level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.parallel.disaggregation.balance import Assignment
from distattn.parallel.disaggregation.tasks import HomeTasks, band_pairs


@dataclass(frozen=True)
class Certificate:
    """1 is a perfect share of all work.

    lower_bound: no plan's busiest rank has less; busiest: this plan's; before: that of the home layout (infinite where a rank
    with work computes nothing). pooling_loss · planning_loss ≥ busiest: equal where the worst rank is in the worst pool.
    byte_floor: of all ranks together, for the tolerance that was asked for; worst_byte_floor: of the rank that must give most.
    binding: the cap that stopped the plan, or what else did; "" where it kept its tolerance.
    """

    lower_bound: float
    busiest: float
    before: float
    num_pools: int
    pooling_loss: float
    planning_loss: float
    byte_floor: int
    worst_byte_floor: int
    moves: int
    stopped_by: str
    binding: str

    @property
    def gap(self) -> float:
        """The busiest rank over the lower bound: 1 cannot be improved."""
        return self.busiest / self.lower_bound if self.lower_bound else 1.0

    def describe(self) -> str:
        """Two lines."""
        pools = ": planning"
        if self.num_pools > 1:
            pools = f", in {self.num_pools} pools: pooling {self.pooling_loss:.3f} × planning"
        before = "no bound" if np.isinf(self.before) else f"{self.before:.3f}"
        limit = f"; bound by {self.binding}" if self.binding else ""
        return (
            f"busiest rank {self.busiest:.3f} of its share (before {before}, at least {self.lower_bound:.3f}){pools} "
            f"{self.planning_loss:.3f}\n{self.moves} moves, {self.stopped_by}{limit}; query rows must carry at least "
            f"{self.byte_floor / 1e6:.4g} MB, {self.worst_byte_floor / 1e6:.4g} MB of the busiest home"
        )


def certify(
    assignment: Assignment,
    speeds: np.ndarray,
    *,
    pools: np.ndarray,
    tolerance: float,
    align: int,
    row_bytes: float,
) -> Certificate:
    """speeds: float64 [P]; pools: int64 [P]; row_bytes: one query row of one KV head's group, there and back."""
    home, work = assignment.home, assignment.work
    total, speed = float(work.sum()), float(speeds.sum())
    at_home = np.bincount(home.home, weights=home.pairs.astype(np.float64) * home.kv_heads, minlength=len(work))
    # Loads in units of the global level.
    level = total / speed if total else 1.0
    pool_work, pool_speed = np.bincount(pools, weights=work), np.bincount(pools, weights=speeds)
    pool_level = np.divide(pool_work, pool_speed, out=np.zeros_like(pool_work), where=pool_speed > 0) / level
    busiest = _most(work, speeds * level)
    planning = _most(work, speeds * level * pool_level[pools])
    indivisible = _tile_pairs(home, align) / (float(speeds.max()) * level)
    floor = _byte_floor(home, at_home, assignment.share, tolerance) * row_bytes
    kept = planning <= 1 + tolerance + 1e-9
    return Certificate(
        lower_bound=max(1.0, indivisible) if total else 0.0,
        busiest=busiest,
        before=_most(at_home, speeds * level),
        num_pools=int(pools.max()) + 1,
        pooling_loss=float(pool_level.max()) if total else 1.0,
        planning_loss=planning if total else 1.0,
        byte_floor=int(floor.sum()),
        worst_byte_floor=int(floor.max(initial=0)),
        moves=assignment.moves,
        stopped_by=assignment.stopped_by,
        binding="" if kept else (assignment.refused_by or assignment.stopped_by),
    )


def _most(work: np.ndarray, share: np.ndarray) -> float:
    """The highest work ÷ share; infinite where there is work without a share."""
    load = np.divide(work, share, out=np.where(work > 0, np.inf, 0.0), where=share > 0)
    return float(load.max(initial=0.0))


def _tile_pairs(home: HomeTasks, align: int) -> int:
    """Pairs of one aligned tile of the costliest task: rows and keys are cut nowhere inside it."""
    if not len(home.pairs):
        return 0
    index = int(home.pairs.argmax())
    _, q1, k0, k1 = home.box[index].tolist()
    start, end = (q1 - 1) // align * align, min((k0 // align + 1) * align, k1)
    most = 0
    for a, b, c, d, lo, hi in home.bands[home.ptr[index] : home.ptr[index + 1]].tolist():
        most += band_pairs((max(a, start), min(b, q1), max(c, k0), min(d, end), lo, hi))
    return most


def _byte_floor(home: HomeTasks, at_home: np.ndarray, share: np.ndarray, tolerance: float) -> np.ndarray:
    """Rows × KV heads that each rank must at least have served elsewhere, float64 [P]: its excess ÷ its longest row."""
    # Keys that each row sees, summed over the boxes that it is in: a sweep over their first and last rows.
    keys = (home.box[:, 3] - home.box[:, 2]).astype(np.float64)
    row, change = np.concatenate([home.box[:, 0], home.box[:, 1]]), np.concatenate([keys, -keys])
    rank = np.concatenate([home.home, home.home])
    order = np.lexsort((change, row, rank))
    longest = np.zeros(len(share))
    np.maximum.at(longest, rank[order], np.cumsum(change[order]))
    excess = np.maximum(at_home - (1 + tolerance) * share, 0.0)
    return np.divide(excess, longest, out=np.zeros_like(excess), where=longest > 0)
