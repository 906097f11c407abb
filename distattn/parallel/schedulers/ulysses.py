"""Ulysses: heads are dealt over ranks, every rank attends over the whole sequence (DeepSpeed, arXiv 2309.14509).

    stage 0   all-to-all: rank u receives all rows of its H/P query heads and of the KV heads that these use
    stage 1   rank u attends
    stage 2   all-to-all back: every rank receives all heads of its own rows

KV heads fewer than ranks are replicated. Where the query heads do not divide by the ranks, the rest of the ranks falls to the
sequence: 6 heads over 4 ranks are 2 ways by heads × 2 along a ring, as in usp. In *pieces*, a rank's heads go in turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.program import Program
from distattn.parallel.schedulers import usp


@dataclass(frozen=True)
class UlyssesOptions:
    """pieces: turns, a stage apart, in which a rank's heads are received, computed and sent back."""

    pieces: int = 1

    def __post_init__(self) -> None:
        if self.pieces < 1:
            raise PlanError(f"pieces must be at least 1, got {self.pieces}")


def variants(heads: int, kv_heads: int, num_ranks: int, ranks_per_node: int) -> list[UlyssesOptions]:
    """All heads at once, and in turns."""
    per_rank = heads // gcd(heads, num_ranks)
    return [UlyssesOptions(x) for x in (1, 2, 4) if per_rank % x == 0]


def plan(
    mask: Mask,
    layout: Layout,
    heads: int,
    kv_heads: int,
    options: UlyssesOptions | None = None,
    key_layout: Layout | None = None,
) -> Program:
    """Ulysses attention over any mask and layout."""
    pieces = (options or UlyssesOptions()).pieces
    return usp.plan(mask, layout, heads, kv_heads, usp.UspOptions(pieces=pieces), key_layout)
