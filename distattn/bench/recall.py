"""Which kinds of layers find again what they have read, and how far back? ``distattn bench recall``.

    distattn bench recall --json recall.json --plot recall.png
    distattn bench recall --tasks associative --kinds softmax,linear,delta --seed 0,1,2 --json recall.json

Four tasks (associative recall, keys that change, a passkey, a grammar with gaps), a small decoder for each kind, all trained
from scratch. Everything is generated from seeds: nothing is downloaded. A cell is a model of one task, kind and seed; each is
trained in a process with one thread, some at a time. Cells that the JSON file has, of the same device and commit, are not run
again.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from distattn.bench.options import Commit, names, parts
from distattn.bench.recall_model import KINDS, WINDOW, Recipe, Trial
from distattn.bench.recall_report import draw, table
from distattn.bench.recall_tasks import TASKS
from distattn.bench.record import Record, environment
from distattn.errors import ConfigError, UnsupportedError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    json_path: Annotated[Path, typer.Option("--json", help="results; cells found there are not run again")],
    tasks: Annotated[str, typer.Option(help=f"of {', '.join(TASKS)}; comma-separated, default all")] = "",
    kinds: Annotated[str, typer.Option(help=f"of {', '.join(KINDS)}; comma-separated, default all")] = "",
    steps: Annotated[int, typer.Option(help="of training; a model that is right sooner stops sooner")] = Recipe.steps,
    seed: Annotated[str, typer.Option(help="of weights and batches; several, comma-separated, are averaged")] = "0",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    jobs: Annotated[int, typer.Option(help="models that train at the same time; 0: a CPU core each, or one on cuda")] = 0,
    time_limit: Annotated[float, typer.Option(help="seconds after which no further model begins")] = 1e9,
    plot: Annotated[Path | None, typer.Option(help="draw the results as a picture")] = None,
    commit: Commit = "",
) -> None:
    """Train small decoders on tasks of recall: accuracy by kind of layer and by distance."""
    chosen = names("tasks", tasks, tuple(TASKS)), names("kinds", kinds, tuple(KINDS)), whole_numbers("seed", seed)
    if steps < 1:
        raise ConfigError(f"--steps is {steps}, but it must be at least 1.")
    _check_device(device)
    recipe = Recipe(steps=steps)
    about = {
        "recipe": dataclasses.asdict(recipe),
        "tasks": {name: dataclasses.asdict(task) for name, task in TASKS.items()},
        "sliding_window": WINDOW,
    }
    place = environment(commit) | ({"device": "cpu", "num_devices": "0"} if device == "cpu" else {})
    record = Record(json_path, place, about)
    # Kinds innermost: a run that a time limit ends has compared all of them on some task.
    trials = [Trial(task, kind, number, recipe, device) for number in chosen[2] for task in chosen[0] for kind in chosen[1]]
    missing = [trial for trial in trials if trial.key not in record]
    for trial, entry in run_all(missing, jobs or _cores(device), time.monotonic() + time_limit):
        record.add(trial.key, entry)
    print(table(record.results))
    if plot is not None:
        draw(record.results, record.environment, plot)
    raise typer.Exit(1 if any("failed" in entry for entry in record.results.values()) else 0)


def run_all(trials: list[Trial], jobs: int, deadline: float) -> Iterator[tuple[Trial, dict[str, Any]]]:
    """(trial, its result) as they end, ``jobs`` at a time; none begins after the deadline (of ``time.monotonic``).

    A trial that raises has ``failed`` and why as its result; the others go on.
    """
    waiting, running = list(reversed(trials)), dict[Future[dict[str, Any]], Trial]()
    context = multiprocessing.get_context("spawn")  # a fork of a process whose torch has threads may hang
    with ProcessPoolExecutor(max(1, min(jobs, len(trials))), context, initializer=_begin_worker) as pool:
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < deadline:
                trial = waiting.pop()
                running[pool.submit(trial.run)] = trial
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                trial, error = running.pop(done), done.exception()
                yield trial, {"failed": f"{type(error).__name__}: {error}"} if error else done.result()


def whole_numbers(option: str, text: str) -> list[int]:
    """Zero and more; ConfigError for anything else, or for none."""
    if not parts(text) or not all(part.isdecimal() for part in parts(text)):
        raise ConfigError(f"--{option} is {text!r}; it takes whole numbers from 0 on, comma-separated")
    return [int(part) for part in parts(text)]


def _begin_worker() -> None:
    """One thread: products this small are slower on two. And no life beyond the command, should that be killed."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _cores(device: str) -> int:
    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device is {device!r}, but it must be cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("--device cuda needs a GPU that torch sees, and it sees none here: use --device cpu")
