"""Notices on each rank that nothing moves any more, says where every rank is, and ends it so that the run can start again.

    rank's loop ──beat("step 7 …")──▶ Watchdog thread: too long without a beat, here or on another rank (the group's store)
                                        │ this rank's stacks → its log;  what it does and waits for → the store
                                        └ all answers, or some seconds later: who waits for whom → log;  exit status 86

The ranks' store hangs too where the rank that is stopped hosts it or holds its file's lock: no look into it delays the end.

The thread needs Python to run. A thread of faulthandler's own, which does not, writes the stacks where native code holds the
interpreter. A process that runs nothing at all (stopped, or stuck in the kernel) is looked at from outside, by its launcher.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from distattn.bounded_store import BoundedStore
from distattn.launchers.supervise import HANG_STATUS

_KEY = "distattn/hang"
_ANSWER_S = 10.0
"""How long a rank that hangs waits for the others to say where they are."""

_EXIT_S = 60.0
"""So long after the alarm the process ends, whatever its report is stuck in."""

_NATIVE_S = 20
_MORTAL = """
import os, signal, sys
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command that ends by itself after so many seconds."""

_MARGIN_S = 10.0


class Watchdog:
    """Watches one rank between ``with`` and the end of the block; ``beat`` says that it got further.

    hang_s: seconds without a beat that count as a hang; 0: nothing is watched. Time in which the process did not run
    (suspended with its machine or by a scheduler) does not count. store: that all ranks share, None for one rank. waits:
    sentences on the transfers that this rank waits for. report: called with the summary before the process ends, on the
    lowest rank that answered.
    """

    def __init__(
        self,
        hang_s: float,
        *,
        rank: int = 0,
        world: int = 1,
        store: dist.Store | None = None,
        waits: Callable[[], Sequence[str]] = tuple,
        report: Callable[[str], None] | None = None,
        answer_s: float = _ANSWER_S,
    ) -> None:
        self._hang_s, self._rank, self._world, self._shared = hang_s, rank, world, store
        self._waits, self._report, self._answer_s = waits, report, answer_s
        # Often enough to be punctual, seldom enough to spare the store of a large group.
        self._poll_s = min(max(hang_s / 20, 0.05), 5.0) * max(1.0, world / 64)
        self._doing, self._num_beats = "starting", 0
        self._store: BoundedStore | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str) -> None:
        """The rank got as far as ``doing``."""
        self._doing = doing
        self._num_beats += 1

    def __enter__(self) -> Watchdog:
        if self._hang_s > 0:
            if self._shared is not None:
                # A connection of its own: one shared with other threads would make them wait for each other.
                own = self._shared.clone()  # pyright: ignore[reportAttributeAccessIssue]: missing in torch's stubs
                # A look takes no longer than the pause between two, so that time is counted right whatever the store does.
                self._store = BoundedStore(dist.PrefixStore(_KEY, own), limit_s=self._poll_s)
            self._thread = threading.Thread(target=self._run, name="distattn-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._answer_s)
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        seen, stalled, before = -1, 0.0, time.monotonic()
        while not self._closed.wait(self._poll_s):
            now = time.monotonic()
            stalled += min(now - before, 2 * self._poll_s)
            before = now
            if self._num_beats != seen:
                seen, stalled = self._num_beats, 0.0
            if stalled >= self._hang_s or self._alarm_of_another():
                self._end(stalled)
            # Set back as long as this thread runs.
            faulthandler.dump_traceback_later(self._hang_s + _MARGIN_S, file=2)

    def _alarm_of_another(self) -> bool:
        try:
            return self._store is not None and self._store.check(["alarm"])
        except (dist.DistError, RuntimeError):  # its host is gone, as that rank's launcher will say, or nothing answers
            return False

    def _end(self, stalled: float) -> None:
        """Report, and leave without destructors, which could wait for what hangs."""
        ender = threading.Timer(_EXIT_S, os._exit, (HANG_STATUS,))
        ender.daemon = True
        ender.start()
        faulthandler.cancel_dump_traceback_later()
        own = {"stalled": stalled, "doing": self._doing, "waits": list(self._waits()), "collective": _torch_collective()}
        store = None if self._store is None else self._store.within(self._answer_s)
        told = store is not None and self._tell(store, own)
        _write(f"distattn: rank {self._rank}: {_describe(own)}. Its stacks:\n")
        faulthandler.dump_traceback(file=2, all_threads=True)
        _write(native_stacks(os.getpid()))
        states = {self._rank: own}
        heard = store is not None and told and self._hear(store, states)
        summary = summarise(states, self._world, reached=heard or store is None)
        _write(f"distattn: {summary}\n")
        if self._report is not None and self._rank == min(states):
            self._report(summary)
        os._exit(HANG_STATUS)

    def _tell(self, store: BoundedStore, own: dict[str, Any]) -> bool:
        """Whether the store took what this rank says of itself, and the alarm."""
        try:
            store.set(f"state/{self._rank}", json.dumps(own))
            store.set("alarm", str(self._rank))
        except (dist.DistError, RuntimeError):
            return False
        return True

    def _hear(self, store: BoundedStore, states: dict[int, dict[str, Any]]) -> bool:
        """Add what the ranks that answer in time say of themselves; False if the store did not answer."""
        deadline = time.monotonic() + self._answer_s
        try:
            while len(states) < self._world and time.monotonic() < deadline:
                for rank in set(range(self._world)) - states.keys():
                    if store.check([f"state/{rank}"]):
                        states[rank] = json.loads(store.get(f"state/{rank}"))
                time.sleep(0.05)
        except (dist.DistError, RuntimeError):
            return len(states) > 1  # what was heard stands
        if len(states) == self._world:
            # The rank that hosts the store must outlive the others' last look.
            with contextlib.suppress(dist.DistError, RuntimeError):
                store.set(f"done/{self._rank}", "")
                while not store.check([f"done/{rank}" for rank in range(self._world)]) and time.monotonic() < deadline:
                    time.sleep(0.05)
        return True


def summarise(states: dict[int, dict[str, Any]], world: int, *, reached: bool = True) -> str:
    """Who waits for whom: the first sentence names the ranks that the others wait for, then there is a line for each rank.

    reached: whether the store was, through which ranks answer.
    """
    silent = [rank for rank in range(world) if rank not in states]
    idle = [rank for rank, state in sorted(states.items()) if not state["waits"] and not state["collective"]]
    longest = max(state["stalled"] for state in states.values())
    if not reached:
        culprit = (
            "the ranks' store, through which they tell each other, does not answer: a rank that hosts it or holds the lock of "
            "its file is stopped, dead or out of reach"
        )
    elif silent:
        culprit = f"everyone waits for {_ranks(silent)}, which did not answer (stopped, dead, or out of reach)"
    elif idle and len(idle) < world:
        culprit = f"everyone waits for {_ranks(idle)}, in no transfer: {states[idle[0]]['doing']}"
    elif idle:
        culprit = "no host waits in a transfer: the stacks say what each does"
    else:
        culprit = "every rank waits in a transfer: the network between them, or a mismatch of what they transfer"
    lines = [f"no progress for {longest:.1f} s: {culprit}"]
    absent = "did not answer" if reached else "could not be asked"
    lines += [f"  rank {rank} {_describe(states[rank]) if rank in states else absent}" for rank in range(world)]
    return "\n".join(lines)


def native_stacks(pid: int, *, from_outside: bool = False) -> str:
    """The Python and native stacks of a process from py-spy; empty where it is not installed or may not look.

    from_outside: of another process, which may be unable to run: it is read without being paused, Python frames only.
    """
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return ""
    look = [program, "dump", "--pid", str(pid), "--nonblocking" if from_outside else "--native"]
    # It pauses us, and waits for a thread that is stuck in the kernel as long as that is: nobody here could end it.
    command = [sys.executable, "-I", "-S", "-c", _MORTAL, str(_NATIVE_S), *look]
    try:
        done = subprocess.run(command, capture_output=True, timeout=2 * _NATIVE_S, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


def _describe(state: dict[str, Any]) -> str:
    text = f"made no progress for {state['stalled']:.1f} s at {state['doing']}"
    if state["waits"]:
        return f"{text}; it waits {'; '.join(state['waits'])}"
    return f"{text}; it waits in torch's {state['collective']}" if state["collective"] else text


def _torch_collective() -> str:
    """The call of torch.distributed that a thread of this process is in, ours excluded; empty if none is."""
    for ident, frame in sys._current_frames().items():
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if ident != threading.get_ident() and "torch/distributed/" in file and "elastic" not in file:
            return frame.f_code.co_name
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _write(text: str) -> None:
    # Straight to the descriptor: a thread that hangs may hold the lock of the stream.
    with contextlib.suppress(OSError):
        os.write(2, text.encode("utf-8", "replace"))
