"""What was measured near a table of tiles corrects what the rates say of it.

    time = rates · exp(Σ w·log(ratio · scaled) / (Σ w + DOUBT)),      w = exp(−distance² / NEAR²)

over the measured cells of the same backend, direction and head dimension. A ``KernelRate`` is off by a third on some masks;
backends often differ by less. Where nothing was measured nearby the weights vanish, and the rates stand as they are.

    scaled = √(a pair's time in the cell ÷ a pair's time here, both by the rates), or 1 by rates that know waits

From a cell of half the size, rates by which a launch waits for its longest row (step_s), whether or not others fill the time,
promise less than twice the time. Twice is nearer to what was seen, the more so the larger both are: the mean of both is taken.
Rates by what the busiest processor computes (wait_s), and by rows (vendor_row_s), need no such thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from distattn.calibration import Calibration, KernelCell, KernelRate
from distattn.kernels.workload import NOTHING, Work

NEAR = 0.25
"""In units of the features. This and DOUBT were set on H100 times: cells in the table, left out of it, of other heads."""
DOUBT = 0.05
"""Weight of the rates themselves, where a cell of the same features has 1."""
SCALED = 0.5
"""How much of the way from the rates' scaling with size to a proportional one. On the same times."""
CUT_SCALE, GROUP_SCALE, SIZE_SCALE = 4.0, 0.5, 0.3


class Correction(NamedTuple):
    """factor: on the seconds by the rates. cell: the nearest one measured, or "" where none is near."""

    factor: float
    cell: str


UNCORRECTED = Correction(1.0, "")


def amounts_of(work: Mapping[str, Work], *, backward: bool) -> tuple[float, float, float, float, float]:
    """launches, rows, steps, pairs, cut_pairs of all kernels of a backend."""
    _, launches, rows, steps, pairs, cut_pairs, *_ = sum(work.values(), NOTHING).terms(backward=backward)
    return launches, rows, steps, pairs, cut_pairs


def features(amounts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """float64 [n, 6] from amounts [n, 5] (``amounts_of``) and group [n]: logarithms, and the share of pairs in cut blocks.

    The pairs of a row stand for the mask, of which twice the heads have twice as many rows; the size itself counts for less.
    """
    launches, rows, steps, pairs, cut_pairs = amounts.T
    total = np.maximum(pairs + cut_pairs, 1)
    # A vendor's kernel writes its own rows, which count as none.
    of_a_row = np.where(rows > 0, total / np.maximum(rows, 1), 1)
    logs = np.log(np.maximum(np.stack([launches, steps, of_a_row]), 1))
    return np.stack([*logs, SIZE_SCALE * np.log(total), CUT_SCALE * cut_pairs / total, GROUP_SCALE * np.log(group)], 1)


def _pair_seconds(rate: KernelRate, cell: KernelCell) -> float:
    """What a pair of the cell takes by the rate, with its share of everything else: one call."""
    device_s = cell.rows * rate.row_s + cell.steps * rate.step_s + cell.pairs * rate.pair_s + cell.cut_pairs * rate.cut_pair_s
    seconds = rate.call_s + max(cell.launches * rate.launch_s, device_s)
    return max(seconds, 1e-12) / max(cell.pairs + cell.cut_pairs, 1)


def correction(calibration: Calibration, like: KernelCell) -> Correction:
    """For work such as ``like``, whose ratio is not known, from the cells of its backend, direction and head dimension."""
    kind = (like.backend, like.backward, like.head_dim)
    cells = [x for x in calibration.cells if (x.backend, x.backward, x.head_dim) == kind]
    if not cells:
        return UNCORRECTED
    every = [like, *cells]
    amounts = np.array([(x.launches, x.rows, x.steps, x.pairs, x.cut_pairs) for x in every], np.float64)
    places = features(amounts, np.array([x.group for x in every]))
    weights = np.exp(-np.square(places[1:] - places[0]).sum(1) / NEAR**2)
    rate = next((x for x in calibration.kernels if (x.backend, x.backward, x.head_dim) == kind), None)
    of_a_pair = np.ones(len(every))
    if rate is not None and not (rate.wait_s or rate.vendor_row_s):
        of_a_pair = np.array([_pair_seconds(rate, x) for x in every])
    logs = np.log([x.ratio for x in cells]) + SCALED * np.log(of_a_pair[1:] / of_a_pair[0])
    nearest = int(weights.argmax())
    factor = float(np.exp((weights * logs).sum() / (weights.sum() + DOUBT)))
    return Correction(factor, cells[nearest].cell if weights[nearest] > np.exp(-1) else "")
