"""Times of several calls in turn, so that a device that warms up or slows down treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UPS = 2
MIN_REPEATS, MAX_REPEATS = 3, 200
PAUSE_CYCLES, MOST_PAUSE_CYCLES = 6_000_000, 48_000_000
"""Of the device before a call: milliseconds in which the host queues what the call launches. Where it needed longer, on a busy
machine, the pause is doubled from then on, up to the second number."""

FLUSH_BYTES = 256 << 20


class Clock:
    """Of one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.flush = torch.zeros(FLUSH_BYTES // 4 if self.cuda else 0, device=device)
        self.pause_cycles = PAUSE_CYCLES

    def once_ms(self, call: Callable[[], object], meet: Callable[[], object] | None = None) -> float:
        """Milliseconds of one call, with cold caches on a GPU. meet: what ranks do just before, on the device.

        A call for which the device waited is made again behind a longer pause, unless other ranks would have to make it too.
        """
        if not self.cuda:
            if meet is not None:
                meet()
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        while True:
            milliseconds, waited = self._once_on_device_ms(call, meet)
            if not waited or self.pause_cycles >= MOST_PAUSE_CYCLES:
                return milliseconds
            self.pause_cycles *= 2
            if meet is not None:
                return milliseconds

    def _once_on_device_ms(self, call: Callable[[], object], meet: Callable[[], object] | None) -> tuple[float, bool]:
        """(milliseconds, whether the device began before the host had queued all)."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.sum()  # read, not written: what a cache has written to it, the call would have to take to memory
        torch.cuda.synchronize()
        torch.cuda._sleep(self.pause_cycles)
        if meet is not None:
            meet()
        begin.record()
        call()
        end.record()
        waited = begin.query()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), waited

    def in_turn(self, calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
        """Milliseconds of each call, after warm-ups, call by call in turn, ``seconds`` long for each."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            for _ in range(WARM_UPS):
                call()
        begin = time.perf_counter()
        for repeat in range(MAX_REPEATS):
            if repeat >= MIN_REPEATS and time.perf_counter() - begin > seconds * len(calls):
                break
            for name, call in calls.items():
                times[name].append(self.once_ms(call))
        return times

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Device memory that a call takes beyond what is there."""
        if not self.cuda:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before


def quantiles(times: list[float]) -> list[float]:
    """20, 50 and 80 %."""
    if len(times) == 1:
        return times * 3
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return [cuts[1], statistics.median(times), cuts[7]]
