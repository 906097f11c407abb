"""The registry of submitted jobs, and how far each has come.

$XDG_STATE_HOME/distattn/jobs/ID.json    one record a run, written once; ~/.local/state where the variable is not set
$XDG_STATE_HOME/distattn/jobs/ID/        what its target keeps: the script, an exit status

How far a run is stands in its own folder (metrics.jsonl, checkpoints/), wherever its ranks are: it is read from there.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distattn.errors import ConfigError
from distattn.launchers.request import JobRecord

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TAIL_BYTES = 1 << 16


class JobRegistry:
    """Records of jobs on disk; safe against a kill at any moment and against two processes that write."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()

    def add(self, record: JobRecord) -> None:
        """Keep a record; ConfigError where the folder cannot be written."""
        assert _ID.fullmatch(record.id), record.id
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(self._path(record.id), json.dumps(asdict(record), ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def find(self, job: str) -> JobRecord:
        """The record of an id, or of a target's own id or a name if it is the only one; ConfigError lists near ones."""
        records = list(self)
        for matches in (
            [r for r in records if r.id == job],
            [r for r in records if r.target_id == job],
            [r for r in records if r.name == job],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                raise ConfigError(f"{job!r} names several jobs: choose one of {', '.join(r.id for r in matches)}.")
        known = ", ".join(r.id for r in records[-5:]) or "none has been submitted from here"
        raise ConfigError(f"there is no job {job!r}: the last ones are {known}; `distattn jobs` lists all.")

    def work_folder(self, job: str) -> Path:
        """A folder for a job's own files; made if it is missing."""
        path = self.folder / job
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

    def new_id(self, target: str) -> str:
        """A number that no job of this target has, for targets that give none; its folder is made, and so is taken."""
        for number in itertools.count(1):
            try:
                (self.folder / f"{target}-{number}").mkdir(parents=True, mode=0o700)
                return f"{target}-{number}"
            except FileExistsError:
                continue
            except OSError as error:
                raise self._unwritable(error) from error
        raise AssertionError("counting does not end")

    def remove(self, job: str) -> None:
        """Forget a job; its run stays as it is."""
        self._path(job).unlink(missing_ok=True)
        shutil.rmtree(self.folder / job, ignore_errors=True)

    def __iter__(self) -> Iterator[JobRecord]:
        """All records, oldest first; a file that is no record is passed over."""
        found = [record for path in self.folder.glob("*.json") if (record := _read(path)) is not None]
        yield from sorted(found, key=lambda record: (record.submitted_at, record.id))

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"the job registry {self.folder} cannot be written ({error.strerror}): set XDG_STATE_HOME to a folder that you may "
            "write to."
        )

    def _path(self, job: str) -> Path:
        return self.folder / f"{job}.json"


@dataclass(frozen=True)
class Progress:
    """Of a run, from its files; None where there is nothing yet. checkpoint: step of the newest. finished: its last step."""

    step: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    checkpoint: int | None = None
    finished: int | None = None


def read_progress(run_dir: str | Path) -> Progress:
    """How far the run in ``run_dir`` is; reads the end of metrics.jsonl only, so that it is quick for long runs too."""
    run = Path(run_dir)
    line = _last_record(run / "metrics.jsonl")
    steps = [int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*") if path.name[5:].isdecimal()]
    return Progress(
        line.get("step"), line.get("loss"), line.get("tokens_per_second"), max(steps, default=None), finished_step(run)
    )


def finished_step(run_dir: str | Path) -> int | None:
    """The last step of a run that is done; None for one that is not."""
    try:
        return int(json.loads((Path(run_dir) / "finished.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def default_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "distattn" / "jobs"


def write_atomically(path: Path, text: str) -> None:
    """The old file or the new one, never a part; readable by its owner alone, since overrides may name private paths."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> JobRecord | None:
    try:
        return JobRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON records."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = stream.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                return record
    return {}
