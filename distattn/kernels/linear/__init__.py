"""Linear attention: a token-by-token reference, chunked backends behind one protocol, a step for decoding."""

from __future__ import annotations

from distattn.errors import UnsupportedError
from distattn.kernels.linear.chunked import TorchLinear
from distattn.kernels.linear.protocol import (
    KINDS,
    BackwardPass,
    ForwardPass,
    Gradients,
    LinearBackend,
    LinearCase,
    Operands,
    Pieces,
)
from distattn.kernels.linear.reference import recurrent
from distattn.kernels.linear.step import step
from distattn.kernels.linear.triton_backend import TritonLinear

__all__ = [
    "KINDS",
    "LINEAR_BACKENDS",
    "BackwardPass",
    "ForwardPass",
    "Gradients",
    "LinearBackend",
    "LinearCase",
    "Operands",
    "Pieces",
    "choose_linear_backend",
    "linear_backend_report",
    "recurrent",
    "step",
]

LINEAR_BACKENDS: dict[str, LinearBackend] = {backend.name: backend for backend in (TritonLinear(), TorchLinear())}
"""By name, on a GPU the preferred first."""


def linear_backend_report(case: LinearCase) -> dict[str, str | None]:
    """Why each backend cannot compute the case, or None where it can."""
    return {name: backend.why_not(case) for name, backend in LINEAR_BACKENDS.items()}


def choose_linear_backend(case: LinearCase, kernel: str = "auto") -> tuple[LinearBackend, str]:
    """(backend, why it was chosen). Raises UnsupportedError with each backend's reason where none computes the case."""
    if kernel != "auto":
        if kernel not in LINEAR_BACKENDS:
            raise UnsupportedError(f"kernel={kernel!r} is unknown; it may be auto, {', '.join(LINEAR_BACKENDS)}")
        reason = LINEAR_BACKENDS[kernel].why_not(case)
        if reason:
            raise UnsupportedError(f"kernel={kernel} cannot compute this: {reason}; use kernel='auto' or another one")
        return LINEAR_BACKENDS[kernel], "given by the caller"
    reasons = linear_backend_report(case)
    # On a CPU Triton is its interpreter, which nobody wants unless he asks for it.
    order = list(LINEAR_BACKENDS) if case.device_type != "cpu" else ["torch", *(x for x in LINEAR_BACKENDS if x != "torch")]
    for name in order:
        if reasons[name] is None:
            passed = "; ".join(f"{other}: {why}" for other, why in reasons.items() if why)
            return LINEAR_BACKENDS[name], f"first of {', '.join(order)} that can" + (f" ({passed})" if passed else "")
    raise UnsupportedError("no kernel computes this: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
