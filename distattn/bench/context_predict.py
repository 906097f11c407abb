"""What the simulator predicts for cells of ``distattn bench context``, and for ranks that are not there."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from distattn.bench.context_cases import Case
from distattn.bench.context_peers import PEERS
from distattn.bench.context_report import IDEAL, Report
from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.hardware import Hardware
from distattn.parallel.kernel_time import Price
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.schedulers.auto import choose_layout, default_options
from distattn.parallel.simulate import Prediction, predict

Prices = tuple[Price | None, Price | None]

_FORWARD_ROW_BYTES = 12
"""For each feature of a query row in one call: a 16-bit result into a 32-bit carry, and from there to the output."""

_BACKWARD_ROW_BYTES = 36
"""The same of dq, dk and dv: added up in 32 bits, and rounded at the end."""


@dataclass(frozen=True)
class Predicted:
    """Of one schedule, forward and backward."""

    layout: str
    forward: Prediction
    backward: Prediction

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def ideal_seconds(self) -> float:
        return self.forward.ideal_seconds + self.backward.ideal_seconds

    @property
    def exposed_seconds(self) -> float:
        return self.forward.exposed_communication_seconds + self.backward.exposed_communication_seconds

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
    scheduler = SCHEDULERS[strategy]
    reason = scheduler.why_not(case.heads, ranks)
    if reason:
        raise PlanError(reason)
    options = default_options(strategy, case.heads, case.kv_heads, ranks, hardware)
    layout = choose_layout(mask, ranks, strategy, heads=case.heads, options=options).layout
    forward = scheduler.plan(mask, layout, case.heads, case.kv_heads, options)
    backward = derive_backward(forward, ranks_per_node=hardware.ranks_per_node)
    both = (predict(p, mask, hardware, case.head_dim, price=price) for p, price in zip((forward, backward), prices))
    return Predicted(layout.name, *both)


def prices_of(ideal: dict[str, Any], case: Case, mask: Mask, hardware: Hardware) -> Prices:
    """What the kernels take on one device, from the measured cell of the ideal, so that a schedule's prediction is checked
    and not the kernel's. Sums of a rank's partial results are not in it: they are counted as bytes of the device's memory."""
    found = []
    for direction, row_bytes in (("forward", _FORWARD_ROW_BYTES), ("backward", _BACKWARD_ROW_BYTES)):
        seconds = 1e-3 * max(statistics.median(times) for times in ideal[f"{direction}_ms"])
        kernel = str(ideal["details"]["kernel"]).split("+")[-1 if direction == "backward" else 0]
        call_s = 1e-6 * hardware.launch_us
        pair_s = max(seconds - call_s, 0.0) / (mask.area * case.heads) if mask.area else 0.0
        found.append(Price(kernel, call_s, row_bytes * case.head_dim / (hardware.copy_gb_per_second * 1e9), pair_s))
    return found[0], found[1]


def add_predictions(report: Report, cases: list[Case], hardware: Hardware) -> None:
    """Beside every measured cell of ours, what is predicted for its schedule from the ideal's time and ``hardware``'s links."""
    ranks = int(report.environment["ranks"])
    for case in cases:
        ideal = report.cell(case.name, IDEAL)
        if "total_ms" not in ideal:
            continue
        mask = case.build()
        prices = prices_of(ideal, case, mask, hardware)
        for engine in report.engines():
            cell = report.cell(case.name, engine)
            if engine not in PEERS and engine != IDEAL and "total_ms" in cell:
                found = predict_case(case, mask, cell["details"]["strategy"], ranks, hardware, prices)
                cell["predicted_ms"] = 1e3 * found.seconds
    report.environment["predicted_for"] = hardware.name
    report.save()
