"""Pictures of disaggregated plans: load before and after, traffic, ping-pong ticks; and a pipeline's ticks.

Need matplotlib (the extra ``plot``); never touch pyplot's global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distattn.errors import ConfigError
from distattn.parallel.disaggregation.pipeline import PlannedTick
from distattn.parallel.disaggregation.ticks import Tick
from distattn.parallel.draw import check_plot_path, draw_traffic, flop_unit, plain_axes, time_unit
from distattn.parallel.simulate import Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEFORE, _AFTER, _TEXT, _FAINT = "#d9a066", "#4477aa", "#222222", "#666666"
_PHASES = {"CI(0)": "#9db8d2", "CI(1)": "#c9d8e6", "CA(0)": "#e0873a", "CA(1)": "#f2bd8c"}
_TRANSFERS = {"0": "#3b4a5a", "1": "#9aa5b1"}
_SHOWN_RANKS = 6


def draw_disaggregated(
    prediction: Prediction, work_before: np.ndarray, ticks: Sequence[Tick], path: str | Path, *, title: str, subtitle: str
) -> None:
    """Write the picture of a plan to ``path`` (.png, .pdf or .svg).

    prediction: of the plan. work_before: FLOPs of each rank at home, float64 [P]. ticks: of ping-pong over it. Raises as
    ``draw_plan`` does.
    """
    check_plot_path(path)
    _save(disaggregated_figure(prediction, work_before, ticks, title=title, subtitle=subtitle), path)


def disaggregated_figure(
    prediction: Prediction, work_before: np.ndarray, ticks: Sequence[Tick], *, title: str, subtitle: str
) -> Figure:
    """The picture as a matplotlib Figure."""
    figure = _figure(15, 8.6, title, subtitle)
    grid = figure.add_gridspec(2, 2, width_ratios=(2.5, 1), height_ratios=(1.25, 1))
    load, traffic = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    _draw_loads(load, work_before, prediction.cost.flops_per_rank.astype(np.float64))
    draw_traffic(figure, traffic, prediction)
    _draw_ticks(figure.add_subplot(grid[1, :]), ticks)
    return figure


def draw_pipeline(ticks: Sequence[PlannedTick], path: str | Path, *, title: str, subtitle: str) -> None:
    """Write the picture of a pipeline's ticks to ``path``. Raises as ``draw_plan`` does."""
    check_plot_path(path)
    _save(pipeline_figure(ticks, title=title, subtitle=subtitle), path)


def pipeline_figure(ticks: Sequence[PlannedTick], *, title: str, subtitle: str) -> Figure:
    """The picture as a matplotlib Figure."""
    stages = len(ticks[0].tick.microbatches)
    figure = _figure(15, 5.6 + 0.45 * min(stages, 12), title, subtitle)
    grid = figure.add_gridspec(2, 1, height_ratios=(0.45 * min(stages, 12) + 0.6, 2.6))
    _draw_stages(figure.add_subplot(grid[0]), ticks)
    _draw_tick_loads(figure.add_subplot(grid[1]), ticks)
    return figure


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.72 / height), w_pad=0.1, h_pad=0.12)
    figure.text(0.01, 1 - 0.12 / height, title, ha="left", va="top", fontsize=13, fontweight="bold", color=_TEXT)
    figure.text(0.01, 1 - 0.42 / height, subtitle, ha="left", va="top", fontsize=11, color=_TEXT)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=150, facecolor="white")
    except OSError as error:
        raise ConfigError(f"cannot write the plot to {str(path)!r}: {error.strerror or error}") from error


