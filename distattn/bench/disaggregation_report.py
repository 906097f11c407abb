"""Results of ``distattn bench disaggregation``: a table and a picture of the cells in its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Cells = Mapping[str, dict[str, Any]]
"""By "tokens|mix|engine"; seconds and silent_seconds of a cell: of each rank, in each repeat."""

OURS = ("auto", "disaggregated_ping_pong")
"""The first of these that was measured is what others are compared with."""

OTHERS = ("data_parallel", "ring", "all_gather", "wlb_cp")
"""Ways to do without disaggregation, by the beginnings of their names."""


def slowest(seconds: list[list[float]]) -> float:
    """Seconds of the slowest rank, median over repeats."""
    return statistics.median(max(times) for times in zip(*seconds, strict=True))


def is_measured(cell: Mapping[str, Any]) -> bool:
    return "seconds" in cell and not cell["wrong"]


def exposed(cell: Mapping[str, Any]) -> float:
    """Seconds of a step that its transfers cost: with them, less without them."""
    return slowest(cell["seconds"]) - slowest(cell["silent_seconds"])


def imbalance(cell: Mapping[str, Any]) -> float:
    """Slowest rank over the mean, in steps without transfers: each rank's work alone."""
    ranks = [statistics.median(times) for times in cell["silent_seconds"]]
    return max(ranks) / statistics.fmean(ranks)


def cases(cells: Cells) -> list[str]:
    return list(dict.fromkeys(key.rsplit("|", 1)[0] for key in cells))


def engines(cells: Cells) -> list[str]:
    return list(dict.fromkeys(key.rsplit("|", 1)[1] for key in cells))


def best_wlb(cells: Cells, case: str) -> str | None:
    """The packing by work with the group size that was fastest here, or None."""
    found = {
        engine: slowest(cells[f"{case}|{engine}"]["seconds"])
        for engine in engines(cells)
        if engine.startswith("wlb_cp") and is_measured(cells.get(f"{case}|{engine}", {}))
    }
    return min(found, key=lambda engine: found[engine]) if found else None


def ours(cells: Cells, case: str) -> str | None:
    """The engine that this case's others are compared with, or None."""
    return next((name for name in OURS if is_measured(cells.get(f"{case}|{name}", {}))), None)


def speedups(cells: Cells, case: str) -> dict[str, float]:
    """Step time of each other engine over that of ours."""
    name = ours(cells, case)
    if name is None:
        return {}
    unit = slowest(cells[f"{case}|{name}"]["seconds"])
    others = {engine: cells.get(f"{case}|{engine}", {}) for engine in engines(cells) if engine != name}
    return {engine: slowest(cell["seconds"]) / unit for engine, cell in others.items() if is_measured(cell)}


def best_other(cells: Cells, case: str) -> tuple[str, float] | None:
    """The fastest way to do without disaggregation that was measured here, and its step time over that of ours."""
    found = {name: gain for name, gain in speedups(cells, case).items() if name.startswith(OTHERS)}
    return min(found.items(), key=lambda item: item[1]) if found else None


def table(cells: Cells) -> str:
    """A line for each cell, and for each case what ping-pong gains over each way to do without it."""
    columns = {"step ms": 10, "exposed ms": 12, "imbalance": 11, "most rows": 11, "GB sent": 9, "peak GB": 9}
    lines = [f"{'tokens a rank, mix, engine':50s}" + "".join(f"{name:>{width}s}" for name, width in columns.items())]
    for key, cell in cells.items():
        name = key.replace("|", " ")
        if "refused" in cell:
            lines.append(f"{name:50s}{'n/a':>10s}  {cell['refused']}")
            continue
        rows = max(sum(parts) for parts in cell["rows"])
        lines.append(
            f"{name:50s}{1e3 * slowest(cell['seconds']):10.1f}{1e3 * exposed(cell):12.1f}{imbalance(cell):11.2f}{rows:11,d}"
            f"{max(cell['bytes_sent']) / 1e9:9.2f}{cell['peak_memory_bytes'] / 1e9:9.1f}{'  WRONG' if cell['wrong'] else ''}"
        )
    for case in cases(cells):
        gains, wlb = speedups(cells, case), best_wlb(cells, case)
        shown = {name: gain for name, gain in gains.items() if not name.startswith("wlb_cp") or name == wlb}
        if shown:
            text = ", ".join(f"{name} {gain:.3f}" for name, gain in shown.items())
            lines.append(f"{case.replace('|', ' ')}: step time over that of {ours(cells, case)}: {text}")
        best = best_other(cells, case)
        if best is not None:
            lines.append(f"    the best without disaggregation: {best[0]} {best[1]:.3f}")
        chosen = cells.get(f"{case}|auto", {}).get("chosen")
        if chosen:
            lines.append(f"    auto took {chosen}")
    return "\n".join(lines)


def plot(cells: Cells, environment: Mapping[str, Any], path: Path) -> None:
    """Step times by engine and case, over that of ours; the part that transfers cost is drawn lighter on top."""
    from matplotlib.figure import Figure

    shown = [engine for engine in engines(cells) if not engine.startswith("wlb_cp")]
    if any(best_wlb(cells, case) for case in cases(cells)):
        shown.insert(min(3, len(shown)), "wlb")
    drawn = [case for case in cases(cells) if speedups(cells, case)]
    figure = Figure(figsize=(max(7.0, 2.2 * len(drawn)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, engine in enumerate(shown):
        places, computed, waited = [], [], []
        for x, case in enumerate(drawn):
            name = best_wlb(cells, case) if engine == "wlb" else engine
            cell = cells.get(f"{case}|{name}", {})
            if not is_measured(cell):
                continue
            unit = slowest(cells[f"{case}|{ours(cells, case)}"]["seconds"])
            places.append(x + 0.86 * (i + 0.5) / len(shown) - 0.43)
            waited.append(max(exposed(cell), 0.0) / unit)
            computed.append(slowest(cell["seconds"]) / unit - waited[-1])
        label = "wlb, best group size" if engine == "wlb" else engine.replace("_", " ")
        bars = axes.bar(places, computed, 0.8 / max(len(shown), 1), label=label, color=f"C{i}")
        if len(bars):
            axes.bar(places, waited, 0.8 / len(shown), bottom=computed, color=f"C{i}", alpha=0.4)
    axes.axhline(1.0, color="black", linewidth=0.8)
    names = []
    for case in drawn:
        tokens, mix = case.split("|")
        names.append(f"{mix.replace('_', ' ')}\n{int(tokens):,} tokens a rank")
    axes.set_xticks(range(len(drawn)), names, fontsize=8)
    units = {(ours(cells, case) or "").replace("_", " ") for case in drawn}
    axes.set_ylabel(f"step time over that of {' or '.join(sorted(units))}")
    place = f"{environment['ranks']} × {environment['device']}, {environment['layers']} layers of {environment['shape']}"
    axes.set_title(f"{place}; pale: exposed transfers", fontsize=10)
    axes.legend(fontsize=7, ncols=3, loc="upper left")
    axes.set_xlim(-0.55, max(len(drawn), 1) - 0.45)
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    figure.savefig(path, dpi=150)
