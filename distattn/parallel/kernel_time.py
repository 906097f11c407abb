"""How long the kernels of each rank and stage take, from measured rates.

    seconds = calls · launch + query rows and heads · row + allowed pairs and heads · pair

The pair's price is the mask's own: blocks that its edges cut are computed whole, so that short documents and narrow windows
pay more for each allowed pair. It is found once, on the whole mask, and holds for any number of ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distattn.calibration import Calibration
from distattn.kernels.protocol import T_H1, T_HI, TILE_COLUMNS
from distattn.kernels.selection import Rates, predicted_seconds
from distattn.kernels.workload import Work, work_of
from distattn.parallel.csr import segment_starts
from distattn.parallel.program import (
    ATTEND_H0,
    ATTEND_H1,
    ATTEND_KV,
    ATTEND_KV_ROWS,
    ATTEND_Q,
    ATTEND_Q_ROWS,
    ATTEND_STAGE,
    SLOT_RANK,
    Program,
)

if TYPE_CHECKING:
    from distattn.mask import Mask
    from distattn.parallel.hardware import Hardware


@dataclass(frozen=True)
class Price:
    """Of one backend on one mask, in seconds: each call, each query row and head of a call, each allowed pair and head.

    The last includes what each launch waits at its end, and the rows that vendors' kernels write.
    """

    backend: str
    call_s: float
    row_s: float
    pair_s: float


_prices: OrderedDict[tuple, Price | None] = OrderedDict()
_MAX_PRICES = 128


def price(
    mask: Mask, hardware: Hardware, heads: int, width: int, *, backward: bool, group: int = 1, kernel: str | None = None
) -> Price | None:
    """The cheapest backend's for the whole mask and ``heads`` query heads, which share what a launch waits for at its end; None
    where the hardware has no rates. width: the larger head dimension. group: query heads a KV head. kernel: this backend's,
    whatever others take."""
    if not hardware.kernels:
        return None
    key = (mask.digest, hardware.rates_key, heads, width, backward, group, kernel)
    if key not in _prices:
        _prices[key] = _price(mask, hardware, heads, width, backward=backward, group=group, only=kernel)
        if len(_prices) > _MAX_PRICES:
            _prices.popitem(last=False)
    return _prices[key]


def _price(
    mask: Mask, hardware: Hardware, heads: int, width: int, *, backward: bool, group: int, only: str | None
) -> Price | None:
    rates = Rates(Calibration(hardware.name, kernels=hardware.kernels), hardware.name)
    table = np.zeros((len(mask.bands), len(TILE_COLUMNS)), np.int64)
    table[:, : T_HI + 1] = mask.bands
    table[:, T_H1] = heads
    best: tuple[float, str, dict[str, Work]] | None = None
    for backend in dict.fromkeys(rate.backend for rate in hardware.kernels if only in (None, rate.backend)):
        work = work_of(backend, [table], group=group)
        seconds = predicted_seconds(work, rates, backward=backward, width=width)
        if seconds is not None and (best is None or seconds < best[0]):
            best = seconds, backend, work
    if best is None:
        return None
    _, backend, work = best
    rate = rates.find(backend, backward, width)
    assert rate is not None
    in_pairs = 0.0
    for kernel, amount in work.items():
        of_kernel = rates.find(kernel, backward, width)
        if of_kernel is not None:
            in_pairs += float(np.dot(amount.terms(backward=backward)[3:], of_kernel.on_device[1:]))
    wider = max(1.0, width / rate.head_dim)
    area = mask.area * heads
    return Price(backend, rate.call_s, wider * rate.row_s, wider * in_pairs / area if area else 0.0)


def stage_seconds(program: Program, mask: Mask, pairs: np.ndarray, cost: Price) -> np.ndarray:
    """float64 [P, S]. pairs: of each Attend, int64 [n], as ``Cost.attend_area``."""
    attends = program.attends[pairs > 0]
    rows = _rows_touched(program, mask, attends, pairs[pairs > 0])
    heads = attends[:, ATTEND_H1] - attends[:, ATTEND_H0]
    rank = program.slots[attends[:, ATTEND_Q], SLOT_RANK]
    out = np.zeros((program.num_ranks, program.num_stages))
    at = rank, attends[:, ATTEND_STAGE]
    np.add.at(out, at, pairs[pairs > 0] * heads * cost.pair_s)
    np.add.at(out, at, rows * heads * cost.row_s)
    # Attends of a stage on the same kinds of slots are one call; slots of one rank and stage nearly always are.
    order = np.lexsort((attends[:, ATTEND_STAGE], rank))
    first = order[segment_starts(rank[order], attends[order, ATTEND_STAGE])]
    np.add.at(out, (rank[first], attends[first, ATTEND_STAGE]), cost.call_s)
    return out


def _rows_touched(program: Program, mask: Mask, attends: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Query rows that see any of an Attend's keys, float64 [n].

    All where queries and keys both lie at home, or both came; else as many as its pairs take if each row sees all keys that it
    may: exact where boxes are dense, half of a halo's triangle.
    """
    rows = program.row_counts[attends[:, ATTEND_Q_ROWS]].astype(float)
    homes = 2 * program.num_ranks
    away = (attends[:, ATTEND_Q] >= homes) != (attends[:, ATTEND_KV] >= homes)
    q0, q1, k0, k1, lo, hi = mask.bands.T
    widest = int(np.minimum(k1 - k0, np.minimum(hi - lo + 1, q1 - q0 + k1 - k0)).max(initial=1))
    keys = np.minimum(program.row_counts[attends[:, ATTEND_KV_ROWS]], widest)
    return np.where(away, np.minimum(rows, pairs / np.maximum(keys, 1)), rows)
