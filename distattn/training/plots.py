"""``loss.png``: the loss over the steps, and the held-out loss by position in the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SMOOTHING_POINTS = 100


def draw_losses(path: Path, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> str | None:
    """Draw lines of metrics.jsonl and of evaluations.json; returns why there is no picture, or None where there is one."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "loss.png was not drawn, because matplotlib is not installed: pip install 'distattn[plot]'"
    # A Figure without pyplot needs no display and touches no global state.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_steps, over_positions = figure.subplots(1, 2)
    _draw_steps(over_steps, steps, evaluations)
    _draw_positions(over_positions, evaluations)
    figure.savefig(path, dpi=130)
    return None


def _draw_steps(axes: Any, steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> None:
    x = [line["step"] for line in steps]
    y = [line["loss"] for line in steps]
    axes.plot(x, y, color="tab:blue", alpha=0.35, linewidth=0.8, label="each step")
    axes.plot(x, _smooth(y), color="tab:blue", linewidth=1.6, label="training, smoothed")
    if evaluations:
        held_out = ([line["step"] for line in evaluations], [line["loss"] for line in evaluations])
        axes.plot(*held_out, "o", color="tab:red", label=f"held out: {evaluations[-1]['loss']:.3f}")
        _draw_bigram(axes, evaluations[-1]["bigram_loss"])
    axes.set(title="Loss over steps", xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_positions(axes: Any, evaluations: Sequence[Mapping[str, Any]]) -> None:
    axes.set(title="Held-out loss by position in the context", xlabel="tokens before, in the document", ylabel="nats per token")
    axes.grid(alpha=0.3)
    if not evaluations:
        return
    last = evaluations[-1]
    bins = zip(last["position_edges"][:-1], last["position_edges"][1:], last["position_loss"], strict=True)
    # The middle of a bin on a logarithmic axis, which has no zero.
    points = [((max(a, 0.5) * b) ** 0.5, loss) for a, b, loss in bins if loss is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], "o-", color="tab:red", label=f"step {last['step']}")
    _draw_bigram(axes, last["bigram_loss"])
    axes.set_xscale("log")
    axes.legend()


def _draw_bigram(axes: Any, loss: float | None) -> None:
    if loss is not None:
        axes.axhline(loss, color="black", linestyle="--", linewidth=1, label=f"bigram: {loss:.3f}")


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a hundredth of the points, without the pull of the start."""
    keep = 1 - 1 / max(1.0, len(values) / _SMOOTHING_POINTS)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
