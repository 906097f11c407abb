"""Patience with a file system that vanishes for a while: a server that restarts, a mount that comes back.

What is missing or out of reach is tried again, with a bound. A full disk is not: somebody has to make room, and the run is
told so at once.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["NO_SPACE", "error_number", "patiently"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EIO", "ENETDOWN", "ENETUNREACH", "ENODEV",
        "ENOENT", "ENOTCONN", "ENXIO", "EREMOTEIO", "ESHUTDOWN", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 5.0


def error_number(error: BaseException) -> int | None:
    """The system's number of an error, also where a library gives it in words only (safetensors: "(os error 28)")."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def patiently(action: Callable[[], T], what: str, *, patience_s: float) -> T:
    """``action()``, again and again for up to ``patience_s`` seconds while the file system is out of reach.

    Any other error, a full disk's among them, and the last one after that time, is raised. The action must be one that can
    be repeated. what: for the log, such as "the checkpoint of step 7".
    """
    deadline, pause = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while True:
        try:
            return action()
        except Exception as error:
            if error_number(error) not in _PASSING or time.monotonic() + pause > deadline:
                raise
            if pause == _FIRST_PAUSE_S:
                logger.warning("%s cannot be written (%s): trying again for %g s", what, error, patience_s)
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE_S)
