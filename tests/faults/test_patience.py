"""Writes to a file system that comes and goes, or is full. Ring 1: no torch.distributed."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from distattn.errors import CheckpointError
from distattn.training import patience, run_dir
from distattn.training.checkpoint import CheckpointManager
from distattn.training.patience import error_number, patiently
from distattn.training.run_dir import MetricsLog, read_lines


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_LAST_PAUSE_S", 0.05)


def failing(times: int, code: int) -> tuple[list[int], object]:
    calls: list[int] = []

    def action() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return "written"

    return calls, action


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ENOENT, errno.ETIMEDOUT])
def test_what_passes_is_waited_for(code: int) -> None:
    calls, action = failing(3, code)
    assert patiently(action, "it", patience_s=30.0) == "written"  # type: ignore[arg-type]
    assert len(calls) == 4


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_does_not_pass_is_raised_at_once(code: int) -> None:
    calls, action = failing(3, code)
    with pytest.raises(OSError):
        patiently(action, "it", patience_s=30.0)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_patience_ends() -> None:
    calls, action = failing(10**6, errno.ESTALE)
    began = time.monotonic()
    with pytest.raises(OSError):
        patiently(action, "it", patience_s=0.3)  # type: ignore[arg-type]
    assert time.monotonic() - began < 5
    assert len(calls) > 2


def test_a_librarys_words() -> None:
    assert error_number(SafetensorError("Error while serializing: I/O error: No such file or directory (os error 2)")) == 2
    assert error_number(ValueError("(os error 28)")) == errno.ENOSPC
    assert error_number(ValueError("no number")) is None


def test_a_line_is_written_once_whatever_the_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is taken, then the handle is stale for a while."""
    log = MetricsLog(tmp_path / "metrics.jsonl", patience_s=30.0)
    real, answers = os.write, iter([3, errno.ESTALE, errno.EIO])

    def write(descriptor: int, data: bytes) -> int:
        answer = next(answers, None)
        if answer is None:
            return real(descriptor, data)
        if answer == 3:
            return real(descriptor, data[:3])
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(run_dir.os, "write", write)
    log.append({"step": 1, "loss": 0.5})
    log.append({"step": 2, "loss": 0.25})
    log.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_a_full_disk_names_the_file_and_loses_no_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, patience_s=30.0)
    log.append({"step": 1})
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if len(data) > 5:
            return real(descriptor, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(run_dir.os, "write", write)
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'") as caught:
            log.append({"step": 2})
    assert caught.value.errno == errno.ENOSPC
    log.close()
    resumed = MetricsLog(path, resume_step=1)
    resumed.append({"step": 2})
    resumed.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_checkpoint_waits_for_its_folder_to_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    manager = CheckpointManager(folder, patience_s=60.0)
    values = {"model.w": torch.arange(6.0)}
    manager.save(1, values, {})
    manager.wait()
    (tmp_path / "run").rename(tmp_path / "away")

    def come_back() -> None:
        time.sleep(0.5)
        assert not (tmp_path / "run").exists(), "nothing may be made in its place"
        (tmp_path / "away").rename(tmp_path / "run")

    back = threading.Thread(target=come_back)
    back.start()
    manager.save(2, values, {})
    manager.wait()
    back.join()
    manager.close()
    assert manager.latest() == 2
    restored = {"model.w": torch.zeros(6)}
    found = CheckpointManager(folder, read_only=True).load(restored)
    assert found is not None
    assert found.step == 2
    assert torch.equal(restored["model.w"], values["model.w"])


def test_a_checkpoint_does_not_wait_for_ever(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "run", patience_s=0.2)
    (tmp_path / "run").rename(tmp_path / "away")
    manager.save(1, {"model.w": torch.zeros(2)}, {})
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 was not written: rank 0: FileNotFoundError"):
        manager.wait()
    assert not (tmp_path / "run").exists()
