"""How long a Program's kernels take by the tiles that its ranks really get, from measured rates.

    seconds of a rank = Σ over its calls (launches, merged rows, blocks) · rates of a backend  +  its sums in fp32

A mask's mean price (``kernel_time``) does not see what a layout does to it: documents and windows that are cut into fragments,
results that are merged, kernels that suit the tiles of some ranks only. A few ranks stand for all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distattn.calibration import Calibration, KernelRate
from distattn.kernels import BACKENDS
from distattn.kernels.protocol import T_H0, T_H1, T_HI, TILE_COLUMNS
from distattn.kernels.selection import Rates, predicted_seconds
from distattn.kernels.softmax.launched import LaunchedBackend
from distattn.kernels.workload import Work, work_of
from distattn.parallel.lowering import lower
from distattn.parallel.program import ATTEND_H0, ATTEND_H1, ATTEND_Q, SLOT_RANK, Program

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
beyond their rates (benchmarks/results/context-h200-before-8k-x2.json)."""


@dataclass(frozen=True)
class TileTime:
    """ranks: those looked at, ascending, int64 [n]; seconds: of all their kernels, float64 [n], with ``backend``, the one that
    is the fastest on the busiest rank, as plans choose theirs; launches: kernels and merges that their hosts start, float64
    [n]."""

    backend: str
    ranks: np.ndarray
    seconds: np.ndarray
    launches: np.ndarray


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
    elements = program.layout.counts[ranks] * program.heads * value_dim
    several = np.array([len(x) > 1 for x in calls]) | (len(program.moves) > 0)
    seconds = several * elements * SUMS_BYTES[program.backward] / (hardware.copy_gb_per_second * 1e9)
    return _fastest(
        hardware.kernels, kernel, ranks, calls, seconds, busiest=int(work[ranks].argmax()),
        width=max(head_dim, value_dim), backward=program.backward, group=program.heads // program.kv_heads,
    )  # fmt: skip


def of_whole(
    mask: Mask, kernels: tuple[KernelRate, ...], kernel: str | None, *, heads: int, group: int, width: int, backward: bool
) -> TileTime | None:
    """One device that computes all of the mask, as rank 0; None without rates. kernel: the backend; None: the fastest."""
    key = (mask.digest, kernels, kernel, heads, group, width, backward)
    if key not in _whole:
        table = np.zeros((len(mask.bands), len(TILE_COLUMNS)), np.int64)
        table[:, : T_HI + 1] = mask.bands
        table[:, T_H1] = heads
        first = np.zeros(1, np.int64)
        shape = {"width": width, "backward": backward, "group": group}
        _whole[key] = _fastest(kernels, kernel, first, [[table]], np.zeros(1), busiest=0, **shape)
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
    as one: what either waits for at its end, the other fills."""
    found: dict[tuple, np.ndarray] = {}
    for step in lower(program, mask, rank).steps:
        for group in step.groups:
            key = (group.q_arena, group.kv_arena, np.delete(group.tiles, [T_H0, T_H1], 1).tobytes())
            before = found.pop(key, None)
            if before is not None and not _goes_on(before, group.tiles):
                found[*key, len(found)] = before
                before = None
            found[key] = group.tiles if before is None else _with_heads_of(before, group.tiles)
    return list(found.values())


def _goes_on(tiles: np.ndarray, other: np.ndarray) -> bool:
    """Whether both are of one range of heads each, and the second's begins where the first's ends."""
    return bool((tiles[:, T_H1] == other[0, T_H0]).all() and (other[:, T_H0] == other[0, T_H0]).all())


def _with_heads_of(tiles: np.ndarray, other: np.ndarray) -> np.ndarray:
    joined = tiles.copy()
    joined[:, T_H1] = other[:, T_H1]
    return joined


def _fastest(
    kernels: tuple[KernelRate, ...], only: str | None, ranks: np.ndarray, calls: Sequence[Sequence[np.ndarray]],
    sums_s: np.ndarray, *, busiest: int, width: int, backward: bool, group: int,
) -> TileTime | None:  # fmt: skip
    """only: the backend; None: the fastest of those with rates. sums_s: seconds of each rank's sums with a backend that adds to
    them, float64 [n]. busiest: index of the rank by which the backend is chosen."""
    rates = Rates(Calibration("", kernels=kernels), "")
    names = [name for name in dict.fromkeys(rate.backend for rate in kernels) if only in (None, name)]
    works = {name: _work(name, calls[busiest], group) for name in names}
    alone = {name: _seconds(work, rates, backward=backward, width=width) for name, work in works.items()}
    name = min(names, key=alone.__getitem__, default=None)
    if name is None or not np.isfinite(alone[name]):
        return None
    launched = isinstance(BACKENDS[name], LaunchedBackend)
    seconds, launches = np.zeros(len(ranks)) if launched else sums_s.copy(), np.zeros(len(ranks))
    for i, tables in enumerate(calls):
        work = works[name] if i == busiest else _work(name, tables, group)
        launches[i] = sum(amount.terms(backward=backward)[1] for amount in work.values())
        if launched:  # what comes before the first of a call's launches is the host's work, which is ahead of the device
            work = {kernel: amount._replace(calls=0.0) for kernel, amount in work.items()}
        seconds[i] += _seconds(work, rates, backward=backward, width=width)
    return TileTime(name, ranks, seconds, launches) if np.isfinite(seconds).all() else None


def _work(backend: str, tables: Sequence[np.ndarray], group: int) -> dict[str, Work]:
    """Of all calls of a rank, by the kernel that does it, from some of them where there are many."""
    some = list(tables[:: max(1, -(-len(tables) // MAX_CALLS))])
    share = len(tables) / max(1, len(some))
    found = {kernel: amount for kernel, amount in work_of(backend, some, group=group).items() if amount.launches}
    return {kernel: Work(*(share * x for x in amount)) for kernel, amount in found.items()}


def _seconds(work: Mapping[str, Work], rates: Rates, *, backward: bool, width: int) -> float:
    found = predicted_seconds(work, rates, backward=backward, width=width)
    return np.inf if found is None else found
