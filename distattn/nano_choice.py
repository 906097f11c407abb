"""One nano-batch or two in turns: whichever is predicted to take less time for these documents, ranks and links.

    one    linear layers + attention, with what it cannot hide of its transfers by itself
    two    a tick lasts as long as what it computes or what travels; two kernels of half the size, more launches, rows handed on

The prediction is that of the plans themselves (``distattn.parallel.simulate``), so that it knows the machine as far as they do.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.disaggregation.halves import arrange
from distattn.parallel.disaggregation.ticks import Half, alone_seconds, turns_seconds
from distattn.parallel.program import MOVE_DST, MOVE_SRC, SLOT_RANK
from distattn.parallel.simulate import predict
from distattn.pingpong import NanoBatches, cut_in_two
from distattn.planning import Plan, plan

WORTH_TURNS = 0.02
"""What two must save: on two H200 their layers took up to 1.2 % more, transfers apart, than those of one; not predicted."""

_seconds: weakref.WeakKeyDictionary[Plan, dict[tuple[int, float, int], tuple[float, float]]] = weakref.WeakKeyDictionary()
"""What was predicted, kept with the plan of the whole, since every step asks again."""


def choose_nano_batches(
    mask: Mask, *, linear_flops: float, layers: int, strategy: str = "auto", **arguments: Any
) -> NanoBatches:
    """One nano-batch, or two by ``cut_in_two``, by predicted time; ``reason`` of the result says which and why.

    mask: square. linear_flops: forward FLOPs a token and layer outside attention; layers: of the model; the rest: arguments of
    ``plan``, without layouts. Collective, as ``plan``. Raises PlanError for FLOPs or layers that are not positive, and what
    ``plan`` raises.
    """
    if not linear_flops > 0 or layers < 1:
        raise PlanError(f"linear_flops and layers must be positive, got {linear_flops} and {layers}")
    whole = plan(mask, strategy=strategy, **arguments)
    alone = NanoBatches.of(whole)
    if whole.num_ranks == 1:
        return replace(alone, reason="one nano-batch: nothing travels on one rank")
    if not _sends(whole):
        return replace(alone, reason="one nano-batch: its attention sends nothing")
    if mask.num_queries < 2 or arrange(mask) is None:
        return replace(alone, reason="one nano-batch: no row of this mask can be cut at")
    one, exposed = _in_one(whole, linear_flops, layers)
    place, least = f"predicted on {whole.hardware.name}", f"two must save {WORTH_TURNS:.0%}"
    if exposed <= WORTH_TURNS * one:
        waits = f"{exposed / one:.1%} of {1e3 * one:.4g} ms wait for transfers"
        return replace(alone, reason=f"one nano-batch: {waits}, {place}; {least}")
    halves = cut_in_two(mask, strategy=strategy, **arguments)
    two = _in_two(whole, halves, linear_flops, layers)
    saved = f"{1e3 * one:.4g} ms in one, {1e3 * two:.4g} ms in two, {place}"
    if two > (1 - WORTH_TURNS) * one:
        return replace(alone, reason=f"one nano-batch: {saved}; {least}")
    return replace(halves, reason=f"two nano-batches: {saved}")


def _sends(whole: Plan) -> bool:
    """Whether any rank's attention needs anything of another."""
    moves, rank = whole.program.moves, whole.program.slots[:, SLOT_RANK]
    return bool((rank[moves[:, MOVE_SRC]] != rank[moves[:, MOVE_DST]]).any())


def _in_one(whole: Plan, linear_flops: float, layers: int) -> tuple[float, float]:
    """Seconds of all layers in one, and those of them that wait for transfers: the most that two could save."""
    known, key = _seconds.setdefault(whole, {}), (whole.handle, linear_flops, layers)
    if key not in known:
        half = _half(whole, whole.layout.counts, 0 * whole.layout.counts)
        exposed = layers * sum(prediction.exposed_communication_seconds for prediction in half.predictions)
        known[key] = alone_seconds(half, linear_flops, layers), exposed
    return known[key]


def _in_two(whole: Plan, halves: NanoBatches, linear_flops: float, layers: int) -> float:
    """Seconds of all layers in turns."""
    first, second = halves.plans
    known, key = _seconds.setdefault(whole, {}), (second.handle, linear_flops, layers)
    if key not in known:
        counts = second.layout.counts
        own = _own_rows(second, whole.mask.num_queries - first.mask.num_queries)
        parts = (
            _half(first, first.layout.counts, 0 * first.layout.counts),
            _half(second, own, np.where(counts > own, counts, 0)),
        )
        known[key] = turns_seconds(parts, linear_flops, layers), 0.0
    return known[key][0]


def _own_rows(second: Plan, own: int) -> np.ndarray:
    """Of each rank's rows in the second half's plan, how many are among its last ``own`` rows; int64 [P]."""
    start = second.mask.num_queries - own
    ranges = second.layout.ranges
    rows = np.maximum(ranges[:, 1] - np.maximum(ranges[:, 0], start), 0)
    return np.bincount(second.layout.range_owner, weights=rows, minlength=second.num_ranks).astype(np.int64)


def _half(made: Plan, rows: np.ndarray, joined: np.ndarray) -> Half:
    programs = made.program, made.backward_program
    dtype = str(made.dtype or "bfloat16")
    forward, backward = (
        predict(
            program, made.mask, made.hardware, made.head_dim, made.value_dim, dtype, kernel=made.hardware.rated(made.kernel)
        )
        for program in programs
    )
    return Half(programs, (forward, backward), rows, joined)
