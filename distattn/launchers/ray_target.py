"""Jobs on Ray: on a cluster that is there, or on one that is started on this machine for the job.

request ──▶ RayJob ──┬─ --ray-address ──▶ submit_job on that cluster
                     └─ without one ───▶ keeper process: a cluster of 127.0.0.1 for as long as the job runs
state ◀── the cluster, or the keeper's files │ cancel ──▶ a mark in the run's folder, which the nodes' launchers see
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distattn.errors import ConfigError, LaunchError
from distattn.launchers.detached import alive, birth
from distattn.launchers.jobs import JobRegistry, finished_step
from distattn.launchers.ray_spec import cancel_mark, jobs_address, orders, preview, ray_job, submit_patiently
from distattn.launchers.request import JobRecord, JobRequest, JobState
from distattn.launchers.supervise import num_restarts

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_STATES = {"PENDING": "pending", "RUNNING": "running", "STOPPED": "cancelled", "FAILED": "failed"}
_REASON_CHARS = 200
_INSTALL = 'Ray is not installed here: pip install "distattn[ray]"'


class RayTarget:
    """``--on ray``."""

    name = "ray"

    def why_not(self) -> str | None:
        try:
            import ray.dashboard.modules.job.sdk
            import ray.train  # noqa: F401
        except ImportError as error:
            return f"{_INSTALL} ({error})."
        return None

    def check(self, request: JobRequest) -> None:
        reason = self.why_not()
        if reason:
            raise ConfigError(f"--on ray is not possible: {reason}")
        for option, value in (
            ("--partition", request.partition),
            ("--account", request.account),
            ("--time", request.time),
            ("--exclude", request.exclude),
            ("--container", request.container),
            ("--template", request.template),
        ):
            if value:
                raise ConfigError(f"{option} has no meaning with --on ray: leave it out, or submit to Slurm.")
        if not request.ray_address:
            _check_gpus_here(request)
            return
        if request.forward:
            raise ConfigError(
                f"--env {request.forward[0]} cannot be passed on unwritten: Ray keeps the variables of a job in its logs. Set "
                "it on the cluster's nodes, before `ray start`."
            )
        connect(jobs_address(request.ray_address))

    def preview(self, request: JobRequest) -> str:
        return preview(request)

    def submit(self, request: JobRequest) -> list[JobRecord]:
        send = self._submit_to_cluster if request.ray_address else self._submit_here
        job = JobRegistry().new_id(self.name)
        cancel_mark(request.run_dir, job).unlink(missing_ok=True)
        log = Path(request.run_dir, "logs", f"{job}.log")
        # Other people's jobs on the same cluster count from 1 too.
        arguments = vars(ray_job(request, orders(request, job), f"distattn-{secrets.token_hex(6)}"))
        details = send(request, job, arguments, log)
        record = JobRecord(
            id=job,
            target=self.name,
            target_id=arguments["submission_id"],
            name=request.name,
            run_dir=request.run_dir,
            nodes=request.nodes,
            ranks_per_node=request.ranks_per_node,
            log=str(log),
            submitted_at=time.time(),
            details=details,
        )
        return [record]

    def state(self, record: JobRecord) -> JobState:
        ask = _state_on_cluster if "address" in record.details else _state_here
        state, reason = ask(record)
        restarts = num_restarts(record.run_dir)
        if state == "succeeded":
            state = "finished"
        if state in ("finished", "failed", "lost") and finished_step(record.run_dir) is not None:
            return JobState("finished", "", restarts)
        if state in ("finished", "failed") and cancel_mark(record.run_dir, record.id).exists():
            return JobState("cancelled", "", restarts)
        return JobState("stopped" if state == "finished" else state, reason, restarts)

    def cancel(self, record: JobRecord, *, now: bool = False) -> str:
        state = self.state(record)
        if not state.active:
            return f"{record.id} is not running: it is {state.state}."
        mark = cancel_mark(record.run_dir, record.id)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        if not now:
            return (
                f"{record.id} was asked to stop: its ranks write a checkpoint first. `distattn cancel {record.id} --now` does "
                "not wait for it."
            )
        if "address" in record.details:
            _asking(record.details["address"], lambda client: client.stop_job(record.target_id))
        else:
            _end_keeper(record)
        return f"{record.id} was cancelled."

    def _submit_to_cluster(self, request: JobRequest, job: str, arguments: dict[str, Any], log: Path) -> dict[str, str]:
        address = jobs_address(request.ray_address)
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            submit_patiently(connect(address).submit_job, arguments)
        except (RuntimeError, ValueError, OSError) as error:
            raise LaunchError(f"the Ray cluster at {address} did not take the job: {_first_line(error)}") from error
        return {"address": address}

    def _submit_here(self, request: JobRequest, job: str, arguments: dict[str, Any], log: Path) -> dict[str, str]:
        from distattn.launchers.ray_local import start_keeper

        wanted = Counter()
        for kind in orders(request, job).bundles(request.nodes):
            wanted.update(kind)
        own = {name: amount for name, amount in wanted.items() if name not in ("CPU", "GPU")}
        order = {**arguments, "num_cpus": max(math.ceil(wanted["CPU"]), os.cpu_count() or 1), "resources": own}
        pid = start_keeper(JobRegistry().work_folder(job), order, log, dict(os.environ))
        return {"keeper": str(pid), "born": birth(pid)}


def connect(address: str) -> JobSubmissionClient:
    """The cluster's job server; ConfigError in a sentence where there is none that answers us."""
    # A token that lies ready is meant to be used; Ray looks only when it is told to.
    token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if token or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"the Ray cluster at {address} refuses us for want of its token: put it into ~/.ray/auth_token, or name its file "
            f"in RAY_AUTH_TOKEN_PATH ({_first_line(error)})."
        ) from error
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: check --ray-address and that the cluster's dashboard can be reached from "
            f"here, or leave the option out to start a cluster on this machine ({_first_line(error)})."
        ) from error


