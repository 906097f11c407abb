"""Which backend is predicted to be the fastest for given tiles, forward and backward each for itself.

Rates are measured: by ``distattn bench calibrate`` on this machine, else those that come with distattn for Hopper GPUs. The
times measured for them correct what they say of tiles like those that were timed (``distattn.kernels.measured``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from distattn.calibration import Calibration, KernelCell, KernelRate, load_calibration, parse_calibration
from distattn.kernels.measured import UNCORRECTED, Correction, amounts_of, correction
from distattn.kernels.protocol import Backend, Carry, Case, Extras, WholeBackend
from distattn.kernels.workload import Work, work_of

SHIPPED = "rates_h200.json"
"""For the choice. ``distattn bench calibrate --recorded`` makes it of benchmarks/results/kernel-rates-h200-8434617-*.json."""

SHIPPED_FOR_SCHEDULES = "rates_h100.json"
"""For predictions of schedules, whose own numbers, such as what sums and merges take, were fitted beside these rates: by the
newer ones, whose shortest times are of 8K tokens, pieces of 8K tokens would be predicted up to 30 % too fast."""

WORTH_A_SECOND_KERNEL = 0.02
"""The share of either direction's time that must be saved before forward and backward take different kernels."""

LEAST_LAUNCH_S = 1e-4
"""Of the host, for each launch of a call that makes several, and each merge of their results, whatever the rates say: those of
a kernel that was measured with few launches do not show it. Beside H200s each of cuDNN's 18 launches took 0.2 ms."""


@dataclass(frozen=True)
class Rates:
    """Rates in use. origin: where they come from, in words."""

    calibration: Calibration
    origin: str

    def find(self, kernel: str, backward: bool, width: int) -> KernelRate | None:
        """That of the next wider head dimension which was measured, or of the widest."""
        known = [x for x in self.calibration.kernels if x.backend == kernel and x.backward == backward]
        wide_enough = [x for x in known if x.head_dim >= width]
        if wide_enough:
            return min(wide_enough, key=lambda x: x.head_dim)
        return max(known, key=lambda x: x.head_dim, default=None)


@dataclass(frozen=True)
class Choice:
    """Names of backends, and why those."""

    forward: str
    backward: str
    reason: str


class SplitBackend:
    """One backend's forward with another's backward: what they pass on, (out, lse), is the same for all."""

    def __init__(self, forward: Backend, backward: Backend) -> None:
        self.forward, self.backward = forward, backward
        self.name = f"{forward.name}+{backward.name}"
        self.needs_out = backward.needs_out

    def why_not(self, case: Case) -> str | None:
        return self.forward.why_not(case) or self.backward.why_not(case)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, *, group: int, scale: float,
        softcap: float | None, extras: Extras | None = None,
    ) -> None:  # fmt: skip
        self.forward.attend(q, k, v, tiles, carry, group=group, scale=scale, softcap=softcap, extras=extras)

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, delta: Tensor,
        tiles: np.ndarray, dq: Tensor, dk: Tensor, dv: Tensor, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> None:  # fmt: skip
        self.backward.attend_backward(
            q, k, v, out, lse, do, delta, tiles, dq, dk, dv, group=group, scale=scale, softcap=softcap, extras=extras
        )


