"""One process per rank on this machine, which live and die together.

    launcher ──starts──▶ guard ──becomes──▶ rank R's command      (guard: dies with the launcher, even on kill -9)
       │ watches: one rank fails → the others get SIGTERM, then SIGKILL, and the message names the one that failed
       │ a rank ended because nothing moved → the stacks of those that say nothing go to their logs first
       │ SIGTERM, SIGINT, SIGHUP here → one SIGTERM to every rank, and time to write a checkpoint
       └ rank 0's output → our terminal and logs/rank-0.log; rank R's → logs/rank-R.log

Ranks meet in a file, so no port is opened, and gloo listens on the loopback interface only; unless they are one node's share
of a larger group, whose launcher says where all meet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from distattn.errors import ConfigError
from distattn.launchers.environment import PREPARED_VARIABLE, STORE_VARIABLE, init_from_environment, joined_by_environment
from distattn.launchers.relay import Relay
from distattn.launchers.supervise import HANG_STATUS, kind_of_status
from distattn.launchers.watchdog import native_stacks

__all__ = [
    "NodeShare",
    "Outcome",
    "init_from_environment",
    "joined_by_environment",
    "launch_local",
    "meet_on_loopback",
    "run_local",
    "threads_per_rank",
]

logger = logging.getLogger(__name__)

_GUARD = Path(__file__).with_name("rank_guard.py")
_POLL_S = 0.02
_LOOK_S = 1.0
_TAIL_LINES, _TAIL_BYTES = 15, 16384
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class NodeShare:
    """This machine's ranks as part of a larger group: its first rank, the number of all, and the variables that say where all
    of them meet (MASTER_ADDR and MASTER_PORT, or ``meet_on_loopback``)."""

    first_rank: int
    world: int
    meeting: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """How ranks ended. status: 0 if every rank exited with 0, 2 if the first to fail did with 2, else 1. failed_rank, kind
    (as in ``supervise.Failure``), message: of the rank that failed first. stopped: somebody had asked them to stop."""

    status: int
    failed_rank: int = -1
    kind: str = ""
    message: str = ""
    stopped: bool = False


@dataclass
class _Rank:
    """A started rank; log_start: where this run's part of its log begins."""

    index: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    relay: Relay | None


@dataclass
class _Request:
    """What the user's signals ask for: each one received, in order."""

    received: list[int] = field(default_factory=list)
    asked_to_stop: Callable[[], bool] = lambda: False
    next_look: float = 0.0

    def look(self) -> None:
        """Take ``asked_to_stop`` for a signal, once."""
        if not self.received and time.monotonic() > self.next_look:
            self.next_look = time.monotonic() + _LOOK_S
            if self.asked_to_stop():
                self.received.append(signal.SIGTERM)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


def launch_local(
    argv: Sequence[str],
    ranks: int,
    *,
    log_dir: str | Path,
    env: Mapping[str, str] | None = None,
    failure_grace_s: float = 3.0,
    stop_grace_s: float = 120.0,
    pass_fds: Sequence[int] = (),
) -> int:
    """``run_local`` on a group of this machine's ranks alone; returns the exit status."""
    return run_local(
        argv,
        ranks,
        log_dir=log_dir,
        env=env,
        failure_grace_s=failure_grace_s,
        stop_grace_s=stop_grace_s,
        pass_fds=pass_fds,
    ).status


