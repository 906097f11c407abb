"""The picture of ``distattn bench kernels``: TFLOP/s of each engine on each mask, forward above backward, for one shape."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from distattn.errors import UnsupportedError

COLOURS = {
    "triton": "#4878cf", "cudnn": "#6acc65", "flash": "#b8b8b8", "fa4": "#956cb4", "auto": "#222222", "flex": "#d65f5f",
    "fa4_mask_mod": "#c4ad66", "hopper": "#1f9e9e",
}  # fmt: skip


def draw(results: dict[str, dict[str, Any]], environment: dict[str, str | None], path: Path) -> None:
    """Draw the shape that most cells have. Raises UnsupportedError without matplotlib, or where nothing was measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib: install it with  pip install 'distattn[plot]'") from error
    measured = {tuple(key.split("|")): entry for key, entry in results.items() if "forward_tflops" in entry}
    if not measured:
        raise UnsupportedError("there is nothing to draw: no engine ran on this machine, and the JSON file says why")
    shape = Counter(cell.split(" ", 1)[1] for cell, _ in measured).most_common(1)[0][0]
    cells = [cell for cell in dict.fromkeys(cell for cell, _ in measured) if cell.split(" ", 1)[1] == shape]
    engines = list(dict.fromkeys(engine for _, engine in measured))
    figure = Figure(figsize=(max(6.0, 1.1 * len(cells)), 6.4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    width = 0.8 / len(engines)
    for direction, ax in zip(("forward", "backward"), axes):
        for i, engine in enumerate(engines):
            heights = [measured.get((cell, engine), {}).get(f"{direction}_tflops", 0.0) for cell in cells]
            places = [place + (i - (len(engines) - 1) / 2) * width for place in range(len(cells))]
            ax.bar(places, heights, width, label=engine, color=COLOURS.get(engine))
        ax.set_ylabel(f"{direction}, TFLOP/s")
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=len(engines), frameon=False, fontsize="small")
    axes[0].set_title(
        f"{shape}, {environment.get('device')}, torch {environment.get('torch')}: by exact mask area", fontsize="medium"
    )
    axes[1].set_xticks(range(len(cells)), [cell.split(" ")[0].replace("_", "\n") for cell in cells], fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
