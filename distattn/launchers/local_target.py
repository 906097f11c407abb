"""Jobs on this machine, in the background: they outlive the terminal, and open no port beyond the loopback interface.

submit ──▶ background.py, in a session of its own ──▶ distattn train ──▶ ranks, restarted by it when they fail
             └ writes how it ended; its process id and start time say whether it still runs
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from distattn.errors import ConfigError
from distattn.launchers.detached import alive, birth, start_detached
from distattn.launchers.jobs import JobRegistry, finished_step
from distattn.launchers.request import JobRecord, JobRequest, JobState
from distattn.launchers.supervise import kind_of_status, num_restarts

_BACKGROUND = Path(__file__).with_name("background.py")
# Of another launcher's making: with these the command would join its ranks instead of starting some.
_NOT_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LocalTarget:
    """``--on local``."""

    name = "local"

    def why_not(self) -> str | None:
        return None

    def check(self, request: JobRequest) -> None:
        if request.nodes > 1:
            raise ConfigError(
                f"--nodes is {request.nodes}, and --on local has one node, this machine: raise --ranks-per-node, or submit to "
                "a cluster."
            )
        for option, value in (
            ("--partition", request.partition),
            ("--account", request.account),
            ("--time", request.time),
            ("--exclude", request.exclude),
            ("--gpus-per-node", request.gpus_per_node),
            ("--cpus-per-rank", request.cpus_per_rank),
            ("--container", request.container),
            ("--template", request.template),
            ("--port", request.port),
            ("--array", request.array),
            ("--server-resource", request.server_resources),
        ):
            if value:
                raise ConfigError(f"{option} has no meaning with --on local: leave it out, or submit to a cluster.")

    def preview(self, request: JobRequest) -> str:
        self.check(request)
        setting = [f"{name}={value}" for name, value in request.env.items()]
        words = [*(["env", *setting] if setting else []), *self._command(request)]
        return (
            "# Ports: none. Ranks meet in a file, and gloo listens on the loopback interface alone.\n"
            f"# In the background, in this shell's environment; output goes to {_log(request)}.\n"
            f"cd {shlex.quote(request.working_dir)}\n"
            f"{' '.join(shlex.quote(word) for word in words)}\n"
        )

    def submit(self, request: JobRequest) -> list[JobRecord]:
        registry = JobRegistry()
        job = registry.new_id(self.name)
        log = _log(request)
        log.parent.mkdir(parents=True, exist_ok=True)
        env = {name: value for name, value in os.environ.items() if name not in _NOT_OURS} | dict(request.env)
        end_file = registry.work_folder(job) / "end.json"
        with open(log, "ab") as output:
            command = [sys.executable, "-I", "-S", str(_BACKGROUND), str(end_file), *self._command(request)]
            pid = start_detached(command, cwd=request.working_dir, env=env, output=output)
        record = JobRecord(
            id=job,
            target=self.name,
            target_id=str(pid),
            name=request.name,
            run_dir=request.run_dir,
            nodes=1,
            ranks_per_node=request.ranks_per_node,
            log=str(log),
            submitted_at=time.time(),
            details={"start_time": birth(pid)},
        )
        return [record]

    def state(self, record: JobRecord) -> JobState:
        restarts = num_restarts(record.run_dir)
        if alive(int(record.target_id), record.details["start_time"]):
            return JobState("running", "", restarts)
        status = _exit_status(record)
        if status == 0 and finished_step(record.run_dir) is not None:
            return JobState("finished", "", restarts)
        if _cancel_mark(record).exists():
            return JobState("cancelled", "", restarts)
        if status is None:
            return JobState("lost", "its process is gone without a word: was the machine restarted?", restarts)
        if status == 0:
            return JobState("stopped", "asked to stop by a signal", restarts)
        reason = kind_of_status(status) if status < 0 else f"exit status {status}"
        return JobState("failed", f"{reason}: see `distattn logs {record.id}`", restarts)

    def cancel(self, record: JobRecord, *, now: bool = False) -> str:
        state = self.state(record)
        if not state.active:
            return f"{record.id} is not running: it is {state.state}."
        _cancel_mark(record).touch()
        with contextlib.suppress(ProcessLookupError):
            if now:
                # Its whole session; ranks, in sessions of their own, die with their launcher.
                os.killpg(int(record.target_id), signal.SIGKILL)
                return f"{record.id} was killed."
            os.kill(int(record.target_id), signal.SIGTERM)
        return (
            f"{record.id} was asked to stop: its ranks write a checkpoint first. `distattn cancel {record.id} --now` does not "
            "wait for it."
        )

    def _command(self, request: JobRequest) -> tuple[str, ...]:
        return (*request.command(), f"run.max_restarts={request.max_restarts}")


def _log(request: JobRequest) -> Path:
    return Path(request.run_dir, "logs", "job.log")


def _cancel_mark(record: JobRecord) -> Path:
    return JobRegistry().work_folder(record.id) / "cancelled"


def _exit_status(record: JobRecord) -> int | None:
    try:
        return int(json.loads((JobRegistry().work_folder(record.id) / "end.json").read_text(encoding="utf-8"))["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
