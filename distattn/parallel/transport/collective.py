"""torch.distributed: one all-to-all of bytes per exchange, on gloo and NCCL alike.

Separate sends cost milliseconds on gloo, and a collective with empty splits is a group of point-to-point transfers on NCCL.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from distattn.errors import TransportError
from distattn.parallel.agreement import Board, board_of
from distattn.parallel.transport.base import Message

_log = logging.getLogger(__name__)

_POLL_S = 0.25
"""How often a rank that waits looks at the notices of the others; large groups look less often, to spare the store."""

_GRACE_S = 2.0
"""How long a rank that gives up waits for the others to say what they wait for."""


class Collective:
    """A process group as transport. timeout_s: longest wait for one exchange; default: the group's own timeout."""

    def __init__(self, group: dist.ProcessGroup, *, timeout_s: float | None = None) -> None:
        self.group = group
        self.board = board_of(group)
        self.timeout_s = group_timeout_s(group) if timeout_s is None else timeout_s
        self.poll_s = _POLL_S * max(1.0, self.board.num_ranks / 64)
        self.num_transfers = 0
        self.bytes_sent = 0
        self._watch: _Watch | None = None

    def post(self, message: Message) -> _InFlight:
        if self._watch is not None:
            self._watch.raise_failure()
        self.num_transfers += 1
        self.bytes_sent += message.send.numel()
        try:
            work = dist.all_to_all_single(
                message.receive, message.send, message.receive_splits, message.send_splits, group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise _failed(self, message, 0.0, error) from error
        assert work is not None
        in_flight = _InFlight(self, message, work)
        if message.send.is_cuda:
            self._watch = self._watch or _Watch(self)
            self._watch.add(in_flight)
        return in_flight


class _InFlight:
    """One all-to-all in flight. Holds its buffers until it is done."""

    def __init__(self, transport: Collective, message: Message, work: dist.Work) -> None:
        self.transport, self.message, self.work = transport, message, work
        self.posted = time.monotonic()

    def wait(self) -> None:
        if self.message.send.is_cuda:
            self.work.wait()  # orders the stream; the host does not block
            return
        started = time.monotonic()
        deadline = started + self.transport.timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                self.work.wait(timedelta(seconds=max(0.001, min(self.transport.poll_s, left))))
                return
            except RuntimeError as error:
                waited = time.monotonic() - started
                if self.work.is_completed():
                    if self.work.is_success():
                        return
                    raise _failed(self.transport, self.message, waited, error) from error
                self.transport.board.check()
                if left <= self.transport.poll_s or self.transport.board.someone_gave_up():
                    raise _failed(self.transport, self.message, waited, None) from None


def group_timeout_s(group: dist.ProcessGroup) -> float:
    """The timeout that a process group was made with, in seconds."""
    return group._get_backend(group_device(group)).options._timeout.total_seconds()


def group_device(group: dist.ProcessGroup) -> torch.device:
    """cuda where the group has NCCL, else cpu."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def _failed(transport: Collective, message: Message, waited: float, cause: Exception | None) -> TransportError:
    """Tell the others, hear what they wait for, and say all of it in one error."""
    board: Board = transport.board
    waiting = message.describe()
    others = board.report_wait(waiting, min(_GRACE_S, transport.timeout_s))
    text = f"rank {board.rank} waited {waited:.1f} s {waiting}; {others}"
    if cause is not None:
        text += f" ({str(cause).strip().splitlines()[0]})"
    return TransportError(text)


class _Watch:
    """Looks after exchanges on CUDA, whose waits never return to the host: a thread that ends them when they are late.

    It aborts the group, so that kernels which wait for a dead peer end, and keeps the error for the next call.
    """

    def __init__(self, transport: Collective) -> None:
        self._transport = transport
        self._in_flight: list[_InFlight] = []
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="distattn-watch", daemon=True).start()

    def add(self, in_flight: _InFlight) -> None:
        with self._lock:
            self._in_flight.append(in_flight)

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while self._failure is None:
            time.sleep(self._transport.poll_s)
            with self._lock:
                self._in_flight = [x for x in self._in_flight if not x.work.is_completed()]
                oldest = self._in_flight[0] if self._in_flight else None
            if oldest is None:
                continue
            waited = time.monotonic() - oldest.posted
            try:
                self._transport.board.check()
                if waited > self._transport.timeout_s or self._transport.board.someone_gave_up():
                    raise _failed(self._transport, oldest.message, waited, None)
            except Exception as error:  # whatever ends the watch must reach the caller, not die with the thread
                self._failure = error
                _log.error("%s", error)
                self._transport.group.abort()
