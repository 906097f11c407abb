"""Speeds of ranks from what their attention took: a slow device gets less of it (for ``DisaggregatedOptions.capacity``)."""

from __future__ import annotations

from collections.abc import Sequence

from distattn.errors import PlanError

SLOWEST, FASTEST = 0.8, 1.25
"""Beyond these a measurement says more about a hiccup than about a device."""


def updated_speeds(
    speeds: Sequence[float],
    measured_seconds: Sequence[float],
    predicted_seconds: Sequence[float],
    *,
    weight: float = 0.25,
    quantum: float = 1 / 64,
) -> tuple[float, ...]:
    """The next speeds, relative to what predictions assume: a moving average, clamped and quantised.

    speeds: before, 1 for a rank as predicted. measured_seconds, predicted_seconds: of each rank's attention since, by position;
    a rank that was predicted or measured to take none keeps its speed. weight: of the new measurement. quantum: speeds are
    multiples of it, so that noise does not change the plan. Pure: ranks that pass the same numbers (gathered once every so
    many steps) get the same speeds, hence the same plans.
    """
    if not len(speeds) == len(measured_seconds) == len(predicted_seconds):
        raise PlanError(
            f"speeds, measured_seconds and predicted_seconds need one number a rank, got {len(speeds)}, "
            f"{len(measured_seconds)} and {len(predicted_seconds)}"
        )
    if not 0 < weight <= 1 or not 0 < quantum <= SLOWEST:
        raise PlanError(f"weight must be in (0, 1] and quantum in (0, {SLOWEST}], got {weight} and {quantum}")
    found = []
    for speed, measured, predicted in zip(speeds, measured_seconds, predicted_seconds, strict=True):
        if measured > 0 and predicted > 0:
            speed = (1 - weight) * speed + weight * min(max(predicted / measured, SLOWEST), FASTEST)
        steps = round(min(max(speed, SLOWEST), FASTEST) / quantum)
        found.append(steps * quantum)
    return tuple(found)
