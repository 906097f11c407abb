"""docs/slurm.md as a new user follows it: every command, in order, in one shell, on a real Slurm of two nodes.

The guide's job is interrupted by TERM, requeued, and loses a node. Its losses must be, bitwise, those of an undisturbed run of
the same config under ``--on local``. The quickstart config is made small first: its shape stays, its size is that of a test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue

import pytest
import typer
import yaml

from distattn.cli.submit import app as submit_app
from distattn.launchers.jobs import read_progress

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "slurm.md"
STEPS = 400
COMMAND_S = 420.0
MARK = "--- ended with"


class Shell:
    """One bash, as a user has it open; each command's output and exit status."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            ["bash", "--norc"],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: Queue[str] = Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def run(self, command: str) -> str:
        """What the command prints; it must end with 0, in time."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command} </dev/null\necho '{MARK}' $?\n")
        self.process.stdin.flush()
        shown, deadline = "", time.monotonic() + COMMAND_S
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                raise AssertionError(f"{command} did not end within {COMMAND_S:.0f} s:\n{shown}") from None
            if MARK in line:
                shown += line[: line.index(MARK)]
                assert line.split()[-1] == "0", f"{command} failed:\n{shown}"
                return shown
            shown += line

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.reader.join(60)
        self.process.stdout.close()


def commands() -> list[str]:
    """All commands of the guide's sh blocks, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A checkout in small: the guide's configs with little data and short sequences, and slurm/."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "corpus").mkdir()
    for i in range(8):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"{i} rings in the sea, " * 300)
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    config["model"] |= {"dim": 24, "num_layers": 1, "head_dim": 4, "ffn_dim": 32, "sliding_window": 64}
    config["data"] |= {"source": "corpus", "cache_dir": "cache", "seq_len": 256, "held_out_fraction": 0.2, "eval_sequences": 2}
    config["train"] |= {"steps": STEPS, "global_batch": 4}
    config["checkpoint"] |= {"interval": 10}
    config["log"] = {"interval_seconds": 0, "plot": False}
    (tmp_path / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(ROOT / "configs" / "llama3-8b.yaml", tmp_path / "configs")
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    return tmp_path


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + COMMAND_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {COMMAND_S:.0f} s"
        time.sleep(0.05)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.mark.timeout(1800)
def test_the_guide_from_nothing_to_a_resumed_job(slurm: None, workplace: Path) -> None:
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(workplace),
        "XDG_STATE_HOME": str(workplace / "state"),
        "DEVCLUSTER_DIR": str(workplace / "dc"),
        "DEVCLUSTER_PORT": "17937",
        "OMP_NUM_THREADS": "1",  # of the local run below: as many as a rank on Slurm has
    }
    env.pop("SLURM_CONF", None)
    run_dir = workplace / "runs" / "quickstart"
    shell = Shell(workplace, env)

    def goes_on(interrupted: str) -> None:
        """Two checkpoints further than now, so that the next blow falls on a run that has come back from the last."""
        before = read_progress(run_dir).step or 0
        wait(lambda: (read_progress(run_dir).step or 0) >= before + 20, f"step {before + 20}, before {interrupted}")
        assert (read_progress(run_dir).step or 0) < STEPS, f"the run was over before {interrupted}"

    outputs = {}
    try:
        for command in commands():
            if command == "distattn jobs" and "distattn jobs" not in outputs:
                goes_on(command)
            if command.startswith(("scancel", "scontrol", "slurm/devcluster kill")):
                goes_on(command)
            outputs[command] = shell.run(command)
            if command.startswith("slurm/devcluster kill"):
                # Until Slurm has noticed, by itself, that the node is gone.
                wait(lambda: "down" in shell.run("sinfo --noheader --states=down --format=%T"), "the loss of the node")
        shell.run(
            f"distattn submit configs/quickstart.yaml --on local --ranks-per-node 2 --name plain run.dir={workplace}/plain"
        )
        shell.run("distattn logs plain -f")
    finally:
        subprocess.run([ROOT / "slurm" / "devcluster", "down"], env=env, timeout=120, check=False)
        shell.close()

    assert "n2: process" in outputs["slurm/devcluster status"]
    check = outputs["distattn doctor --cluster --on slurm --nodes 2 --ranks-per-node 1"]
    assert "all 2 devices compute, all 2 links work" in check
    log = (run_dir / "logs" / "slurm.log").read_text()
    assert "stopped with a checkpoint: requeued" in log
    assert "DUE TO JOB REQUEUE" in log
    assert log.count("ranks meet at") >= 4
    assert "finished:" in outputs["distattn logs quickstart --follow"]
    assert re.search(r"quickstart +finished +2×1 +400 .* [3-9] ", outputs["distattn jobs"])
    disturbed = losses(run_dir)
    assert [step for step, _ in disturbed] == list(range(1, STEPS + 1))
    assert disturbed == losses(workplace / "plain")
    assert not (workplace / "dc").exists()


def test_every_option_is_in_the_guide() -> None:
    table = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    described = {option for line in table for option in re.findall(r"`(--[\w-]+)`", line.split("|")[1])}
    assert described == {name for p in typer.main.get_command(submit_app).params for name in p.opts if name.startswith("--")}
