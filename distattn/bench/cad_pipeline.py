"""The pipeline half of ``cad_model``: ticks in which all stages are one pool, against stages that compute their own."""

from __future__ import annotations

from distattn.bench.cad_model import (
    MEMORY_SLACK,
    RANK_TOKENS,
    Prices,
    Setting,
    dealt_by_tokens,
    group_seconds,
    layer_times,
    packed_by_work,
    predicted,
)
from distattn.parallel.backward import derive_backward
from distattn.parallel.disaggregation.pipeline import pipeline_ticks, tick_stream
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, plan

MICROBATCHES_PER_STAGE = 2


def pipeline_tokens(ranks: int, stages: int) -> int:
    """Of a step: each rank of a stage has as many of every microbatch as a rank has without a pipeline."""
    return ranks * RANK_TOKENS * MICROBATCHES_PER_STAGE


def pipeline_seconds(
    documents: list[int], ranks: int, stages: int, setting: Setting, price: Prices
) -> tuple[float, float, float, float, int]:
    """(baseline, disaggregated, exposed of it, imbalance, ranks that share a document), of one layer a stage."""
    of_stage, count = ranks // stages, MICROBATCHES_PER_STAGE * stages
    base, shared_by = _baseline(documents, (of_stage, stages, count), setting, price)
    return base, *_pooled(documents, (of_stage, stages, count), setting, price), shared_by


def _baseline(documents: list[int], sizes: tuple[int, int, int], setting: Setting, price: Prices) -> tuple[float, int]:
    """Documents dealt by work to (microbatch, data-parallel group) bins; a tick lasts as long as its slowest bin."""
    found: list[tuple[float, int]] = []
    of_stage, stages, count = sizes
    for context in (2**i for i in range(of_stage.bit_length()) if not of_stage % 2**i):
        groups = of_stage // context
        room = MEMORY_SLACK * sum(documents) / (groups * count)
        bins = packed_by_work(documents, groups * count, room, setting)
        if bins is None:
            continue
        # Bins of like work share a microbatch, so that data-parallel groups end it together.
        times = sorted(group_seconds(part, context, setting, price) for part in bins)
        alike = [times[i * groups : (i + 1) * groups] for i in range(count)]
        slowest = [tuple(max(column) for column in zip(*part, strict=True)) for part in alike]
        total = 0.0
        for tick in pipeline_ticks(stages, count):
            total += max(slowest[m][tick.backward] for m in tick.microbatches if m >= 0)
        found.append((total, context))
    return min(found)


def _pooled(documents: list[int], sizes: tuple[int, int, int], setting: Setting, price: Prices) -> tuple[float, float, float]:
    """(seconds, exposed, imbalance): a tick's linear layers on its own ranks, its attention over all, in turns or in one piece,
    whichever is faster."""
    of_stage, stages, count = sizes
    microbatches = dealt_by_tokens(documents, count)
    options = DisaggregatedOptions(tolerance=setting.tolerance)
    seconds = exposed = 0.0
    imbalance, known = 1.0, {}
    for tick in pipeline_ticks(stages, count):
        if tick.microbatches not in known:
            mask, layout = tick_stream(tick, microbatches, of_stage)
            program = plan(mask, layout, setting.heads, setting.kv_heads, options)
            known[tick.microbatches] = mask, program
        mask, program = known[tick.microbatches]
        direction = derive_backward(program) if tick.backward else program
        times, ratio = layer_times(direction, mask, setting, price)
        imbalance = max(imbalance, ratio)
        linear, attention = float(times.linear.max()), float(times.attention.max())
        # Nano-batches of half the tokens: each transfer has half a phase of the other one to hide behind.
        waits = sum(
            max(0.0, float(travel.max()) - hidden) for travel, hidden in ((times.inputs, linear), (times.results, attention))
        )
        whole = predicted(direction, mask, setting, price)
        in_turns = linear + attention + waits, waits
        in_one = linear / setting.turns + whole.seconds, whole.exposed_communication_seconds
        taken = min(in_turns, in_one)
        seconds += taken[0]
        exposed += taken[1]
    return seconds, exposed, imbalance
