"""``distattn train``: check everything, then start one process per device here, or be one of those that exist.

your command ── checks, tokenises, takes the run's lock ──▶ launch_local ──▶ the same command on each rank, with RANK set
torchrun, srun ──▶ RANK is set already: rank 0 checks and takes the lock, the others wait for its word
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from distattn.config import MAY_CHANGE, Config, load_config
from distattn.data import open_cache
from distattn.errors import ConfigError, DistattnError
from distattn.launchers.environment import PREPARED_VARIABLE, init_from_environment, joined_by_environment
from distattn.launchers.local import run_local
from distattn.launchers.supervise import RESTART_VARIABLE, Failure, Journal, step_being_computed, supervise
from distattn.models.hf_weights import check_weights
from distattn.training.engine import check_engine
from distattn.training.mesh import Mesh, build_mesh
from distattn.training.preflight import (
    Ranks,
    check_heads,
    check_kernel,
    check_resumed_data,
    check_space,
    check_vocabulary,
    choose_ranks,
)
from distattn.training.run_dir import RunDir, RunLock
from distattn.training.trainer import StopRequest, Trainer, stop_on_signal


def train(path: Path, overrides: Sequence[str]) -> int:
    """Run or resume the training that a config describes; the exit code.

    0: finished now or before, or stopped by SIGTERM with a checkpoint; 1: a rank failed. Raises ConfigError for what cannot
    be run (exit code 2), before any process starts.
    """
    config = load_config(path, overrides)
    if joined_by_environment():
        return _train_as_rank(config)
    ranks = choose_ranks(config)
    with ExitStack() as stack:
        lock = _prepare(config, ranks, stack)
        if lock is None:
            return 0
        command = [sys.executable, "-m", "distattn.cli.main", "train", "--", str(path), *overrides]
        return _supervised(config, ranks, command, lock)


def _supervised(config: Config, ranks: Ranks, command: Sequence[str], lock: RunLock) -> int:
    """Start the ranks, and again after failures as ``run.max_restarts`` allows; the exit status."""
    run, world = RunDir(config.run.dir), ranks.data * ranks.context
    journal = Journal(run.path)

    def attempt(restart: int) -> int | None:
        journal.started(world, restart)
        ended = run_local(command, world, log_dir=run.logs, pass_fds=(lock.fileno(),))
        if ended.status and ended.stopped:
            return None
        if ended.status:
            step = step_being_computed(run.path)
            journal.failed(Failure(step, ended.kind, ended.message.splitlines()[0], ended.failed_rank))
        return ended.status

    def not_ready() -> str | None:
        if not run.config_path.exists():
            return f"run.dir={run.path} is not there, or out of reach"
        try:
            check_space(config, run)
        except ConfigError as error:
            return str(error)
        return None

    limits = config.run
    return supervise(
        attempt,
        journal,
        max_restarts=limits.max_restarts,
        backoff_s=limits.backoff_seconds,
        not_ready=not_ready,
        say=lambda text: print(f"distattn: {text}", file=sys.stderr, flush=True),
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _prepare(config: Config, ranks: Ranks, stack: ExitStack) -> RunLock | None:
    """Every check, then the run's directory, locked until the stack closes; None if the run in it is finished."""
    check_heads(config, ranks)
    check_kernel(config, ranks)
    check_engine(config)
    check_weights(config.model)
    run = RunDir(config.run.dir)
    cache = open_cache(config.data, log=_say)
    check_vocabulary(config, cache)
    check_space(config, run)
    run.create()
    lock = stack.enter_context(run.lock())
    check_resumed_data(config, cache, run)
    run.claim_config(config.replace("parallel.data", ranks.data).to_dict(), MAY_CHANGE)
    step = run.finished()
    if step is not None:
        _say(f"the run in {run.path} is finished: all {step} steps are done; set another run.dir to train anew")
        return None
    return lock


def _train_as_rank(config: Config) -> int:
    ranks = choose_ranks(config, world=int(os.environ["WORLD_SIZE"]))
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        rank, _ = init_from_environment(ranks.device_type, timeout_s=config.train.timeout_seconds)
        # Our launcher's parent process has prepared the run; under another launcher nobody has.
        if PREPARED_VARIABLE in os.environ or _prepared_by_rank_0(config, ranks, rank, stack):
            device = torch.device("cuda", torch.cuda.current_device()) if ranks.device_type == "cuda" else torch.device("cpu")
            mesh = build_mesh(ranks.data, ranks.context, rank, device)
            _train_and_note_failures(config, mesh, stop)
    dist.destroy_process_group()
    return 0


def _train_and_note_failures(config: Config, mesh: Mesh, stop: StopRequest) -> None:
    run = RunDir(config.run.dir)
    trainer = None
    try:
        trainer = Trainer(config, run, mesh, open_cache(config.data), stop)
        trainer.run()
    except Exception as error:
        step = step_being_computed(run.path) if trainer is None else trainer.step + 1
        Journal(run.path).failed(Failure(step, type(error).__name__, str(error), mesh.rank))
        raise


def _prepared_by_rank_0(config: Config, ranks: Ranks, rank: int, stack: ExitStack) -> bool:
    """Whether there is something to train; what rank 0 finds wrong is raised on every rank. Collective."""
    verdict, error = "", None
    if rank == 0:
        try:
            verdict = "train" if _prepare(config, ranks, stack) is not None else "finished"
            restart = os.environ.get(RESTART_VARIABLE, "")
            if verdict == "train" and restart != "noted":
                Journal(config.run.dir).started(ranks.data * ranks.context, int(restart) if restart.isdecimal() else 0)
        except DistattnError as found:
            verdict, error = f"refused: {found}", found
    told = [verdict]
    dist.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[0].startswith("refused: "):
        raise ConfigError(told[0].removeprefix("refused: "))
    return told[0] == "train"
