"""Plan only: what a picture shows, read back from its bars and labels."""

import struct
from pathlib import Path

import numpy as np
import pytest

from distattn.errors import ConfigError
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.draw import draw_plan, plan_figure
from distattn.parallel.hardware import HARDWARE
from distattn.parallel.layout import Layout
from distattn.parallel.program import Program
from distattn.parallel.schedulers import all_gather, ring, ulysses
from distattn.parallel.simulate import Prediction, predict

pytest.importorskip("matplotlib", reason="drawing needs the extra 'plot'")
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text


def planned(ranks: int, rows: int = 4096, scheduler=ring, backward: bool = False) -> tuple[Program, Prediction]:
    mask = Mask.causal(rows)
    program = scheduler.plan(mask, Layout.contiguous(rows, ranks), 64, 8)
    if backward:
        program = derive_backward(program)
    return program, predict(program, mask, HARDWARE["h100"], 128)


def bars(axes: Axes) -> list[list[tuple[float, float, float]]]:
    """(centre row, start, end) of each bar, by collection."""
    out = []
    for collection in axes.collections:
        assert isinstance(collection, PolyCollection)
        corners = [np.asarray(path.vertices) for path in collection.get_paths()]
        out.append([(float(c[:, 1].mean().round()), c[:, 0].min(), c[:, 0].max()) for c in corners])
    return out


def face_colours(axes: Axes) -> list[str]:
    return [to_hex(tuple(colour)) for colour in np.asarray(axes.collections[0].get_facecolor())]


def labels_out_of_view(axis: Axis) -> list[Text]:
    """Tick labels that matplotlib keeps but does not draw."""
    low, high = sorted(axis.get_view_interval())
    slack = 1e-6 * (high - low)
    return [tick.label1 for tick in axis.get_major_ticks() if not low - slack <= tick.get_loc() <= high + slack]


def texts_overlap(figure: Figure) -> list[str]:
    """Visible texts of the figure that lie on another one or leave the canvas."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer, wrong = canvas.get_renderer(), []
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    unseen = {label for axis in figure.findobj(Axis) if isinstance(axis, Axis) for label in labels_out_of_view(axis)}
    drawn = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip() and t not in unseen]
    for i, (name, box) in enumerate(drawn):
        if box.x0 < -1 or box.y0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1:
            wrong.append(f"{name} leaves the canvas")
        wrong += [f"{name} on {other}" for other, second in drawn[:i] if box.padded(-1).overlaps(second.padded(-1))]
    return wrong


def test_compute_and_waiting_fill_every_rank_and_transfers_are_all_there():
    program, prediction = planned(4)
    compute, waiting, receiving = bars(plan_figure(program, prediction, title="t").axes[0])
    total = prediction.seconds / 1e-6
    for rank in range(4):
        busy = sum(end - start for row, start, end in compute + waiting if row == rank)
        assert busy == pytest.approx(total)
    assert len(compute) == len(program.attends)
    assert len(receiving) == len(prediction.cost.messages)
    line = prediction.timeline
    assert max(end for _, _, end in receiving) == pytest.approx(line.received.max() / 1e-6)


def test_colours_follow_the_owner_of_the_keys():
    program, prediction = planned(4)
    axes = plan_figure(program, prediction, title="t").axes[0]
    rows, starts, _ = zip(*bars(axes)[0])
    colours = face_colours(axes)
    seen = {rank: [c for _, r, c in sorted(zip(starts, rows, colours)) if r == rank] for rank in range(4)}
    own = {rank: seen[rank][0] for rank in range(4)}
    assert len(set(own.values())) == 4
    assert seen[3] == [own[3], own[2], own[1], own[0]]
    assert seen[0] == [own[0]]


def test_keys_of_several_ranks_are_grey_and_named():
    program, prediction = planned(4, scheduler=ulysses)
    axes = plan_figure(program, prediction, title="t").axes[0]
    assert set(face_colours(axes)) == {"#5b6675"}
    legend = axes.get_legend()
    assert legend is not None
    assert "keys of several ranks" in [text.get_text() for text in legend.get_texts()]


def test_load_and_traffic_are_those_of_the_cost():
    program, prediction = planned(4)
    figure = plan_figure(program, prediction, title="t")
    load, traffic = figure.axes[1], figure.axes[2]
    widths = [patch.get_width() for patch in load.patches if isinstance(patch, Rectangle)]
    assert widths == pytest.approx((prediction.cost.flops_per_rank / 1e9).tolist())
    shown = np.ma.filled(np.ma.asarray(traffic.images[0].get_array()), 0)
    assert shown == pytest.approx(prediction.cost.traffic / 1e6)


def test_the_heading_gives_direction_time_and_efficiency():
    program, prediction = planned(4, backward=True)
    figure = plan_figure(program, prediction, title="ring · causal")
    title, summary = (text.get_text() for text in figure.texts)
    assert title == "ring · causal"
    assert summary.startswith("backward ")
    assert f"efficiency {prediction.efficiency:.1%}" in summary
    assert f"imbalance {prediction.cost.imbalance:.3f}" in summary


@pytest.mark.parametrize(
    ("ranks", "scheduler"), [(2, ring), (8, ulysses), (64, all_gather)], ids=["2-ring", "8-ulysses", "64-all_gather"]
)
def test_labels_do_not_overlap_at_any_size(ranks: int, scheduler):
    program, prediction = planned(ranks, 1 << 15, scheduler)
    title = "all_gather · per_document_zigzag · documents 30000,2000,500,98000 (130,500 tokens) · 64 ranks"
    figure = plan_figure(program, prediction, title=title)
    assert texts_overlap(figure) == []
    assert figure.axes[0].get_position().width > 0.48, "the legend takes the room of the timeline"


def test_nothing_to_do_can_be_drawn():
    mask = Mask.causal(8).cut(0, 0, 0, 0)
    program = ring.plan(mask, Layout.contiguous(8, 3), 1, 1)
    figure = plan_figure(program, predict(program, mask, HARDWARE["cpu"], 8), title="t")
    assert texts_overlap(figure) == []


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_files_are_of_their_kind(tmp_path: Path, suffix: str, magic: bytes):
    program, prediction = planned(2)
    path = tmp_path / f"plan.{suffix}"
    draw_plan(program, prediction, path, title="t")
    data = path.read_bytes()
    assert data.startswith(magic)
    if suffix == "png":
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 2000
        assert height >= 600


@pytest.mark.parametrize(
    ("name", "message"), [("plan.jpeg", r"written as \.png, \.pdf, \.svg"), ("no/plan.png", "folder does not exist")]
)
def test_paths_that_cannot_be_written_are_refused(tmp_path: Path, name: str, message: str):
    program, prediction = planned(2)
    with pytest.raises(ConfigError, match=message):
        draw_plan(program, prediction, tmp_path / name, title="t")
