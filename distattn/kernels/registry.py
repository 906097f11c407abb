"""Which backends there are, and which of them computes a case."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distattn.errors import UnsupportedError
from distattn.kernels.protocol import EXTRAS, Backend, Case
from distattn.kernels.selection import fastest, rates_here, split
from distattn.kernels.softmax import (
    CudnnBackend,
    Fa4Backend,
    FlashBackend,
    FlashCpuBackend,
    HopperBackend,
    ReferenceBackend,
    TritonBackend,
)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        ReferenceBackend(),
        FlashCpuBackend(),
        FlashBackend(),
        CudnnBackend(),
        Fa4Backend(),
        HopperBackend(),
        TritonBackend(),
    )
}


def choose_backend(case: Case, kernel: str = "auto", tables: Sequence[np.ndarray] = ()) -> tuple[Backend, str]:
    """(backend, reason) for a case: the fastest that supports it, or the one named by ``kernel``.

    tables: tiles int64 [N, 9] of each call that one pass makes. With them, and rates measured on such a device, the fastest
    is the one of least predicted time, which may be one's forward and another's backward; without, the first of a fixed
    order. Ranks that work together must pass the same tables. Raises UnsupportedError if ``kernel`` is not a backend, if it
    cannot compute the case, or if none can.
    """
    if kernel != "auto":
        return _named_backend(case, kernel), f"kernel={kernel} was asked for"
    order = _preference(case.device_type)
    report = {name: BACKENDS[name].why_not(case) for name in order}
    able = [name for name, reason in report.items() if reason is None]
    passed_over = [f"{name} {reason}" for name, reason in report.items() if reason is not None]
    if not able:
        raise UnsupportedError(f"No kernel computes {_describe(case)}: {'; '.join(passed_over)}.")
    measured = _least_predicted_time(case, able, tables)
    if measured is not None:
        return measured[0], "; ".join([measured[1], *passed_over])
    why = f"the fastest of {', '.join(order)} here that supports the case"
    before = [f"{name} {report[name]}" for name in order[: order.index(able[0])]]
    return BACKENDS[able[0]], "; ".join([why, *before])


def _least_predicted_time(case: Case, able: list[str], tables: Sequence[np.ndarray]) -> tuple[Backend, str] | None:
    """The choice by measured rates, where there are some and there is a choice."""
    names = [name for name in able if name != "reference"]
    if len(names) < 2 or not any(len(table) for table in tables):
        return None
    rates = rates_here()
    choice = None if rates is None else fastest(case, names, tables, rates)
    if choice is None:
        return None
    forward, backward = BACKENDS[choice.forward], BACKENDS[choice.backward]
    reason = choice.reason
    if case.block_plan:
        reason = reason.replace("predicted:", "predicted without the block plan:", 1)
    return (forward if forward is backward else split(forward, backward)), reason


def backend_report(case: Case) -> dict[str, str | None]:
    """Every backend's name with why it cannot compute the case here, or None if it can."""
    return {name: backend.why_not(case) for name, backend in BACKENDS.items()}


def _named_backend(case: Case, kernel: str) -> Backend:
    if kernel not in BACKENDS:
        raise UnsupportedError(f"kernel={kernel!r} is unknown; it may be auto, {', '.join(BACKENDS)}.")
    backend = BACKENDS[kernel]
    reason = backend.why_not(case)
    if reason is not None:
        able = [name for name, why in backend_report(case).items() if why is None]
        remedy = f"Use kernel=auto, or one of: {', '.join(able)}." if able else "No other kernel computes it either."
        raise UnsupportedError(f"kernel={kernel} cannot compute {_describe(case)}: it {reason}. {remedy}")
    return backend


def _preference(device_type: str) -> tuple[str, ...]:
    """Fastest first, for long causal sequences."""
    if device_type == "cpu":
        return ("flash_cpu", "reference")
    if device_type == "cuda":
        # FlashAttention 2 does not use what Hopper added (wgmma, TMA).
        hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
        first = ("fa4", "cudnn", "hopper", "flash") if hopper else ("flash", "cudnn")
        return (*first, "triton", "reference")
    return ("reference",)


def _describe(case: Case) -> str:
    features = [name for name in ("softcap", "lse_gradient", "deterministic", *EXTRAS) if getattr(case, name)]
    shape = f"{case.heads}:{case.kv_heads} heads of {case.head_dim} (values {case.value_dim})"
    return " ".join([str(case.dtype).removeprefix("torch."), shape, "on", case.device_type, *features])
