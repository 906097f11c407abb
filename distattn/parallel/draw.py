"""A picture of a predicted schedule: what each rank does when, how much work it has, who sends how much to whom.

One row a rank. Upper bar: computing, coloured by the rank whose keys are attended to, or waiting (hatched). Thin lower bar:
receiving. Needs matplotlib (the extra ``plot``); never touches pyplot's global state.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distattn.errors import ConfigError, UnsupportedError
from distattn.parallel.cost import M_BYTES, M_DST, M_SRC
from distattn.parallel.csr import expand
from distattn.parallel.program import ATTEND_H0, ATTEND_H1, ATTEND_KV_ROWS, ATTEND_Q, ATTEND_STAGE, SLOT_RANK, Program
from distattn.parallel.simulate import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dark enough to stand on white, apart for colour-blind readers in pairs; ranks beyond take a continuous map.
_FEW = ("#4477aa", "#ee8866", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#997700", "#bb5566", "#44bb99", "#7b68b5")
_SEVERAL = "#5b6675"
_WAIT, _WAIT_EDGE = "#f3f3f3", "#b0b0b0"
_INSIDE, _BETWEEN = "#3b4a5a", "#d62728"
_LOAD, _TEXT, _FAINT = "#8aa4c4", "#222222", "#666666"
# (top, height) within a row of height 1 around the rank: computing, then receiving in a node and between nodes.
_COMPUTE, _INSIDE_LANE, _BETWEEN_LANE = (-0.44, 0.56), (0.15, 0.13), (0.29, 0.13)
_FORMATS = (".png", ".pdf", ".svg")


def draw_plan(program: Program, prediction: Prediction, path: str | Path, *, title: str) -> None:
    """Write the picture of a program's prediction to ``path`` (.png, .pdf or .svg).

    title: what is planned (strategy, mask, …); the numbers are added. Raises UnsupportedError without matplotlib and
    ConfigError for another file type or a folder that cannot be written to.
    """
    check_plot_path(path)
    figure = plan_figure(program, prediction, title=title)
    try:
        figure.savefig(path, dpi=150, facecolor="white")
    except OSError as error:
        raise ConfigError(f"cannot write the plot to {str(path)!r}: {error.strerror or error}") from error


def check_plot_path(path: str | Path) -> None:
    """Refuse what ``draw_plan`` could not write, before the work of planning."""
    if Path(path).suffix.lower() not in _FORMATS:
        raise ConfigError(f"a plot is written as {', '.join(_FORMATS)}, got {str(path)!r}")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"cannot write the plot to {str(path)!r}: its folder does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("drawing needs matplotlib: install it with  pip install 'distattn[plot]'") from error


def plan_figure(program: Program, prediction: Prediction, *, title: str) -> Figure:
    """The picture as a matplotlib Figure."""
    from matplotlib.figure import Figure

    ranks = program.num_ranks
    height = min(max(0.5 * ranks, 2.4), 7.0) + 2.0
    figure = Figure(figsize=(15, height))
    # Tick labels at the ends overhang their axes, hence the padding; the upper edge is for the title.
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.72 / height), w_pad=0.1)
    grid = figure.add_gridspec(1, 3, width_ratios=(3.4, 0.8, 1.35))
    timeline = figure.add_subplot(grid[0, 0])
    load = figure.add_subplot(grid[0, 1], sharey=timeline)
    traffic = figure.add_subplot(grid[0, 2])
    _draw_timeline(timeline, program, prediction)
    _draw_load(load, prediction)
    draw_traffic(figure, traffic, prediction)
    figure.text(0.01, 1 - 0.12 / height, title, ha="left", va="top", fontsize=13, fontweight="bold", color=_TEXT)
    figure.text(0.01, 1 - 0.42 / height, _summary(prediction), ha="left", va="top", fontsize=11, color=_TEXT)
    return figure


def _summary(prediction: Prediction) -> str:
    cost = prediction.cost
    unit, name = time_unit(prediction.seconds)
    decimals = int(np.clip(2 - np.floor(np.log10(max(prediction.seconds / unit, 1e-9))), 0, 2))
    parts = (
        prediction.seconds,
        prediction.ideal_seconds,
        prediction.free_links_seconds - prediction.ideal_seconds,
        prediction.exposed_communication_seconds,
    )
    total, ideal, uneven, exposed = (f"{max(x, 0) / unit:,.{decimals}f}" for x in parts)
    return (
        f"{'backward' if cost.backward else 'forward'} {total} {name} predicted on {prediction.hardware.name} = {ideal} ideal"
        f" + {uneven} imbalance and launches + {exposed} exposed communication   ·   efficiency {prediction.efficiency:.1%}"
        f"   ·   imbalance {cost.imbalance:.3f}"
    )


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds in the unit that suits a time, its name)."""
    return next((u for u in ((1.0, "s"), (1e-3, "ms")) if seconds >= u[0]), (1e-6, "µs"))


