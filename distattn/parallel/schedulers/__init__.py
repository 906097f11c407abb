"""Schedulers: pure functions from a mask, a layout and head counts to a Program.

A new one is a file with a ``plan`` function and an options dataclass, and a line in ``SCHEDULERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distattn.errors import PlanError
from distattn.parallel.program import Program
from distattn.parallel.schedulers import all_gather, ring, ulysses


@dataclass(frozen=True)
class Scheduler:
    """One strategy.

    plan(mask, layout, heads, kv_heads, options) → Program; options: its frozen dataclass; why_not(heads, num_ranks): why it
    cannot split these heads, or None; splits_rows: whether a rank computes its own rows (then the layout decides balance).
    """

    name: str
    plan: Callable[..., Program]
    options: type[Any]
    why_not: Callable[[int, int], str | None]
    splits_rows: bool


def _takes_any_heads(heads: int, num_ranks: int) -> str | None:
    return None


SCHEDULERS: dict[str, Scheduler] = {
    "ring": Scheduler("ring", ring.plan, ring.RingOptions, _takes_any_heads, splits_rows=True),
    "all_gather": Scheduler(
        "all_gather", all_gather.plan, all_gather.AllGatherOptions, _takes_any_heads, splits_rows=True
    ),
    "ulysses": Scheduler("ulysses", ulysses.plan, ulysses.UlyssesOptions, ulysses.why_not, splits_rows=False),
}


def find_scheduler(name: str) -> Scheduler:
    """The scheduler of that name; PlanError lists those that exist."""
    if name not in SCHEDULERS:
        raise PlanError(f"unknown strategy {name!r}; choose one of {', '.join(['auto', *SCHEDULERS])}")
    return SCHEDULERS[name]
