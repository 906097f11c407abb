"""The results of ``distattn bench recall`` as a table and as a picture: accuracy by kind of layer and by distance."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from distattn.bench.recall_model import KINDS
from distattn.bench.recall_tasks import TASKS
from distattn.errors import UnsupportedError

Results = dict[str, dict[str, Any]]

_FEW = 20
"""Scored positions below which a bin's accuracy is noise, and is not shown."""


def cells(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """task → kind → entries that were measured, one a seed; where a seed has several numbers of steps, the most."""
    most: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {}
    for key, entry in results.items():
        task, kind, seed, steps = key.split("|")
        count = int(steps.split(" ")[0])
        if "accuracy" in entry and count >= most.get((task, kind, seed), (0, {}))[0]:
            most[task, kind, seed] = count, entry
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (task, kind, _), (_, entry) in sorted(most.items(), key=lambda item: _order(*item[0])):
        found.setdefault(task, {}).setdefault(kind, []).append(entry)
    return found


def _order(task: str, kind: str, seed: str) -> tuple[int, int, int]:
    """Place in a table: models end in any order. What is no longer known comes last."""
    places = [list(known).index(name) if name in known else len(known) for known, name in ((TASKS, task), (KINDS, kind))]
    return places[0], places[1], int(seed.split(" ")[1])


def mean_by_distance(entries: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """(from, to) in tokens, to not included → accuracy of all seeds' positions there; bins of a few positions are left out."""
    right: dict[tuple[int, int], float] = {}
    total: dict[tuple[int, int], int] = {}
    for entry in entries:
        found = entry["by_distance"]
        for bin_, share, count in zip(pairwise(found["edges"]), found["accuracy"], found["count"], strict=True):
            if count:
                right[bin_] = right.get(bin_, 0.0) + share * count
                total[bin_] = total.get(bin_, 0) + count
    return {bin_: right[bin_] / total[bin_] for bin_ in sorted(right) if total[bin_] >= _FEW}


def table(results: Results) -> str:
    """A line for each kind of each task: mean accuracy in percent, least and most of the seeds, then by distance."""
    lines: list[str] = []
    for task, kinds in cells(results).items():
        lines.append(f"{task}: accuracy in %, least … most of the seeds; by distance in tokens")
        for kind, entries in kinds.items():
            shares = [100 * entry["accuracy"] for entry in entries]
            span = f"{min(shares):.1f} … {max(shares):.1f}" if len(shares) > 1 else ""
            bins = "  ".join(f"{low}:{100 * share:.0f}" for (low, _), share in mean_by_distance(entries).items())
            lines.append(f"  {kind:28s}{sum(shares) / len(shares):6.1f}  {span:16s}{bins}")
    return "\n".join([*lines, *(f"failed {key}: {entry['failed']}" for key, entry in results.items() if "failed" in entry)])


def draw(results: Results, environment: dict[str, str | None], path: Path) -> None:
    """A panel a task: kinds downward, distance to the right, accuracy as colour and number; the first column is over all.

    Raises UnsupportedError without matplotlib, or where nothing was measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib: install it with  pip install 'distattn[plot]'") from error
    found = cells(results)
    if not found:
        raise UnsupportedError("there is nothing to draw: no model was trained, and the JSON file says why")
    kinds = sorted({kind for by_kind in found.values() for kind in by_kind}, key=lambda kind: _order("", kind, "seed 0"))
    figure = Figure(figsize=(2.2 + 4.4 * len(found), 1.4 + 0.36 * len(kinds)), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (task, by_kind) in zip(panels, found.items(), strict=True):
        _draw_task(axes, task, kinds, by_kind)
    counts = sorted({len(entries) for by_kind in found.values() for entries in by_kind.values()})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    figure.suptitle(
        f"accuracy in %, seeds a cell: {seeds}; {environment.get('device')}, torch {environment.get('torch')}",
        fontsize="medium",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_task(axes: Any, task: str, kinds: list[str], by_kind: dict[str, list[dict[str, Any]]]) -> None:
    rows = {kind: mean_by_distance(entries) for kind, entries in by_kind.items()}
    bins = sorted({bin_ for row in rows.values() for bin_ in row})
    grid: list[list[float]] = []
    for kind in kinds:
        entries = by_kind.get(kind, [])
        mean = sum(entry["accuracy"] for entry in entries) / len(entries) if entries else float("nan")
        grid.append([mean, *(rows.get(kind, {}).get(bin_, float("nan")) for bin_ in bins)])
    axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(grid):
        for x, share in enumerate(row):
            if share == share:
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize="x-small", color=_ink(share))
    axes.axvline(0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(bins) + 1), ["all", *(f"{low}–{high - 1}" if high - low > 1 else f"{low}" for low, high in bins)])
    axes.tick_params(axis="x", labelsize="x-small")
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    axes.set_xlabel("distance in tokens", fontsize="small")
    axes.set_title(task, fontsize="medium")


def _ink(share: float) -> str:
    """A colour that can be read on viridis at that height."""
    return "black" if share > 0.6 else "white"
