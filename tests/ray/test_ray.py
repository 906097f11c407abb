"""Jobs on real Ray clusters of two nodes: the same losses, survival, cancellation, docs/ray.md. Ring 2: gloo, 2 ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distattn.errors import ConfigError
from distattn.launchers.ray_target import connect
from distattn.launchers.supervise import Journal
from distattn.training.run_dir import RunDir
from tests.faults.faulty_run import INJECT, wait_until, write_config
from tests.launchers import quickstart

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ray.md"
STEPS, INTERVAL = 30, 4
SECRET = "s3cret-" + secrets.token_hex(8)
COLOUR = "a b'c\"d;$(touch created)`touch created`\n\\ü 1e3 $HOME"
TIMEOUT_S = 280.0
LAST_WORD = re.compile(r"^\S+ \S+ (finished: all|stopped: it goes on|not restarted:)", re.MULTILINE)
INJECTED_PATH = os.pathsep.join([str(INJECT), os.environ.get("PYTHONPATH", "")])


class Shell:
    """A user's shell in a folder, with a config, a registry of jobs and the variables of a cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tools = Path(sys.executable).parent
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "XDG_STATE_HOME": str(folder / "state"),
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_TOKEN": SECRET,
        }

    def run(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "distattn.cli.main", *words],
            cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str) -> str:
        said = self.run("submit", "tiny.yaml", "--on", "ray", "--nodes", "2", "--ranks-per-node", "1", *words)
        found = re.search(r"^(ray-\d+) submitted", said, re.MULTILINE)
        assert found, said
        return found[1]

    def job(self, name: str) -> dict:
        return json.loads(self.run("jobs", name, "--json"))[0]

    def wait_for_end(self, name: str) -> dict:
        """``distattn jobs`` is asked when the driver has had its last word, and seldom before: it competes with the job."""
        deadline = time.monotonic() + TIMEOUT_S
        while (job := self.job(name))["state"] in ("pending", "running"):
            assert time.monotonic() < deadline, self.evidence(job)
            log, ask = Path(job["log"]), time.monotonic() + 20.0
            while time.monotonic() < ask and not (log.exists() and LAST_WORD.search(log.read_text(errors="replace"))):
                time.sleep(0.2)
            time.sleep(1.0)
        return job

    def evidence(self, job: dict) -> str:
        logs = [*Path(job["run_dir"], "logs").glob("*.log"), Path(job["run_dir"], "attempts.jsonl")]
        return "\n".join(
            [str(job), *(f"== {path}\n{path.read_text(errors='replace')[-4000:]}" for path in logs if path.is_file())]
        )


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("ray")
    write_config(folder, STEPS, INTERVAL)
    return Shell(folder)


class RayCluster:
    """Two nodes of a cluster on this machine, its token in a file."""

    def __init__(self, folder: Path) -> None:
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        variables = {
            "DISTATTN_TEST_PACE": "0.2",
            "PYTHONPATH": os.pathsep.join([str(INJECT), os.environ.get("PYTHONPATH", "")]),
        }
        with open(folder / "cluster.txt", "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("cluster_process.py"))],
                env={**base, **self.env, **variables, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.dashboard = ""

    def answer(self) -> dict:
        assert self.process.stdout
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise AssertionError("the cluster ended")

    def remove_node(self, raylet: psutil.Process) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"remove {raylet.pid}\n")
        self.process.stdin.flush()
        assert self.answer()["nodes"] == 2, "one, and that of attention servers"

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


@pytest.fixture(scope="module")
def cluster(shell: Shell) -> Iterator[RayCluster]:
    cluster = RayCluster(shell.folder)
    try:
        cluster.dashboard = cluster.answer()["dashboard"]
        shell.env |= cluster.env
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def local_losses(shell: Shell) -> list[float]:
    shell.run("train", "tiny.yaml", "run.dir=runs/local")
    return losses(shell.folder / "runs/local")


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in RunDir(run_dir).read_metrics()]


