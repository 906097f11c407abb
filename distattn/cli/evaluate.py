"""``distattn eval RUN_DIR``: the held-out loss of a run's checkpoint, by position in the context.

your command ── reads RUN_DIR/config.yaml, checks ──▶ launch_local ──▶ the same command on each rank ──▶ RUN_DIR/eval.json

It only reads the run, which may be training meanwhile. Overrides evaluate otherwise than the run was trained: on other text
(``data.source``), longer sequences (``data.seq_len``, ``model.rope.*``), more ranks (``parallel.context``).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from distattn.config import Config, load_config
from distattn.data import bigram_loss, open_cache
from distattn.errors import CheckpointError, ConfigError
from distattn.launchers.environment import init_from_environment, joined_by_environment
from distattn.launchers.local import run_local
from distattn.training.atomic_file import replace_text
from distattn.training.checkpoint import CheckpointManager, Restored, published_steps
from distattn.training.evaluate import Evaluation, evaluate, held_out_sequences
from distattn.training.mesh import Mesh, build_mesh
from distattn.training.preflight import check_heads, check_kernel, check_vocabulary, choose_ranks
from distattn.training.run_dir import RunDir
from distattn.training.sharding import build_model

RESULT = "eval.json"


def eval_run(run_dir: Path, overrides: Sequence[str], step: int | None = None) -> int:
    """Evaluate the newest checkpoint of a run, or that of ``step``; the exit code.

    Prints a table and writes RUN_DIR/eval.json (see ``result_of``). Raises ConfigError for what cannot be evaluated (exit code
    2), before any process starts.
    """
    config = run_config(run_dir, overrides)
    if joined_by_environment():
        _evaluate_as_rank(config, overrides, step)
    _check_step(run_dir, step)
    ranks = choose_ranks(config)
    check_heads(config, ranks)
    check_kernel(config, ranks)
    check_vocabulary(config, open_cache(config.data, log=_say))
    chosen = [] if step is None else ["--step", str(step)]
    command = [sys.executable, "-m", "distattn.cli.main", "eval", *chosen, "--", str(run_dir), *overrides]
    return run_local(command, ranks.data * ranks.context, log_dir=RunDir(run_dir).logs / "eval").status


def run_config(run_dir: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run as it was trained, with overrides; ConfigError where there is no run."""
    run = RunDir(run_dir)
    if not run.config_path.exists():
        raise ConfigError(f"{run_dir} holds no run: there is no config.yaml; give the run.dir of a training.")
    for override in overrides:
        if override.partition("=")[0].strip() in ("run.dir", "model.init_from"):
            raise ConfigError(f"{override!r} is not possible here: the run is {run_dir}, and its weights are its checkpoint's.")
    # The run's own weights count, not those that it began with; two halves that take turns are for training.
    fixed = ["model.init_from=", "train.nano_batches=1", "train.engine=fsdp", "train.activation_checkpointing=none"]
    fixed.append(f"run.dir={run_dir}")
    return load_config(run.config_path, [*overrides, *fixed])


def result_of(evaluation: Evaluation, run_dir: Path, overrides: Sequence[str], seconds: float) -> dict[str, Any]:
    """What eval.json holds: the fields of ``Evaluation``, the run, the overrides, and how long it took."""
    return {"run": str(run_dir), "overrides": list(overrides), **dataclasses.asdict(evaluation), "seconds": seconds}


def table_of(evaluation: Evaluation) -> str:
    """Loss by position, a line a bin: positions from, to (not included), tokens, loss in nats."""
    lines = [f"{'position':>19}  {'tokens':>10}  {'loss':>8}"]
    edges = evaluation.position_edges
    rows = zip(edges, edges[1:], evaluation.position_tokens, evaluation.position_loss, strict=False)
    for first, end, tokens, loss in rows:
        shown = "" if loss is None else f"{loss:8.4f}"
        lines.append(f"{f'{first:,} to {end:,}':>19}  {tokens:10,}  {shown:>8}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def _check_step(run_dir: Path, step: int | None) -> None:
    steps = published_steps(RunDir(run_dir).checkpoints)
    if not steps:
        raise ConfigError(f"{run_dir} has no checkpoint yet: there is nothing to evaluate.")
    if step is not None and step not in steps:
        raise ConfigError(f"{run_dir} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}.")


def _evaluate_as_rank(config: Config, overrides: Sequence[str], step: int | None) -> NoReturn:
    ranks = choose_ranks(config, world=int(os.environ["WORLD_SIZE"]))
    rank, _ = init_from_environment(ranks.device_type, timeout_s=config.train.timeout_seconds)
    device = torch.device("cuda", torch.cuda.current_device()) if ranks.device_type == "cuda" else torch.device("cpu")
    mesh = build_mesh(ranks.data, ranks.context, rank, device)
    _evaluate(config, mesh, overrides, step)
    # A rank that leaves early closes connections on which others may still wait; and cached plans hold process groups, whose
    # threads can abort an interpreter that ends in the usual way.
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def _evaluate(config: Config, mesh: Mesh, overrides: Sequence[str], step: int | None) -> None:
    began, run = time.perf_counter(), RunDir(config.run.dir)
    model = build_model(config, mesh)
    weights = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    manager = CheckpointManager(run.checkpoints, rank=mesh.rank, world=mesh.world, read_only=True)
    restored = _loaded(lambda: manager.load(weights, step), run)
    cache = open_cache(config.data)
    sequences = held_out_sequences(config, cache)
    evaluation = evaluate(model, config, mesh, sequences, restored.step)
    if mesh.rank:
        return
    evaluation = dataclasses.replace(evaluation, bigram_loss=bigram_loss(cache, sequences, log=_say))
    seconds = time.perf_counter() - began
    result = result_of(evaluation, run.path, overrides, seconds)
    replace_text(run.path / RESULT, json.dumps(result, indent=1) + "\n")
    for reason in restored.skipped:
        _say(reason)
    _say(f"step {restored.step} of {run.path}: {evaluation.describe()}")
    _say(table_of(evaluation))
    _say(f"written to {run.path / RESULT}")


def _loaded(load: Callable[[], Restored | None], run: RunDir) -> Restored:
    restored = load()
    if restored is None:
        raise CheckpointError(f"{run.checkpoints} had a checkpoint when this began, and has none now: start again")
    return restored
