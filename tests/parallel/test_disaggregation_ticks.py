"""Plan only: ticks of ping-pong and of pipelines, and the pictures of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distattn.bench.lengths import draw
from distattn.errors import ConfigError, PlanError
from distattn.mask import Mask
from distattn.parallel.disaggregation.pipeline import (
    PlannedTick,
    pipeline_ticks,
    plan_pipeline,
    split_microbatches,
    tick_stream,
)
from distattn.parallel.disaggregation.ticks import NanoTimes, nano_times, ping_pong
from distattn.parallel.hardware import HARDWARE
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, plan
from distattn.parallel.simulate import predict


def times(linear: float, attention: float, inputs: float, results: float) -> NanoTimes:
    """Alike on two ranks, but that the second takes nothing."""
    return NanoTimes(*(np.array([x, 0.0]) for x in (linear, attention, inputs, results)))


def test_ping_pong_ticks_are_those_of_the_table() -> None:
    ticks = ping_pong((times(4, 3, 2, 1), times(4, 3, 2, 1)), 2)
    assert [(tick.computes, tick.travels) for tick in ticks] == [
        ("CI(0)", ""), ("CI(1)", "QKV(0)"), ("CA(0)", "QKV(1)"), ("CA(1)", "O(0)"),
        ("CI(0)", "O(1)"), ("CI(1)", "QKV(0)"), ("CA(0)", "QKV(1)"), ("CA(1)", "O(0)"),
        ("CI(0)", "O(1)"), ("CI(1)", ""),
    ]  # fmt: skip
    # Everything is hidden: two layers of both nano-batches' computing, and nothing else.
    assert ticks[-1].end == 2 * 2 * (4 + 3)
    assert all(tick.exposed_seconds == 0 for tick in ticks)
    backward = ping_pong((times(4, 3, 2, 1), times(4, 3, 2, 1)), 1, backward=True)
    assert [(tick.computes, tick.travels) for tick in backward] == [
        ("CI(1)", ""), ("CI(0)", "dO(1)"), ("CA(1)", "dO(0)"), ("CA(0)", "dQKV(1)"), ("CI(1)", "dQKV(0)"), ("CI(0)", ""),
    ]  # fmt: skip


def test_what_does_not_hide_is_exposed() -> None:
    """QKV(0) has CI(1) to hide behind, QKV(1) only CA(0)."""
    nano = times(4, 3, 5, 1)
    ticks = ping_pong((nano, nano), 3)
    steady = ticks[4:8]
    assert [tick.exposed_seconds for tick in steady] == [0, 1, 2, 0]
    assert steady[-1].end - steady[0].start == 4 + 5 + 5 + 3
    assert nano.one_by_one == 4 + 5 + 3 + 1


def test_times_of_a_plan_are_its_work_and_its_busiest_links() -> None:
    mask, layout = Mask.documents(draw("wlb", 1 << 18, 0)), Layout.contiguous(1 << 18, 16)
    program = plan(mask, layout, 8, 4)
    prediction = predict(program, mask, HARDWARE["h100"], 128)
    nano = nano_times(program, prediction, np.ones(16))
    rate = HARDWARE["h100"].flops_per_second(backward=False)
    busy = prediction.cost.flops_per_rank / rate
    assert np.allclose(nano.attention, busy, rtol=0, atol=3 * 11e-6)
    sent = max(prediction.cost.bytes_sent_per_rank.max(), prediction.cost.bytes_received_per_rank.max())
    slowest, fastest = (getattr(HARDWARE["h100"], f"{link}_gb_per_second") * 1e9 for link in ("between", "inside"))
    assert sent / fastest / 4 < (nano.inputs + nano.results).max() < 2 * sent / slowest + 1e-4


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_every_stage_does_every_microbatch_once_in_order_of_its_dependencies(stages: int, microbatches: int) -> None:
    ticks = pipeline_ticks(stages, microbatches)
    assert len(ticks) == 2 * (microbatches + stages - 1)
    done: dict[tuple[bool, int, int], int] = {}
    for number, tick in enumerate(ticks):
        for stage, microbatch in enumerate(tick.microbatches):
            if microbatch >= 0:
                key = (tick.backward, stage, microbatch)
                assert key not in done
                done[key] = number
    assert len(done) == 2 * stages * microbatches
    for (backward, stage, microbatch), number in done.items():
        if not backward and stage:
            assert done[False, stage - 1, microbatch] < number
        if backward:
            assert done[False, stage, microbatch] < number
            if stage + 1 < stages:
                assert done[True, stage + 1, microbatch] < number
    assert [tick.backward for tick in ticks[: stages - 1]] == [False] * (stages - 1)


def test_too_few_microbatches_and_uneven_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match="at least as many microbatches as stages, got 2 for 3 stages"):
        pipeline_ticks(3, 2)
    with pytest.raises(PlanError, match="5 ranks cannot be divided over 2 pipeline stages"):
        list(plan_pipeline([[4], [4]], 2, 5, (1, 1), HARDWARE["h100"], head_dim=8))
    options = DisaggregatedOptions(servers=1)
    with pytest.raises(PlanError, match="servers must be 0"):
        list(plan_pipeline([[4], [4]], 2, 4, (1, 1), HARDWARE["h100"], head_dim=8, options=options))
    with pytest.raises(PlanError, match="3 tokens cannot be split into 4 microbatches"):
        split_microbatches([1, 2], 4)


def test_microbatches_have_equal_tokens_and_all_of_them() -> None:
    lengths = [5, 1, 13, 2, 9]
    parts = split_microbatches(lengths, 4)
    assert [sum(part) for part in parts] == [7, 8, 7, 8]
    assert parts == [[5, 1, 1], [8], [4, 2, 1], [8]]


def planned_ticks() -> list[PlannedTick]:
    parts = split_microbatches(draw("wlb", 1 << 16, 1), 3)
    options = DisaggregatedOptions(tolerance=0.02)
    return list(plan_pipeline(parts, 2, 4, (8, 4), HARDWARE["h100"], head_dim=128, options=options))


def test_a_tick_is_one_pool_over_all_stages_and_idle_stages_serve() -> None:
    ticks = planned_ticks()
    first = ticks[0]
    assert first.tick.microbatches == (0, -1)
    assert (first.work_before[2:] == 0).all()
    assert (first.work_after > 0).all()
    for tick in ticks:
        assert tick.after <= 1.0201
        assert tick.before >= tick.after
        assert tick.work_before.sum() == pytest.approx(tick.work_after.sum())
        assert tick.compute_seconds <= tick.seconds
    mask, layout = tick_stream(first.tick, [[3, 5], [8], [8]], 2)
    assert mask.num_queries == 8
    assert layout.counts.tolist() == [4, 4, 0, 0]


def heights_of(axes: Any) -> list[float]:
    """Of all bars, in the order of drawing."""
    return [bar.get_height() for bar in axes.patches]


def test_pictures_show_loads_and_ticks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the extra 'plot'")
    from distattn.parallel.disaggregation.pictures import disaggregated_figure, draw_pipeline, pipeline_figure

    ticks = planned_ticks()
    path = tmp_path / "ticks.png"
    draw_pipeline(ticks, path, title="t", subtitle="s")
    assert path.read_bytes().startswith(b"\x89PNG")
    stages, loads = pipeline_figure(ticks, title="t", subtitle="s").axes[:2]
    assert len(stages.patches) == 2 * len(ticks)
    assert stages.get_xlim()[1] == pytest.approx(sum(tick.seconds for tick in ticks) * 1e3, rel=0.01)
    heights = heights_of(loads)
    assert heights == [t.before for t in ticks] + [t.after for t in ticks]
    with pytest.raises(ConfigError, match="a plot is written as"):
        draw_pipeline(ticks, tmp_path / "ticks.gif", title="t", subtitle="s")
    mask, layout = Mask.documents(draw("wlb", 1 << 16, 0)), Layout.contiguous(1 << 16, 8)
    program = plan(mask, layout, 8, 4)
    prediction = predict(program, mask, HARDWARE["h100"], 128)
    nano = nano_times(program, prediction, np.full(8, 1e-3))
    at_home = np.arange(8) * 1e12
    figure = disaggregated_figure(prediction, at_home, ping_pong((nano, nano), 2), title="t", subtitle="s")
    load = figure.axes[0]
    assert heights_of(load)[:8] == pytest.approx((np.arange(8)).tolist())
    after = prediction.cost.flops_per_rank / 1e12
    assert heights_of(load)[8:] == pytest.approx(after.tolist())
