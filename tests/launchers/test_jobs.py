"""Plan only: the registry on disk, and what is read of a run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from distattn.errors import ConfigError
from distattn.launchers.jobs import JobRegistry, Progress, default_folder, read_progress
from distattn.launchers.request import JobRecord


def record(job: str, name: str = "a", at: float = 1.0, **changes: str) -> JobRecord:
    return JobRecord(job, "local", job.rpartition("-")[2], name, "/runs/a", 1, 2, "/runs/a/logs/job.log", at, changes)


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    registry = JobRegistry(tmp_path / "jobs")
    saved = record("local-1", "naïve; $(x)\n'\"", start_time="7")
    registry.add(saved)
    assert list(registry) == [saved]
    assert registry.find("local-1") == saved
    # Overrides and paths are the user's own business.
    assert stat.S_IMODE(os.stat(tmp_path / "jobs" / "local-1.json").st_mode) == 0o600
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["local-1.json"]


def test_jobs_are_found_by_id_number_and_name(tmp_path: Path) -> None:
    registry = JobRegistry(tmp_path)
    for job, name, at in (("local-2", "b", 3.0), ("slurm-17", "a", 2.0), ("local-3", "a", 1.0)):
        registry.add(record(job, name, at))
    assert [r.id for r in registry] == ["local-3", "slurm-17", "local-2"]
    assert registry.find("17").id == "slurm-17"
    assert registry.find("b").id == "local-2"
    with pytest.raises(ConfigError, match="'a' names several jobs: choose one of local-3, slurm-17"):
        registry.find("a")
    with pytest.raises(ConfigError, match="there is no job 'c': the last ones are local-3, slurm-17, local-2"):
        registry.find("c")
    registry.remove("slurm-17")
    assert [r.id for r in registry] == ["local-3", "local-2"]


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    registry = JobRegistry(tmp_path)
    registry.add(record("local-1"))
    (tmp_path / "local-2.json").write_text("{half")
    (tmp_path / "local-3.json").write_text('{"id": "local-3", "surplus": 1}')
    assert [r.id for r in registry] == ["local-1"]


def test_numbers_are_given_once(tmp_path: Path) -> None:
    registry = JobRegistry(tmp_path)
    assert [registry.new_id("local") for _ in range(3)] == ["local-1", "local-2", "local-3"]
    assert registry.new_id("ray") == "ray-1"


def test_a_registry_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = JobRegistry(tmp_path / "file" / "jobs")
    for act in (lambda: registry.add(record("local-1")), lambda: registry.new_id("local")):
        with pytest.raises(ConfigError, match=r"cannot be written .*: set XDG_STATE_HOME"):
            act()


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "distattn" / "jobs"
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    assert default_folder() == Path.home() / ".local" / "state" / "distattn" / "jobs"


def test_progress(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == Progress()
    lines = [json.dumps({"step": n, "loss": 5.0 - n, "tokens_per_second": 10.0 * n}) + "\n" for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("x" * 70000 + "\n" + "".join(lines) + '{"step": 3, "lo')
    for name in ("step-2", "step-10", "step-11.tmp", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "finished.json").write_text('{"step": 12}')
    assert read_progress(tmp_path) == Progress(2, 3.0, 20.0, 10, 12)


def test_looking_at_jobs_imports_no_compiler() -> None:
    """Each command is a process, and a page of them is waited for: torch's compiler alone takes two seconds to import."""
    code = "import distattn.cli.jobs, distattn.launchers.slurm, sys; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
