"""The folder of a run: one config, one process at a time, and a record that a kill cannot garble.

RUN_DIR/config.yaml      the resolved config that the run was started with
RUN_DIR/metrics.jsonl    one line a step
RUN_DIR/evaluations.json losses on held-out text
RUN_DIR/loss.png         drawn when the last step is done
RUN_DIR/checkpoints/     step-N folders
RUN_DIR/logs/            rank-R.log
RUN_DIR/attempts.jsonl   starts and failures of its ranks
RUN_DIR/finished.json    present when the last step was done
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from distattn.errors import ConfigError
from distattn.training.atomic_file import replace_text
from distattn.training.patience import patiently

__all__ = ["MetricsLog", "RunDir", "RunLock", "read_lines"]

logger = logging.getLogger(__name__)

# Ranks die with their launcher, but not in the same instant: so long does the next process wait for them.
_DYING_S = 15.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_ABSENT = "nothing"


class RunLock:
    """Holds a run directory until released, or until the last process that inherited ``fileno()`` is gone."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class MetricsLog:
    """A file of JSON records, one a line, each with its step; each is one write, so that a kill leaves whole lines."""

    def __init__(self, path: Path, resume_step: int = 0, *, patience_s: float = 0.0) -> None:
        """Open ``path`` for the steps after ``resume_step``. patience_s: how long a vanished file system is waited for.

        What an interrupted run wrote beyond that step, or left half-written, is removed: no step is counted twice.
        """
        lines = _lines(path)
        kept = [line for line in lines if (record := _record(line)) and record["step"] <= resume_step]
        if kept != lines:
            replace_text(path, b"".join(kept).decode("utf-8"))
        self._path, self._patience_s = path, patience_s
        self._descriptor = self._open()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; numbers that JSON has no word for (NaN, infinities) become null. ``record`` has a "step".

        OSError, with the path, where the disk is full or stays out of reach; half a line is dropped when the run resumes.
        """
        finite = {key: None if _is_not_finite(value) else value for key, value in record.items()}
        line = (json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        left = line

        def write() -> None:
            nonlocal left
            if self._descriptor < 0:
                self._descriptor = self._open()
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
            except OSError:
                self.close()  # a server that comes back may not know the old descriptor
                raise

        try:
            patiently(write, str(self._path), patience_s=self._patience_s)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._path)) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # a late error of a server that is gone
                os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of such a file, in file order, none if there is no file; safe while the run writes."""
    return [record for line in _lines(path) if (record := _record(line))]


class RunDir:
    """Paths of a run, and the few operations on them. Making one touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.picture = self.path / "loss.png"
        self._finished_path = self.path / "finished.json"
        self._lock_path = self.path / ".lock"

    def create(self) -> None:
        """Make the folders; ConfigError where they cannot be made."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run.dir is {str(self.path)!r}, where no folder can be made ({error.strerror}): choose a folder that you "
                "may write to"
            ) from error

    def lock(self) -> RunLock:
        """Take the run for this process; ConfigError, naming its process id, if another live process has it.

        Held through a file lock, which the system drops when the process dies, however it dies.
        """
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline = time.monotonic() + _DYING_S
        try:
            while not _try_lock(descriptor, self._lock_path):
                holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
                if _is_alive(holder) or time.monotonic() > deadline:
                    raise ConfigError(
                        f"run.dir is {str(self.path)!r}, which process {holder or 'unknown'} is using: wait for it, stop "
                        "it, or choose another run.dir"
                    )
                time.sleep(0.05)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return RunLock(descriptor)

    def claim_config(self, config: Mapping[str, Any], may_change: Sequence[str]) -> None:
        """Make this the run of ``config`` (resolved: plain dicts, lists and scalars), or refuse with ConfigError.

        A new run keeps it as config.yaml. A run that has one goes on only if all keys but those that match
        ``may_change`` are equal; then config.yaml gets the new values.
        """
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
        old = self.read_config()
        if old is not None:
            before, now = _flatten(old), _flatten(yaml.safe_load(text))
            changed = [
                f"{key} was {before.get(key, _ABSENT)!r} and is now {now.get(key, _ABSENT)!r}"
                for key in sorted(before.keys() | now.keys())
                if not any(fnmatchcase(key, pattern) for pattern in may_change)
                and (key not in before or key not in now or not _same(before[key], now[key]))
            ]
            if changed:
                raise ConfigError(
                    f"run.dir is {str(self.path)!r}, which holds a run of another config: {'; '.join(changed)}. Choose "
                    "another run.dir, or go back to the old values"
                )
        if old is None or text != self.config_path.read_text(encoding="utf-8"):
            replace_text(self.config_path, text)

    def read_config(self) -> dict[str, Any] | None:
        """The config that the run was started with; None for a new folder."""
        try:
            config = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.config_path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{self.config_path} is not the config of a run: it holds no keys")
        return config

    def finished(self) -> int | None:
        """The final step of a finished run, None for one that is not."""
        try:
            return int(json.loads(self._finished_path.read_text(encoding="utf-8"))["step"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self._finished_path} is damaged: remove it, and the run goes on from its last checkpoint"
            ) from error

    def mark_finished(self, step: int) -> None:
        replace_text(self._finished_path, json.dumps({"step": step}) + "\n")

    def metrics(self, resume_step: int = 0, *, patience_s: float = 0.0) -> MetricsLog:
        """Open metrics.jsonl for the steps after ``resume_step``."""
        return MetricsLog(self.metrics_path, resume_step, patience_s=patience_s)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl."""
        return read_lines(self.metrics_path)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None where it was cut short or is none."""
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s is on a file system without locks: nothing keeps a second process out of this run", path)
    return True


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _same(before: Any, now: Any) -> bool:
    # True == 1 in Python, but not in a config.
    return before == now and isinstance(before, bool) == isinstance(now, bool)
