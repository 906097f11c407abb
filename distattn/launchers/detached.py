"""Starts a command that outlives whoever starts it, and whom nobody has to wait for.

    we ──▶ go-between (this file, run by path) ──▶ command, in a session of its own
             └ says its process id, and ends: the command is the system's child, and no zombie of ours when it ends

A process id is given anew once its process is gone, so whoever remembers one remembers ``birth`` with it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


def start_detached(command: Sequence[str], *, cwd: str | Path, env: Mapping[str, str], output: IO[bytes]) -> int:
    """Start ``command``, with no input and its output appended to ``output``; its process id.

    OSError: the program does not exist or may not be run, or the folder is not there.
    """
    between = subprocess.run(
        [sys.executable, "-I", "-S", __file__, str(output.fileno()), *command],
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        pass_fds=(output.fileno(),),
        text=True,
        check=False,
    )
    if between.returncode:
        raise OSError(f"{command[0]} cannot be started: {between.stderr.strip().rpartition(chr(10))[2]}")
    return int(between.stdout)


def birth(pid: int) -> str:
    """When a process started, in the kernel's ticks: with the id it names a process for good. Empty for one that is gone, or
    only waits for its parent to take notice of its end."""
    try:
        # The name, in parentheses, may hold spaces; after it come state (field 3) and, as field 22, the start time.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def alive(pid: int, born: str) -> bool:
    """Whether the process that had this ``birth`` still runs."""
    return born != "" and birth(pid) == born


def main(arguments: Sequence[str]) -> None:
    """OUTPUT_DESCRIPTOR COMMAND…"""
    descriptor = int(arguments[0])
    process = subprocess.Popen(
        arguments[1:], stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, start_new_session=True
    )
    print(process.pid, flush=True)
    process.returncode = 0  # Python would warn that it is not waited for


if __name__ == "__main__":
    main(sys.argv[1:])
