"""Measure this machine, so that choices and predictions rest on it: ``distattn bench calibrate``.

    distattn bench calibrate --only kernels          seconds of each attention kernel by launches, rows, blocks and waits
    distattn bench calibrate --recorded FILE,…       the same from times that --json wrote, on any machine

Kernels: each backend is timed on masks whose launches, rows and blocks differ; the numbers of a ``KernelRate`` are the
non-negative ones that fit these times with the least relative error. How far each time is from the fit is kept as a
``KernelCell``, by which choices correct it. The result goes where ``distattn`` looks for it, and
with --json also elsewhere, with the times.
"""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from distattn.bench.engines import Cell, Problem, first_call, tiles_of
from distattn.bench.options import Commit, head_pairs, names, positive_integers
from distattn.bench.record import Record, environment
from distattn.bench.timing import CellTimeoutError, limit, median_ms
from distattn.calibration import Calibration, KernelCell, KernelRate, calibration_path, load_calibration
from distattn.errors import ConfigError, UnsupportedError
from distattn.kernels import BACKENDS
from distattn.kernels.measured import amounts_of
from distattn.kernels.selection import Rates, predicted_seconds
from distattn.kernels.workload import NOTHING, Work, work_of

MASKS = (
    "causal", "full", "causal_document", "full_document", "sliding_window", "sliding_window_causal",
    "block_causal_document", "global_sliding_window", "share_question", "prefix_lm_document",
)  # fmt: skip
CELL_SECONDS = 60
MAX_CALL_S = 3e-4
"""Of the host, until the first kernel of a call runs. Cells that all take longer say nothing of it, and would take it for a
cost that does not grow with the heads."""
TERMS = ("call_s", "launch_s", "row_s", "step_s", "pair_s", "cut_pair_s", "vendor_row_s", "wait_s")
"""The numbers of a ``KernelRate`` that ``Work.terms`` multiply."""
FEW_LAUNCHES = 4
HOST_BOUND = 1.1
"""A cell of many launches that takes this much longer than its work says may wait for the host,"""
HOST_SPREAD = 2
"""if it also takes no more than so many times as long for a launch as the quickest such cell: merging rows takes longer."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Timed(NamedTuple):
    """A cell as one backend computed it; work: by the kernel that does it."""

    cell: Cell
    backend: str
    work: dict[str, Work]
    forward_ms: float
    backward_ms: float


@app.command()
def main(
    only: Annotated[str, typer.Option(help="kernels or links; default both")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="also write every time measured; resumed from there")] = None,
    output: Annotated[Path | None, typer.Option(help="the calibration, in place of where distattn looks for it")] = None,
    lengths: Annotated[str, typer.Option(help="tokens of the kernels' cells, comma-separated")] = "4096,32768",
    heads: Annotated[str, typer.Option(help="query:KV heads, comma-separated")] = "32:4,16:16",
    head_dims: Annotated[str, typer.Option(help="comma-separated")] = "128,64",
    engines: Annotated[str, typer.Option(help="kernels to time, the rates of others are kept; default all")] = "",
    seconds: Annotated[float, typer.Option(help="of repeats for each time; at least three repeats")] = 0.05,
    recorded: Annotated[str, typer.Option(help="files that --json wrote, comma-separated: fit their times, measure none")] = "",
    commit: Commit = "",
) -> None:
    """Measure kernels and links of this machine, and keep the result for `kernel=auto` and `distattn plan`."""
    if only not in ("", "kernels", "links"):
        raise ConfigError(f"--only={only!r} is unknown; it may be kernels or links")
    if recorded:
        if only or json_path or engines:
            raise ConfigError("--recorded takes the times that its files hold: leave out --only, --json and --engines")
        made = from_files([Path(name) for name in recorded.split(",")])
        print(_table(made.kernels))
        print(f"written to {made.save(output or calibration_path(made.device))}")
        return
    here = environment(commit)
    device = str(here["device"])
    target = output or calibration_path(device)
    before = load_calibration(target) or Calibration(device)
    found = before.updated(device=device, versions=_versions(here), commit=str(here["commit"]))
    if only in ("", "kernels"):
        record = Record(json_path, here) if json_path else None
        cells = [
            Cell(mask, length, *pair, head_dim)
            for head_dim in positive_integers("head-dims", head_dims)
            for pair in head_pairs("heads", heads)
            for length in positive_integers("lengths", lengths)
            for mask in MASKS
        ]
        chosen = names("engines", engines, [name for name in BACKENDS if name != "reference"])
        rates, measured = calibrate_kernels(cells, chosen, seconds=seconds, record=record)
        timed = {(x.backend, x.head_dim) for x in rates}
        same = before.versions == found.versions
        kept = [x for x in before.kernels if same and (x.backend, x.head_dim) not in timed]
        kept_cells = [x for x in before.cells if same and (x.backend, x.head_dim) not in timed]
        found = found.updated(kernels=(*rates, *kept), cells=(*measured, *kept_cells))
        print(_table(found.kernels))
    if only in ("", "links"):
        from distattn.bench.calibrate_links import calibrate_links

        found = found.updated(links=calibrate_links())
    print(f"written to {found.save(target)}")


def calibrate_kernels(
    cells: Sequence[Cell], engines: Sequence[str], *, seconds: float, record: Record | None = None
) -> tuple[tuple[KernelRate, ...], tuple[KernelCell, ...]]:
    """Rates of those of the backends that run here, and cells for them. Raises UnsupportedError where none does."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    entries: dict[str, dict[str, Any]] = {}
    for cell, name in itertools.product(cells, engines):
        key = f"{cell.key}|{name}"
        known = record is not None and key in record
        entries[key] = record.results[key] if record is not None and known else _times(name, cell, device, seconds)
        if record is not None and not known:
            record.add(key, entries[key])
    return rates_of(entries)


