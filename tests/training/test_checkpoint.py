"""Checkpoints in one process: the format, damage, full disks, kills. (Several ranks: test_checkpoint_ranks.py.)"""

import errno
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from distattn.bounded_store import BoundedStore
from distattn.errors import CheckpointError
from distattn.training import checkpoint as checkpoint_module
from distattn.training.checkpoint import CheckpointManager, CheckpointReader, published_steps
from distattn.training.checkpoint_format import FileRecord, record_of, write_manifest
from tests.faults.frozen_store import locked


def example(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(7, 5, generator=generator),
        "half": torch.randn(4, 3, generator=generator).bfloat16(),
        "step": torch.tensor(float(seed)),
        "order": torch.randint(0, 100, (6,), generator=generator),
        "nothing": torch.zeros(0, 3),
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(directory: Path, steps: tuple[int, ...] = (10, 20), keep: int = 3) -> None:
    manager = CheckpointManager(directory, keep=keep)
    for step in steps:
        manager.save(step, example(step), {"tokens": step * 1000})
    manager.close()


def test_round_trip_is_bitwise_and_keeps_meta(tmp_path: Path) -> None:
    directory = tmp_path / "a run – mit Leerzeichen" / "checkpoints"
    meta = {"tokens": 3, "name": "Größe", "nested": {"lr": 0.1 + 0.2, "list": [1, None, True]}}
    manager = CheckpointManager(directory)
    assert manager.load(example()) is None
    manager.save(5, example(5), meta)
    manager.close()
    target = blank(example())
    restored = CheckpointManager(directory).load(target)
    assert restored is not None
    assert (restored.step, restored.meta, restored.skipped) == (5, meta, ())
    assert same(target, example(5))


def test_tensors_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    tensors = {"w": torch.ones(1 << 18)}
    for step in (1, 2):
        manager.save(step, tensors, {})
        tensors["w"].add_(1)
    manager.close()
    target = {"w": torch.zeros(1 << 18)}
    for step in (1, 2):
        CheckpointManager(tmp_path).load(target, step=step)
        assert (target["w"] == step).all()


def test_load_accepts_parameters_subsets_and_strides(tmp_path: Path) -> None:
    saved(tmp_path)
    parameter = torch.nn.Parameter(torch.zeros(5, 7).t())
    CheckpointManager(tmp_path, read_only=True).load({"weight": parameter})
    assert torch.equal(parameter.detach(), example(20)["weight"])


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, (1, 2, 3, 10), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-3"]
    assert published_steps(tmp_path) == [3, 10]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))
    manager = CheckpointManager(tmp_path)
    manager.save(20, example(99), {"again": True})
    manager.close()
    restored = CheckpointManager(tmp_path).load(target := blank(example()))
    assert restored is not None
    assert restored.meta == {"again": True}
    assert same(target, example(99))


