"""Where rows should lie so that balancing their attention sends least.

    contiguous                 tasks move until every rank has its share
    zigzag, per document, …    nothing moves where the layout has balanced already: only keys travel

A layout that balances by itself makes disaggregated attention the context parallelism of that layout; one without traffic at
all makes it data parallelism. Which of them is best hangs on the documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from distattn.mask import Mask
from distattn.parallel.disaggregation.assemble import received, task_table
from distattn.parallel.disaggregation.balance import Assignment
from distattn.parallel.disaggregation.caps import Caps
from distattn.parallel.disaggregation.tasks import home_tasks
from distattn.parallel.layout import Layout, area_per_rank


def least_received(
    mask: Mask,
    layouts: Iterable[Layout],
    kv_heads: int,
    *,
    share: np.ndarray,
    tolerance: float,
    caps: Caps,
    assign: Callable[[Layout], Assignment],
) -> tuple[Layout, str]:
    """The layout whose busiest rank receives least in a forward, and why: those but the first only where they balance by
    themselves.

    share: float64 [P], each rank's part of all work, summing to 1. assign: plans on a layout; called for the first layout
    alone, and not where that one balances.
    """
    found: list[tuple[float, Layout]] = []
    for layout in layouts:
        work = area_per_rank(mask, layout).astype(np.float64)
        balanced = bool((work <= (1 + tolerance) * share * max(mask.area, 1)).all())
        if not balanced and found:
            continue
        tasks = task_table(_at_home(mask, layout, kv_heads, share) if balanced else assign(layout))
        found.append((float(received(tasks, layout, kv_heads, caps).max(initial=0.0)), layout))
    best = min(found, key=lambda x: x[0])  # the first of equals
    unit = max(best[0], 1.0)
    others = ", ".join(f"{layout.name} {rows / unit:.2f}" for rows, layout in found)
    return best[1], f"the busiest rank receives, over the least of all layouts that keep the tolerance: {others}"


def _at_home(mask: Mask, layout: Layout, kv_heads: int, share: np.ndarray) -> Assignment:
    """Every rank computes its own rows."""
    home = home_tasks(mask, layout, kv_heads)
    work = np.bincount(home.home, weights=home.pairs.astype(np.float64) * kv_heads, minlength=len(share))
    return Assignment(home, np.ones(len(home.home), bool), [], share * work.sum(), work, 0, "balanced")
