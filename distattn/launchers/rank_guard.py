"""Becomes a rank's command, having asked the system to kill it when its launcher dies.

Run as a script, by path: it starts in milliseconds because it imports nothing of distattn or torch. The request survives
exec; a preexec_fn would do the same, but is unsafe in a process with threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The launcher may have died before the request was made: then nobody will send the signal.
    if os.getppid() != launcher:
        os._exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
