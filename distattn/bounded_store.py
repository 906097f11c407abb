"""A process group's store whose calls end, whatever has become of the ranks behind it.

torch's own wait for a process that is stopped without end, past every timeout: a FileStore for the one that holds the lock of
its file, the client of a TCPStore for its host.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

import torch.distributed as dist

_Value = TypeVar("_Value")

_SLICE_S = 0.1
"""Time is counted in waits of this length, not by the clock: one in which this process was suspended counts as one."""


class BoundedStore:
    """``store`` for calls of at most limit_s seconds each, from any thread; without an answer they raise dist.DistStoreError.

    A thread makes them one after the other. What it is at when the time is up goes on, and the next calls wait for it; what has
    not begun by then is dropped.
    """

    def __init__(self, store: dist.Store, *, limit_s: float) -> None:
        self._store, self._limit_s, self._caller = store, limit_s, _Caller()

    def within(self, limit_s: float) -> BoundedStore:
        """The same store, and the same thread, with another limit."""
        other = BoundedStore.__new__(BoundedStore)
        other._store, other._limit_s, other._caller = self._store, limit_s, self._caller
        return other

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all ``keys`` are set."""
        return self._ask(self._store.check, list(keys))

    def get(self, key: str) -> bytes:
        """The value of a key that is set."""
        return self._ask(self._store.get, key)

    def set(self, key: str, value: str) -> None:
        self._ask(self._store.set, key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; its new value."""
        return self._ask(self._store.add, key, amount)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set ``key`` to ``desired`` where it is ``expected`` (empty: not set); its value then."""
        return self._ask(self._store.compare_set, key, expected, desired)

    def _ask(self, call: Callable[..., _Value], *arguments: Any) -> _Value:
        answer: Future[_Value] = self._caller.begin(call, arguments)
        for _ in range(max(1, math.ceil(self._limit_s / _SLICE_S))):
            with suppress(TimeoutError):
                answer.exception(min(self._limit_s, _SLICE_S))
            if answer.done():
                return answer.result()
        answer.cancel()
        raise dist.DistStoreError(
            f"the ranks' store did not answer within {self._limit_s:g} s: the process that hosts it, or one that holds the "
            "lock of its file, is stopped or out of reach"
        )


class _Caller:
    """A thread that makes calls, as long as somebody has this. A daemon: a call without end must not keep the process."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_make_calls, args=(self._calls,), name="distattn-store", daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def begin(self, call: Callable[..., _Value], arguments: tuple[Any, ...]) -> Future[_Value]:
        answer: Future[_Value] = Future()
        self._calls.put((answer, call, arguments))
        return answer


def _make_calls(calls: SimpleQueue[Any]) -> None:
    while (begun := calls.get()) is not None:
        answer, call, arguments = begun
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(call(*arguments))
            except BaseException as error:  # it belongs to whoever asked
                answer.set_exception(error)
        del begun, answer, call, arguments  # nothing is kept while it waits
