"""Jobs on a Slurm cluster, through Slurm's own commands.

request ──render──▶ script ──sbatch──▶ job ──▶ squeue: state │ scancel: end it │ the run's folder: everything else
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from distattn.errors import ConfigError, LaunchError
from distattn.launchers.jobs import JobRegistry, finished_step, write_atomically
from distattn.launchers.request import JobRecord, JobRequest, JobState
from distattn.launchers.slurm_script import FIRST_PORT, NUM_PORTS, render_script, sbatch_arguments
from distattn.launchers.slurm_verdict import cancel_mark, read_end
from distattn.launchers.supervise import num_restarts

_ANSWER_S = 60.0
_DEV_CLUSTER = 'a two-node cluster on this machine: eval "$(slurm/devcluster up)"'
_STATES = {
    "PENDING": "pending",
    "CONFIGURING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending",
    "SPECIAL_EXIT": "pending",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "SIGNALING": "running",
    "RESIZING": "running",
    "STAGE_OUT": "running",
    "COMPLETED": "stopped",
    "CANCELLED": "cancelled",
}
_JOB_NUMBER = re.compile(r"\d+(_\d+)?")


class SlurmTarget:
    """``--on slurm``."""

    name = "slurm"

    def why_not(self) -> str | None:
        if shutil.which("sbatch") is None:
            return (
                "there is no Slurm here (no sbatch on the PATH): log in to a node of your cluster, or install slurm-wlm and "
                f"munge and start {_DEV_CLUSTER}."
            )
        try:
            answer = _run(["sinfo", "--noheader", "--format=%R"])
        except LaunchError as error:
            return f"{error} Is SLURM_CONF set, and does slurmctld run? Without a cluster, start {_DEV_CLUSTER}."
        return None if answer.strip() else f"Slurm answers, but has no partition to run jobs in. Start {_DEV_CLUSTER}."

    def check(self, request: JobRequest) -> None:
        reason = self.why_not()
        if reason:
            raise ConfigError(f"--on slurm is not possible: {reason}")
        _refuse_what_is_rays(request)
        partitions = _partitions()
        for run in request.runs:
            _check_resources(run, partitions)
        render_script(request, _own_template(request))

    def preview(self, request: JobRequest) -> str:
        _refuse_what_is_rays(request)
        command = " ".join(shlex.quote(word) for word in sbatch_arguments(request))
        return f"{_ports(request)}\n{command} <<'SCRIPT'\n{render_script(request, _own_template(request))}SCRIPT\n"

    def submit(self, request: JobRequest) -> list[JobRecord]:
        script = render_script(request, _own_template(request))
        for element in request.elements:
            Path(element.run_dir, "logs").mkdir(parents=True, exist_ok=True)
        Path(request.run_dir, "logs").mkdir(parents=True, exist_ok=True)
        # On standard input: no script file lies around that could differ from what was submitted.
        number = _run(sbatch_arguments(request), stdin=script).strip().partition(";")[0]
        if not number.isdecimal():
            raise LaunchError(f"sbatch answered {number!r} where the number of the job was expected.")
        folder = JobRegistry().work_folder(f"slurm-{number}")
        write_atomically(folder / "script.sbatch", script)
        records = []
        for index, element in enumerate(request.elements):
            job = f"{number}_{index}" if request.array else number
            records.append(
                JobRecord(
                    id=f"slurm-{job}",
                    target=self.name,
                    target_id=job,
                    name=" ".join(filter(None, (request.name, element.label))),
                    run_dir=element.run_dir,
                    nodes=request.nodes,
                    ranks_per_node=request.ranks_per_node,
                    log=f"{element.run_dir}/logs/slurm.log",
                    submitted_at=time.time(),
                    details={"slurm_conf": os.environ.get("SLURM_CONF", "")},
                )
            )
        return records

    def state(self, record: JobRecord) -> JobState:
        restarts = num_restarts(record.run_dir)
        try:
            shown = _shown(record)
        except LaunchError:
            # A cluster that is gone takes nothing away from what the run's own folder says.
            if read_end(record.run_dir, record.target_id) is None and finished_step(record.run_dir) is None:
                raise
            shown = None
        if shown is not None:
            slurm_state, reason = shown
            state = _STATES.get(slurm_state, "failed")
            if state in ("pending", "running"):
                return JobState(state, "" if reason == "None" else reason, restarts)
        end = read_end(record.run_dir, record.target_id)
        if end is not None:
            return JobState(end[0], end[1], restarts)
        if finished_step(record.run_dir) is not None:
            return JobState("finished", "", restarts)
        if cancel_mark(record.run_dir, record.target_id).exists():
            return JobState("cancelled", "", restarts)
        if shown is None:
            return JobState("lost", "Slurm does not know it any more, and it left no word of its end", restarts)
        slurm_state, reason = shown
        return JobState(_STATES.get(slurm_state, "failed"), f"{slurm_state}: {reason}", restarts)

    def cancel(self, record: JobRecord, *, now: bool = False) -> str:
        state = self.state(record)
        if not state.active:
            return f"{record.id} is not running: it is {state.state}."
        mark = cancel_mark(record.run_dir, record.target_id)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        if now or state.state == "pending":
            _run(["scancel", record.target_id], conf=record.details.get("slurm_conf"))
            return f"{record.id} was cancelled."
        _run(["scancel", "--signal=TERM", record.target_id], conf=record.details.get("slurm_conf"))
        return (
            f"{record.id} was asked to stop: its ranks write a checkpoint first. `distattn cancel {record.id} --now` does not "
            "wait for it."
        )


def _refuse_what_is_rays(request: JobRequest) -> None:
    if request.server_resources:
        raise ConfigError("--server-resource has no meaning with --on slurm: leave it out, or submit to Ray.")


def _ports(request: JobRequest) -> str:
    port = str(request.port) if request.port else f"{FIRST_PORT} + job number mod {NUM_PORTS}"
    return "\n".join(
        (
            f"# Ports: ranks meet at TCP port {port} of the first node (MASTER_PORT); gloo and NCCL listen on ports that the",
            "# system chooses, on the nodes of the job. srun and slurmd use those of your Slurm.",
        )
    )


def _own_template(request: JobRequest) -> str | None:
    if not request.template:
        return None
    try:
        return Path(request.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--template {request.template} cannot be read: {reason}.") from error


# --- what Slurm says -----------------------------------------------------------------------------------------------


class _Partition:
    """A partition as sinfo describes it: name, whether it is the default, nodes, most GPUs and CPUs of a node."""

    def __init__(self, name: str, default: bool) -> None:
        self.name, self.default = name, default
        self.nodes = self.gpus = self.cpus = 0

    def add(self, nodes: int, cpus: int, gres: str) -> None:
        self.nodes += nodes
        self.cpus = max(self.cpus, cpus)
        # For instance gpu:h100:8(S:0-1),nvme:1; a type may be missing.
        counts = re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres)
        self.gpus = max(self.gpus, sum(map(int, counts)))


def _partitions() -> dict[str, _Partition]:
    found: dict[str, _Partition] = {}
    for line in _run(["sinfo", "--noheader", "--exact", "--format=%P|%D|%c|%G"]).splitlines():
        name, nodes, cpus, gres = line.split("|", 3)
        partition = found.setdefault(name.rstrip("*"), _Partition(name.rstrip("*"), name.endswith("*")))
        partition.add(int(nodes), int(cpus.rstrip("+")), gres)
    return found


def _check_resources(request: JobRequest, partitions: dict[str, _Partition]) -> None:
    known = ", ".join(partitions)
    if request.partition:
        chosen = [partitions[name] for name in request.partition.split(",") if name in partitions]
        unknown = [name for name in request.partition.split(",") if name not in partitions]
        if unknown:
            raise ConfigError(f"--partition {unknown[0]} is unknown to this Slurm: choose one of {known}.")
    else:
        chosen = [partition for partition in partitions.values() if partition.default]
        if not chosen:
            raise ConfigError(f"this Slurm has no default partition: choose one with --partition: {known}.")
    best = max(chosen, key=lambda partition: (partition.nodes, partition.gpus))
    if request.nodes > best.nodes:
        raise ConfigError(f"--nodes is {request.nodes}, and the partition {best.name} has {best.nodes}: ask for fewer.")
    gpus = max(partition.gpus for partition in chosen)
    if request.gpus_per_node > gpus:
        raise ConfigError(
            f"--gpus-per-node is {request.gpus_per_node}, and the nodes of partition {best.name} have {gpus} GPUs: ask for "
            f"fewer or for another partition of {known}."
        )
    cpus = max(partition.cpus for partition in chosen)
    if request.ranks_per_node * max(request.cpus_per_rank, 1) > cpus:
        raise ConfigError(
            f"--ranks-per-node {request.ranks_per_node} × --cpus-per-rank {max(request.cpus_per_rank, 1)} needs more than the "
            f"{cpus} CPUs of a node in partition {best.name}: lower one of them."
        )


def _shown(record: JobRecord) -> tuple[str, str] | None:
    """(state, reason) of a job as squeue has it; None if it knows no such job any more."""
    assert _JOB_NUMBER.fullmatch(record.target_id), record.target_id
    conf = record.details.get("slurm_conf")
    if conf and not Path(conf).exists():
        # squeue itself would look for it for a minute.
        raise LaunchError(f"the Slurm of {record.id} is gone: there is no {conf} any more.")
    command = ["squeue", "--noheader", "--states=all", f"--jobs={record.target_id}", "--format=%T|%r"]
    try:
        lines = _run(command, conf=record.details.get("slurm_conf")).splitlines()
    except LaunchError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    state, _, reason = lines[0].partition("|") if lines else ("", "", "")
    return (state, reason) if state else None


def _run(command: Sequence[str], *, stdin: str | None = None, conf: str | None = None) -> str:
    """What a command of Slurm prints; LaunchError with its own words if it fails or does not answer."""
    env = {**os.environ, "SLURM_CONF": conf} if conf else None
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=_ANSWER_S, env=env, check=False)
    except FileNotFoundError as error:
        raise LaunchError(f"{command[0]} is not on the PATH: there is no Slurm here, or its module is not loaded.") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{command[0]} did not answer within {_ANSWER_S:.0f} s.") from error
    if done.returncode:
        said = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip()) or f"exit status {done.returncode}"
        raise LaunchError(f"{command[0]} failed: {said}.")
    return done.stdout
