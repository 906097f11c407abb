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
from distattn.bench.context_predict import add_forecasts, add_predictions
from distattn.bench.context_ranks import Job
from distattn.bench.context_report import IDEAL, Report, markdown, plot, table
from distattn.bench.masks import LONGCA_MASKS
from distattn.bench.options import Commit, parts
from distattn.bench.record import environment
from distattn.calibration import load_calibration
from distattn.errors import ConfigError
from distattn.launchers.local import launch_local
from distattn.parallel.hardware import Hardware, calibrated, hardware_here
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.transport.choice import TRANSPORTS

QUICK_MASKS = ("causal", "causal_document", "sliding_window_causal", "share_question")
ENGINE_WORDS = (*TRANSPORTS, "keep")
"""What may follow a strategy's name, after a plus: its transport, and that received keys are kept for the backward."""

_MAX_RESTARTS = 20
_SETS = ("all", "longca", "targets")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def context_command(
    json_path: Annotated[
        Path, typer.Option("--json", help="Results; cells found there are not run again. FILE-xP.json for several --ranks.")
    ],
    ranks: Annotated[str, typer.Option(help="Ranks on this machine, such as 4 or 1,2,4 (default: its GPUs, or 2).")] = "",
    cases: Annotated[str, typer.Option(help=f"Which shapes: {', '.join(_SETS)}.")] = "all",
    masks: Annotated[str, typer.Option(help="Masks, comma-separated (default: all of the set).")] = "",
    tokens: Annotated[str, typer.Option(help="LongCA-bench's tokens a rank, comma-separated.")] = "8192,65536",
    heads: Annotated[str, typer.Option(help="Other heads, such as 16:4:64 for 16 query and 4 KV heads of 64.")] = "",
    engines: Annotated[
        str, typer.Option(help="Strategies and peers, comma-separated (default: all); also ring+symmetric, ring+keep.")
    ] = "",
    last: Annotated[str, typer.Option(help="Of those, the ones that come when all others have all cells.")] = "",
    kernel: Annotated[str, typer.Option(help="Kernel of ours, for the ideal too.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Four masks, the shorter length, and the targets.")] = False,
    seconds: Annotated[float, typer.Option(help="Of repeats for each cell.")] = 0.5,
    time_limit: Annotated[float, typer.Option(help="Seconds after which no further cell begins.")] = 1e9,
    cell_seconds: Annotated[float, typer.Option(help="Seconds after which a cell counts as failed.")] = 180.0,
    profile: Annotated[bool, typer.Option(help="Keep where the device's time goes in short cells, too.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu (default: what there is).")] = "",
    calibration: Annotated[Path | None, typer.Option(help="What predictions rest on (default: this machine's).")] = None,
    only_predict: Annotated[bool, typer.Option("--only-predict", help="Measure nothing: predict the cells there are.")] = False,
    only_forecast: Annotated[
        bool, typer.Option("--forecast", help="Measure nothing: predict the chosen cells from --calibration alone.")
    ] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Measure nothing: print what there is for a page.")] = False,
    commit: Commit = "",
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the shares of the ideal to FILE.png.")] = None,
) -> None:
    """Time context-parallel attention, ours and its peers; exits with 1 if a result of ours is wrong or failed."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = choose_ranks(ranks, device)
    names, late = choose_engines(engines), [name for name in choose_engines(last) if last]
    chosen = {size: choose_cases(cases, masks, tokens, heads, size, quick=quick) for size in sizes}
    if only_forecast:
        for size, path in report_paths(json_path, sizes).items():
            report = Report.begin(path, {**environment(commit), "ranks": size, "kernel": kernel, "device_type": device})
            add_forecasts(report, chosen[size], names, predicted_hardware(calibration, device))
        return
    if as_markdown:
        print("\n\n".join(markdown(Report.read(path)) for path in report_paths(json_path, sizes).values()))
        return
    if not only_predict:
        reports = {
            size: Report.begin(path, {**environment(commit), "ranks": size, "kernel": kernel, "device_type": device})
            for size, path in report_paths(json_path.resolve(), sizes).items()
        }
        jobs = make_jobs(chosen, reports, names, late)
        settings = {
            "jobs": [asdict(job) for job in jobs],
            "notes": str(json_path.resolve()),
            "device": device,
            "kernel": kernel,
            "seconds": seconds,
            "deadline": time.time() + time_limit,
            "cell_seconds": cell_seconds,
            "profile": profile,
        }
        launch(list(reports.values()), settings, max(sizes))
    failed = False
    for size, path in report_paths(json_path, sizes).items():
        report = Report.read(path)
        add_predictions(report, chosen[size], predicted_hardware(calibration, device))
        print(table(report))
        if plot_path is not None:
            plot(report, report_paths(plot_path, sizes)[size])
        ours = [cell for key, cell in report.results.items() if key.split("|")[1] not in PEERS]
        failed = failed or any("failed" in cell or cell.get("wrong") for cell in ours)
    raise typer.Exit(1 if failed and not only_predict else 0)


def choose_ranks(text: str, device: str) -> list[int]:
    """Numbers of ranks, each of which divides the largest: groups of them measure at once."""
    if not text:
        return [torch.cuda.device_count() if device == "cuda" else 2]
    sizes = sorted(set(_numbers("--ranks", text, ",")))
    odd = [size for size in sizes if sizes[-1] % size]
    if odd:
        raise ConfigError(f"--ranks is {text!r}: {odd[0]} does not divide {sizes[-1]}, the ranks that are started")
    return sizes


def report_paths(path: Path, sizes: list[int]) -> dict[int, Path]:
    """A file for each number of ranks: the one that was named, or beside it FILE-xP."""
    if len(sizes) == 1:
        return {sizes[0]: path}
    return {size: path.with_name(f"{path.stem}-x{size}{path.suffix}") for size in sizes}


def make_jobs(chosen: dict[int, list[Case]], reports: dict[int, Report], names: list[str], late: list[str]) -> list[Job]:
    """Cases in their order, each on the most ranks first, so that what a run leaves undone at its end matters least.

    One rank has the ideal and nothing else: every schedule is the same there.
    """
    jobs = []
    for engines in ([name for name in names if name not in late], [name for name in names if name in late]):
        for i in range(max(map(len, chosen.values())) if engines else 0):
            for size in sorted(chosen, reverse=True):
                if i < len(chosen[size]):
                    wanted = engines if size > 1 else [IDEAL]
                    jobs.append(Job(asdict(chosen[size][i]), size, wanted, str(reports[size].path)))
    return jobs


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
    listed = parts(masks)
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
    chosen = parts(names) or known
    for name in chosen:
        strategy, *words = name.split("+")
        theirs = strategy in (*PEERS, IDEAL)
        if strategy not in (*known, IDEAL) or any(theirs or word not in ENGINE_WORDS for word in words):
            endings = " or ".join(f"+{x}" for x in ENGINE_WORDS)
            raise ConfigError(f"unknown engine {name!r}: choose from {', '.join(known)}; strategies may end in {endings}")
    return chosen


def _numbers(option: str, text: str, separator: str) -> list[int]:
    try:
        numbers = [int(x) for x in text.split(separator)]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} is {text!r}: give whole numbers of at least 1, separated by {separator!r}")
    return numbers


def launch(reports: list[Report], settings: dict[str, Any], ranks: int) -> None:
    """Start the ranks; where a cell ends them, it counts as failed and new ones go on with the rest."""
    with tempfile.TemporaryDirectory(prefix="distattn-bench-") as folder:
        written = Path(folder) / "settings.json"
        written.write_text(json.dumps(settings))
        argv = [sys.executable, "-m", "distattn.bench.context_ranks", str(written)]
        (Path(folder) / "path").mkdir()
        env = {"PYTHONPATH": _python_path(Path(folder) / "path")}
        done = -1
        for _ in range(_MAX_RESTARTS):
            code = launch_local(argv, ranks, log_dir=Path(folder) / "logs", env=env, stop_grace_s=10.0)
            if code == 0:
                break
            now = [Report.read(report.path) for report in reports]
            for report in now:
                if report.running is not None:
                    report.results[report.running] = {"failed": _reason(settings["notes"], ranks)}
                    report.running = None
                    report.save()
            before, done = done, sum(len(report.results) for report in now)
            if before == done or time.time() > settings["deadline"]:
                break
    for rank in range(ranks):
        Path(f"{settings['notes']}.rank-{rank}").unlink(missing_ok=True)


def _python_path(folder: Path) -> str:
    """Where ranks find this package: they start in safe-path mode, and it need not be installed.

    A folder with nothing else in it: beside the package may lie folders whose names are those of what peers import.
    """
    package = Path(distattn.__file__).resolve().parent
    (folder / "distattn").symlink_to(package, target_is_directory=True)
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join([str(folder), *(entry for entry in known if Path(entry).resolve() != package.parent)])


def _reason(notes: str, ranks: int) -> str:
    """What a rank wrote of its error before all of them ended."""
    for rank in range(ranks):
        note = Path(f"{notes}.rank-{rank}")
        if note.exists():
            text = note.read_text()
            note.unlink()
            return f"rank {rank}: {text}"
    return "the rank processes ended while it ran"