def ranks(run_dir: Path) -> dict[int, psutil.Process]:
    """The rank processes of a run, by number."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "distattn.cli.main" in words and "train" in words and f"run.dir={run_dir}" in words:
                found[int(process.environ()["RANK"])] = process
    return found


def raylet_of(rank: psutil.Process) -> psutil.Process:
    return next(parent for parent in rank.parents() if parent.name().startswith("raylet"))


def wait_for_step(shell: Shell, name: str, run_dir: Path, step: int) -> None:
    end = shell.folder / "state" / "distattn" / "jobs" / name / "end.json"

    def reached() -> bool:
        assert not end.exists(), end.read_text()
        done = RunDir(run_dir).read_metrics()
        return bool(done) and done[-1]["step"] >= step

    try:
        wait_until(reached, f"step {step}")
    except AssertionError:
        raise AssertionError(shell.evidence(shell.job(name))) from None


# --- a cluster that is there -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def survivor(shell: Shell, cluster: RayCluster) -> tuple[dict, dict[str, object]]:
    """A job in a folder with a hostile name, one of whose workers is killed, and whose second node is then removed."""
    run_dir = shell.folder / f"runs {COLOUR}".replace("/", "_")
    name = shell.submit("--ray-address", cluster.dashboard, "--env", f"COLOUR={COLOUR}", f"run.dir={run_dir}")
    wait_for_step(shell, name, run_dir, 6)
    before = ranks(run_dir)
    seen: dict[str, object] = {
        "colour": [process.environ()["COLOUR"] for process in before.values()],
        "raylets": {raylet_of(process).pid for process in before.values()},
    }
    before[1].parent().kill()  # pyright: ignore[reportOptionalMemberAccess]: the Ray worker that started the rank
    wait_until(lambda: len(Journal(run_dir).attempts()) == 2, "a restart")
    wait_for_step(shell, name, run_dir, 16)
    cluster.remove_node(raylet_of(ranks(run_dir)[1]))
    wait_until(lambda: len(Journal(run_dir).attempts()) == 3, "another restart")
    return shell.wait_for_end(name), seen


@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_removed_node(survivor: tuple[dict, dict], shell: Shell, local_losses: list[float]) -> None:
    job, seen = survivor
    assert job["state"] == "finished", shell.evidence(job)
    assert job["restarts"] == 2
    assert len(seen["raylets"]) == 2, "the ranks were on two nodes"
    assert losses(Path(job["run_dir"])) == local_losses
    assert [attempt.ranks for attempt in Journal(job["run_dir"]).attempts()] == [2, 2, 2], "the node that is left took both"


def test_values_arrive_and_execute_nothing(survivor: tuple[dict, dict], shell: Shell) -> None:
    job, seen = survivor
    assert seen["colour"] == [COLOUR, COLOUR]
    assert Path(job["run_dir"]).name == f"runs {COLOUR}"
    assert not list(shell.folder.rglob("created"))


def test_no_secret_is_written(survivor: tuple[dict, dict], shell: Shell, cluster: RayCluster) -> None:
    wanted = (SECRET.encode(), cluster.token.read_bytes())
    session = Path("/tmp/ray/session_latest/logs").resolve()
    folders = [shell.folder, session]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path != cluster.token and path.stat().st_size < 50_000_000:
                content = path.read_bytes()
                assert not any(word in content for word in wanted), f"a secret is in {path}"


@pytest.mark.timeout(900)
def test_attention_servers_on_a_node_of_their_own(shell: Shell, cluster: RayCluster) -> None:
    """The last rank only serves, in a bundle that none but the third node has; and is killed once."""
    keys = ["parallel.strategy=disaggregated", "parallel.servers=1", "train.steps=16"]
    run_dir = shell.folder / "runs/servers"
    name = shell.submit(
        "--ray-address", cluster.dashboard, "--server-resource", "attention_server=1", f"run.dir={run_dir}", *keys
    )
    wait_for_step(shell, name, run_dir, 6)
    running = ranks(run_dir)
    assert ["attention_server" in " ".join(raylet_of(running[rank]).cmdline()) for rank in (0, 1)] == [False, True]
    running[1].parent().kill()  # pyright: ignore[reportOptionalMemberAccess]: the actor that started the rank
    job = shell.wait_for_end(name)
    assert (job["state"], job["restarts"]) == ("finished", 1), shell.evidence(job)
    failure = Journal(run_dir).attempts()[0].failure
    assert failure is not None
    assert failure.kind == "lost"
    assert failure.message.startswith("a node of attention servers is gone")
    shell.run("train", "tiny.yaml", "run.dir=runs/local-servers", *keys)
    assert losses(run_dir) == losses(shell.folder / "runs/local-servers")


@pytest.mark.timeout(900)
def test_the_quickstart_gives_the_same_curve_as_on_this_machine(shell: Shell, cluster: RayCluster) -> None:
    folder = shell.folder / "quickstart"
    said = shell.run(
        "submit", *quickstart.arguments(folder, "ray"), "--on", "ray", "--nodes", "2", "--ranks-per-node", "1",
        "--ray-address", cluster.dashboard,
    )  # fmt: skip
    found = re.search(r"^(ray-\d+) submitted", said, re.MULTILINE)
    assert found, said
    shell.run("train", *quickstart.arguments(folder, "local"))
    job = shell.wait_for_end(found[1])
    assert job["state"] == "finished", shell.evidence(job)
    assert quickstart.curve(folder, "ray") == quickstart.curve(folder, "local")


def test_a_wrong_token_is_a_sentence(shell: Shell, cluster: RayCluster) -> None:
    wrong = shell.folder / "wrong"
    wrong.write_text("0" * 64)
    said = subprocess.run(
        [sys.executable, "-m", "distattn.cli.main", "submit", "tiny.yaml", "--on", "ray", "--ray-address", cluster.dashboard,
         "--ranks-per-node", "2", "run.dir=runs/refused"],
        cwd=shell.folder, env={**shell.env, "RAY_AUTH_TOKEN_PATH": str(wrong)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 2, said.stderr
    assert f"error: the Ray cluster at {cluster.dashboard} refuses us for want of its token" in said.stderr
    assert "Traceback" not in said.stderr


# --- docs/ray.md: a cluster for the job alone, then the one that is there --------------------------------------------


def commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


@pytest.mark.timeout(900)
def test_every_command_of_the_page(shell: Shell, cluster: RayCluster, tmp_path: Path, local_losses: list[float]) -> None:
    """As a new user types them: submitted, looked at, cancelled, resumed; then on a cluster with an address."""
    user = Shell(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("text", "cache"):
        (tmp_path / name).symlink_to(shell.folder / name)
    (tmp_path / "configs" / "quickstart.yaml").write_text((shell.folder / "tiny.yaml").read_text())
    # Slow until it is cancelled: the commands before that take their time.
    alone = {"DISTATTN_TEST_PACE": "4", "PYTHONPATH": INJECTED_PATH}
    said: dict[str, str] = {}
    stopped_after = 0
    for number, command in enumerate(commands()):
        if "--ray-address" in command:
            user.env |= cluster.env
            command = command.replace("http://127.0.0.1:8265", cluster.dashboard)
        if number == 3:  # the first that needs a rank to have said something
            wait_for_step(user, "ray-1", tmp_path / "runs/quickstart", 3)
            check_ports(tmp_path)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env={**user.env, **alone}, capture_output=True, text=True, timeout=TIMEOUT_S,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        said[f"{number} {command}"] = done.stdout
        if "distattn cancel" in command:
            job = user.wait_for_end("ray-1")
            assert job["state"] == "cancelled", user.evidence(job)
            alone["DISTATTN_TEST_PACE"] = "0"
            stopped_after = job["step"]
            assert job["checkpoint"] == stopped_after, "the checkpoint is of the step that it stopped after"
            assert stopped_after < STEPS
    assert user.wait_for_end("ray-2")["state"] == "finished"
    assert user.wait_for_end("ray-3")["state"] == "finished"
    assert losses(tmp_path / "runs/quickstart") == local_losses
    # Two clusters were there: what Ray itself starts must have looked for its own, and not waited for another.
    assert "Timed out while waiting for GCS" not in (tmp_path / "runs/quickstart/logs/ray-2.log").read_text()
    assert losses(tmp_path / "runs/cluster") == local_losses
    assert f"resuming after step {stopped_after}" in (tmp_path / "runs/quickstart/logs/rank-0.log").read_text()
    last_table = next(text for command, text in reversed(said.items()) if command.endswith("distattn jobs"))
    assert all(name in last_table for name in ("ray-1", "ray-2", "ray-3", "finished"))


def check_ports(folder: Path) -> None:
    """All that the keeper of a cluster started listens on the loopback interface only."""
    keeper = next(
        process for process in psutil.process_iter(["cmdline"])  # asked for so, since processes come and go meanwhile
        if "distattn.launchers.ray_local" in (line := process.info["cmdline"] or []) and str(folder) in " ".join(line)
    )  # fmt: skip
    listening = []
    for process in [keeper, *keeper.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            listening += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5, "Ray should listen somewhere, or this looks in the wrong place"
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}, listening


def test_a_cluster_that_asks_for_its_token(cluster: RayCluster) -> None:
    """Without a token there is no answer but a refusal."""
    code = f"from distattn.launchers.ray_target import connect; connect({cluster.dashboard!r})"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "refuses us for want of its token" in done.stderr
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        connect("http://127.0.0.1:1")
