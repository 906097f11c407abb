"""``distattn train`` as a user meets it: refusals, kills, resumption. Ring 2: real processes, gloo on CPU with 2 ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import distattn.cli.train
import distattn.training.preflight
from distattn.cli.main import main
from distattn.training.run_dir import RunDir

STEPS, INTERVAL = 16, 4
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and a configuration that trains on it with two ranks."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for i in range(6):
        (folder / "text" / f"{i}.txt").write_text(f"{i} rings in the sea, " * 60)
    (folder / "tiny.yaml").write_text(
        f"train: {{steps: {STEPS}, global_batch: 2}}\n"
        f"data: {{source: {folder}/text, cache_dir: {folder}/cache, seq_len: 128, eval_sequences: 2, held_out_fraction: 0.2}}\n"
        "model: {dim: 24, num_layers: 1, num_heads: 4, num_kv_heads: 2, head_dim: 4, ffn_dim: 32}\n"
        "optim: {lr: 1e-2}\n"
        "parallel: {context: 2, strategy: ring}\n"
        f"checkpoint: {{interval: {INTERVAL}}}\n"
        "log: {interval_seconds: 0}\n"
    )
    return folder


# --- refusals, in this process ---------------------------------------------------------------------------------------


@pytest.fixture
def refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command with overrides, expects exit code 2 before any process starts, returns the sentence."""

    def start_nothing(*args: object, **kwargs: object) -> int:
        raise AssertionError("a process would have been started")

    monkeypatch.setattr(distattn.cli.train, "run_local", start_nothing)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*overrides: str, config: Path = folder / "tiny.yaml") -> str:
        arguments = ["distattn", "train", str(config), f"run.dir={tmp_path}/run", *overrides]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        return shown

    return run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stesp=3"], r"unknown key train.stesp: did you mean train.steps\?"),
        (["train.steps=many"], r"train.steps='many' is not allowed: train.steps must be a whole number"),
        (["parallel.strategy=star"], r"parallel.strategy=star is unknown: choose one of auto, ring, double_ring"),
        (["kernel=flash"], r"kernel=flash is not possible here: .*"),
        (["data.source=/nowhere"], r"data.source='/nowhere' names no file"),
        (["data.source="], r"data.source is empty"),
        (["model.vocab_size=100"], r"model.vocab_size=100 is too small for data.tokenizer=bytes, which has 256 tokens"),
        (["train.global_batch=3", "parallel.data=2"], r"train.global_batch=3 does not divide over parallel.data=2"),
        (["run.dir=${oc.env:HOME}"], r"run.dir='\${oc.env:HOME}' is refused"),
        (["run.dir=/proc/no"], r"run.dir.*/proc/no"),
    ],
)
def test_a_bad_config_is_one_sentence(refused: Callable[..., str], overrides: list[str], message: str) -> None:
    assert re.search(message, refused(*overrides))


