"""``distattn bench context``: attention over several devices, every schedule of ours and its peers, in one run.

LongCA-bench's protocol (arXiv 2510.17896): 64 query and 8 KV heads of 128, bf16, 8,192 and 65,536 tokens a rank, forward and
backward, two warm-ups, then repeats for half a second. Beside it the shapes of our own targets. Every cell says what share it
reaches of the ideal: the time of one device with the same kernel, divided by the ranks.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import distattn
from distattn.bench.context_cases import Case, check_mask, longca_cases, target_cases
from distattn.bench.context_peers import PEERS
from distattn.bench.context_predict import add_predictions
from distattn.bench.context_report import IDEAL, Report, plot, table
from distattn.bench.masks import LONGCA_MASKS
from distattn.bench.record import environment
from distattn.calibration import load_calibration
from distattn.errors import ConfigError
from distattn.launchers.local import launch_local
from distattn.parallel.hardware import Hardware, calibrated, hardware_here
from distattn.parallel.schedulers import SCHEDULERS

QUICK_MASKS = ("causal", "causal_document", "sliding_window_causal", "share_question")
_MAX_RESTARTS = 20
_SETS = ("all", "longca", "targets")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def context_command(
    json_path: Annotated[Path, typer.Option("--json", help="Results; cells found there are not run again.")],
    ranks: Annotated[int | None, typer.Option(help="Ranks on this machine (default: its GPUs, or 2).")] = None,
    cases: Annotated[str, typer.Option(help=f"Which shapes: {', '.join(_SETS)}.")] = "all",
    masks: Annotated[str, typer.Option(help="Masks, comma-separated (default: all of the set).")] = "",
    tokens: Annotated[str, typer.Option(help="LongCA-bench's tokens a rank, comma-separated.")] = "8192,65536",
    heads: Annotated[str, typer.Option(help="Other heads, such as 16:4:64 for 16 query and 4 KV heads of 64.")] = "",
    engines: Annotated[str, typer.Option(help="Strategies and peers, comma-separated (default: all).")] = "",
    kernel: Annotated[str, typer.Option(help="Kernel of ours, for the ideal too.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Four masks, the shorter length, and the targets.")] = False,
    seconds: Annotated[float, typer.Option(help="Of repeats for each cell.")] = 0.5,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no further cell begins.")] = 1e9,
    profile: Annotated[bool, typer.Option(help="Keep where each cell's device time goes, too.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu (default: what there is).")] = "",
    calibration: Annotated[Path | None, typer.Option(help="What predictions rest on (default: this machine's).")] = None,
    only_predict: Annotated[bool, typer.Option("--only-predict", help="Measure nothing: predict the cells there are.")] = False,
    commit: Annotated[str, typer.Option(help="Commit to record where the checkout is no git repository.")] = "",
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the shares of the ideal to FILE.png.")] = None,
) -> None:
    """Time context-parallel attention, ours and its peers; exits with 1 if a result of ours is wrong or failed."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = ranks or (torch.cuda.device_count() if device == "cuda" else 2)
    chosen = choose_cases(cases, masks, tokens, heads, ranks, quick=quick)
    if only_predict:
        report = Report.read(json_path)
        add_predictions(report, chosen, predicted_hardware(calibration, device))
        print(table(report))
        return
    settings = {
        "results": str(json_path.resolve()),
        "device": device,
        "cases": [asdict(case) for case in chosen],
        "engines": choose_engines(engines),
        "kernel": kernel,
        "seconds": seconds,
        "deadline": time.time() + time_limit,
        "profile": profile,
    }
    report = Report.begin(json_path.resolve(), {**environment(commit), "ranks": ranks, "kernel": kernel, "device_type": device})
    report = launch(report, settings, ranks)
    add_predictions(report, chosen, predicted_hardware(calibration, device))
    print(table(report))
    if plot_path is not None:
        plot(report, plot_path)
    ours = [cell for key, cell in report.results.items() if key.split("|")[1] not in PEERS]
    raise typer.Exit(1 if any("failed" in cell or cell.get("wrong") for cell in ours) else 0)


