"""``distattn bench disaggregation``: a step of a decoder's layers with attention disaggregated, in turns and not, and without.

Mixes of document lengths from uniform to one giant document, against data parallelism without balance, context parallelism by
ring and by all-gather over per-document zigzag, and WLB-LLM's packing by work. Every cell also says how long the step waits for
transfers that nothing hides.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import distattn
from distattn.bench.disaggregation_cases import MIXES, SHAPES, engine_names, make_lengths
from distattn.bench.disaggregation_report import plot, table
from distattn.bench.options import Commit, parts
from distattn.bench.record import check_settings, environment
from distattn.errors import ConfigError
from distattn.launchers.local import launch_local
from distattn.parallel.transport.choice import TRANSPORTS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def disaggregation_command(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not run again.")],
    ranks: Annotated[int | None, typer.Option(help="Ranks on this machine (default: its GPUs, or 2).")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens a rank, comma-separated.")] = "65536",
    mixes: Annotated[str, typer.Option(help="Mixes of document lengths, comma-separated (default: all).")] = "",
    engines: Annotated[str, typer.Option(help="Engines, comma-separated (default: all).")] = "",
    shape: Annotated[str, typer.Option(help=f"Layers of this shape: {', '.join(SHAPES)} (default: 8b on a GPU).")] = "",
    kernel: Annotated[str, typer.Option(help="Kernel of every engine.")] = "auto",
    transport: Annotated[str, typer.Option(help="collective, symmetric or auto, of every engine.")] = "collective",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    seconds: Annotated[float, typer.Option(help="Of repeats for each cell; engines take turns.")] = 2.0,
    repeats: Annotated[int, typer.Option(help="At least so many of each cell.")] = 5,
    silent: Annotated[bool, typer.Option("--silent", help="Time the same steps without their transfers, too.")] = False,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no further cell begins.")] = 1e9,
    device: Annotated[str, typer.Option(help="cuda or cpu (default: what there is).")] = "",
    commit: Commit = "",
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the step times to FILE.png.")] = None,
    only_report: Annotated[bool, typer.Option("--only-report", help="Measure nothing: show what the file holds.")] = False,
) -> None:
    """Time disaggregated attention in a model beside other ways to share it; exits with 1 if one is wrong or ranks fail."""
    status = 0
    if not only_report:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2)
        shape = shape or ("8b" if device == "cuda" else "tiny")
        if shape not in SHAPES:
            raise ConfigError(f"--shape is {shape!r}: choose one of {', '.join(SHAPES)}")
        if transport not in ("auto", *TRANSPORTS):
            raise ConfigError(f"--transport is {transport!r}: choose one of auto, {', '.join(TRANSPORTS)}")
        if min(layers, ranks, repeats) < 1:
            raise ConfigError(f"--layers={layers}, --ranks={ranks} and --repeats={repeats} must be at least 1")
        settings = {"ranks": ranks, "shape": shape, "layers": layers, "kernel": kernel, "transport": transport}
        check_settings(json_path, settings)
        status = _launch(
            ranks,
            {
                "results": str(json_path.resolve()),
                "environment": {**environment(commit), **settings},
                "device": device,
                "shape": shape,
                "kernel": kernel,
                "transport": transport,
                "layers": layers,
                "cells": choose_cells(tokens, mixes, engines, ranks),
                "seconds": seconds,
                "repeats": repeats,
                "silent": silent,
                "deadline": time.time() + time_limit,
            },
        )
    report = _read(json_path)
    print(table(report["results"]))
    if plot_path is not None:
        plot(report["results"], report["environment"], plot_path)
    raise typer.Exit(1 if status or any(cell.get("wrong") for cell in report["results"].values()) else 0)


def choose_cells(tokens: str, mixes: str, engines: str, ranks: int) -> list[tuple[int, str, str]]:
    """(tokens a rank, mix, engine) of the options; ConfigError names one that is wrong."""
    try:
        sizes = [int(x) for x in tokens.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 2:
        raise ConfigError(f"--tokens is {tokens!r}: give whole numbers of at least 2, separated by commas")
    names = parts(engines) or engine_names(ranks)
    for name in names:
        if name not in engine_names(ranks):
            raise ConfigError(f"--engines has {name!r}: for {ranks} ranks choose from {', '.join(engine_names(ranks))}")
    chosen = parts(mixes) or list(MIXES)
    for mix in chosen:
        make_lengths(mix, ranks, sizes[0])
    return [(size, mix, name) for size in sizes for mix in chosen for name in names]


def _launch(ranks: int, settings: dict[str, Any]) -> int:
    """Run the cells on ranks of this machine; 0 if all of them ended well."""
    with tempfile.TemporaryDirectory(prefix="distattn-bench-") as folder:
        written = Path(folder) / "settings.json"
        written.write_text(json.dumps(settings))
        argv = [sys.executable, "-m", "distattn.bench.disaggregation_ranks", str(written)]
        # Ranks start in safe-path mode, and this package need not be installed.
        env = {"PYTHONPATH": str(Path(distattn.__file__).resolve().parent.parent)}
        return launch_local(argv, ranks, log_dir=Path(folder) / "logs", env=env)


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        return {"environment": report["environment"], "results": report["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no results of distattn bench disaggregation: {error}") from error
