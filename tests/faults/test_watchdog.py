"""What ranks say when nothing moves any more. Rings 1 and 2: summaries, then real processes that hang."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distattn.launchers import watchdog as module
from distattn.launchers.supervise import HANG_STATUS
from distattn.launchers.watchdog import Watchdog, native_stacks, summarise
from tests.faults.frozen_store import hosting, locked


def state(stalled: float, doing: str, *waits: str, collective: str = "") -> dict[str, Any]:
    return {"stalled": stalled, "doing": doing, "waits": list(waits), "collective": collective}


def test_a_silent_rank_is_the_one_that_everyone_waits_for() -> None:
    waiting = state(9.0, "step 7", "at stage 2 of the ring forward for KV rows from rank 1")
    text = summarise({0: waiting, 2: state(8.0, "step 7", collective="all_reduce")}, 3)
    assert text.splitlines() == [
        "no progress for 9.0 s: everyone waits for rank 1, which did not answer (stopped, dead, or out of reach)",
        "  rank 0 made no progress for 9.0 s at step 7; it waits at stage 2 of the ring forward for KV rows from rank 1",
        "  rank 1 did not answer",
        "  rank 2 made no progress for 8.0 s at step 7; it waits in torch's all_reduce",
    ]


def test_a_rank_in_no_transfer_is_the_one_that_the_others_wait_for() -> None:
    states = {
        0: state(9.0, "step 7", collective="all_reduce"),
        1: state(9.5, "step 6, evaluation"),
        2: state(1.0, "x", "for 1"),
    }
    assert "everyone waits for rank 1, in no transfer: step 6, evaluation" in summarise(states, 3)
    everybody = {rank: state(9.0, "step 7", "for another") for rank in range(2)}
    assert "every rank waits in a transfer" in summarise(everybody, 2)
    assert "no host waits in a transfer" in summarise({0: state(9.0, "step 7")}, 1)


def test_what_nobody_could_be_asked_is_not_said_of_them() -> None:
    text = summarise({1: state(9.0, "step 7", collective="all_reduce")}, 3, reached=False)
    assert text.splitlines() == [
        "no progress for 9.0 s: the ranks' store, through which they tell each other, does not answer: a rank that hosts it or "
        "holds the lock of its file is stopped, dead or out of reach",
        "  rank 0 could not be asked",
        "  rank 1 made no progress for 9.0 s at step 7; it waits in torch's all_reduce",
        "  rank 2 could not be asked",
    ]


def run(code: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    text = "import sys, time\nfrom distattn.launchers.watchdog import Watchdog\n" + code
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=timeout_s, check=False)


def test_one_rank_reports_its_stacks_and_ends() -> None:
    done = run(
        """
def deep_inside():
    time.sleep(60)
with Watchdog(0.5, report=lambda summary: sys.stderr.write(f"REPORT {summary}\\n"), answer_s=1.0) as watchdog:
    watchdog.beat("step 3, forward")
    deep_inside()
"""
    )
    assert done.returncode == HANG_STATUS, done.stderr
    assert re.search(r"distattn: rank 0: made no progress for \d\.\d s at step 3, forward. Its stacks:", done.stderr)
    assert "in deep_inside" in done.stderr
    assert "REPORT no progress for" in done.stderr


HANGING = """
import torch.distributed as dist
store = {store}
def report(summary):
    sys.stderr.write("REPORT " + summary)
with Watchdog(3.0, rank=1, world=2, store=store, report=report, answer_s=1.0) as watchdog:
    watchdog.beat("step 3, forward")
    print("watched", flush=True)
    time.sleep(600)
