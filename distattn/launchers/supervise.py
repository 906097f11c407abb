"""What happened to a run, and whether it is started again.

RUN_DIR/attempts.jsonl   one line an event: an attempt was started; a rank, or the launcher on its behalf, says how it failed

    attempt ──ends──▶ Journal ──▶ root_cause: of all that failed, what the others failed of
                                  └──▶ decide: again after a pause │ stop: too often, or the same step the same way twice

``decide`` is a pure function, so that a local launcher, a Slurm script and a Ray driver cannot differ.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "HANG",
    "HANG_STATUS",
    "LOST",
    "RESTART_VARIABLE",
    "Attempt",
    "Decision",
    "Failure",
    "Journal",
    "after_attempt",
    "decide",
    "num_restarts",
    "supervise",
    "wait_until_ready",
]

logger = logging.getLogger(__name__)

HANG = "hang"
LOST = "lost"
"""Kind of a failure of a whole node, or of the process that started its ranks."""

HANG_STATUS = 86
"""Exit status of a rank that ended itself because nothing moved any more."""

RESTART_VARIABLE = "DISTATTN_RESTART"
"""How often the run was restarted before: set by the launcher that restarts it, read by ranks that record their start."""

CONFIG = "ConfigError"
LONGEST_PAUSE_S = 300.0
READY_S = 3600.0
"""So long does a restart wait for what it needs: space on the disk, a file system that is gone."""

_READY_POLL_S = 2.0
_MESSAGE_CHARS = 2000
# Errors that a healthy rank raises when a peer is gone.
_OF_PEERS = ("TransportError", "DistBackendError", "DistNetworkError", "DistStoreError")


@dataclass(frozen=True)
class Failure:
    """How a rank failed. step: the one that was being computed; kind: a signal's name, ``hang``, ``lost``, the class
    of an exception, or ``status N``; rank: −1 where it is not one rank's; time: seconds since 1970."""

    step: int
    kind: str
    message: str = ""
    rank: int = -1
    time: float = 0.0

    def same_way(self, other: Failure) -> bool:
        """Whether both are the same step failing in the same way."""
        return (self.step, self.kind) == (other.step, other.kind)

    def describe(self) -> str:
        who = f"rank {self.rank}: " if self.rank >= 0 else ""
        return f"{who}{self.kind} at step {self.step}" + (f" ({self.message.splitlines()[0]})" if self.message else "")


@dataclass(frozen=True)
class Attempt:
    """One start of a run's ranks. restart: 0 for the first of a submission; failure: the root cause, None without one."""

    restart: int
    ranks: int
    failure: Failure | None


@dataclass(frozen=True)
class Decision:
    """Whether to start again, after how many seconds, and why (or why not)."""

    restart: bool
    wait_s: float
    reason: str


def decide(failures: Sequence[Failure], *, restarts: int, max_restarts: int, backoff_s: float = 5.0) -> Decision:
    """What follows the last of ``failures``, one for each failed attempt in a row, oldest first.

    restarts: how many there have been. The pause doubles from backoff_s with each restart since the run last got further,
    up to five minutes.
    """
    last = failures[-1]
    if last.kind == CONFIG:
        return Decision(False, 0.0, f"not restarted: {last.describe()}, which a restart cannot change")
    if max_restarts == 0:
        return Decision(False, 0.0, "not restarted: no restarts are allowed")
    if len(failures) > 1 and last.same_way(failures[-2]):
        return Decision(
            False, 0.0, f"not restarted: step {last.step} failed the same way twice, so it would again: {last.describe()}"
        )
    if restarts >= max_restarts:
        return Decision(False, 0.0, f"not restarted: {restarts} restarts have been used of {max_restarts} allowed")
    stuck = 0
    for before, after in zip(reversed(failures[:-1]), reversed(failures[1:]), strict=True):
        if after.step > before.step:
            break
        stuck += 1
    pause = min(backoff_s * 2.0**stuck, LONGEST_PAUSE_S)
    return Decision(True, pause, f"restart {restarts + 1} of {max_restarts} in {pause:g} s, after {last.describe()}")


def root_cause(failures: Sequence[Failure]) -> Failure | None:
    """What the others failed of: a signal or a lost node, then a hang, then a rank's own error, then what lost peers cause."""

    def order(failure: Failure) -> tuple[int, float]:
        if failure.kind == LOST or failure.kind in signal.Signals.__members__:
            return 0, failure.time
        if failure.kind == HANG:
            return 1, failure.time
        if failure.kind in _OF_PEERS:
            return 4, failure.time
        # gloo's and CUDA's errors are bare RuntimeErrors, a peer's absence among them.
        return (5 if failure.kind.startswith("status ") else 3 if failure.kind == "RuntimeError" else 2), failure.time

    return min(failures, key=order, default=None)


