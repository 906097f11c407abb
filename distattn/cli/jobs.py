"""``distattn jobs``, ``logs`` and ``cancel``: the same for every target.

The registry says which jobs there are, their targets in what state they are, their runs' own folders how far they have come.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from distattn.errors import ConfigError, LaunchError
from distattn.launchers.jobs import JobRegistry, read_progress
from distattn.launchers.request import JobRecord, JobState
from distattn.launchers.targets import find_target

jobs_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
logs_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
cancel_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_STYLES = {"running": "green", "pending": "yellow", "finished": "bold green", "failed": "red", "lost": "red"}
_POLL_S = 0.5
_CHUNK = 1 << 16


@jobs_app.command()
def jobs(
    names: Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="these only; all by default")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print them as JSON")] = False,
    active: Annotated[bool, typer.Option("--active", help="only those that wait or run")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="remove those that have ended from the list; runs are kept")] = False,
) -> None:
    """The jobs submitted from here: state, ranks, step, loss, tokens/s, last checkpoint, restarts."""
    registry = JobRegistry()
    records = [registry.find(name) for name in names] if names else list(registry)
    rows = [(record, _state(record)) for record in records]
    if active:
        rows = [(record, state) for record, state in rows if state.active]
    if forget:
        ended = [record for record, state in rows if not state.active and state.state != "unknown"]
        for record in ended:
            registry.remove(record.id)
        print(f"forgot {len(ended)} jobs")
        return
    if as_json:
        print(json.dumps([_describe(record, state) for record, state in rows], indent=1))
        return
    _print_table(rows)


@logs_app.command()
def logs(
    job: Annotated[str, typer.Argument(metavar="JOB", help="as `distattn jobs` shows it")],
    rank: Annotated[int, typer.Option(help="whose output")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on printing until the job has ended")] = False,
    launcher: Annotated[bool, typer.Option("--launcher", help="what starts the ranks: starts, failures, restarts")] = False,
) -> None:
    """What a rank of a job printed."""
    record = JobRegistry().find(job)
    if not 0 <= rank < record.nodes * record.ranks_per_node:
        raise ConfigError(f"--rank is {rank}: {record.id} has the ranks 0 to {record.nodes * record.ranks_per_node - 1}.")
    path = Path(record.log) if launcher else Path(record.run_dir, "logs", f"rank-{rank}.log")
    if not follow and not path.exists():
        state = _state(record)
        hint = "" if launcher else f" `distattn logs {record.id} --launcher` may say why."
        raise ConfigError(f"there is no log {path} yet: {record.id} is {state.state}.{hint}")
    out = sys.stdout.buffer
    try:
        for chunk in _read(path, record) if follow else _read_once(path):
            out.write(chunk)
            out.flush()
    except (BrokenPipeError, KeyboardInterrupt):
        # The reader has seen enough; keep Python from complaining about what it can't flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@cancel_app.command()
def cancel(
    names: Annotated[list[str], typer.Argument(metavar="JOB...", help="as `distattn jobs` shows them")],
    now: Annotated[bool, typer.Option("--now", help="without writing a checkpoint first")] = False,
) -> None:
    """End jobs; their ranks write a checkpoint first, so that the same submission goes on from there."""
    registry = JobRegistry()
    for record in [registry.find(name) for name in names]:
        print(find_target(record.target).cancel(record, now=now), flush=True)


def _state(record: JobRecord) -> JobState:
    """A target that does not answer costs its own rows, not the whole table."""
    try:
        return find_target(record.target).state(record)
    except (LaunchError, ConfigError) as error:
        return JobState("unknown", str(error))


def _describe(record: JobRecord, state: JobState) -> dict[str, Any]:
    progress = read_progress(record.run_dir)
    return {
        "id": record.id,
        "name": record.name,
        "target": record.target,
        "nodes": record.nodes,
        "ranks_per_node": record.ranks_per_node,
        "run_dir": record.run_dir,
        "log": record.log,
        "submitted_at": record.submitted_at,
        **asdict(state),
        **asdict(progress),
    }


def _print_table(rows: list[tuple[JobRecord, JobState]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # Where nobody looks, as in a pipe, nothing is cut to a screen's width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if not rows:
        console.print("no jobs: distattn submit CONFIG --on local|slurm|ray starts one")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("job", "name", "state", "ranks", "step", "loss", "tokens/s", "checkpoint", "restarts", "age"):
        numeric = title in ("step", "loss", "tokens/s", "checkpoint", "restarts", "age")
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for record, state in rows:
        progress = read_progress(record.run_dir)
        style = _STYLES.get(state.state, "dim")
        table.add_row(
            record.id,
            escape(" ".join(record.name.split())),
            f"[{style}]{state.state}[/]",
            f"{record.nodes}×{record.ranks_per_node}",
            _number(progress.step, ",d"),
            _number(progress.loss, ".4f"),
            _number(progress.tokens_per_second, ",.0f"),
            _number(progress.checkpoint, ",d"),
            str(state.restarts),
            _age(time.time() - record.submitted_at),
        )
    console.print(table)
    for record, state in rows:
        if state.reason and state.state != "finished":
            console.print(f"{record.id}: {escape(state.reason)}", soft_wrap=True)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _read_once(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        yield from _rest(stream)


def _read(path: Path, record: JobRecord) -> Iterator[bytes]:
    """What is in a log and what comes, until the job is no longer active; the file may not be there yet."""
    stream: IO[bytes] | None = None
    try:
        ended = False
        while True:
            if stream is None and path.exists():
                stream = open(path, "rb")  # noqa: SIM115 (closed below, after many turns)
            if stream is not None:
                yield from _rest(stream)
            if ended:
                return
            # Asked before the last look, so that what is written in between is seen too.
            state = _state(record)
            ended = not state.active and state.state != "unknown"
            if not ended:
                time.sleep(_POLL_S)
    finally:
        if stream is not None:
            stream.close()


def _rest(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk
