"""Jobs on this machine: real processes in the background, gloo on CPU with 2 ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from distattn.cli.main import main
from distattn.launchers.jobs import JobRegistry, read_progress
from distattn.launchers.request import JobRecord, JobRequest
from distattn.launchers.targets import find_target

PATIENCE_S = 240.0


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a config, and a registry of its own; whatever still runs at the end is killed."""
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} rings in the sea, " * 60)
    (tmp_path / "tiny.yaml").write_text(
        "train: {steps: 100000, global_batch: 2}\n"
        "data: {source: text, cache_dir: cache, seq_len: 128, eval_sequences: 2, held_out_fraction: 0.2}\n"
        "model: {dim: 24, num_layers: 1, num_heads: 4, num_kv_heads: 2, head_dim: 4, ffn_dim: 32}\n"
        "parallel: {context: 2, strategy: ring}\ncheckpoint: {interval: 5}\nlog: {interval_seconds: 0, plot: false}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RANK", "0")  # what another launcher may have left must not make the job join it
    yield tmp_path
    for record in JobRegistry():
        find_target("local").cancel(record, now=True)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a ``distattn`` command here, and gives what it printed."""

    def command(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["distattn", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        shown = "".join(capfd.readouterr())
        assert (caught.value.code or 0) == code, shown
        return shown

    return command


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE_S:.0f} s"
        time.sleep(0.1)


def state(job: str) -> str:
    record = JobRegistry().find(job)
    return find_target("local").state(record).state


def listening(pids: set[int]) -> list[str]:
    """Local addresses at which these processes listen, by ss."""
    shown = subprocess.run(["ss", "-H", "-l", "-n", "-t", "-u", "-p"], capture_output=True, text=True, check=True).stdout
    found = []
    for line in shown.splitlines():
        if pids & {int(pid) for pid in re.findall(r"pid=(\d+)", line)}:
            found.append(line.split()[4])
    return found


@pytest.mark.timeout(900)
def test_a_job_runs_on_its_own_and_is_cancelled_and_resumed(workplace: Path, run: Callable[..., str]) -> None:
    shown = run("submit", "tiny.yaml", "--on", "local", "--ranks-per-node", "2", "run.dir=runs/a b", "--name", "näme; x")
    assert "local-1 submitted" in shown
    record = JobRegistry().find("näme; x")
    run_dir = workplace / "runs" / "a b"
    wait(lambda: (read_progress(run_dir).checkpoint or 0) >= 5, "a checkpoint")

    # It survives the terminal: a session of its own, and the parent that started it is gone.
    job = psutil.Process(int(record.target_id))
    assert os.getsid(job.pid) == job.pid
    ranks = [process for process in job.children(recursive=True) if process.environ().get("LOCAL_RANK")]
    assert len(ranks) >= 2
    addresses = listening({job.pid, *(process.pid for process in job.children(recursive=True))})
    assert [address for address in addresses if not re.match(r"(127\.|\[::1\])", address)] == []

    (row,) = json.loads(run("jobs", "--json"))
    assert (row["state"], row["nodes"], row["ranks_per_node"]) == ("running", 1, 2)
    assert row["step"] >= 5
    table = run("jobs")
    assert "näme; x" in table
    assert "running" in table
    assert "run.dir=" in run("submit", "tiny.yaml", "run.dir=runs/a b", code=2)  # the config of the refused one is the same
    assert f"--rank is 2: {record.id} has the ranks 0 to 1" in run("logs", record.id, "--rank", "2", code=2)
    assert "step" in run("logs", "local-1")

    assert "asked to stop" in run("cancel", "local-1")
    wait(lambda: state("local-1") == "cancelled", "the end of a cancelled job")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks)
    saved = read_progress(run_dir).checkpoint
    assert saved is not None

    last = (read_progress(run_dir).step or 0) + 2
    # train.steps is of the curve and may not change; a copy of the run goes on from its checkpoint to an end that is near.
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("steps: 100000", f"steps: {last}"))
    run("submit", "tiny.yaml", "run.dir=runs/a b", f"train.steps={last}")
    followed = run("logs", "local-2", "-f")
    assert f"resuming after step {saved}" in followed
    assert "finished:" in followed
    assert state("local-2") == "finished"
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, last + 1))
    assert "is finished: all" in run("submit", "tiny.yaml", "run.dir=runs/a b", f"train.steps={last}", code=2)
    assert "forgot 2 jobs" in run("jobs", "--forget")
    assert "no jobs" in run("jobs")


def test_how_a_job_ended(workplace: Path) -> None:
    """Failed, killed, and gone without a word, with any command in the place of training."""
    target, registry = find_target("local"), JobRegistry()

    def submit(script: str) -> JobRecord:
        (workplace / "command").write_text(f"#!/bin/bash\n{script}\n")
        (workplace / "command").chmod(0o755)
        request = JobRequest(
            "a.yaml",
            run_dir=str(workplace / "r"),
            working_dir=str(workplace),
            python=str(workplace / "command"),
            env={"V": "$(x) y"},
        )
        (record,) = target.submit(request)
        registry.add(record)
        return record

    failed = submit('echo "$V"; exit 3')
    wait(lambda: not target.state(failed).active, "the end")
    assert target.state(failed).state == "failed"
    assert "exit status 3" in target.state(failed).reason
    assert Path(failed.log).read_text().splitlines() == ["$(x) y"]

    stopped = submit("trap 'exit 0' TERM; sleep 300 & wait")
    time.sleep(0.5)
    os.kill(int(stopped.target_id), signal.SIGTERM)
    wait(lambda: not target.state(stopped).active, "the end")
    assert target.state(stopped).state == "stopped"

    lost = submit("sleep 300")
    assert target.state(lost).state == "running"
    os.killpg(int(lost.target_id), signal.SIGKILL)
    wait(lambda: not target.state(lost).active, "the end")
    assert target.state(lost).state == "lost"

    killed = submit("sleep 300")
    assert target.cancel(killed, now=True) == f"{killed.id} was killed."
    wait(lambda: not target.state(killed).active, "the end")
    assert target.state(killed).state == "cancelled"
    assert target.cancel(killed) == f"{killed.id} is not running: it is cancelled."


def test_the_number_of_a_dead_process_is_not_the_job(workplace: Path) -> None:
    record = JobRecord("local-9", "local", str(os.getpid()), "a", str(workplace), 1, 1, "", 0.0, {"start_time": "1"})
    assert find_target("local").state(record).state == "lost"
