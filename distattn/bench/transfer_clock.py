"""What of a step its transfers cost: how long they are waited for, and the same step without them.

    waits     before and after each wait an event on the stream that computes: between them it stands still    ClockedTransport
    without   nothing is sent, what would arrive is there at once                                             SilentTransport

Waits resolve microseconds, but do not know by how much transfers slow down what computes meanwhile; the difference to a step
without transfers does, to the noise of both.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.parallel.transport.base import Message, Pending, StagingTransport
from distattn.pingpong import NanoBatches


class TransferClock:
    """Seconds that one rank's step waits for transfers: of the computing stream on a GPU, else of the host."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._host_seconds = 0.0

    def wait(self, pending: Pending) -> None:
        if not self.cuda:
            began = time.perf_counter()
            pending.wait()
            self._host_seconds += time.perf_counter() - began
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        pending.wait()
        after.record()
        self._events.append((before, after))

    def start(self) -> None:
        """Forget what was waited so far."""
        self._events, self._host_seconds = [], 0.0

    def seconds(self) -> float:
        """Since ``start``; the device must have done what was queued."""
        return self._host_seconds + sum(before.elapsed_time(after) for before, after in self._events) / 1e3


class _Clocked:
    """An exchange in flight whose wait is timed."""

    def __init__(self, pending: Pending, clock: TransferClock) -> None:
        self._pending, self._clock = pending, clock

    def wait(self) -> None:
        self._clock.wait(self._pending)


class ClockedTransport:
    """A transport whose waits are timed."""

    def __init__(self, inner: Any, clock: TransferClock) -> None:
        self.inner, self.clock = inner, clock
        self.takes_parts, self.board = inner.takes_parts, inner.board

    @property
    def num_transfers(self) -> int:
        return self.inner.num_transfers

    @property
    def bytes_sent(self) -> int:
        return self.inner.bytes_sent

    def post(self, message: Message) -> _Clocked:
        return _Clocked(self.inner.post(message), self.clock)


class ClockedStagingTransport(ClockedTransport, StagingTransport):
    """The same of one that says where messages are packed."""

    def routes(self, key: object, send_splits: Sequence[Sequence[int]]) -> Sequence[object]:
        return self.inner.routes(key, send_splits)

    def staging(self, route: object) -> Tensor:
        return self.inner.staging(route)


class _Arrived:
    """A transfer that was left out."""

    def wait(self) -> None:
        pass


class SilentTransport:
    """Sends nothing: what would arrive is filled with ordinary numbers, for kernels to be as fast as on real ones."""

    def __init__(self, like: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.takes_parts, self.board = like.takes_parts, like.board
        self.num_transfers = self.bytes_sent = 0
        self._pattern = torch.empty(0, dtype=torch.uint8, device=device)
        self._dtype = dtype

    def post(self, message: Message) -> _Arrived:
        size = message.receive.numel()
        if len(self._pattern) < size:
            numbers = torch.randn(-(-size // self._dtype.itemsize), device=self._pattern.device, dtype=self._dtype)
            self._pattern = numbers.view(torch.uint8)
        message.receive.copy_(self._pattern[:size])
        return _Arrived()


def clocked(nano: NanoBatches, clock: TransferClock) -> NanoBatches:
    """The same nano-batches, whose waits ``clock`` times."""

    def wrap(inner: Any) -> Any:
        kind = ClockedStagingTransport if isinstance(inner, StagingTransport) else ClockedTransport
        return kind(inner, clock)

    return _with_transports(nano, wrap)


def silenced(nano: NanoBatches, device: torch.device, dtype: torch.dtype) -> NanoBatches:
    """The same nano-batches without their transfers: results mean nothing."""
    return _with_transports(nano, lambda inner: SilentTransport(inner, device, dtype))


def _with_transports(nano: NanoBatches, wrap: Any) -> NanoBatches:
    plans = tuple(
        made if made.transport is None else dataclasses.replace(made, transport=wrap(made.transport)) for made in nano.plans
    )
    return dataclasses.replace(nano, plans=plans)
