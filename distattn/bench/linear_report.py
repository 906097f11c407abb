"""The results of ``distattn bench linear`` as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distattn.errors import UnsupportedError

MAX_ERRORS = {"o": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dg": 2e-2, "dbeta": 2e-2}
"""Relative errors (RMS, bf16) above which a cell counts as wrong."""

Results = dict[str, dict[str, dict[str, Any]]]


def cells(results: Results, part: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Of one part, by what stands after its name; of ``ranks``, the number of ranks comes first."""
    found = {}
    for key, cell in results.items():
        first, rest = key.split("|") if "|" in key else (key, "")
        if first.split(" ")[0] == part:
            found[f"{first.removeprefix('ranks').strip()} {rest}".strip() if part == "ranks" else rest] = cell
    return found


def median(entry: dict[str, Any] | None, direction: str) -> float | None:
    """Milliseconds, None where there is no right result."""
    if entry is None or f"{direction}_ms" not in entry or entry.get("wrong"):
        return None
    return entry[f"{direction}_ms"][1]


def tokens_of(key: str) -> int:
    words = key.split(" ")
    return int(next(w[1:] for w in words if w[0] == "T")) * int(next(w[1:] for w in words if w[0] == "B"))


def table(results: Results) -> str:
    """Lines for each part that has cells; then why others are empty."""
    lines: list[str] = []
    kernels, lengths, ranks = (cells(results, part) for part in ("kernel", "length", "ranks"))
    if kernels:
        lines.append("milliseconds on one device, forward / forward + backward")
        lines.append(f"{'':38s}{'ours':>20s}{'fla':>20s}{'fla ÷ ours':>20s}")
    for key, cell in kernels.items():
        mine, theirs = ([median(cell.get(name), way) for way in ("forward", "train")] for name in ("ours", "fla"))
        ratios = [b / a if a and b else None for a, b in zip(mine, theirs, strict=True)]
        lines.append(f"{key:38s}{_pair(mine):>20s}{_pair(theirs):>20s}{_pair(ratios):>20s}")
    if lengths:
        lines.append("nanoseconds a token of ours, forward + backward")
    for key, cell in lengths.items():
        time = median(cell.get("ours"), "train")
        lines.append(f"{key:38s}{'n/a' if time is None else f'{1e6 * time / tokens_of(key):.1f}':>20s}")
    for key, cell in ranks.items():
        alone = median(cell.get("alone"), "train")
        lines.append(f"{key} ranks, forward + backward, slowest rank")
        for name, entry in cell.items():
            time = median(entry, "train")
            text = "n/a" if time is None else f"{time:.3f} ms" + (f", {time / alone:.3f} of alone" if alone else "")
            lines.append(f"  {name:36s}{text}{' !' if entry.get('wrong') else ''}")
    reasons = {
        f"{word} {name}: {entry[word]}"
        for cell in results.values()
        for name, entry in cell.items()
        for word in ("not_run", "failed")
        if word in entry
    }
    return "\n".join([*lines, *sorted(reasons)])


def _pair(values: list[float | None]) -> str:
    return " / ".join("n/a" if x is None else f"{x:.3f}" if x < 100 else f"{x:.1f}" for x in values)


def draw(results: Results, environment: dict[str, str | None], path: Path) -> None:
    """Ratios to fla by operator, nanoseconds a token by length, times of exchanges: a panel each, those that have cells.

    Raises UnsupportedError without matplotlib, or where nothing was measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib: install it with  pip install 'distattn[plot]'") from error
    panels = [
        (part, draw_part)
        for part, draw_part in (("kernel", _draw_kernels), ("length", _draw_lengths), ("ranks", _draw_ranks))
        if any(median(entry, "train") for cell in cells(results, part).values() for entry in cell.values())
    ]
    if not panels:
        raise UnsupportedError("there is nothing to draw: no engine ran on this machine, and the JSON file says why")
    rows: list[list[Any]] = [[part for part, _ in panels[i : i + 2]] for i in range(0, len(panels), 2)]
    if len(rows) > 1:
        rows[-1] *= 2 // len(rows[-1])  # a panel by itself takes the whole row
    figure = Figure(figsize=(7.4 * len(rows[0]), 4.8 * len(rows)), layout="constrained")
    places = figure.subplot_mosaic(rows)
    for part, draw_part in panels:
        axes = places[part]
        draw_part(axes, cells(results, part))
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small", ncols=2)
    figure.suptitle(f"{environment.get('device')}, torch {environment.get('torch')}, forward + backward", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_kernels(axes: Any, found: Results) -> None:
    """Bars of times, ours and fla's beside each other, and above them how many times ours fla's is."""
    for i, name in enumerate(("ours", "fla")):
        heights = [median(cell.get(name), "train") or 0.0 for cell in found.values()]
        axes.bar([x + 0.4 * i - 0.2 for x in range(len(found))], heights, 0.38, label=name)
    for x, cell in enumerate(found.values()):
        mine, theirs = (median(cell.get(name), "train") for name in ("ours", "fla"))
        if mine and theirs:
            axes.annotate(f"{theirs / mine:.2f}", (x, max(mine, theirs)), (0, 2), textcoords="offset points", ha="center")
    _name_ticks(axes, list(found))
    axes.set_ylabel("ms (above: fla ÷ ours)")


def _draw_lengths(axes: Any, found: Results) -> None:
    by_kind: dict[str, list[tuple[int, float]]] = {}
    for key, cell in found.items():
        time = median(cell.get("ours"), "train")
        if time is not None:
            by_kind.setdefault(key.split(" ")[0], []).append((tokens_of(key), 1e6 * time / tokens_of(key)))
    for kind, points in by_kind.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=kind)
    counts = sorted({tokens_of(key) for key in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_ylim(0, 1.4 * max(time for points in by_kind.values() for _, time in points))  # room for the legend
    axes.set_xlabel("tokens")
    axes.set_ylabel("ns a token")


def _draw_ranks(axes: Any, found: Results) -> None:
    """Bars of each engine's time over that of ranks that exchange nothing."""
    engines = [name for name in dict.fromkeys(name for cell in found.values() for name in cell) if name != "alone"]
    width = 0.85 / max(len(engines), 1)
    for i, name in enumerate(engines):
        alone = [median(cell.get("alone"), "train") for cell in found.values()]
        times = [median(cell.get(name), "train") for cell in found.values()]
        heights = [time / base if time and base else 0.0 for time, base in zip(times, alone, strict=True)]
        axes.bar([x + (i + 0.5) * width - 0.425 for x in range(len(found))], heights, width, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.margins(y=0.25)  # room for the legend
    _name_ticks(axes, [" ".join([*key.split(" ")[1:], f"P{key.split(' ')[0]}"]) for key in found])
    axes.set_ylabel("time over that without exchange")


def _name_ticks(axes: Any, keys: list[str]) -> None:
    """Kinds and what sets shapes apart as ticks, what all have in common below."""
    words = [key.split(" ") for key in keys]
    common = {word for word in words[0][1:] if all(word in other for other in words)}
    labels = ["\n".join(word for word in key if word not in common) for key in words]
    axes.set_xticks(range(len(keys)), labels, fontsize="small")
    axes.set_xlabel(" ".join(word for word in words[0] if word in common))
