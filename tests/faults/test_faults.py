"""A run that goes through every fault there is, and ends with the losses of one that was left alone. Ring 2: gloo, 2 ranks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import distattn.cli.train
from distattn.launchers.local import Outcome
from distattn.launchers.supervise import Journal
from distattn.training.checkpoint_format import CheckpointReader
from tests.faults.faulty_run import FaultyRun, write_config

STEPS, INTERVAL = 60, 4
HANG_S = 8.0
DISK_MB = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return write_config(folder, STEPS, INTERVAL)


@pytest.fixture(scope="module")
def disk(folder: Path) -> Iterator[Path]:
    """A disk that is quickly full."""
    if os.geteuid() != 0:
        pytest.skip("root: mounts a small disk")
    path = folder / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "distattn-test", str(path)], check=True)
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def quiet(config: Path, folder: Path) -> list[float]:
    """Losses of the run that nobody disturbs."""
    run = FaultyRun(config, folder / "quiet")
    assert run.wait() == 0, run.text()
    return run.losses()


@pytest.fixture(scope="module")
def faulty(config: Path, disk: Path, folder: Path) -> Iterator[FaultyRun]:
    """The run that survives: a file system that vanishes, a full disk, a stall, a stopped process, one that is stopped with
    the lock of the file in which ranks meet, a kill."""
    run = FaultyRun(
        config,
        disk / "run",
        f"train.hang_seconds={HANG_S}",
        "run.max_restarts=6",
        "run.backoff_seconds=0.1",
        DISTATTN_TEST_PACE="0.2",
        DISTATTN_TEST_STALL=f"1:30:{folder}/stalled",
    )
    try:
        vanish(run, disk)
        fill(run, disk)
        run.wait_for_text("restart 2 of 6")  # after the stall in step 30
        for step, restart, with_lock in ((40, 3, False), (45, 4, True)):
            run.wait_for_step(step)
            with run.stopped_rank(1, with_lock=with_lock):
                stopped_at = time.monotonic()
                run.wait_for_text(f"restart {restart} of 6")
                # A silent rank is given ten seconds to answer; the rest is a busy machine's.
                assert time.monotonic() - stopped_at < 6 * HANG_S + 30, run.text()
        run.wait_for_step(51)
        run.rank(0).kill()
        run.wait()
        yield run
    finally:
        run.stop()


def vanish(run: FaultyRun, disk: Path) -> None:
    """The run's folder is gone for three seconds, a checkpoint's time among them."""
    run.wait_for_step(2)
    (disk / "run").rename(disk / "away")
    time.sleep(3.0)
    assert not (disk / "run").exists(), "nothing may be made in the place of what will come back"
    (disk / "away").rename(disk / "run")


def write_without_end(path: Path) -> None:
    with open(path, "wb", buffering=0) as stream:
        while True:
            stream.write(b"x" * 65536)


def fill(run: FaultyRun, disk: Path) -> None:
    """The disk is full until the launcher says that it waits."""
    run.wait_for_step(14)
    ballast = disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        write_without_end(ballast)
    run.wait_for_text("waiting before the restart: run.dir=")
    good = sorted((disk / "run" / "checkpoints").glob("step-*[0-9]"))
    assert good, "the checkpoints before are kept"
    for path in good:
        CheckpointReader(path).verify()
    ballast.unlink()


@pytest.mark.timeout(900)
def test_it_ends_with_the_losses_of_a_quiet_run(faulty: FaultyRun, quiet: list[float]) -> None:
    assert faulty.wait() == 0, faulty.text()
    assert faulty.steps() == list(range(1, STEPS + 1))
    assert faulty.losses() == quiet


def test_each_failure_is_recorded_with_its_kind(faulty: FaultyRun) -> None:
    attempts = Journal(faulty.run_dir.path).attempts()
    assert [attempt.restart for attempt in attempts] == [0, 1, 2, 3, 4, 5]
    kinds = [attempt.failure.kind if attempt.failure else "" for attempt in attempts]
    assert kinds[1:] == ["hang", "hang", "hang", "SIGKILL", ""]  # of the first nothing can be written on a full disk, or just


def test_a_vanished_folder_costs_no_restart(faulty: FaultyRun) -> None:
    first = faulty.text().partition("restart 1 of 6")[0]
    assert "cannot be written" in first + faulty.log(0) + faulty.log(1)
    assert "step 14/" in first


def test_a_full_disk_is_named(faulty: FaultyRun) -> None:
    assert re.search(r"(no space is left on the disk of|No space left on device)", faulty.text(), re.IGNORECASE)
    assert re.search(r"waiting before the restart: run.dir=\S+ has no space left for \d checkpoints", faulty.text())


def test_a_stall_is_reported_with_all_stacks_and_the_waiting_transfer(faulty: FaultyRun) -> None:
    waiting, stalled = faulty.log(0), faulty.log(1)
    assert "in stall_for_good" in stalled, "the stack of the rank that stalls"
    assert re.search(r"rank 1: made no progress for \S+ s at step 30, forward of sequence 1 of 4. Its stacks:", stalled)
    assert "in _wait_on_host" in waiting, "the stack of the rank that waits"
    transfer = r"it waits at stage 1 of the ring forward for KV rows from rank 1 \(as rank 0 of the group of ranks 0, 1\)"
    assert re.search(r"rank 0: made no progress for \S+ s at step 30, forward of sequence 1 of 4; " + transfer, waiting)
    report = re.search(r"no progress for ([\d.]+) s: everyone waits for rank 1, in no transfer: step 30, forward", waiting)
    assert report, waiting
    assert HANG_S <= float(report[1]) < 3 * HANG_S


def test_a_stopped_process_is_named_and_read_from_outside(faulty: FaultyRun) -> None:
    waiting, stopped = faulty.log(0), faulty.log(1)
    assert "everyone waits for rank 1, which did not answer (stopped, dead, or out of reach)" in waiting
    outside = stopped.partition("rank 1 did not answer; its stacks, read from outside:")[2]
    assert re.search(r"Thread \d+", outside), stopped[-3000:]
    assert "distattn/cli/train.py" in outside


def test_a_stopped_process_that_holds_the_lock_of_the_store_does_not_silence_the_others(faulty: FaultyRun) -> None:
    """A rank that was stopped while it wrote to the store: what one run of CI in many met, and waited for in vain."""
    reports = re.findall(r"no progress for [\d.]+ s: (.*)", faulty.log(0))
    assert len(reports) == 3
    assert reports[2].startswith("the ranks' store, through which they tell each other, does not answer")
    assert faulty.log(1).count("rank 1 did not answer; its stacks, read from outside:") == 2


@pytest.mark.timeout(600)
def test_another_number_of_ranks_goes_on_with_the_same_losses(config: Path, folder: Path, quiet: list[float]) -> None:
    """4 ranks, then 1, then 2: what a step computes does not depend on who computes it, but for rounding."""
    run_dir = folder / "elastic"
    shapes = [("parallel.data=2", "parallel.context=2"), ("parallel.data=1", "parallel.context=1")]
    for shape, until in zip(shapes, (6, 14), strict=True):
        run = FaultyRun(config, run_dir, *shape, DISTATTN_TEST_PACE="0.05")
        run.wait_for_step(until)
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 0, run.text()
        assert "stopped after step" in run.text()
    run = FaultyRun(config, run_dir, "parallel.context=2")
    assert run.wait() == 0, run.text()
    assert "resuming after step" in run.text()
    assert run.steps() == list(range(1, STEPS + 1))
    assert run.losses() == pytest.approx(quiet, rel=2e-5)
    shutil.rmtree(run_dir)


def test_the_same_failure_twice_stops_the_command(
    config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``distattn train`` itself: a rank that is killed in the same step twice is not started a third time."""
    starts: list[int] = []

    def run_local(command: list[str], ranks: int, **options: object) -> Outcome:
        starts.append(ranks)
        return Outcome(1, 1, "SIGKILL", "rank 1 was killed by SIGKILL\n  the end of its log")

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distattn.cli.train, "run_local", run_local)
    limits = ["run.max_restarts=6", "run.backoff_seconds=0"]
    assert distattn.cli.train.train(config, [f"run.dir={folder}/stubborn", *limits]) == 1
    assert starts == [2, 2]
    said = capsys.readouterr().err
    assert "restart 1 of 6 in 0 s, after rank 1: SIGKILL at step 1 (rank 1 was killed by SIGKILL)" in said
    assert "not restarted: step 1 failed the same way twice, so it would again" in said
    assert distattn.cli.train.train(config, [f"run.dir={folder}/stubborn"]) == 1, "by default there are no restarts"
    assert starts == [2, 2, 2]
