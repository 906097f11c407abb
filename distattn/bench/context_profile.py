"""Where the device's time goes in one call of an implementation: computing, transferring, both at once, or neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_TRANSFERS = ("nccl", "memcpy ptop", "symm", "signal")
_LONGEST_NAMES = 12
LONG_PAUSE_US = 500.0
"""Shorter spins are head starts of transfers, inside the call."""


def profile_call(call: Callable[[], object]) -> dict[str, Any]:
    """Run ``call`` once under torch's profiler on this rank's GPU.

    Returns milliseconds: span (first to last activity), computing, transferring, overlapped (both), idle (neither); kernels:
    the names that took longest, with milliseconds and calls; timeline: (start ms, ms, name) of everything over 20 µs;
    host_operators: those in which the host itself was longest, with milliseconds and calls.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    spans.sort()
    # What keeps the device busy until the host has run ahead is no part of the call, nor is what came before it.
    pauses = [end for begin, end, name in spans if "spin" in name and end - begin > LONG_PAUSE_US]
    found = summarise([span for span in spans if span[0] >= max(pauses, default=0.0) and "spin" not in span[2]])
    return found | {"host_operators": _host_operators(profiler)}


def _host_operators(profiler: profile) -> dict[str, list[float]]:
    """Where the host's time goes: operators that took longest themselves, with milliseconds and calls."""
    averages = [(event.key[:80], event.self_cpu_time_total / 1e3, event.count) for event in profiler.key_averages()]
    longest = sorted(averages, key=lambda entry: -entry[1])[:_LONGEST_NAMES]
    return {name: [milliseconds, count] for name, milliseconds, count in longest}


def summarise(spans: list[tuple[float, float, str]]) -> dict[str, Any]:
    """spans: (start µs, end µs, name) by start."""
    if not spans:
        return {}
    transfers = [(a, b) for a, b, name in spans if is_transfer(name)]
    computing = [(a, b) for a, b, name in spans if not is_transfer(name)]
    first, last = spans[0][0], max(b for _, b, _ in spans)
    busy = _covered(transfers + computing)
    by_name: dict[str, list[float]] = {}
    for a, b, name in spans:
        by_name.setdefault(name[:100], []).append(b - a)
    longest = sorted(by_name.items(), key=lambda entry: -sum(entry[1]))[:_LONGEST_NAMES]
    return {
        "span": (last - first) / 1e3,
        "computing": _covered(computing) / 1e3,
        "transferring": _covered(transfers) / 1e3,
        "overlapped": (_covered(computing) + _covered(transfers) - busy) / 1e3,
        "idle": (last - first - busy) / 1e3,
        "kernels": {name: [sum(times) / 1e3, len(times)] for name, times in longest},
        "timeline": [[round((a - first) / 1e3, 3), round((b - a) / 1e3, 3), name[:60]] for a, b, name in spans if b - a > 20],
    }


def is_transfer(name: str) -> bool:
    """Whether an activity moves data between devices."""
    return any(word in name.lower() for word in _TRANSFERS)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total
