"""Attention kernels behind one protocol: backends compute tiles; they know nothing of ranks."""

if __name__ != "distattn.kernels":
    raise ImportError(f"import distattn.kernels, not {__name__}: the folder at the repository's root is a link for readers")

from distattn.kernels.protocol import Backend, Carry, Case
from distattn.kernels.registry import BACKENDS, backend_report, choose_backend

__all__ = ["BACKENDS", "Backend", "Carry", "Case", "backend_report", "choose_backend"]
