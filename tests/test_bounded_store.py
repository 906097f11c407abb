"""Ring 0: a store whose calls end although a process behind it is stopped."""

from __future__ import annotations

import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from distattn.bounded_store import BoundedStore
from tests.faults.frozen_store import client, hosting, locked


def test_calls_give_what_the_store_gives() -> None:
    store = BoundedStore(dist.HashStore(), limit_s=60.0)
    assert not store.check(["key"])
    store.set("key", "value")
    assert store.check(["key"])
    assert not store.check(["key", "missing"])
    assert store.get("key") == b"value"
    assert [store.add("counter", 2), store.add("counter", 3)] == [2, 5]
    assert [store.compare_set("new", "", "first"), store.compare_set("new", "", "second")] == [b"first", b"first"]


def test_errors_of_the_store_are_raised() -> None:
    inner = dist.HashStore()
    inner.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(dist.DistError):
        BoundedStore(inner, limit_s=60.0).get("missing")


def test_a_held_lock_ends_calls_and_what_was_in_flight_is_done_once_it_is_free(tmp_path: Path) -> None:
    inner = dist.FileStore(str(tmp_path / "store"), 1)
    inner.set("before", "1")
    store = BoundedStore(inner, limit_s=0.3)
    with locked(tmp_path / "store"):
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(dist.DistStoreError, match=r"did not answer within 0\.3 s: the process that hosts it, or"):
                store.set("late", "not lost")
        assert time.monotonic() - started < 30.0
    assert store.within(60.0).get("late") == b"not lost"


def test_a_stopped_host_ends_calls() -> None:
    with hosting() as (port, host):
        store = BoundedStore(client(port), limit_s=0.3)
        assert store.within(60.0).add("counter", 1) == 1
        host.send_signal(signal.SIGSTOP)
        for _ in range(2):
            with pytest.raises(dist.DistStoreError, match="did not answer"):
                store.check(["alarm"])
        host.kill()
        with pytest.raises(dist.DistError):  # and the call in flight ends
            store.within(60.0).check(["alarm"])