def rates_of(entries: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[KernelRate, ...], tuple[KernelCell, ...]]:
    """Rates and cells from times by ``cell|backend``, as --json writes them. Raises UnsupportedError where there are none."""
    timed = []
    for key, entry in entries.items():
        if "not_run" not in entry:
            text, name = key.split("|")
            cell = Cell.read(text)
            work = work_of(name, [tiles_of(cell)[0]], group=cell.group)
            timed.append(Timed(cell, name, work, entry["forward_ms"], entry["backward_ms"]))
    if not timed:
        raise UnsupportedError("no kernel could be measured: `distattn doctor` says which run here, and why the others do not")
    times: dict[tuple[str, int], list[tuple[dict[str, Work], float, float]]] = {}
    for x in timed:
        times.setdefault((x.backend, x.cell.head_dim), []).append((x.work, x.forward_ms, x.backward_ms))
    rates = fit_all(times)
    return rates, cells_of(timed, Rates(Calibration("", kernels=rates), ""))


def from_files(paths: Sequence[Path]) -> Calibration:
    """A calibration from files of times; of a time that several have, the last one's counts.

    Raises ConfigError for a file that holds no times of kernels, and for files of different devices.
    """
    entries: dict[str, dict[str, Any]] = {}
    here: dict[str, dict[str, str | None]] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
            found = {key: entry for key, entry in content["results"].items() if "not_run" in entry or "forward_ms" in entry}
            here[str(content["environment"]["device"])] = content["environment"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{path} holds no times of kernels ({error}): give files of `calibrate --json`") from error
        entries |= found
    if len(here) != 1:
        raise ConfigError(f"--recorded needs times of one kind of device, but these are of {', '.join(sorted(here))}")
    ((device, environment_there),) = here.items()
    rates, cells = rates_of(entries)
    return Calibration(device, _versions(environment_there), str(environment_there["commit"]), kernels=rates, cells=cells)


def cells_of(timed: Sequence[Timed], rates: Rates) -> tuple[KernelCell, ...]:
    """How far each time is from what ``rates`` say; none for a backend without a rate of its own."""
    found = []
    for (cell, name, work, *times), backward in itertools.product(timed, (False, True)):
        by_rates = predicted_seconds(work, rates, backward=backward, width=cell.head_dim)
        own = rates.find(name, backward, cell.head_dim)
        if not by_rates or own is None or own.head_dim != cell.head_dim:
            continue
        amounts, ratio = amounts_of(work, backward=backward), float(f"{times[backward] / 1e3 / by_rates:.5g}")
        found.append(KernelCell(cell.key, name, backward, cell.head_dim, cell.group, *amounts, ratio=ratio))
    return tuple(found)


def fit_all(times: dict[tuple[str, int], list[tuple[dict[str, Work], float, float]]]) -> tuple[KernelRate, ...]:
    """Rates from times: (backend, head_dim) → (work by kernel, forward ms, backward ms) of each cell.

    A backend that leaves cells to another's kernel is fitted on those that it computes all by itself.
    """
    rates = []
    for (name, head_dim), cells in sorted(times.items()):
        own = [
            (work[name], *ms)
            for work, *ms in cells
            if work.get(name, NOTHING).launches and not any(w.launches for kernel, w in work.items() if kernel != name)
        ]
        for backward in (False, True):
            if own:
                amounts = np.array([work.terms(backward=backward) for work, *_ in own])
                seconds = np.array([ms[backward] for _, *ms in own]) / 1e3
                numbers, error = fit(amounts, seconds)
                rates.append(KernelRate(name, backward, head_dim, **dict(zip(TERMS, numbers)), error=error))
    return tuple(rates)


def fit(amounts: np.ndarray, seconds: np.ndarray) -> tuple[list[float], float]:
    """The numbers of a ``KernelRate``, from amounts [n, 8] (``Work.terms``) and seconds
    [n]; and their largest error. Waits take the place of steps, which are 0 in it.

    Cells of few launches give the device's numbers. Cells of many that take longer than these say, but not longer for a launch
    than others, may wait for the host: no launch takes it longer than those of the quickest such cell, which gives its time for
    one. All others then give the device's numbers once more.
    """
    calls, launches = amounts[:, 0], amounts[:, 1]
    device = np.delete(amounts, 1, axis=1)
    device[:, TERMS.index("step_s") - 1] = 0
    many = launches > FEW_LAUNCHES * calls
    numbers = _of_device(device[~many], seconds[~many]) if (~many).any() else np.zeros(device.shape[1])
    a_launch = np.where(many, (seconds - calls * numbers[0]) / np.maximum(launches, 1), np.inf)
    waiting = (seconds > HOST_BOUND * (device @ numbers)) & many & (a_launch <= HOST_SPREAD * a_launch.min())
    launch_s = float(a_launch[waiting].min()) if waiting.any() else 0.0
    if (~waiting).any():
        numbers = _of_device(device[~waiting], seconds[~waiting])
    call_s, *rest = numbers.tolist()
    predicted = calls * call_s + np.maximum(launches * launch_s, device[:, 1:] @ numbers[1:])
    return [call_s, launch_s, *rest], float(np.abs(predicted / seconds - 1).max())


def _of_device(amounts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """What amounts [n, c], of which the first counts calls, take each: float64 [c]."""
    numbers = non_negative_fit(amounts, seconds, seconds)
    if numbers[0] <= MAX_CALL_S:
        return numbers
    return np.append(MAX_CALL_S, non_negative_fit(amounts[:, 1:], seconds - MAX_CALL_S * amounts[:, 0], seconds))


def non_negative_fit(amounts: np.ndarray, seconds: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Non-negative x that bring amounts [n, c] · x nearest to seconds [n], by error relative to scale [n].

    Few columns have few supports, and the best non-negative solution is the least-squares one on some support. Of that no more
    than half as many columns as there are times: as many numbers as times fit these exactly, and others not at all.
    """
    rows, wanted = amounts / scale[:, None], seconds / scale
    size = np.maximum(np.abs(rows).max(0), 1e-300)  # columns of like size, so that the solutions are accurate
    best, least = np.zeros(rows.shape[1]), np.inf
    for support in itertools.product((False, True), repeat=rows.shape[1]):
        columns = np.flatnonzero(support)
        if not 0 < len(columns) <= max(1, len(rows) // 2) or not rows[:, columns].any(0).all():
            continue  # times say nothing of an amount that is 0 in all of them
        solution = np.linalg.lstsq(rows[:, columns] / size[columns], wanted, rcond=None)[0]
        misfit = float(np.square(rows[:, columns] / size[columns] @ solution - wanted).sum())
        if (solution >= 0).all() and misfit < least:
            best, least = np.zeros(rows.shape[1]), misfit
            best[columns] = solution / size[columns]
    return best


def _times(name: str, cell: Cell, device: str, seconds: float) -> dict[str, Any]:
    try:
        with limit(CELL_SECONDS):
            x = Problem.make(cell, device)
            timed, _ = first_call(name, x)
            entry = {
                "forward_ms": median_ms(timed.forward, seconds, device),
                "backward_ms": median_ms(timed.backward, seconds, device),
            }
            del timed, x
    except (UnsupportedError, CellTimeoutError) as error:
        return {"not_run": str(error)}
    except torch.AcceleratorError:  # nothing runs on the device after it
        raise
    except Exception as error:  # whatever is wrong with one kernel, the others have their rates
        return {"not_run": f"{type(error).__name__}: {str(error)[:200]}"}
    gc.collect()
    return entry


def _versions(here: dict[str, str | None]) -> dict[str, str | None]:
    return {name: text for name, text in here.items() if name not in ("device", "commit", "num_devices")}


def _table(rates: Sequence[KernelRate]) -> str:
    titles = ("call µs", "launch µs", "row ns", "vendor's", "wait µs", "TFLOP/s", "cut", "worst fit")
    lines = [f"{'kernel':28s}" + "".join(f"{title:>11s}" for title in titles)]
    for x in rates:
        flops = (10 if x.backward else 4) * x.head_dim
        whole, cut = (f"{flops / s / 1e12:.0f}" if s else "–" for s in (x.pair_s, x.cut_pair_s))
        name = f"{x.backend} D{x.head_dim} {'backward' if x.backward else 'forward'}"
        numbers = (x.call_s * 1e6, x.launch_s * 1e6, x.row_s * 1e9, x.vendor_row_s * 1e9, x.wait_s * 1e6)
        times = "".join(f"{s:11.2f}" for s in numbers)
        lines.append(f"{name:28s}{times}{whole:>11s}{cut:>11s}{x.error:>11.1%}")
    return "\n".join(lines)
