"""The run folder: its lock, its config, its record. No torch.distributed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distattn.config import MAY_CHANGE
from distattn.errors import ConfigError
from distattn.training import run_dir as run_dir_module
from distattn.training.run_dir import MetricsLog, RunDir, read_lines

CONFIG: dict[str, Any] = {
    "run": {"dir": "läufe/a b"},
    "train": {"steps": 100, "seed": 0, "device": "auto"},
    "optim": {"lr": 1e-5, "clip_norm": 1.0},
    "data": {"source": "${oc.env:HOME}", "tokenizer": "bytes", "lengths": [1, 2]},
    "model": {"tied": True, "rope": {}},
    "parallel": {"context": 2, "strategy": "ring"},
    "kernel": "auto",
    "checkpoint": {"keep": 3},
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "ein Lauf – 1")
    assert not run.path.exists(), "making a RunDir touches nothing"
    run.create()
    return run


def changed(key: str, value: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    section, _, name = key.partition(".")
    if name:
        config[section][name] = value
    else:
        config[section] = value
    return config


def test_layout(run: RunDir) -> None:
    run.create()
    assert run.checkpoints.is_dir()
    assert run.logs.is_dir()
    assert {path.parent for path in (run.config_path, run.metrics_path, run.picture)} == {run.path}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir is .*file/run.*choose a folder"):
        RunDir(tmp_path / "file" / "run").create()


def test_config_is_kept_as_given(run: RunDir) -> None:
    assert run.read_config() is None
    run.claim_config(CONFIG, MAY_CHANGE)
    assert run.read_config() == CONFIG
    written = run.config_path.stat().st_mtime_ns
    assert "läufe/a b" in run.config_path.read_text(encoding="utf-8")
    run.claim_config(CONFIG, MAY_CHANGE)
    assert run.config_path.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 101),
        ("train.seed", 1),
        ("optim.lr", 2e-5),
        ("data.source", "elsewhere"),
        ("data.lengths", [1, 3]),
        ("model.tied", 1),
        ("model.rope", {"base": 5}),
        ("model.layers", 3),
    ],
)
def test_another_config_is_refused(run: RunDir, key: str, value: Any) -> None:
    run.claim_config(CONFIG, MAY_CHANGE)
    with pytest.raises(ConfigError, match=f"holds a run of another config: .*{key}.* was .* and is now "):
        run.claim_config(changed(key, value), MAY_CHANGE)
    assert run.read_config() == CONFIG


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallel.context", 3),
        ("parallel.strategy", "ulysses"),
        ("kernel", "reference"),
        ("run.dir", "moved"),
        ("checkpoint.keep", 1),
        ("train.device", "cpu"),
    ],
)
def test_where_it_runs_may_change(run: RunDir, key: str, value: Any) -> None:
    run.claim_config(CONFIG, MAY_CHANGE)
    run.claim_config(changed(key, value), MAY_CHANGE)
    assert run.read_config() == changed(key, value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "", "\x00", "!!python/object/apply:os.mkdir [/tmp/it-ran]"])
def test_a_config_that_cannot_be_read(run: RunDir, text: str) -> None:
    run.config_path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        run.claim_config(CONFIG, MAY_CHANGE)
    assert run.config_path.read_text() == text


def test_finished(run: RunDir) -> None:
    assert run.finished() is None
    run.mark_finished(100)
    assert run.finished() == 100
    (run.path / "finished.json").write_text("{")
    with pytest.raises(ConfigError, match=r"finished\.json is damaged: remove it"):
        run.finished()


def test_metrics_drop_what_is_beyond_the_resumed_step_or_half_written(run: RunDir) -> None:
    with_steps = run.metrics()
    for step in range(1, 6):
        with_steps.append({"step": step, "loss": 1 / step, "note": "größer"})
    with_steps.close()
    before = run.metrics_path.read_bytes().splitlines(keepends=True)
    with open(run.metrics_path, "ab") as stream:
        stream.write(b'{"step": 6, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4, 5]
    log = run.metrics(resume_step=3)
    assert run.metrics_path.read_bytes() == b"".join(before[:3])
    log.append({"step": 4, "loss": float("nan"), "mfu": float("inf")})
    log.close()
    assert run.read_metrics()[3:] == [{"step": 4, "loss": None, "mfu": None}]


@pytest.mark.parametrize(
    "garbage", [b"\xff\xfe\n", b"[]\n", b"3\n", b'{"loss": 1}\n', b'{"step": 2}', b"\n", b'{"step": "1"}\n']
)
def test_metrics_drop_lines_that_are_no_records(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + garbage)
    assert read_lines(path) == [{"step": 1}]
    MetricsLog(path, 10).close()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_metrics_of_a_fresh_start(run: RunDir) -> None:
    assert run.read_metrics() == []
    run.metrics_path.write_bytes(b'{"step": 1}\n')
    run.metrics(0).close()
    assert run.read_metrics() == []


# --- the lock, held by other processes ---

HOLD = """
import subprocess, sys, time
from distattn.training.run_dir import RunDir
lock = RunDir(sys.argv[1]).lock()
if len(sys.argv) > 2:  # a child that inherits the lock and outlives us for a while
    child = subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[lock.fileno()])
print("held", flush=True)
time.sleep(60)
"""


def holder(run: RunDir, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(run.path), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_process_is_refused_and_told_which_is_the_first(run: RunDir) -> None:
    process = holder(run)
    try:
        began = time.monotonic()
        with pytest.raises(ConfigError, match=f"which process {process.pid} is using"):
            run.lock()
        assert time.monotonic() - began < 1, "a live holder is not waited for"
    finally:
        end(process)
    with run.lock() as lock:
        os.fstat(lock.fileno())
        with pytest.raises(ConfigError, match=f"which process {os.getpid()} is using"):
            RunDir(run.path).lock()
    run.lock().release()


def test_after_a_kill_the_lock_waits_for_the_ranks_that_still_die(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    process = holder(run, "1.5")
    os.kill(process.pid, signal.SIGKILL)
    end(process)
    monkeypatch.setattr(run_dir_module, "_DYING_S", 0.2)
    with pytest.raises(ConfigError, match=f"which process {process.pid} is using"):
        run.lock()
    monkeypatch.setattr(run_dir_module, "_DYING_S", 30.0)
    run.lock().release()


def test_a_file_system_without_locks_is_reported(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_dir_module.fcntl, "flock", unsupported)
    run.lock().release()
    assert "without locks" in caplog.text
