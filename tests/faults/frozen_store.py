"""Stores that do not answer, because a process behind them is stopped."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

_HOST = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def hosting() -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The port of a TCPStore, and the process that hosts it."""
    with subprocess.Popen([sys.executable, "-c", _HOST], stdout=subprocess.PIPE, text=True) as host:
        try:
            assert host.stdout is not None
            yield int(host.stdout.readline()), host
        finally:
            host.kill()


@contextlib.contextmanager
def locked(path: Path, operation: int = fcntl.LOCK_EX) -> Iterator[None]:
    """The lock of a FileStore's file is held, as by a rank that was stopped in a call."""
    with open(path, "rb") as file:
        fcntl.flock(file, operation)
        yield


def client(port: int) -> dist.Store:
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
