"""How long a Program's kernels take by the tiles that its ranks really get, from measured rates.

    seconds of a rank = Σ over its calls (launches, merged rows, blocks) · rates of a backend  +  its sums in fp32

A mask's mean price (``kernel_time``) does not see what a layout does to it: documents and windows that are cut into fragments,
results that are merged, kernels that suit the tiles of some ranks only. A few ranks stand for all. What the host takes to start
kernels is not in it: the host is ahead of the device, or all of its work counts (``simulate.total_seconds``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distattn.kernels import BACKENDS
from distattn.kernels.protocol import T_H0, T_H1, T_HI, TILE_COLUMNS
from distattn.kernels.selection import Rates, corrected, predicted_seconds
from distattn.kernels.softmax.launched import LaunchedBackend
from distattn.kernels.workload import Work, work_of
from distattn.parallel.lowering import HOME_KV, HOME_Q, lower
from distattn.parallel.program import ATTEND_H0, ATTEND_H1, ATTEND_Q, SLOT_H0, SLOT_H1, SLOT_RANK, SLOT_ROWS, Program

if TYPE_CHECKING:
    from distattn.mask import Mask
    from distattn.parallel.hardware import Hardware

FEW_RANKS = 3
"""At most so many ranks are looked at, spread over all, and the busiest; of more than MANY_RANKS the busiest alone."""

MANY_RANKS = 16

MAX_CALLS = 16
"""Calls of a rank whose tiles are looked at; of more, as many spread over them stand for all."""

SUMS_BYTES = {False: 25, True: 38}
"""Of each feature of each query row and head, forward and backward: what clearing, adding to and rounding sums in fp32 moves
where a backend adds to them, since other calls or ranks have a part in them. Fitted to what our Triton kernels took on two H200
beyond their rates (benchmarks/results/context-h200-before-8k-x2.json). Results of queries that came to a rank go through such
sums whatever the backend."""

LEAST_ROW_S = 6e-10
"""Of each query row and head of 128 features whose result or gradient is added to sums in fp32, whatever the rates say: those
of a kernel that was measured with few such rows do not show it. 10 bytes a feature, at 2.1 TB/s, as profiles showed them."""

RATED_GROUPS = (1, 8)
"""Query heads a KV head in the times that rates are fitted to. A row of the backward stands for those of dq, dk and dv, of
which the last two are the fewer the larger this is."""


@dataclass(frozen=True)
class TileTime:
    """ranks: those looked at, ascending, int64 [n]; seconds: of all their kernels, float64 [n], with ``backend``, the one that
    is the fastest on the busiest rank, as plans choose theirs; launches: kernels and merges that their hosts start, float64
    [n]."""

    backend: str
    ranks: np.ndarray
    seconds: np.ndarray
    launches: np.ndarray


class _Asked(NamedTuple):
    """Of one pass. width: the larger head dimension; group: query heads a KV head."""

    rates: Rates
    width: int
    group: int
    backward: bool


_whole: OrderedDict[tuple, TileTime | None] = OrderedDict()
_MAX_WHOLE = 128


def of_program(
    program: Program,
    mask: Mask,
    pairs: np.ndarray,
    hardware: Hardware,
    head_dim: int,
    value_dim: int,
    *,
    kernel: str | None = None,
) -> TileTime | None:
    """None where the hardware has no rates, or nothing is computed. pairs: of each Attend, int64 [n], as
    ``Cost.attend_area``. kernel: the backend; None: the fastest."""
    attends = program.attends
    heads = attends[:, ATTEND_H1] - attends[:, ATTEND_H0]
    work = np.bincount(program.slots[attends[:, ATTEND_Q], SLOT_RANK], weights=pairs * heads, minlength=program.num_ranks)
    if not hardware.kernels or not work.any():
        return None
    ranks = chosen_ranks(work)
    calls = [calls_of(program, mask, int(rank)) for rank in ranks]
    several = np.array([len(x) > 1 for x in calls]) | (len(program.moves) > 0)
    added = several * program.layout.counts[ranks] * program.heads * SUMS_BYTES[program.backward]
    carried = (not program.backward) * _rows_away(program)[ranks] * SUMS_BYTES[False]
    per_byte = value_dim / (hardware.copy_gb_per_second * 1e9)
    asked = _Asked(hardware.rates, max(head_dim, value_dim), program.heads // program.kv_heads, program.backward)
    sums_s = {False: per_byte * added, True: per_byte * carried}
    return _fastest(asked, kernel, ranks, calls, sums_s, busiest=int(work[ranks].argmax()))


def _rows_away(program: Program) -> np.ndarray:
    """Rows and heads of queries that each rank computes for others or with others' heads, int64 [P]."""
    queries = np.unique(program.attends[:, ATTEND_Q])
    away = program.slots[queries[queries >= 2 * program.num_ranks]]
    rows = program.row_counts[away[:, SLOT_ROWS]] * (away[:, SLOT_H1] - away[:, SLOT_H0])
    return np.bincount(away[:, SLOT_RANK], weights=rows, minlength=program.num_ranks)


