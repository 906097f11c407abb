"""A Ray cluster on this machine for the length of one job: ``python -m distattn.launchers.ray_local ORDER_FILE``.

    keeper: ray start ──▶ cluster (127.0.0.1 only, token required) ──▶ submits the job, waits, takes the cluster down

The keeper is a process of its own that outlives the shell. It leaves ``address`` while the job runs and ``end.json`` after it
beside ORDER_FILE. Its cluster dies with it, however it dies.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from distattn.errors import LaunchError
from distattn.launchers.detached import start_detached
from distattn.launchers.jobs import write_atomically
from distattn.launchers.ray_spec import submit_patiently

_LOOPBACK = "127.0.0.1"
_POLL_S = 1.0
_START_S, _END_S = 240.0, 30.0
TOKEN_FILE = "token"
ADDRESS_FILE = "address"
END_FILE = "end.json"


def cluster_environment(folder: Path, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a cluster whose token lies in ``folder``, over ``base`` without what points to another cluster."""
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN_FILE),
        # Ray's name for it: nodes then know each other by 127.0.0.1, and nothing listens anywhere else.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONSAFEPATH": "1",
    }
    dropped = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    return {name: value for name, value in base.items() if name not in dropped} | ours


def start_keeper(folder: Path, order: Mapping[str, Any], log: Path, env: Mapping[str, str]) -> int:
    """Start the keeper of one job in a session of its own; its process id. order: arguments of ``submit_job``, ``num_cpus``
    and ``resources``, amounts of other kinds; env: of the user's, for the ranks."""
    write_atomically(folder / TOKEN_FILE, secrets.token_hex(32))
    path = folder / "order.json"
    write_atomically(path, json.dumps(order))
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "distattn.launchers.ray_local", str(path)]
    with open(log, "ab") as stream:
        return start_detached(command, cwd=folder, env=cluster_environment(folder, env), output=stream)


def main(arguments: Sequence[str]) -> int:
    """Keep a cluster for the job in ORDER_FILE."""
    path = Path(arguments[0])
    order = json.loads(path.read_text(encoding="utf-8"))
    folder, has = path.parent, {"num_cpus": order.pop("num_cpus"), "resources": order.pop("resources")}

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, stop)
    state, reason = "failed", "the cluster could not be kept up; the log says why"
    # Short, since Ray makes sockets below it; and its own, so that other programs do not find this cluster and join it.
    session = Path(tempfile.mkdtemp(prefix="distattn-ray-", dir="/tmp"))
    cluster = None
    try:
        cluster, client, address = _start_and_submit(order, session, has)
        write_atomically(folder / ADDRESS_FILE, address)
        state, reason = _wait(client, order["submission_id"])
    except SystemExit:
        state, reason = "cancelled", "the cluster was told to end"
    finally:
        for name in (ADDRESS_FILE, TOKEN_FILE):
            (folder / name).unlink(missing_ok=True)
        write_atomically(folder / END_FILE, json.dumps({"state": state, "reason": reason}) + "\n")
        if cluster is not None:
            _end_cluster(cluster)
        if state == "succeeded":
            shutil.rmtree(session, ignore_errors=True)
        else:
            print(f"distattn: Ray's own logs are in {session}", flush=True)
    return 0 if state == "succeeded" else 1


def _start_cluster(address: str, session: Path, has: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Ray's head node, which dies with us. Its fixed ports are replaced by free ones: another Ray may run here."""
    port = address.rpartition(":")[2]
    with open(session / "start.log", "ab") as log:  # what Ray says to people who start clusters by hand is not for ours
        return subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(Path(__file__).with_name("rank_guard.py")), str(os.getpid())),
                *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
                *(f"--node-ip-address={_LOOPBACK}", "--port=0", f"--num-cpus={has['num_cpus']}", f"--temp-dir={session}"),
                f"--resources={json.dumps(has['resources'])}",
                *("--include-dashboard=true", f"--dashboard-host={_LOOPBACK}", f"--dashboard-port={port}"),
                *(f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _end_cluster(cluster: subprocess.Popen[bytes]) -> None:
    cluster.terminate()
    try:
        cluster.wait(_END_S)
    except subprocess.TimeoutExpired:
        cluster.kill()
        cluster.wait()


def _start_and_submit(
    order: dict[str, Any], session: Path, has: Mapping[str, Any]
) -> tuple[subprocess.Popen[bytes], JobSubmissionClient, str]:
    """Ray gives a node 30 seconds to start, which a busy machine may not have: so there are several tries."""
    for tries_left in (3, 2, 1, 0):
        address = f"http://{_LOOPBACK}:{_free_port()}"
        cluster = _start_cluster(address, session, has)
        try:
            client = _connect(address, cluster)
            submit_patiently(client.submit_job, order)
            return cluster, client, address
        except (LaunchError, RuntimeError, OSError):
            _end_cluster(cluster)
            if not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _wait(client: JobSubmissionClient, job: str) -> tuple[str, str]:
    """How the job ended: Ray's word for it, and its message."""
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(_POLL_S)
    print(client.get_job_logs(job), flush=True)
    info = client.get_job_info(job)
    return status.value.lower(), (info.message or "") if status != JobStatus.SUCCEEDED else ""


def _connect(address: str, cluster: subprocess.Popen[bytes]) -> JobSubmissionClient:
    """The cluster's job server, once it answers; LaunchError if the cluster ended or took too long."""
    deadline = time.monotonic() + _START_S
    while True:
        if cluster.poll() is not None:
            raise LaunchError(f"Ray ended with status {cluster.returncode} instead of starting a cluster")
        try:
            return JobSubmissionClient(address)
        except (ConnectionError, OSError, RuntimeError):
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    sys.exit(main(sys.argv[1:]))
