"""Times of calls, by device events on a GPU and by the clock on a CPU, and a limit on how long a cell may take."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WARM_UPS = 2
MIN_REPEATS = 3


class CellTimeoutError(Exception):
    """A cell took longer than it may."""


def median_ms(call: Callable[[], object], seconds: float, device: str, *, warm_up_seconds: float = 0.0) -> float:
    """Two warm-ups or more, then at least three repeats and ``seconds`` long; the median in milliseconds.

    warm_up_seconds: the least that the warm-ups take, for a device whose clocks have fallen while something was compiled.
    On a GPU three repeats are queued one after another without a pause of the device before them: of a call that the host takes
    longer to queue than the device to compute, this is the host's time, and otherwise the device's.
    """
    begin = time.perf_counter()
    warm_ups = 0
    while warm_ups < WARM_UPS or time.perf_counter() - begin < warm_up_seconds:
        call()
        synchronize(device)
        warm_ups += 1
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < seconds:
        times += _three_ms(call, device)
    return statistics.median(times)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise CellTimeoutError inside the block after ``seconds``, at the next Python instruction of the main thread.

    In other threads, where signals cannot be taken, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or seconds <= 0:
        yield
        return

    def raise_timeout(*_: object) -> None:
        raise CellTimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _three_ms(call: Callable[[], object], device: str) -> list[float]:
    """Times of ``MIN_REPEATS`` calls."""
    if device != "cuda":
        return [_one_ms(call) for _ in range(MIN_REPEATS)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(MIN_REPEATS)]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def _one_ms(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
