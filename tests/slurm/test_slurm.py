"""On a real Slurm of two nodes here: what users write arrives, what they ask wrongly is refused, jobs end as they say.

Ranks here are mostly a script that writes down what it was given; training over two nodes is in test_guide.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distattn.cli.main import main
from distattn.errors import ConfigError
from distattn.launchers.jobs import JobRegistry
from distattn.launchers.request import ArrayAxis, JobRecord, JobRequest, JobState
from distattn.launchers.slurm import SlurmTarget
from tests.launchers import quickstart

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "a b'\"\\;$(touch pwned)`touch pwned`\n#SBATCH --nodes=9\n&& touch pwned #é☃%j*~$HOME"
PATIENCE_S = 120.0
PORT = "17917"

# In the place of Python: the verdict is the real one; a rank writes down its arguments and environment, and does as told.
RANK = """#!/bin/bash
if [ "$2" = distattn.launchers.slurm_verdict ]; then exec {python} "$@"; fi
printf '%s\\0' "$@" >"$LOGS/argv-$RANK"
env --null >"$LOGS/env-$RANK"
{action}
"""
FINISH = 'if [ "$RANK" = 0 ]; then echo "{\\"step\\": 1}" >"$LOGS/../finished.json"; fi'


@pytest.fixture(scope="module")
def cluster(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a shell that has evaluated what ``slurm/devcluster up`` prints."""
    folder = tmp_path_factory.mktemp("slurm")
    env = {**os.environ, "DEVCLUSTER_DIR": str(folder / "c"), "DEVCLUSTER_PORT": PORT}
    up = subprocess.run(
        [ROOT / "slurm" / "devcluster", "up"], env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert up.returncode == 0, up.stderr
    assert up.stdout.startswith("export SLURM_CONF=")
    try:
        yield {"SLURM_CONF": shlex.split(up.stdout.strip().partition("=")[2])[0], "folder": str(folder / "c")}
    finally:
        subprocess.run([ROOT / "slurm" / "devcluster", "down"], env=env, timeout=120, check=True)
        assert not (folder / "c").exists()


@pytest.fixture
def target(cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmTarget:
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return SlurmTarget()


def request(tmp_path: Path, action: str = FINISH, **changes: Any) -> JobRequest:
    command = tmp_path / "command"
    command.write_text(RANK.format(python=shlex.quote(sys.executable), action=action))
    command.chmod(0o755)
    base = JobRequest("a.yaml", on="slurm", nodes=2, run_dir=f"{tmp_path}/run", working_dir=str(tmp_path), python=str(command))
    return base.replace(**changes)


def wait(
    target: SlurmTarget, record: JobRecord, until: Callable[[JobState], bool] = lambda state: not state.active
) -> JobState:
    deadline = time.monotonic() + PATIENCE_S
    while not until(state := target.state(record)):
        log = Path(record.log).read_text() if Path(record.log).exists() else "(no log)"
        assert time.monotonic() < deadline, f"{record.id} is still {state}:\n{log}"
        time.sleep(0.2)
    return state


def test_values_arrive_and_execute_nothing(
    target: SlurmTarget, cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name, paths, config, overrides and variables, through sbatch and srun to ranks on both nodes; no secret follows."""
    secret = "not-for-anybody-else"
    monkeypatch.setenv("MY_SECRET", secret)
    monkeypatch.setenv("PASSED_ON", f"{HOSTILE} by name")
    # A slash would make it several folders.
    folder = HOSTILE.replace("/", "")
    (tmp_path / folder).mkdir()
    asked = request(
        tmp_path,
        config=HOSTILE,
        overrides=(f"data.text_key={HOSTILE}", "1e3", ""),
        run_dir=f"{tmp_path}/{folder}/run",
        working_dir=f"{tmp_path}/{folder}",
        name=HOSTILE,
        env={"VALUE": HOSTILE},
        forward=("PASSED_ON",),
    )
    (record,) = target.submit(asked)
    state = wait(target, record)
    assert state.state == "finished", Path(record.log).read_text()
    logs, nodes = Path(asked.run_dir, "logs"), set()
    for rank in ("0", "1"):
        given = (logs / f"argv-{rank}").read_text().split("\0")[:-1]
        assert given == ["-m", "distattn.cli.main", "train", "--", HOSTILE, *asked.overrides]
        env = dict(entry.split("=", 1) for entry in (logs / f"env-{rank}").read_text().split("\0")[:-1])
        assert (env["VALUE"], env["PASSED_ON"]) == (HOSTILE, f"{HOSTILE} by name")
        assert "MY_SECRET" not in env
        assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"]) == (rank, "2", "0")
        assert env["MASTER_PORT"] == str(20000 + int(record.target_id) % 10000)
        assert env["PWD"] == asked.working_dir
        nodes.add(env["SLURMD_NODENAME"])
    assert nodes == {"n1", "n2"}
    shown = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%j"], capture_output=True, text=True, check=True).stdout
    assert HOSTILE in shown
    assert [path for path in tmp_path.rglob("*") if path.name == "pwned"] == []
    for place in (tmp_path, Path(cluster["folder"])):
        holders = [path for path in place.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        assert holders == []


@pytest.mark.timeout(900)
def test_the_quickstart_gives_the_same_curve_as_on_this_machine(
    target: SlurmTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:  # jobs of another cluster of this machine have the same numbers, and so the same port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # Of the local run: as many threads as a rank on Slurm has.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for words in (
        ["submit", *quickstart.arguments(tmp_path, "slurm"), "--on", "slurm", "--nodes", "2", "--ranks-per-node", "1",
         "--env", "OMP_NUM_THREADS=1", "--port", port],
        ["train", *quickstart.arguments(tmp_path, "local")],
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "distattn.cli.main", *words], capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert wait(target, JobRegistry().find("quickstart")).state == "finished"
    assert quickstart.curve(tmp_path, "slurm") == quickstart.curve(tmp_path, "local")


def test_an_array_is_a_run_for_each_value(target: SlurmTarget, tmp_path: Path) -> None:
    asked = request(tmp_path, array=(ArrayAxis("kernel", ("1e3", "x y")),))
    records = target.submit(asked)
    assert [record.run_dir for record in records] == [f"{tmp_path}/run/kernel=1e3", f"{tmp_path}/run/kernel=x y"]
    for record, element in zip(records, asked.elements, strict=True):
        assert wait(target, record).state == "finished"
        given = Path(record.run_dir, "logs", "argv-1").read_text().split("\0")[:-1]
        assert given[-2:] == list(element.overrides)


def test_an_array_of_numbers_of_nodes(target: SlurmTarget, tmp_path: Path) -> None:
    axes = (ArrayAxis("nodes", ("1", "2")), ArrayAxis("parallel.context", ("2", "4")))
    asked = request(tmp_path, nodes=1, ranks_per_node=2, array=axes)
    records = [record for job in asked.jobs for record in target.submit(job)]
    assert [(record.nodes, Path(record.run_dir).name) for record in records] == [
        (1, "nodes=1,parallel.context=2"), (2, "nodes=2,parallel.context=4"),
    ]  # fmt: skip
    for record, ranks in zip(records, ("2", "4"), strict=True):
        assert wait(target, record).state == "finished"
        env = dict(entry.split("=", 1) for entry in Path(record.run_dir, "logs", "env-1").read_text().split("\0")[:-1])
        assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (ranks, "2")
        given = Path(record.run_dir, "logs", "argv-1").read_text().split("\0")[:-1]
        assert given[-2:] == [f"parallel.context={ranks}", f"run.dir={record.run_dir}"]


def test_a_killed_node_takes_everything_on_it_along(target: SlurmTarget, cluster: dict[str, str], tmp_path: Path) -> None:
    """As a power cut would: slurmd, its steps, their ranks; and nothing of the other node."""
    devcluster = {**os.environ, "DEVCLUSTER_DIR": cluster["folder"], "DEVCLUSTER_PORT": PORT}

    def on_node(node: str) -> list[str]:
        """Of the processes that are ranks there, or have its log open, as slurmd and slurmstepd have."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environment = process.environ()
                rank = (environment.get("SLURMD_NODENAME"), environment.get("SLURM_CONF")) == (node, cluster["SLURM_CONF"])
                if rank or f"{cluster['folder']}/{node}.log" in [file.path for file in process.open_files()]:
                    found.append(process.name())
        return found

    (record,) = target.submit(request(tmp_path, action='touch "$LOGS/up-$RANK"; sleep 600'))
    wait(target, record, lambda state: all(Path(record.run_dir, "logs", f"up-{rank}").exists() for rank in "01"))
    assert {"slurmd", "slurmstepd", "sleep"} <= set(on_node("n2"))
    subprocess.run([ROOT / "slurm" / "devcluster", "kill", "n2"], env=devcluster, timeout=120, check=True)
    assert on_node("n2") == []
    assert "slurmd" in on_node("n1")
    subprocess.run([ROOT / "slurm" / "devcluster", "up"], env=devcluster, timeout=180, check=True, capture_output=True)
    target.cancel(record, now=True)
    assert wait(target, record).state == "cancelled"


def test_failures_are_restarted_and_then_given_up(target: SlurmTarget, tmp_path: Path) -> None:
    # One rank fails and the other waits: of two that fail, the first may be another one each time.
    (record,) = target.submit(request(tmp_path, action='[ "$RANK" = 1 ] || exit 7; sleep 600'))
    state = wait(target, record)
    assert (state.state, "failed the same way twice" in state.reason) == ("failed", True)
    log = Path(record.log).read_text()
    assert "restart 1 of 3" in log
    assert (Path(record.run_dir) / "logs" / f"slurm-{record.target_id}.starts").read_text() == ".."


def test_a_cancelled_job_stops_well_or_at_once(target: SlurmTarget, tmp_path: Path) -> None:
    obedient = 'trap \'echo saved >>"$LOGS/saved"; exit 0\' TERM; touch "$LOGS/up-$RANK"; sleep 600 & wait'
    (record,) = target.submit(request(tmp_path, action=obedient))
    logs = Path(record.run_dir, "logs")
    wait(target, record, lambda state: (logs / "up-0").exists() and (logs / "up-1").exists())
    assert "asked to stop: its ranks write a checkpoint first" in target.cancel(record)
    assert wait(target, record).state == "cancelled"
    assert (logs / "saved").read_text() == "saved\nsaved\n"
    assert target.cancel(record) == f"{record.id} is not running: it is cancelled."

    both = [target.submit(request(tmp_path, action="trap '' TERM; sleep 600", run_dir=f"{tmp_path}/{n}"))[0] for n in "ab"]
    wait(target, both[0], lambda state: state.state == "running")
    for record in both:
        assert target.cancel(record, now=True) == f"{record.id} was cancelled."
    assert [wait(target, record).state for record in both] == ["cancelled", "cancelled"]


def test_near_the_time_limit_the_ranks_are_told_and_the_job_is_requeued(target: SlurmTarget, tmp_path: Path) -> None:
    """Slurm's USR1 to the batch script, sent by hand: the limit itself would take minutes."""
    action = (
        'if [ -e "$LOGS/saved" ]; then ' + FINISH + "; exit; fi; trap 'touch \"$LOGS/saved\"; exit 0' TERM; "
        'touch "$LOGS/up-$RANK"; sleep 600 & wait'
    )
    (record,) = target.submit(request(tmp_path, action=action))
    logs = Path(record.run_dir, "logs")
    wait(target, record, lambda state: (logs / "up-0").exists() and (logs / "up-1").exists())
    subprocess.run(["scancel", "--batch", "--signal=USR1", record.target_id], check=True)
    wait(target, record, lambda state: state.state == "pending")
    assert wait(target, record).state == "finished"
    assert "the time limit is near: requeued" in Path(record.log).read_text()
    assert target.state(record).restarts == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": "gpu"}, "--partition gpu is unknown to this Slurm: choose one of debug."),
        ({"nodes": 3}, "--nodes is 3, and the partition debug has 2: ask for fewer."),
        ({"gpus_per_node": 8}, "--gpus-per-node is 8, and the nodes of partition debug have 0 GPUs: ask for fewer"),
        (
            {"ranks_per_node": 5},
            "--ranks-per-node 5 × --cpus-per-rank 1 needs more than the 4 CPUs of a node in",
        ),
    ],
)
def test_what_the_cluster_cannot_give(target: SlurmTarget, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        target.check(request(tmp_path, **changes))


def test_no_slurm_and_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path)
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nNodeName=n1\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr("distattn.launchers.slurm._ANSWER_S", 3.0)
    with pytest.raises(ConfigError, match=r"--on slurm is not possible: sinfo .* Is SLURM_CONF set, .*slurm/devcluster up"):
        SlurmTarget().check(asked)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no Slurm here \(no sbatch on the PATH\): .*slurm/devcluster up"):
        SlurmTarget().check(asked)


def test_submit_refuses_in_a_sentence(
    target: SlurmTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is submitted, with exit code 2: what the trainer, the target and the registry have against it."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("rings in the sea, " * 400)
    (tmp_path / "tiny.yaml").write_text(
        "data: {source: text, cache_dir: cache, seq_len: 128, held_out_fraction: 0.2, eval_sequences: 1}\n"
        "model: {num_heads: 4, num_kv_heads: 2}\nparallel: {context: 2, strategy: ring}\n"
    )
    JobRegistry().add(JobRecord("local-1", "local", str(os.getpid()), "a", f"{tmp_path}/used", 1, 1, "", 0.0, {}))
    monkeypatch.setattr("distattn.launchers.local_target.LocalTarget.state", lambda self, record: JobState("running", "", 0))
    slurm = ["--on", "slurm", "--nodes", "2"]
    for arguments, message in (
        ([*slurm, "train.stesp=3"], "unknown key train.stesp: did you mean train.steps?"),
        ([*slurm, "model.vocab_size=100"], "model.vocab_size=100 is too small for data.tokenizer=bytes"),
        ([*slurm, "data.source=/nowhere"], "data.source='/nowhere' names no file"),
        ([*slurm, "run.dir=${oc.env:HOME}"], "run.dir='${oc.env:HOME}' is refused"),
        ([*slurm, "data.text_key=${now:%Y}"], "data.text_key='${now:%Y}' is refused"),
        ([*slurm, "--ranks-per-node", "2", "parallel.context=3"], "parallel.context=3 does not divide the 4 ranks"),
        ([*slurm, "--ranks-per-node", "4", "--gpus-per-node", "2"], "a rank needs a GPU of its own"),
        ([*slurm, "train.device=cuda"], "train.device=cuda needs GPUs: ask for them with --gpus-per-node"),
        ([*slurm, "--partition", "gpu"], "--partition gpu is unknown to this Slurm: choose one of debug"),
        ([*slurm, "--array", "kernel=auto,flush"], "kernel=flush is unknown"),
        ([*slurm, "run.dir=used"], f"run.dir={tmp_path}/used is in use by job local-1"),
        (["--on", "local", "--nodes", "2"], "--nodes is 2, and --on local has one node"),
        (["--on", "local", "--ranks-per-node", "3"], "--ranks-per-node is 3: make them equal"),
        (["--on", "local", "--partition", "debug"], "--partition has no meaning with --on local"),
    ):
        monkeypatch.setattr(sys, "argv", ["distattn", "submit", "tiny.yaml", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        shown = capsys.readouterr().err
        assert (caught.value.code, shown.count("\n"), message in shown) == (2, 1, True), (arguments, shown)
    assert [record.id for record in JobRegistry()] == ["local-1"]
    assert subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout == ""


def test_the_cluster_listens_on_loopback_alone(target: SlurmTarget, cluster: dict[str, str]) -> None:
    shown = subprocess.run(["ss", "-H", "-l", "-n", "-t"], capture_output=True, text=True, check=True).stdout
    addresses = [line.split()[3] for line in shown.splitlines()]
    ours = [address for address in addresses if address.rpartition(":")[2] in ("17917", "17918", "17919")]
    assert sorted(ours) == ["127.0.0.1:17917", "127.0.0.1:17918", "127.0.0.1:17919"]


def test_a_job_that_slurm_forgot(target: SlurmTarget, tmp_path: Path) -> None:
    record = JobRecord("slurm-999999", "slurm", "999999", "a", str(tmp_path), 1, 1, "", 0.0, {})
    assert target.state(record).state == "lost"
    (tmp_path / "finished.json").write_text(json.dumps({"step": 3}))
    assert target.state(record).state == "finished"
