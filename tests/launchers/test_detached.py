"""Commands that outlive whoever started them, as real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from distattn.launchers.detached import alive, birth, start_detached

SCRIPT = """
import os, sys, time
print(os.getcwd(), os.environ['COLOUR'], sys.argv[1:], sys.stdin.read(), flush=True)
time.sleep({})
"""


def start(folder: Path, seconds: float) -> int:
    with open(folder / "output", "ab") as output:
        command = [sys.executable, "-S", "-c", SCRIPT.format(seconds), "a b", "$(touch x)", ""]
        return start_detached(command, cwd=folder, env={"COLOUR": "grün; x"}, output=output)


def wait_for_end(pid: int, born: str) -> None:
    deadline = time.monotonic() + 60.0
    while alive(pid, born):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_is_nobodys_child_and_gets_what_it_is_given(tmp_path: Path) -> None:
    pid = start(tmp_path, 600)
    born = birth(pid)
    try:
        assert alive(pid, born)
        assert os.getsid(pid) == pid
        assert pid not in [child.pid for child in psutil.Process().children(recursive=True)]
        while not (tmp_path / "output").stat().st_size:
            time.sleep(0.01)
        assert (tmp_path / "output").read_text() == f"{tmp_path} grün; x ['a b', '$(touch x)', ''] \n"
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_for_end(pid, born)


def test_its_end_leaves_no_zombie_here(tmp_path: Path) -> None:
    before = psutil.Process().children()
    pid = start(tmp_path, 0)
    wait_for_end(pid, birth(pid))
    assert psutil.Process().children() == before


def test_a_process_is_more_than_its_number() -> None:
    assert alive(os.getpid(), birth(os.getpid()))
    assert not alive(os.getpid(), "1")
    assert not alive(os.getpid(), "")
    assert not alive(0x3FFFFF, "")


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with open(tmp_path / "output", "ab") as output:
        with pytest.raises(OSError, match=r"/nowhere/x cannot be started: FileNotFoundError: .*No such file"):
            start_detached(["/nowhere/x"], cwd=tmp_path, env={}, output=output)
        with pytest.raises(FileNotFoundError):
            start_detached([sys.executable], cwd=tmp_path / "away", env={}, output=output)
    assert (tmp_path / "output").read_bytes() == b""
