"""Choosing a layout by measured balance, and a strategy by predicted time. Every choice carries its reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.hardware import HARDWARE, Hardware
from distattn.parallel.layout import Layout
from distattn.parallel.need import area_per_rank
from distattn.parallel.program import Program
from distattn.parallel.schedulers import SCHEDULERS, find_scheduler
from distattn.parallel.simulate import predict

BALANCE_TOLERANCE = 1.05
"""A layout with less traffic is preferred as long as its busiest rank is within this factor of the best layout's."""


@dataclass(frozen=True)
class LayoutChoice:
    layout: Layout
    reason: str


@dataclass(frozen=True)
class StrategyChoice:
    """The winner, its layout and program, why it won, and predicted forward + backward seconds of every candidate."""

    strategy: str
    layout: Layout
    program: Program
    reason: str
    predicted_seconds: dict[str, float] = field(default_factory=dict)


def choose_layout(mask: Mask, num_ranks: int, strategy: str) -> LayoutChoice:
    """Contiguous where balance allows, else zigzag, else per-document zigzag: by each rank's area, not by the mask's name."""
    rows = mask.num_queries
    contiguous = Layout.contiguous(rows, num_ranks)
    if num_ranks == 1:
        return LayoutChoice(contiguous, "one rank holds all rows")
    if not find_scheduler(strategy).splits_rows:
        return LayoutChoice(contiguous, f"{strategy} balances by heads, whatever the layout")
    candidates = [contiguous, Layout.zigzag(rows, num_ranks)]
    cuts = mask.segments()
    if len(cuts) > 2:
        candidates.append(Layout.per_document_zigzag(cuts[1:] - cuts[:-1], num_ranks))
    busiest = [int(area_per_rank(mask, layout).max(initial=0)) for layout in candidates]
    best = min(busiest)
    chosen = next(i for i, area in enumerate(busiest) if area <= BALANCE_TOLERANCE * best)
    mean = mask.area / num_ranks
    balance = ", ".join(
        f"{layout.name} {area / mean if mean else 1:.2f}" for layout, area in zip(candidates, busiest, strict=True)
    )
    return LayoutChoice(candidates[chosen], f"busiest rank over mean: {balance}")


def choose_strategy(
    mask: Mask,
    num_ranks: int,
    heads: int,
    kv_heads: int,
    *,
    head_dim: int,
    value_dim: int | None = None,
    dtype: str = "bfloat16",
    hardware: Hardware | None = None,
    layout: Layout | None = None,
) -> StrategyChoice:
    """The scheduler with the least predicted forward + backward time on ``hardware`` (default: h100 nodes).

    layout: a given layout, which all candidates must use; None lets each choose its own.
    """
    hardware = hardware or HARDWARE["h100"]
    if num_ranks == 1:
        chosen = layout or Layout.contiguous(mask.num_queries, 1)
        program = SCHEDULERS["ring"].plan(mask, chosen, heads, kv_heads)
        return StrategyChoice("ring", chosen, program, "one rank: every strategy is the same local attention")
    seconds: dict[str, float] = {}
    refused: list[str] = []
    best: tuple[float, str, Layout, Program] | None = None
    for name, scheduler in SCHEDULERS.items():
        reason = scheduler.why_not(heads, num_ranks)
        if reason:
            refused.append(name)
            continue
        placed = layout or choose_layout(mask, num_ranks, name).layout
        program = scheduler.plan(mask, placed, heads, kv_heads)
        backward = derive_backward(program, ranks_per_node=hardware.ranks_per_node)
        seconds[name] = sum(
            predict(direction, mask, hardware, head_dim, value_dim, dtype).seconds for direction in (program, backward)
        )
        if best is None or seconds[name] < best[0]:
            best = (seconds[name], name, placed, program)
    assert best is not None, "ring takes any heads"
    table = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in sorted(seconds.items(), key=lambda x: x[1]))
    reason = f"least predicted forward + backward time on {hardware.name}: {table}"
    if refused:
        reason += f" (heads do not divide for {', '.join(refused)})"
    return StrategyChoice(best[1], best[2], best[3], reason, seconds)
