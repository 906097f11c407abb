"""Passes a child's output on to our own streams and to a log, as it comes."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import struct
import termios
import threading
from collections.abc import Sequence
from fcntl import ioctl
from typing import TextIO

_CLOSE_S = 2.0
_LONGEST_LINE = 1 << 16


class Relay:
    """One channel for each of our streams: a pseudo-terminal where ours is a terminal, else a pipe."""

    def __init__(self, streams: Sequence[TextIO], log: int) -> None:
        """log: a file descriptor to append to, which the relay closes."""
        self._log = log
        self._streams = list(streams)
        channels = [_terminal() if stream.isatty() else os.pipe() for stream in self._streams]
        self._ours = [ours for ours, _ in channels]
        self.child_descriptors = [theirs for _, theirs in channels]
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to pass on; call it once the child has been started with ``child_descriptors``."""
        for descriptor in self.child_descriptors:
            os.close(descriptor)
        for ours, stream in zip(self._ours, self._streams, strict=True):
            thread = threading.Thread(target=self._pass_on, args=(ours, stream), name="relay", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Wait for the rest of the output; the child must be gone."""
        for thread in self._threads:
            thread.join(_CLOSE_S)
        if not any(thread.is_alive() for thread in self._threads):
            for descriptor in (*self._ours, self._log):
                os.close(descriptor)

    def _pass_on(self, ours: int, stream: TextIO) -> None:
        # Whatever fails to be written, keep reading: a full pipe would stop the child.
        pending = b""
        while chunk := _read(ours):
            with contextlib.suppress(OSError, ValueError):
                _show(stream, chunk)
            # The log gets whole lines: both channels share it, and an unbuffered child writes a line in pieces.
            lines, newline, pending = (pending + chunk).rpartition(b"\n")
            if len(pending) > _LONGEST_LINE:
                lines, newline, pending = lines + newline + pending, b"", b""
            self._record(lines + newline)
        self._record(pending)

    def _record(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._log, text)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how a pseudo-terminal says that its other end is closed
        return b""


def _show(stream: TextIO, chunk: bytes) -> None:
    binary = getattr(stream, "buffer", None)
    if binary is None:  # a stream of text alone, as test runners put in our place
        stream.write(chunk.decode("utf-8", "replace"))
    else:
        binary.write(chunk)
    stream.flush()


def _terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST  # our own terminal makes the line ends
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    size = shutil.get_terminal_size()
    with contextlib.suppress(OSError):
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    return ours, theirs
