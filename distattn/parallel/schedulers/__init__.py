"""Schedulers: pure functions from a mask, a layout and head counts to a Program.

A new one is a file with a ``plan`` function and an options dataclass, and a line in ``SCHEDULERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.program import Program
from distattn.parallel.schedulers import all_gather, disaggregated, double_ring, ring, ulysses, usp


def _takes_any_heads(heads: int, num_ranks: int) -> str | None:
    return None


def _each_alone(options: Any, heads: int, num_ranks: int) -> np.ndarray:
    return np.arange(num_ranks)


def _no_servers(options: Any) -> int:
    return 0


def _no_home(mask: Mask, layouts: Iterable[Layout], heads: int, kv_heads: int, options: Any) -> tuple[Layout, str] | None:
    return None


@dataclass(frozen=True)
class Scheduler:
    """One strategy.

    plan(mask, layout, heads, kv_heads, options, key_layout) → Program; options: its frozen dataclass.
    variants(heads, kv_heads, num_ranks, ranks_per_node) → options worth a prediction, the default for this shape and these
    nodes first. why_not(heads, num_ranks): why it cannot split these heads, or None. groups(options, heads, num_ranks) → int64
    [P]: ranks of one group compute on the same rows, so that the layout has to balance groups only. balances: it evens out
    the ranks' work itself, so that auto needs it only where no layout does. servers(options): last ranks that compute for
    others only, to which layouts give no rows. home(mask, layouts, heads, kv_heads, options) → the layout of these with which
    one that balances sends least, and why, or None for the first. certificate(mask, layout, heads, kv_heads, options) → how far
    the plan is from what no plan can beat, for schedulers that know.
    """

    name: str
    plan: Callable[..., Program]
    options: type[Any]
    variants: Callable[[int, int, int, int], Sequence[Any]]
    groups: Callable[[Any, int, int], np.ndarray] = _each_alone
    why_not: Callable[[int, int], str | None] = _takes_any_heads
    balances: bool = False
    servers: Callable[[Any], int] = _no_servers
    home: Callable[..., tuple[Layout, str] | None] = _no_home
    certificate: Callable[..., disaggregated.Certificate] | None = None


def _all_as_one(options: Any, heads: int, num_ranks: int) -> np.ndarray:
    return np.zeros(num_ranks, np.int64)


def _dedicated(options: disaggregated.DisaggregatedOptions) -> int:
    return options.servers


def _ulysses_groups(options: ulysses.UlyssesOptions, heads: int, num_ranks: int) -> np.ndarray:
    return usp.groups_of(usp.UspOptions(), heads, num_ranks)


SCHEDULERS: dict[str, Scheduler] = {
    "ring": Scheduler("ring", ring.plan, ring.RingOptions, ring.variants),
    "double_ring": Scheduler("double_ring", double_ring.plan, double_ring.DoubleRingOptions, double_ring.variants),
    "all_gather": Scheduler("all_gather", all_gather.plan, all_gather.AllGatherOptions, all_gather.variants),
    "ulysses": Scheduler("ulysses", ulysses.plan, ulysses.UlyssesOptions, ulysses.variants, _ulysses_groups),
    "usp": Scheduler("usp", usp.plan, usp.UspOptions, usp.variants, usp.groups_of),
    "disaggregated": Scheduler(
        "disaggregated",
        disaggregated.plan,
        disaggregated.DisaggregatedOptions,
        disaggregated.variants,
        _all_as_one,
        balances=True,
        servers=_dedicated,
        home=disaggregated.choose_home,
        certificate=disaggregated.certificate,
    ),
}


def find_scheduler(name: str) -> Scheduler:
    """The scheduler of that name; PlanError lists those that exist."""
    if name not in SCHEDULERS:
        raise PlanError(f"unknown strategy {name!r}; choose one of {', '.join(['auto', *SCHEDULERS])}")
    return SCHEDULERS[name]