def _byte_unit(num_bytes: float) -> tuple[float, str]:
    return next((u for u in ((1e9, "GB"), (1e6, "MB")) if num_bytes >= u[0]), (1e3, "kB"))


def flop_unit(flops: float) -> tuple[float, str]:
    """(FLOPs in the unit that suits a number of them, its name)."""
    return next((u for u in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")) if flops >= u[0]), (1e6, "MFLOP"))


def _draw_timeline(axes: Axes, program: Program, prediction: Prediction) -> None:
    unit, name = time_unit(prediction.seconds)
    ranks, few = program.num_ranks, program.num_ranks <= 16
    line, messages = prediction.timeline, prediction.cost.messages
    rank, start, end, source = _compute_spans(program, prediction)
    edge = {"edgecolors": "white", "linewidths": 0.5} if few else {"linewidths": 0}
    _bars(axes, rank, start / unit, end / unit, _COMPUTE, facecolors=_colours(source, ranks), **edge)
    idle = np.concatenate([line.go, np.full((ranks, 1), line.seconds)], 1)
    busy = np.concatenate([line.arrive, line.go[:, -1:]], 1)
    waiting, at = np.nonzero(idle - busy > 1e-4 * line.seconds)
    hatch = {"hatch": "/////", "edgecolors": _WAIT_EDGE, "linewidths": 0} if few else {"linewidths": 0}
    grey = _WAIT if few else "#dddddd"
    _bars(axes, waiting, busy[waiting, at] / unit, idle[waiting, at] / unit, _COMPUTE, facecolors=grey, **hatch)
    between = prediction.hardware.crosses_nodes(messages[:, M_SRC], messages[:, M_DST])
    for chosen, colour, lane in ((~between, _INSIDE, _INSIDE_LANE), (between, _BETWEEN, _BETWEEN_LANE)):
        sent, received = line.sent[chosen] / unit, line.received[chosen] / unit
        _bars(axes, messages[chosen, M_DST], sent, received, lane, facecolors=colour, linewidths=0)
    axes.axvline(prediction.ideal_seconds / unit, color=_TEXT, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_xlim(0, line.seconds / unit * 1.005 or 1)
    axes.set_ylim(ranks - 0.5, -0.55)
    axes.set_yticks(range(0, ranks, 1 if ranks <= 16 else 2 ** int(np.ceil(np.log2(ranks / 16)))))
    axes.set_ylabel("rank", fontsize=11)
    axes.set_xlabel(f"time [{name}]", fontsize=11)
    plain_axes(axes)
    _legend(axes, np.unique(source), ranks, waits=len(waiting) > 0, between=bool(between.any()), inside=not between.all())


def _compute_spans(program: Program, prediction: Prediction) -> tuple[np.ndarray, ...]:
    """Each stage's compute cut by whose keys it attends to, by share of the work: (rank, start, end, source) arrays."""
    attends, line = program.attends, prediction.timeline
    work = prediction.cost.attend_area * (attends[:, ATTEND_H1] - attends[:, ATTEND_H0])
    rank, stage = program.slots[attends[:, ATTEND_Q], SLOT_RANK], attends[:, ATTEND_STAGE]
    source = _key_owner(program)[attends[:, ATTEND_KV_ROWS]]
    cell = rank * program.num_stages + stage
    key, part = np.unique(cell * (program.num_ranks + 1) + source + 1, return_inverse=True)
    amount = np.bincount(part.ravel(), weights=work, minlength=len(key))
    cell, source = key // (program.num_ranks + 1), key % (program.num_ranks + 1) - 1
    total = np.bincount(cell, weights=amount, minlength=program.num_ranks * max(program.num_stages, 1))
    upto = np.cumsum(amount)
    before_cell = (np.cumsum(total) - total)[cell]
    rank, stage = cell // max(program.num_stages, 1), cell % max(program.num_stages, 1)
    begin, length = line.go[rank, stage], line.done[rank, stage] - line.go[rank, stage]
    share = np.maximum(total[cell], 1)
    start, end = begin + length * (upto - amount - before_cell) / share, begin + length * (upto - before_cell) / share
    drawn = amount > 0
    return rank[drawn], start[drawn], end[drawn], source[drawn]


def _key_owner(program: Program) -> np.ndarray:
    """The rank that owns all rows of each row set, or −1 where several do; int64 [N]."""
    layout = program.layout
    order = np.argsort(layout.ranges[:, 0], kind="stable")
    starts, owners = layout.ranges[order, 0], layout.range_owner[order]
    first = np.searchsorted(starts, program.row_ranges[:, 0], "right") - 1
    piece, at = expand(first, np.searchsorted(starts, program.row_ranges[:, 1], "left") - first)
    row_set = np.repeat(np.arange(len(program.row_ptr) - 1), np.diff(program.row_ptr))[piece]
    low, high = np.full(len(program.row_ptr) - 1, program.num_ranks), np.full(len(program.row_ptr) - 1, -1)
    np.minimum.at(low, row_set, owners[at])
    np.maximum.at(high, row_set, owners[at])
    return np.where(low == high, low, -1)


def _bars(axes: Axes, rank: np.ndarray, start: np.ndarray, end: np.ndarray, box: tuple[float, float], **style: Any) -> None:
    """Horizontal bars in the ranks' rows, as one collection: tens of thousands of them stay quick."""
    from matplotlib.collections import PolyCollection

    if not len(rank):
        return
    top, bottom = rank + box[0], rank + box[0] + box[1]
    corners = np.stack([np.stack([start, end, end, start], 1), np.stack([top, top, bottom, bottom], 1)], 2)
    axes.add_collection(PolyCollection(list(corners), **style))


def _colours(source: np.ndarray, ranks: int) -> np.ndarray:
    """RGBA of each source rank, float [n, 4]; −1 is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba_array

    if ranks <= len(_FEW):
        table = to_rgba_array([*_FEW[:ranks], _SEVERAL])
    else:
        table = np.concatenate([colormaps["turbo"](np.linspace(0.06, 0.94, ranks)), to_rgba_array(_SEVERAL)])
    return table[source]


def _legend(axes: Axes, sources: np.ndarray, ranks: int, *, waits: bool, inside: bool, between: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    own = sources[sources >= 0]
    if ranks > len(_FEW):
        own = own[np.unique(np.linspace(0, len(own) - 1, 6).round().astype(int))] if len(own) else own
    handles: list[Any] = [
        Patch(color=_colours(own[i : i + 1], ranks)[0], label=f"{'keys of rank ' if i == 0 else ''}{own[i]}")
        for i in range(len(own))
    ]
    if (sources < 0).any():
        handles.append(Patch(color=_SEVERAL, label="keys of several ranks"))
    if waits:
        hatch = "/////" if ranks <= 16 else None
        colour = _WAIT if hatch else "#dddddd"
        handles.append(Patch(facecolor=colour, edgecolor=_WAIT_EDGE, linewidth=0, hatch=hatch, label="waiting"))
    if inside:
        handles.append(Line2D([], [], color=_INSIDE, linewidth=3, label="receiving" + " in node" * between))
    if between:
        handles.append(Line2D([], [], color=_BETWEEN, linewidth=3, label="receiving between nodes"))
    handles.append(Line2D([], [], color=_TEXT, linestyle=(0, (4, 3)), linewidth=1, label="ideal"))
    letters = sum(len(handle.get_label()) + 5 for handle in handles)
    columns = len(handles) if letters <= 115 else -(-len(handles) // 2)
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, frameon=False, fontsize=9,
        handlelength=1.2, columnspacing=0.9, handletextpad=0.4, borderaxespad=0.2, labelcolor=_TEXT,
    )  # fmt: skip


def _draw_load(axes: Axes, prediction: Prediction) -> None:
    flops = prediction.cost.flops_per_rank
    unit, name = flop_unit(float(flops.max(initial=0)))
    axes.barh(np.arange(len(flops)), flops / unit, height=0.84 if len(flops) <= 16 else 1.0, color=_LOAD)
    mean = float(flops.mean()) / unit
    axes.axvline(mean, color=_TEXT, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_xlim(0, float(flops.max(initial=0)) / unit * 1.12 or 1)
    axes.set_title(f"work   (mean {mean:,.3g})", fontsize=10, loc="left", color=_TEXT)
    axes.set_xlabel(f"{name} per rank", fontsize=11)
    axes.tick_params(labelleft=False)
    plain_axes(axes)


def draw_traffic(figure: Figure, axes: Axes, prediction: Prediction) -> None:
    """A matrix of bytes from rank to rank; numbers in the cells of few ranks, else a colour scale below."""
    traffic = prediction.cost.traffic
    ranks = len(traffic)
    unit, name = _byte_unit(float(traffic.max(initial=0)))
    values = np.where(traffic > 0, traffic / unit, np.nan)
    axes.set_facecolor("#f7f7f7")
    axes.set_anchor("N")
    image = axes.imshow(values, cmap="YlGnBu", vmin=0, vmax=max(float(traffic.max(initial=0)) / unit, 1e-9))
    axes.set_title(f"traffic [{name}]", fontsize=10, loc="left", color=_TEXT)
    axes.set_xlabel("to rank", fontsize=11)
    axes.set_ylabel("from rank", fontsize=11)
    step = 1 if ranks <= 8 else 2 ** int(np.ceil(np.log2(ranks / 8)))
    axes.set_xticks(range(0, ranks, step))
    axes.set_yticks(range(0, ranks, step))
    if ranks <= 8:
        dark = 0.55 * float(np.nanmax(values)) if (traffic > 0).any() else 0
        for i, j in np.argwhere(traffic > 0).tolist():
            colour = "white" if values[i, j] > dark else _TEXT
            axes.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", fontsize=8, color=colour)
    elif (traffic > 0).any():
        bar = figure.colorbar(image, cax=axes.inset_axes((0, -0.24, 1, 0.035)), orientation="horizontal")
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.tick_params(colors=_FAINT, labelsize=9, length=3)
    plain_axes(axes)
    if not len(prediction.cost.messages) or not prediction.cost.messages[:, M_BYTES].any():
        axes.text(0.5, 0.5, "nothing is sent", ha="center", va="center", transform=axes.transAxes, color=_FAINT)


def plain_axes(axes: Axes) -> None:
    """Axes as all pictures have them: no box, faint ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aaaaaa")
    axes.tick_params(colors=_FAINT, labelsize=10, length=3)
