"""What a step is measured by: throughput, model FLOP/s utilisation, memory."""

from __future__ import annotations

import resource
import sys

import torch

# Dense bf16 FLOP/s of the vendors' data sheets, without sparsity; the first name that the device's name contains counts.
_PEAK_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
)
_TF32_SHARE = 0.5


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device for matrix products in that dtype, or None where it is not known (a CPU, an unlisted GPU).

    fp32 on an NVIDIA GPU is counted as TF32, half the bf16 rate.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, flops in _PEAK_FLOPS:
        if part.lower() in name.lower():
            return flops if dtype in (torch.bfloat16, torch.float16) else flops * _TF32_SHARE
    return None


def utilisation(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """Share of the devices' peak that model FLOPs make up, or None where the peak is not known."""
    return None if peak is None else flops / (seconds * devices * peak)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held so far: the CUDA allocator's peak, or the resident set's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