def predicted_hardware(path: Path | None, device: str) -> Hardware:
    """What a calibration file describes, or what predictions on this kind of device rest on."""
    if path is None:
        return hardware_here(on_gpu=device == "cuda")
    found = load_calibration(path)
    if found is None:
        raise ConfigError(f"there is no calibration at {path}: `distattn bench calibrate --output {path}` makes one")
    return calibrated(found)


def choose_cases(names: str, masks: str, tokens: str, heads: str, ranks: int, *, quick: bool) -> list[Case]:
    """The cases of the options; ConfigError names an option that is wrong."""
    if names not in _SETS:
        raise ConfigError(f"--cases is {names!r}: choose one of {', '.join(_SETS)}")
    listed = [name for name in masks.split(",") if name]
    for name in listed:
        check_mask(name)
    sizes = _numbers("--tokens", tokens, ",")
    shape = _numbers("--heads", heads, ":") if heads else []
    if shape and len(shape) != 3:
        raise ConfigError(f"--heads is {heads!r}: give query heads, KV heads and head dimension, such as 16:4:64")
    found: list[Case] = []
    if names != "longca" and not shape:
        found += [case for case in target_cases() if not listed or case.mask in listed]
    if names != "targets":
        chosen = listed or list(QUICK_MASKS if quick else LONGCA_MASKS)
        found += [case for size in (sizes[:1] if quick else sizes) for case in longca_cases(ranks, size, chosen)]
    if shape:
        found = [Case(case.mask, case.tokens, *shape, seed=case.seed) for case in found]
    return found


def choose_engines(names: str) -> list[str]:
    """Ours and the peers in the order of the table; ConfigError lists them."""
    known = [*SCHEDULERS, "auto", *PEERS]
    chosen = [name for name in names.split(",") if name] or known
    for name in chosen:
        if name not in (*known, IDEAL):
            raise ConfigError(f"unknown engine {name!r}: choose from {', '.join(known)}")
    return chosen


def _numbers(option: str, text: str, separator: str) -> list[int]:
    try:
        numbers = [int(x) for x in text.split(separator)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} is {text!r}: give whole numbers of at least 1, separated by {separator!r}")
    return numbers


def launch(report: Report, settings: dict[str, Any], ranks: int) -> Report:
    """Start the ranks; where a cell ends them, it counts as failed and new ones go on with the rest."""
    with tempfile.TemporaryDirectory(prefix="distattn-bench-") as folder:
        written = Path(folder) / "settings.json"
        written.write_text(json.dumps(settings))
        argv = [sys.executable, "-m", "distattn.bench.context_ranks", str(written)]
        (Path(folder) / "path").mkdir()
        env = {"PYTHONPATH": _python_path(Path(folder) / "path")}
        for _ in range(_MAX_RESTARTS):
            before = len(report.results)
            code = launch_local(argv, ranks, log_dir=Path(folder) / "logs", env=env)
            report = Report.read(report.path)
            if code == 0:
                break
            if report.running is not None:
                report.results[report.running] = {"failed": _reason(report, ranks)}
                report.running = None
                report.save()
            elif len(report.results) == before:
                break
    for rank in range(ranks):
        Path(f"{report.path}.rank-{rank}").unlink(missing_ok=True)
    return report


def _python_path(folder: Path) -> str:
    """Where ranks find this package: they start in safe-path mode, and it need not be installed.

    A folder with nothing else in it: beside the package may lie folders whose names are those of what peers import.
    """
    package = Path(distattn.__file__).resolve().parent
    (folder / "distattn").symlink_to(package, target_is_directory=True)
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join([str(folder), *(entry for entry in known if Path(entry).resolve() != package.parent)])


def _reason(report: Report, ranks: int) -> str:
    """What a rank wrote of its error before all of them ended."""
    for rank in range(ranks):
        note = Path(f"{report.path}.rank-{rank}")
        if note.exists():
            text = note.read_text()
            note.unlink()
            return f"rank {rank}: {text}"
    return "the rank processes ended while it ran"
