"""Runs a command for a user who has left, and writes down how it ended: ``background.py END_FILE COMMAND…``.

Run as a script, by path: it lives as long as the job, and so imports nothing of distattn or torch. A signal to stop goes on to
the command, which has its own way of stopping.
"""

import json
import os
import signal
import subprocess
import sys


def main() -> int:
    end_file, *command = sys.argv[1:]
    received = []
    # Before the start, so that no signal comes too early to be passed on.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    child = subprocess.Popen(command)
    passed = 0
    while True:
        try:
            status = child.wait(0.2)
            break
        except subprocess.TimeoutExpired:
            for number in received[passed:]:
                child.send_signal(number)
                passed += 1
    temporary = f"{end_file}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump({"status": status}, stream)
    os.replace(temporary, end_file)
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
