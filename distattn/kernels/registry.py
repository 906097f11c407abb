"""Which backends there are, and which of them computes a case."""

from __future__ import annotations

import torch

from distattn.errors import UnsupportedError
from distattn.kernels.protocol import Backend, Case
from distattn.kernels.softmax import CudnnBackend, FlashBackend, FlashCpuBackend, ReferenceBackend, TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (ReferenceBackend(), FlashCpuBackend(), FlashBackend(), CudnnBackend(), TritonBackend())
}


def choose_backend(case: Case, kernel: str = "auto") -> tuple[Backend, str]:
    """(backend, reason) for a case: the fastest that supports it, or the one named by ``kernel``.

    Raises UnsupportedError if ``kernel`` is not a backend, if it cannot compute the case, or if none can.
    """
    if kernel != "auto":
        return _named_backend(case, kernel), f"kernel={kernel} was asked for"
    passed_over: list[str] = []
    for name in _preference(case.device_type):
        reason = BACKENDS[name].why_not(case)
        if reason is None:
            why = f"the fastest of {', '.join(_preference(case.device_type))} here that supports the case"
            return BACKENDS[name], "; ".join([why, *passed_over])
        passed_over.append(f"{name} {reason}")
    raise UnsupportedError(f"No kernel computes {_describe(case)}: {'; '.join(passed_over)}.")


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
    """Fastest first."""
    if device_type == "cpu":
        return ("flash_cpu", "reference")
    if device_type == "cuda":
        # cuDNN's kernels use what Hopper added (wgmma, TMA); FlashAttention 2 does not.
        hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
        vendor = ("cudnn", "flash") if hopper else ("flash", "cudnn")
        return (*vendor, "triton", "reference")
    return ("reference",)


def _describe(case: Case) -> str:
    features = [name for name in ("softcap", "lse_gradient", "deterministic") if getattr(case, name)]
    shape = f"{case.heads}:{case.kv_heads} heads of {case.head_dim} (values {case.value_dim})"
    return " ".join([str(case.dtype).removeprefix("torch."), shape, "on", case.device_type, *features])