def _asking(address: str, question: Callable[[JobSubmissionClient], Any]) -> Any:
    try:
        return question(connect(address))
    except ConfigError as error:
        raise LaunchError(str(error)) from error
    except (RuntimeError, OSError) as error:
        raise LaunchError(f"the Ray cluster at {address} did not answer: {_first_line(error)}") from error


def _state_on_cluster(record: JobRecord) -> tuple[str, str]:
    try:
        info = _asking(record.details["address"], lambda client: client.get_job_info(record.target_id))
    except LaunchError as error:
        if "404" not in str(error):
            raise
        return "lost", "the cluster does not know it: it was started anew"
    status = info.status.value
    reason = _brief(info.message or "")
    return ("finished", "") if status == "SUCCEEDED" else (_STATES.get(status, "failed"), reason if status == "FAILED" else "")


def _state_here(record: JobRecord) -> tuple[str, str]:
    folder = JobRegistry().work_folder(record.id)
    with contextlib.suppress(OSError, ValueError, KeyError):
        end = json.loads((folder / "end.json").read_text(encoding="utf-8"))
        return str(end["state"]), _brief(str(end["reason"]))
    if not alive(int(record.details["keeper"]), record.details["born"]):
        return "lost", f"the process that kept its cluster is gone; {record.log} may say why"
    return ("running" if (folder / "address").exists() else "pending"), ""


def _end_keeper(record: JobRecord) -> None:
    pid = int(record.details["keeper"])
    if alive(pid, record.details["born"]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _check_gpus_here(request: JobRequest) -> None:
    wanted, present = request.nodes * request.gpus_per_node, torch.cuda.device_count()
    if wanted > present:
        raise ConfigError(
            f"--nodes {request.nodes} × --gpus-per-node {request.gpus_per_node} needs {wanted} GPUs, and this machine has "
            f"{present}: lower them, or name a cluster with --ray-address."
        )


def _brief(message: str) -> str:
    """The beginning of what Ray says of a job's end, which may be all of its logs."""
    text = " ".join(message.split())
    return text if len(text) <= _REASON_CHARS else f"{text[:_REASON_CHARS]}…"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
