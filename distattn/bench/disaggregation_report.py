"""Results of ``distattn bench disaggregation``: a table and a picture of the cells in its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Cells = Mapping[str, dict[str, Any]]
"""By "tokens|mix|engine". Of each rank in each repeat: seconds; waited_seconds, those of them that wait for transfers;
silent_seconds, of the same step without transfers. One of the latter two may be missing."""

OURS = ("auto", "disaggregated_ping_pong")
"""The first of these that was measured is what others are compared with."""

OTHERS = ("data_parallel", "ring", "all_gather", "wlb_cp")
"""Ways to do without disaggregation, by the beginnings of their names."""


def slowest(seconds: list[list[float]]) -> float:
    """Seconds of the slowest rank, median over repeats."""
    return statistics.median(max(times) for times in zip(*seconds, strict=True))


def is_measured(cell: Mapping[str, Any]) -> bool:
    return "seconds" in cell and not cell["wrong"]


def uncertainty(cell: Mapping[str, Any]) -> float:
    """Standard error of the step's seconds, from the spread of its repeats."""
    found = [max(times) for times in zip(*cell["seconds"], strict=True)]
    return statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0


def computed(cell: Mapping[str, Any]) -> list[float]:
    """Seconds of each rank that it does not wait for transfers: its work alone, median over repeats."""
    if "waited_seconds" not in cell:
        return [statistics.median(times) for times in cell["silent_seconds"]]
    pairs = zip(cell["seconds"], cell["waited_seconds"], strict=True)
    return [statistics.median(x - y for x, y in zip(times, waits, strict=True)) for times, waits in pairs]


def exposed(cell: Mapping[str, Any]) -> float:
    """Seconds that the step lasts beyond the work of its busiest rank, median over repeats: waits of which no other rank's work
    is the reason. Where waits were not measured, the step's with transfers less those without."""
    if "waited_seconds" not in cell:
        return slowest(cell["seconds"]) - slowest(cell["silent_seconds"])
    repeats = zip(zip(*cell["seconds"], strict=True), zip(*cell["waited_seconds"], strict=True), strict=True)
    return statistics.median(max(times) - max(t - w for t, w in zip(times, waits, strict=True)) for times, waits in repeats)


def without_transfers(cell: Mapping[str, Any]) -> float:
    """Seconds of the same step without transfers, as measured, or else what its busiest rank computes."""
    return slowest(cell["silent_seconds"]) if "silent_seconds" in cell else max(computed(cell))


def transfer_cost(cell: Mapping[str, Any]) -> float | None:
    """Seconds of a step with its transfers less those without: waits, and what transfers slow down. None where not measured."""
    if "silent_seconds" not in cell:
        return None
    return slowest(cell["seconds"]) - slowest(cell["silent_seconds"])


def imbalance(cell: Mapping[str, Any]) -> float:
    """Slowest rank over the mean, of what ranks compute: what balancing could gain at most."""
    ranks = computed(cell)
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


def ratio_error(cells: Cells, case: str, engine: str) -> float:
    """Standard error of an engine's step time over that of ours."""
    pair = [cells[f"{case}|{name}"] for name in (engine, ours(cells, case))]
    steps = [slowest(cell["seconds"]) for cell in pair]
    parts = [uncertainty(cell) / step for cell, step in zip(pair, steps, strict=True)]
    return steps[0] / steps[1] * (parts[0] ** 2 + parts[1] ** 2) ** 0.5


def _line(name: str, cell: Mapping[str, Any]) -> str:
    if "refused" in cell:
        return f"{name:52s}{'n/a':>10s}  {cell['refused']}"
    rows, cost = max(sum(parts) for parts in cell["rows"]), transfer_cost(cell)
    waits = f"{1e3 * exposed(cell):.2f}" if "waited_seconds" in cell else ""
    return (
        f"{name:52s}{1e3 * slowest(cell['seconds']):10.1f}{1e3 * uncertainty(cell):6.1f}{waits:>9s}"
        f"{'' if cost is None else f'{1e3 * cost:.1f}':>8s}{imbalance(cell):11.2f}{rows:11,d}"
        f"{max(cell['bytes_sent']) / 1e9:9.2f}{cell['peak_memory_bytes'] / 1e9:9.1f}{'  WRONG' if cell['wrong'] else ''}"
    )