"""


def assert_ends(store: str, freeze: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
    """A rank that waits ends itself although the store is frozen, and long before its last resort, an exit after a minute."""
    text = "import sys, time\nfrom distattn.launchers.watchdog import Watchdog\n" + HANGING.format(store=store)
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "watched\n"
            with freeze():
                _, said = process.communicate(timeout=45.0)
        finally:
            process.kill()
    assert process.returncode == HANG_STATUS, said
    assert re.search(r"distattn: rank 1: made no progress for \d\.\d s at step 3, forward. Its stacks:", said)
    assert re.search(r"REPORT no progress for \d\.\d s: the ranks' store, through which they tell each other, does not", said)


@pytest.mark.parametrize("operation", [fcntl.LOCK_SH, fcntl.LOCK_EX], ids=["shared", "exclusive"])
def test_a_rank_that_is_stopped_with_the_lock_of_the_store_hangs_nobody(tmp_path: Path, operation: int) -> None:
    """A look into a FileStore takes a lock of the file, and a stopped process keeps it. Escaped: it takes a tenth of a
    millisecond twice a second, so that tests stopped no rank just then, until one did."""
    assert_ends(f"dist.FileStore({str(tmp_path / 'store')!r}, 2)", lambda: locked(tmp_path / "store", operation))


def test_a_store_whose_host_is_stopped_hangs_nobody() -> None:
    """Escaped: every rank that tests stopped met in a file, and rank 1 at that."""
    with hosting() as (port, host):

        def freeze() -> contextlib.AbstractContextManager[object]:
            host.send_signal(signal.SIGSTOP)
            return contextlib.nullcontext()

        assert_ends(f"dist.TCPStore('127.0.0.1', {port}, is_master=False, wait_for_workers=False)", freeze)


def test_beats_keep_it_quiet_and_zero_turns_it_off() -> None:
    done = run(
        """
with Watchdog(1.5) as watchdog:
    for i in range(30):
        watchdog.beat(str(i))
        time.sleep(0.1)
with Watchdog(0.0):
    time.sleep(0.5)
print("went on")
"""
    )
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_native_code_that_holds_the_interpreter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctypes.PyDLL keeps the interpreter's lock: no Python thread runs, and the stacks come all the same."""
    done = run(
        """
import ctypes
import distattn.launchers.watchdog as module
module._MARGIN_S = 0.5
def held():
    ctypes.PyDLL(None).sleep(5)
with Watchdog(1.0) as watchdog:
    watchdog.beat("native")
    time.sleep(0.3)
    held()
"""
    )
    assert "Timeout (0:00:01.500000)!" in done.stderr
    assert "in held" in done.stderr


def test_time_in_which_the_process_did_not_run_does_not_count(tmp_path: Path) -> None:
    code = f"""
import sys, time
from distattn.launchers.watchdog import Watchdog
with Watchdog(4.0) as watchdog:
    open({str(tmp_path / "ready")!r}, "w").close()
    for i in range(20):
        watchdog.beat(str(i))
        time.sleep(0.1)
print("went on")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(19)
    time.sleep(5.0)
    process.send_signal(18)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "went on\n")


def test_a_stopped_process_is_read_from_outside() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time\ndef waiting_here():\n    time.sleep(60)\nwaiting_here()"])
    try:
        time.sleep(1.0)
        process.send_signal(19)
        deadline = time.monotonic() + 60
        while "waiting_here" not in (stacks := native_stacks(process.pid, from_outside=True)):
            assert time.monotonic() < deadline, stacks
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()


def test_py_spy_does_not_pause_a_rank_without_end(tmp_path: Path) -> None:
    """A thread in vfork, whose child waits for a pipe, is as deep in the kernel as one that waits for a dead disk. Escaped:
    every hang in tests was in user code, where py-spy can stop each thread."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = f"""
import ctypes, os, threading, time
import distattn.launchers.watchdog as module
module._NATIVE_S = 2
libc, actions, pid = ctypes.CDLL(None), ctypes.create_string_buffer(1024), ctypes.c_int()
def spawn():
    libc.posix_spawn_file_actions_init(actions)
    libc.posix_spawn_file_actions_addopen(actions, 0, {os.fsencode(pipe)!r}, os.O_RDONLY, 0)
    libc.posix_spawn(ctypes.byref(pid), b"/bin/true", actions, None, (ctypes.c_char_p * 2)(b"true", None), None)
with module.Watchdog(1.0) as watchdog:
    watchdog.beat("step 3, forward")
    threading.Thread(target=spawn, daemon=True).start()  # later than the watchdog's, so that this one is paused first
    time.sleep(600)
"""
    said = tmp_path / "said"
    # Into a file: the child has the same stderr, and lives longer.
    with open(said, "wb") as stderr, subprocess.Popen([sys.executable, "-c", code], stderr=stderr) as process:
        try:
            status = process.wait(45.0)
        finally:
            process.kill()
            with contextlib.suppress(OSError):  # the child goes on, and ends
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    assert status == HANG_STATUS, said.read_text()
    assert "no progress for" in said.read_text()


def test_without_py_spy_nothing_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.sys, "executable", "/nowhere/python")
    assert native_stacks(os.getpid()) == ""


def test_a_watchdog_leaves_no_thread() -> None:
    with Watchdog(60.0) as watchdog:
        watchdog.beat("x")
        thread = watchdog._thread
    assert thread is not None
    assert not thread.is_alive()