def test_a_gpu_that_is_not_there(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "train.device=cuda is not possible: torch sees no GPU here" in refused("train.device=cuda")


def test_no_space_left(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(distattn.training.preflight.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    message = refused()
    assert re.search(r"run.dir=\S+ has no space left for 4 checkpoints \(\d+ MB needed, 0 MB free\)", message)
    assert "checkpoint.keep=3" in message
    assert not (tmp_path / "run").exists()


def test_an_unwritable_file_is_not_a_traceback(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "run.dir" in refused(f"run.dir={tmp_path}/file/run")


def test_usage_errors_have_exit_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["distattn", "train"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "CONFIG" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["distattn", "trian"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2


# --- a run that is interrupted in every way --------------------------------------------------------------------------


class Command:
    """``distattn train`` in a process of its own."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.run_dir = RunDir(run_dir)
        self.output = run_dir.parent / f"{run_dir.name}-{time.monotonic_ns()}.txt"
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distattn.cli.main", "train", str(folder / "tiny.yaml"), f"run.dir={run_dir}"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def steps(self) -> list[int]:
        return [line["step"] for line in self.run_dir.read_metrics()]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not (done := self.steps()) or done[-1] < step or "step " not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)

    def ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for child in psutil.Process(self.process.pid).children():
            found[int(child.environ()["RANK"])] = child
        return found

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def resumed_after(self) -> int:
        match = re.search(r"resuming after step (\d+)", self.text())
        return int(match[1]) if match else 0


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[float]:
    command = Command(folder, folder / "whole")
    assert command.wait() == 0, command.text()
    assert command.steps() == list(range(1, STEPS + 1))
    return [line["loss"] for line in command.run_dir.read_metrics()]


def interrupt_rank(command: Command, rank: int) -> int:
    command.ranks()[rank].kill()
    assert command.wait() == 1
    assert f"rank {rank} was killed by SIGKILL" in command.text()
    return command.steps()[-1]


def interrupt_launcher(command: Command) -> int:
    ranks = list(command.ranks().values())
    command.process.kill()
    command.wait()
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() for rank in ranks), "ranks outlived their launcher"
    return command.steps()[-1]


def interrupt_politely(command: Command) -> int:
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 0, command.text()
    last = command.steps()[-1]
    assert f"stopped after step {last}, which is saved" in command.text()
    return last


INTERRUPTIONS: list[tuple[int, Callable[[Command], int]]] = [
    (INTERVAL, lambda command: interrupt_rank(command, 1)),  # while the first checkpoint is being written
    (7, interrupt_launcher),
    (11, interrupt_politely),
]


@pytest.fixture(scope="module")
def interrupted(folder: Path, uninterrupted: list[float]) -> Path:
    """The run directory of a run that was killed twice and stopped once, and then left to finish."""
    run_dir = folder / "killed"
    done = 0
    for step, interrupt in INTERRUPTIONS:
        command = Command(folder, run_dir)
        command.wait_for_step(step)
        last = interrupt(command)
        assert command.resumed_after() >= done - INTERVAL, "a kill costs at most an interval"
        done = last
    command = Command(folder, run_dir)
    assert command.wait() == 0, command.text()
    return run_dir


@pytest.mark.timeout(600)
def test_losses_after_kills_are_those_of_an_uninterrupted_run(interrupted: Path, uninterrupted: list[float]) -> None:
    lines = RunDir(interrupted).read_metrics()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == uninterrupted
    evaluations = [json.loads((interrupted.parent / name / "evaluations.json").read_text()) for name in ("killed", "whole")]
    assert evaluations[0] == evaluations[1]


def test_a_finished_run_says_so(
    folder: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distattn", "train", str(folder / "tiny.yaml"), f"run.dir={interrupted}"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    assert f"is finished: all {STEPS} steps are done" in capsys.readouterr().out


def test_another_config_or_text_or_process_is_refused(interrupted: Path, folder: Path, refused: Callable[..., str]) -> None:
    before = RunDir(interrupted).config_path.read_text()
    assert re.search(r"train.seed was 0 and is now 1", refused(f"run.dir={interrupted}", "train.seed=1"))
    assert re.search(r"optim.lr was 0.01 and is now 0.5", refused(f"run.dir={interrupted}", "optim.lr=0.5"))
    with RunDir(interrupted).lock():
        assert f"process {os.getpid()} is using" in refused(f"run.dir={interrupted}")
    extra = folder / "text" / "more.txt"
    extra.write_text("more")
    try:
        assert "holds another text than when the run in" in refused(f"run.dir={interrupted}")
    finally:
        extra.unlink()
    assert RunDir(interrupted).config_path.read_text() == before


def test_a_tokenizer_that_is_not_the_checkpoints(interrupted: Path, folder: Path, refused: Callable[..., str]) -> None:
    from tokenizers import Tokenizer, models

    letters = {chr(code): code for code in range(32, 127)}
    Tokenizer(models.BPE(letters, [])).save(str(folder / "tokenizer.json"))
    message = refused(f"run.dir={interrupted}", f"data.tokenizer={folder}/tokenizer.json")
    assert re.search(r"data.tokenizer=\S+ is not the tokenizer that the checkpoints in \S+ were trained with", message)