class SplitWholeBackend(SplitBackend):
    """The same of two backends that need no carry where one call is all."""

    forward: WholeBackend
    backward: WholeBackend

    def attend_whole(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self.forward.attend_whole(q, k, v, tiles, group=group, scale=scale, softcap=softcap, extras=extras)

    def attend_backward_whole(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
        tiles: np.ndarray, *, group: int, scale: float, softcap: float | None, extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return self.backward.attend_backward_whole(
            q, k, v, out, lse, do, dlse, tiles, group=group, scale=scale, softcap=softcap, extras=extras
        )


def split(forward: Backend, backward: Backend) -> Backend:
    """One's forward with another's backward."""
    if isinstance(forward, WholeBackend) and isinstance(backward, WholeBackend):
        return SplitWholeBackend(forward, backward)
    return SplitBackend(forward, backward)


@lru_cache(maxsize=1)
def rates_here() -> Rates | None:
    """The rates for this machine's device, read once; None where nothing was measured on anything like it.

    Raises ConfigError for a calibration file that cannot be read.
    """
    if not torch.cuda.is_available():
        return None
    own = load_calibration()
    if own is not None and own.kernels:
        return Rates(own, f"the calibration of this {own.device}")
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    shipped = shipped_choice_rates()
    return Rates(shipped, f"rates measured on {shipped.device}s; `distattn bench calibrate` measures yours")


def shipped_choice_rates() -> Calibration:
    """What comes with the package for the choice on a Hopper GPU that was not calibrated."""
    return _shipped(SHIPPED)


def shipped_rates() -> Calibration:
    """What comes with the package for predictions of schedules on such GPUs."""
    return _shipped(SHIPPED_FOR_SCHEDULES)


def _shipped(name: str) -> Calibration:
    return parse_calibration(json.loads(resources.files("distattn.kernels").joinpath(name).read_text()))


def predicted_seconds(work: Mapping[str, Work], rates: Rates, *, backward: bool, width: int) -> float | None:
    """Seconds for the work of one backend, with heads of ``width`` = max(head_dim, value_dim); None without a rate."""
    total = 0.0
    for kernel, amount in work.items():
        if not amount.launches:
            continue
        rate = rates.find(kernel, backward, width)
        if rate is None:
            return None
        # Wider heads than those measured: everything but the host's work grows with the width.
        wider = max(1.0, width / rate.head_dim)
        calls, launches, *on_device = amount.terms(backward=backward)
        device_s = float(np.dot(on_device, rate.on_device))
        launch_s = max(rate.launch_s, LEAST_LAUNCH_S) if launches > max(calls, 1) else rate.launch_s
        total += calls * rate.call_s + max(launches * launch_s, wider * device_s)
    return total


def fastest(case: Case, names: Sequence[str], tables: Sequence[np.ndarray], rates: Rates) -> Choice | None:
    """The choice among backends that compute the case; None where fewer than one of them was measured.

    tables: tiles int64 [N, 9] of each call of one pass.
    """
    width = max(case.head_dim, case.value_dim)
    group = max(1, case.heads // max(1, case.kv_heads))
    works = {name: work_of(name, tables, group=group) for name in names}
    times: dict[bool, dict[str, float]] = {}
    near: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for backward in (False, True):
        times[backward] = {}
        for name, work in works.items():
            seconds = predicted_seconds(work, rates, backward=backward, width=width)
            if seconds is not None:
                factor, near[backward][name] = corrected(name, work, rates, backward=backward, width=width, group=group)
                times[backward][name] = factor * seconds
        if not times[backward]:
            return None
    best = {backward: min(found, key=found.__getitem__) for backward, found in times.items()}
    both = [name for name in times[False] if name in times[True]]
    if best[False] != best[True] and both:
        # One kernel for both directions is simpler, and costs one compilation less.
        one = min(both, key=lambda name: times[False][name] + times[True][name])
        if all(times[b][one] <= (1 + WORTH_A_SECOND_KERNEL) * times[b][best[b]] for b in times):
            best = {False: one, True: one}
    shown = "; ".join(
        f"{'backward' if backward else 'forward'} {_shown(times[backward], best[backward], near[backward])}"
        for backward in (False, True)
    )
    return Choice(best[False], best[True], f"predicted: {shown}; by {rates.origin}")


def corrected(name: str, work: Mapping[str, Work], rates: Rates, *, backward: bool, width: int, group: int) -> Correction:
    """What the times measured for the rates say of them near this work of one backend."""
    rate = rates.find(name, backward, width)
    if rate is None or not rates.calibration.cells:
        return UNCORRECTED
    amounts = amounts_of(work, backward=backward)
    return correction(rates.calibration, KernelCell("", name, backward, rate.head_dim, group, *amounts, ratio=1.0))


def _shown(times: Mapping[str, float], best: str, near: Mapping[str, str]) -> str:
    others = sorted((name for name in times if name != best), key=times.__getitem__)
    beside = ", ".join(f"{name} {times[name] * 1e3:.3g}" for name in others)
    measured = f", as measured near {near[best]}" if near[best] else ""
    return f"{best} {times[best] * 1e3:.3g} ms" + (f" ({beside})" if beside else "") + measured