def run_local(
    argv: Sequence[str],
    ranks: int,
    *,
    log_dir: str | Path,
    env: Mapping[str, str] | None = None,
    failure_grace_s: float = 3.0,
    stop_grace_s: float = 120.0,
    pass_fds: Sequence[int] = (),
    share: NodeShare | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run ``argv`` once per rank and wait.

    Each rank finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, DISTATTN_STORE (with ``share``: its own variables) and
    thread settings in its environment, over ``env``, over ours. When a rank fails, the others get SIGTERM and,
    failure_grace_s later, SIGKILL; stderr says which failed, how, and the end of its log. A first SIGTERM, SIGINT or SIGHUP
    here becomes a SIGTERM to every rank, which has stop_grace_s to checkpoint; a second one kills. asked_to_stop: as such a
    signal, for threads, which get none; looked at every second. pass_fds: descriptors that ranks inherit (the run's lock).
    Call it from the main thread, where signals arrive. ConfigError: ranks is less than 1, or argv is empty.
    """
    if ranks < 1 or not argv:
        raise ConfigError(f"{ranks} ranks of {list(argv)} cannot be started: give at least one rank and a command")
    logs = Path(log_dir)
    logs.mkdir(parents=True, exist_ok=True)
    started: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="distattn-", ignore_cleanup_errors=True) as meeting, _listen() as request:
        shared = _environment({**os.environ, **(env or {})}, ranks, Path(meeting) / "store", share)
        first = share.first_rank if share else 0
        try:
            for local in range(ranks):
                started.append(_start(argv, (first + local, local), shared, logs, pass_fds))
            request.asked_to_stop = asked_to_stop
            return _watch(started, request, failure_grace_s, stop_grace_s)
        finally:
            _finish(started)


def meet_on_loopback(store: str | Path) -> dict[str, str]:
    """Variables of ranks of one machine: they meet in the file ``store``, and listen on the loopback interface only."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {STORE_VARIABLE: str(store), "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


def threads_per_rank(ranks: int, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """CPU threads for each of ``ranks`` on this machine, and why: ranks that share cores slow each other down."""
    chosen = (os.environ if env is None else env).get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen), "OMP_NUM_THREADS is set"
    cores = _num_cores()
    return max(1, cores // ranks), f"{cores} cores shared by {ranks} ranks"


def _num_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        # A container may show all cores of its host and grant a few.
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = max(1, min(cores, int(quota) // int(period)))
    return cores


def _environment(base: Mapping[str, str], ranks: int, store: Path, share: NodeShare | None) -> dict[str, str]:
    threads, reason = threads_per_rank(ranks, base)
    logger.info("%d threads per rank: %s", threads, reason)
    base = {name: value for name, value in base.items() if name not in (STORE_VARIABLE, PREPARED_VARIABLE)}
    return {
        **base,
        **(share.meeting if share else {**meet_on_loopback(store), PREPARED_VARIABLE: "1"}),
        "WORLD_SIZE": str(share.world if share else ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONSAFEPATH": "1",
        # A killed rank loses what Python still buffers, which is just what one wants to read then.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def _start(
    argv: Sequence[str], numbers: tuple[int, int], shared: Mapping[str, str], logs: Path, pass_fds: Sequence[int]
) -> _Rank:
    """numbers: of the rank in the whole group, and on this machine."""
    index, local = numbers
    path = logs / f"rank-{index}.log"
    with open(path, "ab") as log:
        log_start = log.tell()
        # Rank 0 speaks to the user. A terminal stays one for it, so that it knows to draw a progress bar.
        relay = Relay([sys.stdout, sys.stderr], os.dup(log.fileno())) if index == 0 else None
        out, err = relay.child_descriptors if relay else (log.fileno(), log.fileno())
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), *argv],
            env={**shared, "RANK": str(index), "LOCAL_RANK": str(local)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            # A session of its own: Ctrl-C reaches the launcher alone, and killing the group reaches a rank's children.
            start_new_session=True,
            pass_fds=tuple(pass_fds),
        )
    if relay:
        relay.start()
    return _Rank(index, process, path, log_start, relay)


@contextlib.contextmanager
def _listen() -> Iterator[_Request]:
    """Collect stop signals instead of dying of them; in a thread other than the main one, none can be collected."""
    request = _Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # SIGHUP is ignored under nohup, and must stay so.
    numbers = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, request.note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _watch(started: list[_Rank], request: _Request, failure_grace_s: float, stop_grace_s: float) -> Outcome:
    """Until every rank is gone."""
    failed, deadline, asked = None, float("inf"), 0
    while running := [rank for rank in started if rank.process.poll() is None]:
        if failed is None and (failed := _first_failure(started)) is not None:
            _tell(_describe(failed, len(running)))
            if not asked:
                _signal(running, signal.SIGTERM)
            deadline = min(deadline, time.monotonic() + failure_grace_s)
        request.look()
        if len(request.received) > asked:
            if asked or failed:
                deadline = 0.0
            else:
                _tell(f"received {signal.Signals(request.received[0]).name}: asking {len(running)} ranks to stop")
                _signal(running, signal.SIGTERM)
                deadline = time.monotonic() + stop_grace_s
            asked = len(request.received)
        if time.monotonic() > deadline:
            names = ", ".join(str(rank.index) for rank in running)
            if failed is not None and failed.process.returncode == HANG_STATUS:
                _write_stacks(running)
            _tell(f"killing the ranks that did not stop in time: {names}")
            _signal(running, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(_POLL_S)
    if failed is None and (failed := _first_failure(started)) is not None:
        _tell(_describe(failed, 0))
    if failed is None:
        return Outcome(0, stopped=asked > 0)
    code = failed.process.returncode
    return Outcome(2 if code == 2 else 1, failed.index, kind_of_status(code), _describe(failed, 0), asked > 0)


def _first_failure(started: list[_Rank]) -> _Rank | None:
    """Of the ranks found dead at once: one that a signal ended comes first, since its peers fail of its absence."""
    failures = [rank for rank in started if rank.process.returncode]
    return min(failures, key=lambda rank: (rank.process.returncode > 0, rank.index), default=None)


def _describe(rank: _Rank, num_running: int) -> str:
    code = rank.process.returncode
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        how = f"was killed by {name}"
        if -code == signal.SIGKILL:
            how += " (by a user, or by the system for want of memory)"
    elif code == HANG_STATUS:
        how = "ended itself because nothing moved any more"
    else:
        how = f"exited with status {code}"
    stopping = f"; stopping the other {num_running}" if num_running else ""
    if rank.relay is not None:  # its output is on the screen already
        return f"rank {rank.index} {how}{stopping}. Its log: {rank.log}"
    tail = _tail(rank)
    return f"rank {rank.index} {how}{stopping}. The end of its log, {rank.log}:\n{tail or '  (empty)'}"


def _tail(rank: _Rank) -> str:
    with contextlib.suppress(OSError), open(rank.log, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(rank.log_start, size - _TAIL_BYTES))
        lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:])
    return ""


def _write_stacks(ranks: Sequence[_Rank]) -> None:
    """Into the logs of ranks that cannot write theirs: a stopped process, or one stuck in the kernel, runs no code."""
    for rank in ranks:
        stacks = native_stacks(rank.process.pid, from_outside=True)
        with contextlib.suppress(OSError), open(rank.log, "ab") as log:
            log.write(f"distattn: rank {rank.index} did not answer; its stacks, read from outside:\n{stacks}".encode())


def _signal(ranks: Sequence[_Rank], number: int) -> None:
    for rank in ranks:
        # To the whole session on SIGKILL; a SIGTERM is for the rank to act on, and its helpers obey the rank.
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(rank.process.pid, number)
            else:
                rank.process.send_signal(number)


def _finish(started: list[_Rank]) -> None:
    """Leave nothing behind: not a rank, nor anything that a rank started and did not stop."""
    for rank in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.wait()
        if rank.relay is not None:
            rank.relay.close()


def _tell(message: str) -> None:
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else 0
    # A progress bar may have left the cursor in its line.
    clear = "\r" + " " * (width - 1) + "\r" if width > 1 else ""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{clear}distattn: {message}\n")
        sys.stderr.flush()
