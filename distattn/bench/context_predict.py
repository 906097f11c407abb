"""What the simulator predicts for cells of ``distattn bench context``, and for ranks that are not there."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any

from distattn.bench.context_cases import Case
from distattn.bench.context_peers import PEERS
from distattn.bench.context_report import IDEAL, Report
from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.hardware import Hardware
from distattn.parallel.kernel_time import Price
from distattn.parallel.program import Program
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.schedulers.auto import choose_layout, choose_strategy, default_options, layouts_for, option_label
from distattn.parallel.simulate import Prediction, predict, total_seconds

Prices = tuple[Price | None, Price | None]

_FORWARD_ROW_BYTES = 6
"""For each feature of a query row in one call: a 16-bit result merged into another."""

_BACKWARD_ROW_BYTES = 18
"""The same of dq, dk and dv: added to another in 16 bits."""

HEAD_START_US = 6600
"""Of the host in a repeat: ``context_ranks.PAUSE_CYCLES`` before it, less 1.4 ms that a call takes whatever it does."""


@dataclass(frozen=True)
class Predicted:
    """Of one schedule, forward and backward."""

    layout: str
    forward: Prediction
    backward: Prediction

    @property
    def seconds(self) -> float:
        return total_seconds(self.forward, self.backward)

    @property
    def ideal_seconds(self) -> float:
        return self.forward.ideal_seconds + self.backward.ideal_seconds

    @property
    def exposed_seconds(self) -> float:
        return self.seconds - total_seconds(self.forward, self.backward, free_links=True)

    @property
    def peak_memory_bytes(self) -> int:
        return max(int(x.cost.peak_memory_bytes_per_rank.max()) for x in (self.forward, self.backward))

    @property
    def efficiency(self) -> float:
        return self.ideal_seconds / self.seconds if self.seconds else 1.0


def predict_case(
    case: Case, mask: Mask, strategy: str, ranks: int, hardware: Hardware, prices: Prices = (None, None)
) -> Predicted:
    """A strategy with its default options and layout; prices: of the forward and backward kernels, None: by the hardware.

    Raises PlanError where it cannot split the heads.
    """
    return predict_program(_default_program(case, mask, strategy, ranks, hardware), case, mask, hardware, prices)


def predict_program(
    program: Program,
    case: Case,
    mask: Mask,
    hardware: Hardware,
    prices: Prices = (None, None),
    *,
    keep: bool = False,
    kernel: str | None = None,
) -> Predicted:
    """A forward program, and the backward that follows from it. keep: received keys and values are kept for it. kernel: the
    backend, or those of both directions, joined by a plus; None: the fastest."""
    backward = derive_backward(program, keep=keep, ranks_per_node=hardware.ranks_per_node)
    kernels = [None, None] if kernel is None else [kernel.split("+")[i] for i in (0, -1)]
    both = (
        predict(p, mask, hardware, case.head_dim, price=price, kernel=name)
        for p, price, name in zip((program, backward), prices, kernels)
    )
    return Predicted(program.layout.name, *both)


def _default_program(case: Case, mask: Mask, strategy: str, ranks: int, hardware: Hardware) -> Program:
    scheduler = SCHEDULERS[strategy]
    reason = scheduler.why_not(case.heads, ranks)
    if reason:
        raise PlanError(reason)
    options = default_options(strategy, case.heads, case.kv_heads, ranks, hardware)
    layout = choose_layout(mask, ranks, strategy, heads=case.heads, options=options).layout
    return scheduler.plan(mask, layout, case.heads, case.kv_heads, options)


def find_program(digest: str, case: Case, mask: Mask, strategy: str, ranks: int, hardware: Hardware) -> Program | None:
    """The program with this digest among those that a plan with this strategy, or ``auto``, may have taken."""
    scheduler = SCHEDULERS[strategy]
    for options in scheduler.variants(case.heads, case.kv_heads, ranks, hardware.ranks_per_node):
        groups = scheduler.groups(options, case.heads, ranks)
        for layout in layouts_for(mask, ranks, groups):
            program = scheduler.plan(mask, layout, case.heads, case.kv_heads, options)
            if program.digest == digest:
                return program
    return None


def prices_of(ideal: dict[str, Any], case: Case, mask: Mask, hardware: Hardware) -> Prices:
    """What the kernels take on one device, from the measured cell of the ideal, so that a schedule's prediction is checked
    and not the kernel's. Sums of a rank's partial results are not in it: they are counted as bytes of the device's memory."""
    found = []
    for direction, row_bytes in (("forward", _FORWARD_ROW_BYTES), ("backward", _BACKWARD_ROW_BYTES)):
        seconds = 1e-3 * max(statistics.median(times) for times in ideal[f"{direction}_ms"])
        kernel = str(ideal["details"]["kernel"]).split("+")[-1 if direction == "backward" else 0]
        call_s = 1e-6 * hardware.launch_us
        row_s = row_bytes * case.head_dim / (hardware.copy_gb_per_second * 1e9)
        rest = max(seconds - call_s - mask.num_queries * case.heads * row_s, 0.0)
        found.append(Price(kernel, call_s, row_s, rest / (mask.area * case.heads) if mask.area else 0.0))
    return found[0], found[1]