def _draw_loads(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    """Work of each rank: at home as wide pale bars, as planned as narrow dark ones before them."""
    from matplotlib.ticker import MaxNLocator

    unit, name = flop_unit(float(max(before.max(initial=0), after.max(initial=0))))
    ranks, mean = np.arange(len(after)), float(after.mean()) / unit
    worst = [x.max() / x.mean() if x.any() else 1.0 for x in (before, after)]
    many = len(after) > 64
    axes.bar(ranks, before / unit, width=1.0 if many else 0.86, color=_BEFORE, label=f"at home: busiest {worst[0]:.2f} × mean")
    width = 1.0 if many else 0.5
    axes.bar(ranks, after / unit, width=width, color=_AFTER, alpha=0.8, label=f"as planned: busiest {worst[1]:.3f} × mean")
    axes.axhline(mean, color=_TEXT, linestyle=(0, (4, 3)), linewidth=1, label=f"mean {mean:,.3g} {name}")
    axes.set_xlim(-0.6, len(after) - 0.4)
    axes.set_ylabel(f"attention, {name}", fontsize=11)
    axes.set_xlabel("rank", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_axes(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=10, borderaxespad=0.2)


def _draw_ticks(axes: Axes, ticks: Sequence[Tick]) -> None:
    """A few ranks, the busiest ones of each kind among them: computing above, travelling below."""
    unit, name = time_unit(ticks[-1].end)
    shown = _shown_ranks(ticks)
    for row, rank in enumerate(shown):
        for tick in ticks:
            start = tick.start / unit
            computes, travels = tick.compute_seconds[rank] / unit, tick.travel_seconds[rank] / unit
            axes.barh(row - 0.14, computes, 0.5, start, color=_PHASES[tick.computes], edgecolor="white", linewidth=0.5)
            if tick.travels:
                axes.barh(row + 0.27, travels, 0.2, start, color=_TRANSFERS[tick.travels[-2]], linewidth=0)
    for tick in ticks:
        axes.axvline(tick.end / unit, color="#cccccc", linewidth=0.6, zorder=0)
    _label_ticks(axes, ticks, unit)
    axes.set_ylim(len(shown) - 0.5, -0.55)
    axes.set_xlim(0, ticks[-1].end / unit)
    axes.set_yticks(range(len(shown)), [f"rank {rank}" for rank in shown])
    axes.set_xlabel(f"time [{name}]: ping-pong of two such nano-batches, forward", fontsize=11)
    plain_axes(axes)
    _legend_below(axes)


def _shown_ranks(ticks: Sequence[Tick]) -> list[int]:
    num_ranks = len(ticks[0].compute_seconds)
    if num_ranks <= _SHOWN_RANKS:
        return list(range(num_ranks))
    busiest = {int(tick.travel_seconds.argmax()) for tick in ticks if tick.travels}
    busiest |= {int(tick.compute_seconds.argmax()) for tick in ticks if tick.computes.startswith("CA")}
    spread = np.linspace(0, num_ranks - 1, _SHOWN_RANKS).round().astype(int).tolist()
    return sorted([*sorted(busiest)[:_SHOWN_RANKS], *(rank for rank in spread if rank not in busiest)][:_SHOWN_RANKS])


def _label_ticks(axes: Axes, ticks: Sequence[Tick], unit: float) -> None:
    """What computes and travels, over each tick that is wide enough for the words."""
    total = ticks[-1].end
    for tick in ticks:
        if tick.end - tick.start > 0.035 * total:
            text = f"{tick.computes}\n{tick.travels or '–'}"
            middle = (tick.start + tick.end) / 2 / unit
            axes.text(
                middle, 1.01, text, ha="center", va="bottom", fontsize=8, color=_FAINT, transform=axes.get_xaxis_transform()
            )


def _legend_below(axes: Axes) -> None:
    from matplotlib.patches import Patch

    names = {"CI": "linear layers", "CA": "attention"}
    handles = [
        Patch(color=colour, label=f"{names[phase[:2]]}, nano-batch {phase[3]}")
        for phase, colour in sorted(_PHASES.items(), key=lambda item: item[0][::-1])
    ]
    handles += [Patch(color=colour, label=f"travelling, nano-batch {nano}") for nano, colour in _TRANSFERS.items()]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=6, frameon=False, fontsize=9, labelcolor=_TEXT
    )


def _draw_stages(axes: Axes, ticks: Sequence[PlannedTick]) -> None:
    """A box a stage and tick, coloured by microbatch; ticks are as wide as they take."""
    from matplotlib import colormaps

    unit, name = time_unit(sum(tick.seconds for tick in ticks))
    microbatches = 1 + max(max(tick.tick.microbatches) for tick in ticks)
    colours = colormaps["turbo"](np.linspace(0.16, 0.86, microbatches))
    now, total = 0.0, sum(tick.seconds for tick in ticks)
    for planned in ticks:
        width = planned.seconds / unit
        for stage, microbatch in enumerate(planned.tick.microbatches):
            style: dict[str, Any] = {"facecolor": "#f3f3f3", "hatch": "/////", "edgecolor": "#b0b0b0"}
            if microbatch >= 0:
                style = {
                    "facecolor": colours[microbatch],
                    "edgecolor": "white",
                    "alpha": 0.55 if planned.tick.backward else 1.0,
                }
            axes.barh(stage, width, 0.86, now, linewidth=0.6, **style)
            if microbatch >= 0 and planned.seconds > 0.012 * total:
                text = f"{'B' if planned.tick.backward else 'F'}{microbatch}"
                axes.text(now + width / 2, stage, text, ha="center", va="center", fontsize=8, color=_TEXT)
        now += width
    stages = len(ticks[0].tick.microbatches)
    axes.set_xlim(0, now)
    axes.set_ylim(stages - 0.5, -0.5)
    axes.set_yticks(range(stages))
    axes.set_ylabel("stage", fontsize=11)
    axes.set_xlabel(
        f"time of attention, one layer a stage [{name}]   (F, B: forward, backward of a microbatch; hatched: serves)"
    )
    plain_axes(axes)


def _draw_tick_loads(axes: Axes, ticks: Sequence[PlannedTick]) -> None:
    """Busiest rank over the mean of all ranks, tick by tick, at home and as planned."""
    at = np.arange(len(ticks))
    before, after = ([getattr(tick, which) for tick in ticks] for which in ("before", "after"))
    axes.bar(at - 0.2, before, 0.38, color=_BEFORE, label="at home")
    axes.bar(at + 0.2, after, 0.38, color=_AFTER, label="as planned, over all stages")
    axes.axhline(1, color=_TEXT, linestyle=(0, (4, 3)), linewidth=1)
    labels = [f"{'B' if tick.tick.backward else 'F'}" for tick in ticks]
    axes.set_xticks(at, labels)
    axes.set_xlim(-0.6, len(ticks) - 0.4)
    axes.set_xlabel("tick (F, B: forward, backward)", fontsize=11)
    axes.set_ylabel("busiest rank ÷ mean", fontsize=11)
    plain_axes(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=10, borderaxespad=0.2)
