"""Disaggregated: attention is cut into tasks, which go to whichever rank has time for them (DistCA, arXiv 2510.18121).

    stage 0   rank r attends to its own rows and keys     while tasks' queries and keys travel to their servers
    stage 1   rank r attends for other ranks
    stage 2   its own queries, fetched keys               while results of stage 1 travel home and merge

The packed stream of all ranks is balanced as one, whatever the lengths of its documents: a rank that drew a long document hands
heads, rows or key ranges of it to ranks that drew short ones. ``servers`` sets the last ranks apart to compute attention only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.disaggregation.assemble import assemble, task_table
from distattn.parallel.disaggregation.balance import Assignment, Limits, balance
from distattn.parallel.disaggregation.caps import Caps, Usage
from distattn.parallel.disaggregation.greedy import greedy_balance
from distattn.parallel.disaggregation.tasks import home_tasks
from distattn.parallel.layout import Layout
from distattn.parallel.need import check_rows
from distattn.parallel.program import Program, check_heads


@dataclass(frozen=True)
class DisaggregatedOptions:
    """How the work is balanced.

    tolerance: how far a rank may exceed its share of the work (0.05: by 5 %).
    align: rows and keys are cut at multiples of it, a kernel's tile.
    servers: this many last ranks do nothing but attention, for all others, which do none.
    capacity: speed of each rank, in any unit; None: all equal.
    planner: "boxes", or "greedy", the published one, for comparison.
    receive_bytes, memory_bytes: most that a rank may receive in a forward, and hold besides its own rows, for heads of
    ``head_dim`` features of ``element_bytes`` each.
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

    def __post_init__(self) -> None:
        if not 0 < self.tolerance <= 10:
            raise PlanError(f"tolerance must be positive and at most 10 (0.05 is 5 %), got {self.tolerance}")
        if self.planner not in ("boxes", "greedy"):
            raise PlanError(f"planner must be boxes or greedy, got {self.planner!r}")
        if not (self.receive_bytes >= 0 and self.memory_bytes >= 0):
            raise PlanError("receive_bytes and memory_bytes must not be negative")
        if self.align < 1 or self.servers < 0:
            raise PlanError(f"align must be positive and servers not negative, got align={self.align}, servers={self.servers}")


def assign(mask: Mask, layout: Layout, heads: int, kv_heads: int, options: DisaggregatedOptions) -> Assignment:
    """Who computes what, before it becomes a Program."""
    check_rows(mask, layout)
    check_heads(heads, kv_heads)
    if options.servers >= layout.num_ranks:
        raise PlanError(f"servers must be fewer than the {layout.num_ranks} ranks, got {options.servers}")
    home = home_tasks(mask, layout, kv_heads)
    share = _speeds(options, layout.num_ranks)
    share *= float(home.pairs.sum()) * kv_heads / share.sum()
    limits = Limits(options.tolerance, options.align, _caps(options, heads // kv_heads))
    if options.planner == "greedy":
        return greedy_balance(home, share, limits)
    assignment = balance(home, layout, share, limits)
    if assignment.usage is not None:
        _check_caps(assignment.usage, options, kv_row_bytes(options))
    return assignment


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


def _check_caps(usage: Usage, options: DisaggregatedOptions, unit: int) -> None:
    for name, used in (("receive_bytes", usage.received), ("memory_bytes", usage.held)):
        cap, worst = getattr(options, name), int(used.argmax())
        if used[worst] * unit > cap:
            raise PlanError(
                f"no assignment found that keeps {name}={cap:.0f}: rank {worst} would need {used[worst] * unit:.0f}; raise the "
                "cap or the tolerance, or use more ranks"
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
    return assemble(task_table(assignment), layout, heads, kv_heads)
