"""torch.distributed: one all-to-all of bytes per exchange, or on NCCL one group of point-to-point transfers.

Separate sends cost milliseconds on gloo. On NCCL an all-to-all is such a group itself, but wants all bytes in one buffer:
parts save packing them, where the group's communicator exists from the start, so that no rank need join an exchange that it
takes no part in.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from distattn.errors import TransportError
from distattn.parallel.agreement import Board, board_of
from distattn.parallel.transport.base import Message, Parts

_log = logging.getLogger(__name__)

_POLL_S = 0.25
"""How often a rank that waits looks at the notices of the others; large groups look less often, to spare the store."""

_HEAD_START_CYCLES = 25_000
"""By how much what is computed next waits for a transfer on NCCL, some 15 µs: attention kernels fill the device, and a transfer
that is placed after one moves nothing until it ends. Seen in profiles: it otherwise starts when the kernel ends."""

_GRACE_S = 2.0
"""How long a rank that gives up waits for the others to say what they wait for."""


class Collective:
    """A process group as transport. timeout_s: longest wait for one exchange; default: the group's own timeout."""

    def __init__(self, group: dist.ProcessGroup, *, timeout_s: float | None = None) -> None:
        self.group = group
        self.board = board_of(group)
        self.timeout_s = group_timeout_s(group) if timeout_s is None else timeout_s
        self.poll_s = _POLL_S * max(1.0, self.board.num_ranks / 64)
        self.takes_parts = group_device(group).type == "cuda" and group.bound_device_id is not None
        self.num_transfers = 0
        self.bytes_sent = 0
        self._watch: _Watch | None = None

    def post(self, message: Message) -> OnDevice:
        if self._watch is not None:
            self._watch.raise_failure()
        self.num_transfers += 1
        parts = message.parts
        self.bytes_sent += message.send.numel() if parts is None else sum(part.numel() for _, part in parts.sends)
        try:
            works = self._exchange(message) if parts is None else self._exchange_parts(parts)
        except RuntimeError as error:
            raise _failed(self, message.describe, 0.0, error) from error
        in_flight = _InFlight(self, message, works)
        if message.send.is_cuda:
            torch.cuda._sleep(_HEAD_START_CYCLES)
            self._look_after(in_flight)
        return in_flight

    def _look_after(self, in_flight: OnDevice) -> None:
        self._watch = self._watch or _Watch(self)
        self._watch.add(in_flight)

    def give_up(self) -> None:
        """End what waits for ranks that do not answer; no transfer is possible any more."""
        self.group.abort()

    def _exchange(self, message: Message) -> list[dist.Work]:
        work = dist.all_to_all_single(
            message.receive, message.send, message.receive_splits, message.send_splits, group=self.group, async_op=True
        )
        assert work is not None
        return [work]

    def _exchange_parts(self, parts: Parts) -> list[dist.Work]:
        group = self.group
        if not parts.sends and not parts.receives:
            return []
        # What dist.batch_isend_irecv does, without its checks of every part.
        device = (parts.sends or parts.receives)[0][1].device
        group._start_coalescing(device)
        for peer, part in parts.sends:
            group.send([part], peer, 0)
        for peer, part in parts.receives:
            group.recv([part], peer, 0)
        return [group._end_coalescing(device)]


class OnDevice(Protocol):
    """An exchange in flight whose waits never return to the host. posted: time.monotonic(). describe: as in Message.

    It holds no buffers: the thread that looks after it drops it late, and memory would pile up meanwhile.
    """

    describe: Callable[[], str]
    posted: float

    def is_completed(self) -> bool: ...

    def wait(self) -> None: ...


class _InFlight:
    """One exchange in flight. Its buffers are held by whoever waits, and on NCCL by the works until then."""

    def __init__(self, transport: Collective, message: Message, works: list[dist.Work]) -> None:
        self.transport, self.works = transport, works
        self.describe, self.on_device = message.describe, message.send.is_cuda
        self.posted = time.monotonic()

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def wait(self) -> None:
        if self.on_device:
            for work in self.works:
                work.wait()  # orders the stream; the host does not block
            return
        self.transport.board.waiting = self.describe
        self._wait_on_host()
        self.transport.board.waiting = None

    def _wait_on_host(self) -> None:
        (work,) = self.works  # on the CPU an exchange is one all-to-all
        started = time.monotonic()
        deadline = started + self.transport.timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(0.001, min(self.transport.poll_s, left))))
                return
            except RuntimeError as error:
                waited = time.monotonic() - started
                if work.is_completed():
                    if work.is_success():
                        return
                    raise _failed(self.transport, self.describe, waited, error) from error
                self.transport.board.check()
                if left <= self.transport.poll_s or self.transport.board.someone_gave_up():
                    raise _failed(self.transport, self.describe, waited, None) from None


def group_timeout_s(group: dist.ProcessGroup) -> float:
    """The timeout that a process group was made with, in seconds."""
    return group._get_backend(group_device(group)).options._timeout.total_seconds()


def group_device(group: dist.ProcessGroup) -> torch.device:
    """cuda where the group has NCCL, else cpu."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def _failed(transport: Collective, describe: Callable[[], str], waited: float, cause: Exception | None) -> TransportError:
    """Tell the others, hear what they wait for, and say all of it in one error."""
    board: Board = transport.board
    waiting = describe()
    others = board.report_wait(waiting, min(_GRACE_S, transport.timeout_s))
    text = f"rank {board.rank} waited {waited:.1f} s {waiting}; {others}"
    if cause is not None:
        text += f" ({str(cause).strip().splitlines()[0]})"
    return TransportError(text)


class _Watch:
    """Looks after exchanges on CUDA, whose waits never return to the host: a thread that ends them when they are late.

    It has the transport give up, so that kernels which wait for a dead peer end, and keeps the error for the next call.
    """

    def __init__(self, transport: Collective) -> None:
        self._transport = transport
        self._in_flight: list[OnDevice] = []
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="distattn-watch", daemon=True).start()

    def add(self, in_flight: OnDevice) -> None:
        with self._lock:
            self._in_flight.append(in_flight)

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while self._failure is None:
            time.sleep(self._transport.poll_s)
            with self._lock:
                self._in_flight = [x for x in self._in_flight if not x.is_completed()]
                oldest = self._in_flight[0] if self._in_flight else None
            self._transport.board.waiting = oldest.describe if oldest else None
            if oldest is None:
                continue
            waited = time.monotonic() - oldest.posted
            try:
                self._transport.board.check()
                if waited > self._transport.timeout_s or self._transport.board.someone_gave_up():
                    raise _failed(self._transport, oldest.describe, waited, None)
            except Exception as error:  # whatever ends the watch must reach the caller, not die with the thread
                self._failure = error
                _log.error("%s", error)
                self._transport.give_up()