def add_predictions(report: Report, cases: list[Case], hardware: Hardware) -> None:
    """Beside every measured cell of ours, what is predicted for its schedule and kernel from the ideal's time and the links of
    ``hardware``."""
    ranks = int(report.environment["ranks"])
    hardware = replace(hardware, host_ahead_us=HEAD_START_US)
    for case in cases:
        ideal = report.cell(case.name, IDEAL)
        if "total_ms" not in ideal:
            continue
        mask = case.build()
        prices = prices_of(ideal, case, mask, hardware)
        for engine in report.engines():
            cell = report.cell(case.name, engine)
            if engine not in PEERS and engine != IDEAL and "total_ms" in cell:
                details = cell["details"]
                program = find_program(details["program"], case, mask, details["strategy"], ranks, hardware)
                if program is not None:
                    found = predict_program(
                        program, case, mask, hardware, prices, keep="keep" in engine.split("+"), kernel=details["kernel"]
                    )
                    cell["predicted_ms"] = 1e3 * found.seconds
    report.environment["predicted_for"] = hardware.name
    report.save()


def add_forecasts(report: Report, cases: list[Case], engines: list[str], hardware: Hardware) -> None:
    """What the hardware's rates alone say of cells that nobody has measured: ``forecast_ms`` and its parts, by schedule."""
    ranks = int(report.environment["ranks"])
    report.environment["hardware"] = repr(hardware)
    for case in cases:
        mask = case.build()
        for engine in engines:
            key = f"{case.name}|{engine}"
            if engine.partition("+")[0] not in (*SCHEDULERS, "auto") or key in report.results:
                continue
            try:
                report.results[key] = _forecast(case, mask, engine, ranks, hardware)
            except PlanError as error:
                report.results[key] = {"refused": str(error)}
            report.save()


def _forecast(case: Case, mask: Mask, engine: str, ranks: int, hardware: Hardware) -> dict[str, Any]:
    engine, *words = engine.split("+")
    if engine == "auto":
        chosen = choose_strategy(mask, ranks, case.heads, case.kv_heads, head_dim=case.head_dim, hardware=hardware)
        label, program = option_label(chosen.strategy, chosen.options), chosen.program
    else:
        label, program = engine, _default_program(case, mask, engine, ranks, hardware)
    found = predict_program(program, case, mask, hardware, keep="keep" in words)
    return {
        "strategy": label,
        "program": program.digest,
        "layout": found.layout,
        "forecast_ms": 1e3 * found.seconds,
        "ideal_ms": 1e3 * found.ideal_seconds,
        "exposed_ms": 1e3 * found.exposed_seconds,
        "efficiency": found.efficiency,
        "imbalance": found.forward.cost.imbalance,
        "peak_memory_bytes": found.peak_memory_bytes,
    }
