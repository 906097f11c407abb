"""A small run in a process of its own that tests interfere with."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from distattn.training.run_dir import RunDir

INJECT = Path(__file__).resolve().parent / "inject"
TIMEOUT_S = 280.0


def write_config(folder: Path, steps: int, interval: int) -> Path:
    """A config of two context ranks, and the text that it trains on."""
    (folder / "text").mkdir()
    for i in range(6):
        (folder / "text" / f"{i}.txt").write_text(f"{i} rings in the sea, " * 60)
    path = folder / "tiny.yaml"
    path.write_text(
        f"train: {{steps: {steps}, global_batch: 4}}\n"
        f"data: {{source: {folder}/text, cache_dir: {folder}/cache, seq_len: 128, eval_sequences: 2, held_out_fraction: 0.2}}\n"
        "model: {dim: 24, num_layers: 1, num_heads: 4, num_kv_heads: 2, head_dim: 4, ffn_dim: 32}\n"
        "optim: {lr: 1e-2}\n"
        "parallel: {context: 2, strategy: ring}\n"
        f"checkpoint: {{interval: {interval}}}\n"
        "log: {interval_seconds: 0, plot: false}\n"
    )
    return path


def wait_until(condition: Callable[[], object], what: str | Callable[[], str], timeout_s: float = TIMEOUT_S) -> None:
    """what: was waited for; a function is called when time is up."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what() if callable(what) else what}"
        time.sleep(0.01)


class FaultyRun:
    """``distattn train`` with injected faults."""

    def __init__(self, config: Path, run_dir: Path, *overrides: str, **variables: str) -> None:
        self.run_dir = RunDir(run_dir)
        self.output = config.parent / f"output-{time.monotonic_ns()}.txt"
        path = os.pathsep.join(filter(None, [str(INJECT), os.environ.get("PYTHONPATH", "")]))
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distattn.cli.main", "train", str(config), f"run.dir={run_dir}", *overrides],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables},
            )

    def steps(self) -> list[int]:
        return [line["step"] for line in self.run_dir.read_metrics()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.run_dir.read_metrics()]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, self.text()
            return bool(done := self.steps()) and done[-1] >= step

        wait_until(reached, self.text)

    def wait_for_text(self, text: str, timeout_s: float = TIMEOUT_S) -> None:
        def said() -> bool:
            assert self.process.poll() is None or text in self.text(), self.text()
            return text in self.text()

        wait_until(said, lambda: f"{text!r} in {self.text()}", timeout_s)

    def rank(self, number: int) -> psutil.Process:
        """A rank that has become its command."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"there is no rank {number}: {self.text()}")

    @contextlib.contextmanager
    def stopped_rank(self, number: int, *, with_lock: bool) -> Iterator[None]:
        """A rank is stopped, in the block as if it held the lock of the file in which the ranks meet, or without it."""
        rank = self.rank(number)
        with open(rank.environ()["DISTATTN_STORE"], "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            rank.send_signal(signal.SIGSTOP)
            if not with_lock:
                fcntl.flock(file, fcntl.LOCK_UN)
            yield

    def log(self, rank: int) -> str:
        return (self.run_dir.logs / f"rank-{rank}.log").read_text(errors="replace")

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