def of_whole(
    mask: Mask, hardware: Hardware, kernel: str | None, *, heads: int, group: int, width: int, backward: bool
) -> TileTime | None:
    """One device that computes all of the mask, as rank 0; None without rates. kernel: the backend; None: the fastest."""
    key = (mask.digest, hardware.rates_key, kernel, heads, group, width, backward)
    if key not in _whole:
        table = np.zeros((len(mask.bands), len(TILE_COLUMNS)), np.int64)
        table[:, : T_HI + 1] = mask.bands
        table[:, T_H1] = heads
        nothing = {False: np.zeros(1), True: np.zeros(1)}
        asked = _Asked(hardware.rates, width, group, backward)
        _whole[key] = _fastest(asked, kernel, np.zeros(1, np.int64), [[table]], nothing, busiest=0)
        if len(_whole) > _MAX_WHOLE:
            _whole.popitem(last=False)
    return _whole[key]


def factors(ranks: np.ndarray, found: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """By what each rank's ``amounts`` [P] are multiplied so that these ranks have what was ``found`` [n], float64 [P]. Ranks
    that were not looked at have the mean of the others."""
    known = found / np.where(amounts[ranks] > 0, amounts[ranks], np.inf)
    out = np.full(len(amounts), known[known > 0].mean() if (known > 0).any() else 1.0)
    out[ranks] = known
    return out


def chosen_ranks(work: np.ndarray) -> np.ndarray:
    """Ranks that stand for all, int64, ascending; work: of each rank, float64 [P]."""
    num_ranks, busiest = len(work), int(work.argmax())
    if num_ranks > MANY_RANKS:
        return np.array([busiest])
    spread = np.linspace(0, num_ranks - 1, min(num_ranks, FEW_RANKS)).astype(np.int64)
    return np.unique(np.append(spread, busiest))


def calls_of(program: Program, mask: Mask, rank: int) -> list[np.ndarray]:
    """The tiles of each of a rank's kernel calls. Calls that are one but for their heads, such as those that fill a wait, count
    as one: what either waits for at its end, the other fills. What is at home comes first: results of the others are merged
    into it, and so are their gradients, whatever comes first in time."""
    found: dict[tuple, np.ndarray] = {}
    for step in lower(program, mask, rank).steps:
        for group in step.groups:
            key = (group.q_arena, group.kv_arena, np.delete(group.tiles, [T_H0, T_H1], 1).tobytes())
            before = found.pop(key, None)
            if before is not None and not _goes_on(before, group.tiles):
                found[*key, len(found)] = before
                before = None
            found[key] = group.tiles if before is None else _with_heads_of(before, group.tiles)
    away = [key[:2] != (HOME_Q, HOME_KV) for key in found]
    return [tiles for _, tiles in sorted(zip(away, found.values()), key=lambda entry: entry[0])]


def _goes_on(tiles: np.ndarray, other: np.ndarray) -> bool:
    """Whether both are of one range of heads each, and the second's begins where the first's ends."""
    return bool((tiles[:, T_H1] == other[0, T_H0]).all() and (other[:, T_H0] == other[0, T_H0]).all())


def _with_heads_of(tiles: np.ndarray, other: np.ndarray) -> np.ndarray:
    joined = tiles.copy()
    joined[:, T_H1] = other[:, T_H1]
    return joined


def _fastest(
    asked: _Asked, only: str | None, ranks: np.ndarray, calls: Sequence[Sequence[np.ndarray]],
    sums_s: Mapping[bool, np.ndarray], *, busiest: int,
) -> TileTime | None:  # fmt: skip
    """only: the backend; None: the fastest of those with rates. sums_s: seconds of each rank's sums, float64 [n], by whether
    the backend works in launches. busiest: index of the rank by which the backend is chosen."""
    names = [name for name in dict.fromkeys(rate.backend for rate in asked.rates.calibration.kernels) if only in (None, name)]
    works = {name: _work(name, calls[busiest], asked) for name in names}
    alone = {name: _seconds(name, work, asked) for name, work in works.items()}  # as the choice of a plan has them
    name = min(names, key=alone.__getitem__, default=None)
    if name is None or not np.isfinite(alone[name]):
        return None
    seconds, launches = sums_s[isinstance(BACKENDS[name], LaunchedBackend)].copy(), np.zeros(len(ranks))
    for i, tables in enumerate(calls):
        work = works[name] if i == busiest else _work(name, tables, asked)
        launches[i] = sum(amount.terms(backward=asked.backward)[1] for amount in work.values())
        seconds[i] += _device_seconds(name, work, asked)
    return TileTime(name, ranks, seconds, launches) if np.isfinite(seconds).all() else None


def _work(backend: str, tables: Sequence[np.ndarray], asked: _Asked) -> dict[str, Work]:
    """Of all calls of a rank, by the kernel that does it, from some of them where there are many."""
    some = list(tables[:: max(1, -(-len(tables) // MAX_CALLS))])
    share = len(tables) / max(1, len(some))
    found = {kernel: amount for kernel, amount in work_of(backend, some, group=asked.group).items() if amount.launches}
    return {kernel: Work(*(share * x for x in amount)) for kernel, amount in found.items()}


def _seconds(name: str, work: Mapping[str, Work], asked: _Asked) -> float:
    found = predicted_seconds(work, asked.rates, backward=asked.backward, width=asked.width)
    factor = corrected(name, work, asked.rates, backward=asked.backward, width=asked.width, group=asked.group).factor
    return np.inf if found is None else factor * found


def _device_seconds(name: str, work: Mapping[str, Work], asked: _Asked) -> float:
    """The same of the device alone, for which the host has launched before: of a backend that works in launches."""
    if not isinstance(BACKENDS[name], LaunchedBackend):
        return _seconds(name, work, asked)
    rows_s = sum(amount.rows * _row_seconds(kernel, asked) for kernel, amount in work.items())
    rest = {kernel: amount._replace(calls=0.0, launches=1.0, merges=0.0, rows=0.0) for kernel, amount in work.items()}
    found = predicted_seconds(rest, asked.rates, backward=asked.backward, width=asked.width)
    factor = corrected(name, work, asked.rates, backward=asked.backward, width=asked.width, group=asked.group).factor
    return np.inf if found is None else factor * (found + rows_s)


def _row_seconds(kernel: str, asked: _Asked) -> float:
    """Of a query row and head whose result or gradients are added to others, by a kernel that works in launches."""
    rate = asked.rates.find(kernel, asked.backward, asked.width)
    if rate is None:
        return np.inf
    tensors, rated = 1.0, 1.0
    if asked.backward:
        tensors, *of_rated = (1 + 2 / group for group in (asked.group, *RATED_GROUPS))
        rated = float(np.mean(of_rated))
    wider = max(1.0, asked.width / rate.head_dim)
    return max(wider * rate.row_s * tensors / rated, LEAST_ROW_S * asked.width / 128 * tensors)
