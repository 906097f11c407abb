"""Disaggregated: attention is cut into tasks, which go to whichever rank has time for them (DistCA, arXiv 2510.18121).

    stage 0   rank r attends to its own rows and keys     while tasks' queries and keys travel to their servers
    stage 1   rank r attends for other ranks
    stage 2   its own queries, fetched keys               while results of stage 1 travel home and merge

The packed stream of all ranks is balanced as one, whatever the lengths of its documents: a rank that drew a long document hands
heads, rows or key ranges of it to ranks that drew short ones. ``servers`` sets the last ranks apart to compute attention only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.disaggregation.assemble import assemble, received, task_table
from distattn.parallel.disaggregation.balance import Assignment, Limits, balance
from distattn.parallel.disaggregation.caps import Caps, Usage
from distattn.parallel.disaggregation.certificate import Certificate, certify
from distattn.parallel.disaggregation.greedy import greedy_balance
from distattn.parallel.disaggregation.homes import least_received
from distattn.parallel.disaggregation.pools import pools_of
from distattn.parallel.disaggregation.tasks import HomeTasks, home_tasks
from distattn.parallel.layout import Layout
from distattn.parallel.need import check_rows
from distattn.parallel.program import Program, RoundBudget, check_heads
from distattn.parallel.rounds import in_rounds

_FEW_RANKS = 64
"""Up to which several plans are made and the one that receives least is taken."""

_PREFERENCES = ((3, 20.0), (2, 1.5))
"""(tasks looked at, weight of results' way back) of those plans, besides the default."""


@dataclass(frozen=True)
class DisaggregatedOptions:
    """How the work is balanced.

    tolerance: how far a rank may exceed its share of the work (0.05: by 5 %).
    align: rows and keys are cut at multiples of it, a kernel's tile.
    servers: this many last ranks do nothing but attention, for all others, which do none.
    capacity: speed of each rank, in any unit; None: all equal.
    planner: "boxes", or "greedy", the published one, for comparison.
    round_bytes: transfers travel in rounds in which no rank sends or receives more than this, in the backward too; 0: each
    stage's at once.
    pool: work moves among at most this many neighbouring ranks, in whole nodes of ranks_per_node; 0: among all.
    receive_bytes, memory_bytes: most that a rank may receive in a forward, and hold besides its own rows, for heads of
    ``head_dim`` features of ``element_bytes`` each.
    place_rows: where no layout is given, rows lie where balancing them sends least; False: contiguous, as they come.
    """

    tolerance: float = 0.05
    align: int = 128
    servers: int = 0
    capacity: tuple[float, ...] | None = None
    planner: str = "boxes"
    receive_bytes: float = math.inf
    memory_bytes: float = math.inf
    head_dim: int = 128
    element_bytes: int = 2
    round_bytes: int = 0
    pool: int = 0
    ranks_per_node: int = 8
    place_rows: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.tolerance <= 10:
            raise PlanError(f"tolerance must be positive and at most 10 (0.05 is 5 %), got {self.tolerance}")
        if self.planner not in ("boxes", "greedy"):
            raise PlanError(f"planner must be boxes or greedy, got {self.planner!r}")
        if not (self.receive_bytes >= 0 and self.memory_bytes >= 0):
            raise PlanError("receive_bytes and memory_bytes must not be negative")
        if self.round_bytes < 0 or self.element_bytes not in (2, 4, 8) or self.head_dim < 1:
            raise PlanError(
                f"round_bytes must not be negative, head_dim be positive and element_bytes 2, 4 or 8; got {self.round_bytes}, "
                f"{self.head_dim} and {self.element_bytes}"
            )
        if self.planner == "greedy" and self.pool:
            raise PlanError("the greedy planner knows no pools: leave pool at 0, or use the planner boxes")
        if self.align < 1 or self.servers < 0:
            raise PlanError(f"align must be positive and servers not negative, got align={self.align}, servers={self.servers}")


def assign(mask: Mask, layout: Layout, heads: int, kv_heads: int, options: DisaggregatedOptions) -> Assignment:
    """Who computes what, before it becomes a Program."""
    check_rows(mask, layout)
    check_heads(heads, kv_heads)
    if options.servers >= layout.num_ranks:
        raise PlanError(f"servers must be fewer than the {layout.num_ranks} ranks, got {options.servers}")
    home = home_tasks(mask, layout, kv_heads)
    pools = pools_of(layout.num_ranks, options.pool, options.ranks_per_node, options.servers)
    share = _shares(home, _speeds(options, layout.num_ranks), pools)
    limits = Limits(options.tolerance, options.align, _caps(options, heads // kv_heads))
    if options.planner == "greedy":
        return greedy_balance(home, share, limits)
    assignment = balance(home, layout, share, limits, pools if options.pool else None)
    if assignment.usage is not None:
        _check_caps(assignment, assignment.usage, options)
        return assignment
    if layout.num_ranks > _FEW_RANKS:
        return assignment
    return _least_received(assignment, layout, limits, pools if options.pool else None)


def _least_received(assignment: Assignment, layout: Layout, limits: Limits, pools: np.ndarray | None) -> Assignment:
    """Of plans with other preferences, and the published planner's, finished by ours where it misses the tolerance, the one
    whose busiest link has the least to carry. The bytes of a plan hang on its first moves: where planning is quick, it pays to
    try a few."""
    home, share = assignment.home, assignment.share
    found = [assignment]
    for costliest, return_weight in _PREFERENCES:
        other = replace(limits, costliest=costliest, return_weight=return_weight)
        found.append(balance(home, layout, share, other, pools))
    if pools is None and (share > 0).all():
        published = greedy_balance(home, share, limits)
        kept = published.imbalance <= 1 + limits.tolerance
        found.append(published if kept else balance(home, layout, share, limits, start=published))
    bound = max(assignment.imbalance, 1 + limits.tolerance)
    kept = [x for x in found if x.imbalance <= bound]
    worst = [float(received(task_table(x), layout, home.kv_heads, limits.caps).max()) for x in kept]
    return kept[int(np.argmin(worst))]


def certificate(
    mask: Mask, layout: Layout, heads: int, kv_heads: int, options: DisaggregatedOptions | None = None
) -> Certificate:
    """How far the plan for these arguments is from what no plan can beat. Plans anew: pure, as ``plan`` is."""
    options = options or DisaggregatedOptions()
    assignment = assign(mask, layout, heads, kv_heads, options)
    num_ranks = layout.num_ranks
    return certify(
        assignment,
        _speeds(options, num_ranks),
        pools=pools_of(num_ranks, options.pool, options.ranks_per_node, options.servers),
        tolerance=options.tolerance,
        align=options.align,
        row_bytes=_caps(options, heads // kv_heads).query_cost * kv_row_bytes(options),
    )


def _shares(home: HomeTasks, speeds: np.ndarray, pools: np.ndarray) -> np.ndarray:
    """Work that each rank should do, float64 [P]: its part, by speed, of its pool's."""
    work = np.bincount(pools[home.home], weights=home.pairs.astype(np.float64), minlength=int(pools.max()) + 1) * home.kv_heads
    speed = np.bincount(pools, weights=speeds)
    if (speed[work > 0] <= 0).any():
        raise PlanError("a pool has work, but none of its ranks has a capacity above 0: use larger pools, or give it one")
    return speeds * (work / np.where(speed > 0, speed, 1.0))[pools]


def _speeds(options: DisaggregatedOptions, num_ranks: int) -> np.ndarray:
    """What each rank can do, float64 [P]; 0 for ranks that leave attention to the servers."""
    if options.capacity is not None and len(options.capacity) != num_ranks:
        raise PlanError(f"capacity needs one speed for each of the {num_ranks} ranks, got {len(options.capacity)}")
    speeds = np.array(options.capacity or [1.0] * num_ranks)
    if options.servers:
        speeds[: num_ranks - options.servers] = 0.0
    if not np.isfinite(speeds).all() or (speeds < 0).any() or not speeds.any():
        raise PlanError(f"speeds must be finite, not negative, and not all 0 among those that serve, got {speeds.tolist()}")
    return speeds


def kv_row_bytes(options: DisaggregatedOptions) -> int:
    """Bytes of one row of K and V of one KV head."""
    return 2 * options.head_dim * options.element_bytes


def _caps(options: DisaggregatedOptions, group: int) -> Caps:
    unit = kv_row_bytes(options)
    # Results are partial: they travel and are held in fp32, with their LSE.
    query_in = group * options.head_dim * options.element_bytes / unit
    query_out = group * (options.head_dim + 1) * max(4, options.element_bytes) / unit
    return Caps(query_in, query_out, query_in + query_out, options.receive_bytes / unit, options.memory_bytes / unit)


def _check_caps(assignment: Assignment, usage: Usage, options: DisaggregatedOptions) -> None:
    unit = kv_row_bytes(options)
    for name, used in (("receive_bytes", usage.received), ("memory_bytes", usage.held)):
        cap, worst = getattr(options, name), int(used.argmax())
        if used[worst] * unit > cap:
            binding = assignment.refused_by
            others = f" (moves off it were refused by {binding})" if binding not in ("", name) else ""
            raise PlanError(
                f"no assignment found that keeps {name}={cap:.0f}: rank {worst} would need {used[worst] * unit:.0f}{others}; "
                "raise the cap or the tolerance, or use more ranks"
            )


def choose_home(
    mask: Mask, layouts: Iterable[Layout], heads: int, kv_heads: int, options: DisaggregatedOptions
) -> tuple[Layout, str] | None:
    """Of these layouts, the first of which tasks may leave, the one whose busiest rank receives least, with the reason; None
    where the first is all there is: with caps, pools or the greedy planner, which are about where tasks go, beyond
    64 ranks, where other layouts cut documents into crumbs, and where ``place_rows`` is off."""
    if not options.place_rows:
        return None
    layouts = list(layouts)
    num_ranks = layouts[0].num_ranks
    caps = _caps(options, heads // kv_heads)
    if num_ranks > _FEW_RANKS or caps.bind or options.pool or options.planner == "greedy" or not mask.area:
        return None
    speeds = _speeds(options, num_ranks)
    return least_received(
        mask,
        layouts,
        kv_heads,
        share=speeds / speeds.sum(),
        tolerance=options.tolerance,
        caps=caps,
        assign=lambda layout: assign(mask, layout, heads, kv_heads, options),
    )


def variants(heads: int, kv_heads: int, num_ranks: int, ranks_per_node: int) -> list[DisaggregatedOptions]:
    """The defaults."""
    return [DisaggregatedOptions()]


def plan(
    mask: Mask,
    layout: Layout,
    heads: int,
    kv_heads: int,
    options: DisaggregatedOptions | None = None,
    key_layout: Layout | None = None,
) -> Program:
    """Disaggregated attention over any mask and layout of self-attention."""
    if key_layout is not None:
        raise PlanError('disaggregated attention needs queries and keys of the same rows; use strategy "ring" for others')
    options = options or DisaggregatedOptions()
    assignment = assign(mask, layout, heads, kv_heads, options)
    program = assemble(task_table(assignment), layout, heads, kv_heads)
    if not options.round_bytes:
        return program
    return in_rounds(program, RoundBudget(options.round_bytes, options.head_dim, options.element_bytes))