def table(cells: Cells) -> str:
    """A line for each cell, and for each case what ours gains over each way to do without it. ±: standard errors; waits: what
    the step lasts beyond its busiest rank's work; cost: what transfers cost in all."""
    columns = {"step ms": 10, "±": 6, "waits ms": 9, "cost ms": 8, "imbalance": 11, "most rows": 11, "GB sent": 9, "peak GB": 9}
    lines = [f"{'tokens a rank, mix, engine':52s}" + "".join(f"{name:>{width}s}" for name, width in columns.items())]
    lines += [_line(key.replace("|", " "), cell) for key, cell in cells.items()]
    for case in cases(cells):
        gains, wlb = speedups(cells, case), best_wlb(cells, case)
        shown = {name: gain for name, gain in gains.items() if not name.startswith("wlb_cp") or name == wlb}
        if shown:
            parts = [f"{name} {gain:.3f} ± {ratio_error(cells, case, name):.3f}" for name, gain in shown.items()]
            lines.append(f"{case.replace('|', ' ')}: step time over that of {ours(cells, case)}: {', '.join(parts)}")
        best = best_other(cells, case)
        if best is not None:
            lines.append(f"    the best without disaggregation: {best[0]} {best[1]:.3f}")
        alone = cells.get(f"{case}|data_parallel", {})
        if "data_parallel" in gains:
            lines.append(f"    of data parallelism's step, balancing could save a factor of {imbalance(alone):.3f}")
        chosen = cells.get(f"{case}|auto", {}).get("chosen")
        if chosen:
            lines.append(f"    auto took {chosen}")
    return "\n".join(lines)


def plot(cells: Cells, environment: Mapping[str, Any], path: Path) -> None:
    """Step times by case and engine over that of ours, of what was measured; what waits for transfers is drawn pale on top, and
    a line beside data parallelism marks what its imbalance allows."""
    from matplotlib.figure import Figure

    drawn = [case for case in cases(cells) if speedups(cells, case)]
    bars = {case: _bars(cells, case) for case in drawn}
    names = [name for name in dict.fromkeys((*OURS, *engines(cells))) if any(name in bars[case] for case in drawn)]
    labels = {name: "wlb, best group size" if name.startswith("wlb_cp") else name.replace("_", " ") for name in names}
    kinds = list(dict.fromkeys(labels.values()))
    figure = Figure(
        figsize=(max(7.0, 0.5 + 0.36 * sum(len(found) + 1.2 for found in bars.values())), 4.2), layout="constrained"
    )
    axes = figure.add_subplot()
    ticks, x = [], 0.0
    for case in drawn:
        found = bars[case]
        ticks.append(x + (len(found) - 1) / 2)
        for name in names:
            if name not in found:
                continue
            step, waits = found[name]
            color = f"C{kinds.index(labels[name])}"
            axes.bar(x, step - waits, 0.9, color=color)
            axes.bar(x, waits, 0.9, bottom=step - waits, color=color, alpha=0.4)
            if name == "data_parallel":
                allowed = imbalance(cells[f"{case}|{name}"])
                axes.plot([x - 0.6, x + 0.6], [allowed, allowed], color="black", linewidth=1.5)
            x += 1
        x += 1.2
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(ticks, [_title(case) for case in drawn], fontsize=8)
    axes.set_xlabel("mix of documents, tokens a rank", fontsize=8)
    units = {(ours(cells, case) or "").replace("_", " ") for case in drawn}
    axes.set_ylabel(f"step time over that of {' or '.join(sorted(units))}")
    layers = f"{environment['layers']} layer{'s' if environment['layers'] != 1 else ''}"
    place = f"{environment['ranks']} × {environment['device']}, {layers} of {environment['shape']}"
    axes.set_title(f"{place}\npale: waits for transfers; thick line: what data parallelism's imbalance allows", fontsize=9)
    axes.legend([_patch(f"C{i}") for i in range(len(kinds))], kinds, fontsize=7, ncols=4, loc="upper left")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    figure.savefig(path, dpi=150)


def _bars(cells: Cells, case: str) -> dict[str, tuple[float, float]]:
    """Step and waits over the step of ours, by engine; of the packings by work the fastest."""
    unit, wlb = slowest(cells[f"{case}|{ours(cells, case)}"]["seconds"]), best_wlb(cells, case)
    found = {}
    for engine in engines(cells):
        cell = cells.get(f"{case}|{engine}", {})
        if is_measured(cell) and (not engine.startswith("wlb_cp") or engine == wlb):
            found[engine] = slowest(cell["seconds"]) / unit, max(exposed(cell), 0.0) / unit
    return found


def _title(case: str) -> str:
    tokens, mix = case.split("|")
    return f"{mix.replace('_', ' ')}\n{int(tokens):,}"


def _patch(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)
