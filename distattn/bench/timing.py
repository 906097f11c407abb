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


def median_ms(call: Callable[[], object], seconds: float, device: str) -> float:
    """Two warm-ups, then at least three repeats and ``seconds`` long; the median in milliseconds."""
    for _ in range(WARM_UPS):
        call()
    synchronize(device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < MIN_REPEATS or time.perf_counter() - begin < seconds:
        times.append(_one_ms(call, device))
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


def _one_ms(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