def test_leftovers_of_killed_runs_are_removed_but_not_by_readers(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    for name in ("step-30.tmp", "step-10.replaced", "step-5.removed", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    saved(tmp_path / "other", (7,))
    (tmp_path / "other" / "step-7").rename(tmp_path / "step-7.replaced")  # killed between the two renames
    CheckpointManager(tmp_path, read_only=True)
    assert (tmp_path / "step-30.tmp").exists()
    CheckpointManager(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "other", "step-10", "step-7"]


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


DAMAGE: dict[str, Any] = {
    "bit flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "not text": lambda path: path.write_bytes(b"\xff\xfe" * (path.stat().st_size // 2)),
    "nested without end": lambda path: path.write_bytes(b"[" * 100_000),
    "other json": lambda path: path.write_text('{"body": [], "blake2b": 3, "tensors": []}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ("manifest.json", "shard-00000-of-00001.json", "shard-00000-of-00001.safetensors")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    saved(tmp_path)
    assert files_of(tmp_path / "step-20") == list(FILES)
    DAMAGE[damage](tmp_path / "step-20" / file)
    target = blank(example())
    with caplog.at_level(logging.WARNING):
        restored = CheckpointManager(tmp_path).load(target)
    assert restored is not None
    assert restored.step == 10
    assert restored.meta == {"tokens": 10_000}
    assert same(target, example(10))
    assert len(restored.skipped) == 1
    assert file in restored.skipped[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert file in caplog.text


def test_flipping_any_one_byte_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    path = tmp_path / "step-10" / "manifest.json"
    good = path.read_bytes()
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        try:
            reader = CheckpointReader(path.parent)
        except CheckpointError:
            continue
        # White space and the like may change; what is read may not.
        assert (reader.step, reader.meta) == (10, {"tokens": 10_000})
        assert json.loads(data) == json.loads(good)


def test_damaged_checkpoints_do_not_count_as_kept_and_go_with_the_next_save(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20, 30))
    flip(tmp_path / "step-30" / FILES[2])
    manager = CheckpointManager(tmp_path, keep=1)
    restored = manager.load(blank(example()))
    assert restored is not None
    assert restored.step == 20
    assert published_steps(tmp_path) == [10, 20, 30]
    manager.save(25, example(25), {})
    manager.close()
    assert published_steps(tmp_path) == [25]


def test_when_none_is_usable_the_error_names_all(tmp_path: Path) -> None:
    saved(tmp_path)
    flip(tmp_path / "step-20" / FILES[2])
    (tmp_path / "step-10" / FILES[0]).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be used: .*step-20.*digest.*step-10.*missing"):
        CheckpointManager(tmp_path).load(blank(example()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(7, 6)}, r"weight has shape \[7, 5\].* and shape \[7, 6\]"),
        ({"weight": torch.zeros(7, 5, dtype=torch.float64)}, "dtype float32 .* dtype float64 here"),
        ({"extra": torch.zeros(2)}, "has no tensor extra: it was written by another model"),
    ],
)
def test_another_model_is_refused_before_anything_is_overwritten(
    tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    saved(tmp_path)
    target = blank(example()) | change
    with pytest.raises(CheckpointError, match=message):
        CheckpointManager(tmp_path).load(target)
    assert (target["half"] == 77).all()


def test_a_step_can_be_named(tmp_path: Path) -> None:
    saved(tmp_path)
    manager = CheckpointManager(tmp_path)
    restored = manager.load(target := blank(example()), step=10)
    assert restored is not None
    assert restored.step == 10
    assert same(target, example(10))
    assert manager.latest() == 20
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 15; it has \[10, 20\]"):
        manager.load(target, step=15)
    flip(tmp_path / "step-20" / FILES[2])
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be used"):
        manager.load(target, step=20)


class Bomb:
    """Unpickled, it makes the file that it names."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_pickle_bomb_runs_nothing(tmp_path: Path, file: str, form: str) -> None:
    proof = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(proof)))
    assert proof.exists(), "the bomb must work where it is let off"
    proof.rmdir()
    saved(tmp_path / "c", (10,))
    path = tmp_path / "c" / "step-10" / file
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(proof)))
    else:
        torch.save({"weight": Bomb(proof)}, path)
    # Recorded as it is, so that its content is parsed and not only its digest compared.
    if file != FILES[0]:
        write_manifest(path.parent, 10, {}, {name: record_of(path.parent / name) for name in FILES[1:]})
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be used"):
        CheckpointManager(tmp_path / "c").load(blank(example()))
    assert not proof.exists()


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    write_manifest(tmp_path / "step-10", 10, {}, {"../../secret.json": FileRecord(0, "")})
    with pytest.raises(CheckpointError, match=r"secret.json', which is no file of a checkpoint"):
        CheckpointReader(tmp_path / "step-10")


def test_no_space_left_is_said_at_the_next_call_and_the_run_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, (10,))
    manager = CheckpointManager(tmp_path)
    real = checkpoint_module.write_shard

    def full(folder: Path, *arguments: Any) -> Any:
        real(folder, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_shard", full)
    manager.save(20, example(20), {})
    with pytest.raises(CheckpointError, match=r"step 20 was not written: rank 0: no space is left .*checkpoint.keep"):
        manager.save(30, example(30), {})
    monkeypatch.undo()
    assert files_of(tmp_path) == ["step-10"], "what was half-written takes no space"
    manager.save(30, example(30), {})
    manager.close()
    assert published_steps(tmp_path) == [10, 30]


def test_too_little_space_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path)
    real = checkpoint_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: real._replace(free=10))
    manager.save(20, example(20), {})
    with pytest.raises(CheckpointError, match="no space is left on the disk of"):
        manager.wait()
    manager.wait()  # once


def test_safetensors_words_for_a_full_disk_are_understood(tmp_path: Path) -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "no space is left" in checkpoint_module._reason(error, tmp_path, 5)
    assert "no space" not in checkpoint_module._reason(OSError(errno.EIO, "Input/output error"), tmp_path, 5)


def test_a_failed_rename_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, (10,))
    manager = CheckpointManager(tmp_path)

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint_module, "write_manifest", broken)
    manager.save(20, example(20), {})
    with pytest.raises(CheckpointError, match=r"rank 0: OSError.*Input/output error.*untouched"):
        manager.close()
    assert files_of(tmp_path) == ["step-10"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep is 0"):
        CheckpointManager(tmp_path, keep=0)
    with pytest.raises(CheckpointError, match="call init_process_group first"):
        CheckpointManager(tmp_path, rank=0, world=2)
    with pytest.raises(CheckpointError, match="meta of step 3 cannot be written as JSON"):
        CheckpointManager(tmp_path).save(3, {}, {"loss": float("nan")})
    with pytest.raises(CheckpointError, match="opened to read"):
        CheckpointManager(tmp_path, read_only=True).save(3, {}, {})


def test_a_store_that_does_not_answer_fails_the_save_and_keeps_the_ones_before(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints")
    manager.save(10, example(10), {})
    manager.wait()
    inner = dist.FileStore(str(tmp_path / "store"), 1)
    inner.set("before", "1")
    manager._ranks._store = BoundedStore(inner, limit_s=0.3)
    with locked(tmp_path / "store"):
        manager.save(20, example(20), {})
        with pytest.raises(CheckpointError, match=r"step 20 was not written: .*the ranks' store did not answer within 0\.3 s"):
            manager.close()
    assert published_steps(tmp_path / "checkpoints") == [10]


KILLED = """
import os, signal, sys, time
import torch
from distattn.training.checkpoint import CheckpointManager, published_steps

def state(step):
    return {"w": torch.full((100_000,), float(step)), "v": torch.full((3, 5), float(-step))}

def write_until_killed():
    manager = CheckpointManager(sys.argv[1], keep=2)
    step = manager.latest() or 0
    while True:
        step += 1
        manager.save(step, state(step), {"step": step})

last = 0
for trial in range(8):
    child = os.fork()
    if not child:
        try:
            write_until_killed()
        finally:
            os._exit(3)
    deadline = time.monotonic() + 60
    try:
        while max(published_steps(sys.argv[1]), default=0) <= last:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.0037 * trial)
    finally:
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    target = state(0)
    restored = CheckpointManager(sys.argv[1]).load(target)
    assert restored is not None and not restored.skipped, restored
    assert restored.step > last and restored.meta == {"step": restored.step}
    assert all(torch.equal(target[name], value) for name, value in state(restored.step).items())
    last = restored.step
print("steps", last)
"""


def test_kill_at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # a fork has none of its parent's threads, and OpenMP would wait for them
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("steps ")
