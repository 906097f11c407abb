"""Whether Triton kernels can run here: what all families of them ask before they look at shapes."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_no_triton(device_type: str, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel computes on this kind of device in this dtype; None where they do."""
    if not is_installed():
        return "needs the package triton"
    if dtype not in TRITON_DTYPES:
        return f"computes bf16, fp16 and fp32, not {dtype}"
    if device_type == "cpu":
        if not is_interpreted():
            return "runs on cpu only in Triton's interpreter (TRITON_INTERPRET=1)"
        return "computes no bf16 in Triton's interpreter" if dtype == torch.bfloat16 else None
    if device_type != "cuda":
        return f"runs on cuda, not on {device_type}"
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


@lru_cache(maxsize=1)
def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """As Triton itself decides when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