class Journal:
    """``attempts.jsonl`` of a run. Every write is one line in one call, so that ranks on several nodes may append."""

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / "attempts.jsonl"

    def started(self, ranks: int, restart: int) -> None:
        """Note that ``ranks`` ranks are being started, for the ``restart``-th time again."""
        self._append({"event": "started", "time": time.time(), "restart": restart, "ranks": ranks})

    def failed(self, failure: Failure) -> None:
        """Note a failure; its time is now unless it has one."""
        record = asdict(failure) | {"time": failure.time or time.time(), "message": failure.message[:_MESSAGE_CHARS]}
        self._append({"event": "failed", **record})

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        found: list[tuple[dict[str, Any], list[Failure]]] = []
        for record in _records(self.path):
            if record.get("event") == "started":
                found.append((record, []))
            elif record.get("event") == "failed":
                if not found:  # it failed before anybody could say that it had started
                    found.append(({}, []))
                found[-1][1].append(Failure(**{name: record[name] for name in Failure.__dataclass_fields__}))
        return [Attempt(start.get("restart", 0), start.get("ranks", 0), root_cause(fails)) for start, fails in found]

    def failures_in_a_row(self) -> list[Failure]:
        """The root causes of the latest attempts, back to the one that was no restart."""
        row: list[Failure] = []
        for attempt in reversed(self.attempts()):
            if attempt.failure is not None:
                row.append(attempt.failure)
            if attempt.restart == 0:
                break
        return row[::-1]

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        try:
            # Without O_CREAT's parents: a folder that is gone for a while must not be made anew in its place.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.write(descriptor, line.encode("utf-8", "replace"))
            finally:
                os.close(descriptor)
        except OSError as error:  # the failure itself matters more than its record
            logger.warning("%s cannot be written: %s", self.path, error)


def num_restarts(run_dir: str | Path) -> int:
    """How often the run in ``run_dir`` has been restarted since it was last submitted; 0 where nothing is known."""
    attempts = Journal(run_dir).attempts()
    return attempts[-1].restart if attempts else 0


def step_being_computed(run_dir: str | Path) -> int:
    """The step after the last one in metrics.jsonl."""
    steps = [record["step"] for record in _records(Path(run_dir) / "metrics.jsonl") if isinstance(record.get("step"), int)]
    return steps[-1] + 1 if steps else 1


def after_attempt(run_dir: str | Path, *, status: int, restarts: int, max_restarts: int, backoff_s: float = 5.0) -> Decision:
    """``decide`` for a launcher that knows only the exit status of its command, such as srun's (128 + a signal's number).

    What the ranks could not write themselves, because they were killed, is added to the journal.
    """
    journal = Journal(run_dir)
    attempts = journal.attempts()
    if not attempts or attempts[-1].failure is None or (attempts[-1].failure.kind in _OF_PEERS and status > 128):
        step = step_being_computed(run_dir)
        journal.failed(Failure(step, kind_of_status(status), f"the command ended with status {status}"))
    return decide(journal.failures_in_a_row(), restarts=restarts, max_restarts=max_restarts, backoff_s=backoff_s)


def kind_of_status(status: int) -> str:
    """A process's status as the kind of a failure: negative, or 128 + n, for signal n."""
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return {HANG_STATUS: HANG, 2: CONFIG}.get(status, f"status {status}")


def supervise(
    attempt: Callable[[int], int | None],
    journal: Journal,
    *,
    max_restarts: int,
    backoff_s: float,
    not_ready: Callable[[], str | None] = lambda: None,
    say: Callable[[str], None] = logger.warning,
) -> int:
    """Run ``attempt(restart)`` until it ends well, ends for good, or ``decide`` says no; the last exit status.

    attempt: starts the ranks, notes their failures in the journal, and returns their exit status, or None if a user stopped
    it, which is never followed by a restart (the status is then 1). not_ready: what a restart would have to wait for.
    """
    restart = 0
    while True:
        status = attempt(restart)
        if status in (0, None):
            return 0 if status == 0 else 1
        failures = journal.failures_in_a_row() or [Failure(1, kind_of_status(status))]
        decision = decide(failures, restarts=restart, max_restarts=max_restarts, backoff_s=backoff_s)
        if max_restarts or decision.restart:
            say(decision.reason)
        if not decision.restart:
            return status
        try:
            time.sleep(decision.wait_s)
            reason = wait_until_ready(not_ready, say=say)
        except KeyboardInterrupt:
            reason = "interrupted"
        if reason is not None:
            say(f"not restarted: {reason}")
            return status
        restart += 1


def wait_until_ready(
    not_ready: Callable[[], str | None], *, say: Callable[[str], None] = logger.warning, timeout_s: float = READY_S
) -> str | None:
    """Wait until nothing stands in the way of a restart; what still does after ``timeout_s``, None if nothing."""
    deadline, said = time.monotonic() + timeout_s, None
    while (reason := not_ready()) is not None:
        if time.monotonic() > deadline:
            return reason
        if reason != said:
            say(f"waiting before the restart: {reason}")
            said = reason
        time.sleep(_READY_POLL_S)
    return None


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON records; none without a file."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    records = []
    for line in lines:
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line.decode("utf-8", "replace"))
                records += [record] if isinstance(record, dict) else []
    return records
