"""Attention of all pipeline stages as one pool, tick by tick: it has no weights, so that any rank may compute it for any stage.

    tick             0     1     2     3            stage p holds microbatch tick − p
    stage 0         [0]   [1]   [2]    ·            ·  none: its ranks only serve
    stage 1          ·    [0]   [1]   [2]

All stages are in the same phase. Of N stages and M microbatches there are N − 1 forward ticks, then M times a forward and a
backward tick, then N − 1 backward ticks. Planning and prediction only: nothing here executes a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.hardware import Hardware
from distattn.parallel.layout import Layout, area_per_rank
from distattn.parallel.program import Program
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, plan
from distattn.parallel.simulate import predict


@dataclass(frozen=True)
class Tick:
    """microbatches: of each stage, −1 where it holds none."""

    backward: bool
    microbatches: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PlannedTick:
    """One tick's attention as planned over all ranks, for one layer of each stage.

    work_before, work_after: pairs × heads of each rank, at home and as planned, float64 [P]. seconds: predicted, until the last
    rank is done; compute_seconds: the same if all transfers were hidden; home_seconds: at home, if its were.
    """

    tick: Tick
    program: Program = field(repr=False)
    work_before: np.ndarray = field(repr=False)
    work_after: np.ndarray = field(repr=False)
    seconds: float
    compute_seconds: float
    home_seconds: float

    @property
    def before(self) -> float:
        """Busiest rank over the mean, at home."""
        return _imbalance(self.work_before)

    @property
    def after(self) -> float:
        """Busiest rank over the mean, as planned."""
        return _imbalance(self.work_after)


def pipeline_ticks(stages: int, microbatches: int) -> list[Tick]:
    """The ticks of one step. Raises PlanError where there are fewer microbatches than stages: no tick would be full."""
    if stages < 1 or microbatches < stages:
        raise PlanError(f"a pipeline needs at least as many microbatches as stages, got {microbatches} for {stages} stages")
    forward = [
        Tick(False, tuple(_held(tick - p, microbatches) for p in range(stages))) for tick in range(microbatches + stages - 1)
    ]
    backward = [
        Tick(True, tuple(_held(tick - (stages - 1 - p), microbatches) for p in range(stages)))
        for tick in range(microbatches + stages - 1)
    ]
    fill = stages - 1
    pairs = [tick for both in zip(forward[fill:], backward, strict=False) for tick in both]
    return forward[:fill] + pairs + backward[microbatches:]


def _held(microbatch: int, microbatches: int) -> int:
    return microbatch if 0 <= microbatch < microbatches else -1


def split_microbatches(lengths: Sequence[int], microbatches: int) -> list[list[int]]:
    """A stream of documents as microbatches of equal tokens (the first ones get one more where that does not divide);
    documents that lie across a border are cut there."""
    total = sum(lengths)
    if not 1 <= microbatches <= total:
        raise PlanError(f"{total} tokens cannot be split into {microbatches} microbatches of at least one token")
    ends = np.cumsum(lengths)
    borders = np.array([total * (i + 1) // microbatches for i in range(microbatches)])
    cuts = np.union1d(ends, borders)
    parts = np.diff(cuts, prepend=0)
    owner = np.searchsorted(borders, cuts, "left")
    return [parts[(owner == i) & (parts > 0)].tolist() for i in range(microbatches)]


def plan_pipeline(
    microbatches: Sequence[Sequence[int]],
    stages: int,
    ranks: int,
    heads: tuple[int, int],
    hardware: Hardware,
    *,
    head_dim: int,
    dtype: str = "bfloat16",
    options: DisaggregatedOptions | None = None,
) -> Iterator[PlannedTick]:
    """Plan, verify and predict every tick of a step.

    microbatches: document lengths of each; stages: of the pipeline; ranks: of all stages, a multiple of them: those of stage p
    follow those of stage p − 1, and divide the stage's microbatch evenly; heads: query and KV heads. Raises PlanError.
    """
    if ranks % stages:
        raise PlanError(f"{ranks} ranks cannot be divided over {stages} pipeline stages: give a multiple of them")
    if options is not None and options.servers:
        raise PlanError("the ranks of a pipeline all hold a stage: servers must be 0")
    planned: dict[tuple[int, ...], tuple[Mask, Layout, Program]] = {}
    for tick in pipeline_ticks(stages, len(microbatches)):
        if tick.microbatches not in planned:
            mask, layout = tick_stream(tick, microbatches, ranks // stages)
            program = plan(mask, layout, *heads, options)
            program.verify(mask)
            planned[tick.microbatches] = mask, layout, program
        mask, layout, program = planned[tick.microbatches]
        direction = derive_backward(program, ranks_per_node=hardware.ranks_per_node) if tick.backward else program
        prediction = predict(direction, mask, hardware, head_dim, dtype=dtype)
        flops = prediction.shape.flops_per_pair(backward=tick.backward)
        at_home = area_per_rank(mask, layout).astype(np.float64) * heads[0]
        work = prediction.cost.flops_per_rank / flops
        home_seconds = float(at_home.max()) * flops / hardware.flops_per_second(backward=tick.backward)
        home_seconds += hardware.launch_us * 1e-6
        yield PlannedTick(tick, direction, at_home, work, prediction.seconds, prediction.free_links_seconds, home_seconds)


def tick_stream(tick: Tick, microbatches: Sequence[Sequence[int]], ranks_per_stage: int) -> tuple[Mask, Layout]:
    """What a tick attends to: the documents of the microbatches that stages hold, one stage after another, each over its
    ranks; ranks of a stage without one hold nothing."""
    lengths: list[int] = []
    ranges: list[list[tuple[int, int]]] = []
    for microbatch in tick.microbatches:
        documents = list(microbatches[microbatch]) if microbatch >= 0 else []
        first, rows = sum(lengths), sum(documents)
        cuts = [first + rows * i // ranks_per_stage for i in range(ranks_per_stage + 1)]
        ranges += [[(cuts[i], cuts[i + 1])] for i in range(ranks_per_stage)]
        lengths += documents
    return Mask.documents(lengths), Layout.given(ranges, name="pipeline")


def _imbalance(work: np.ndarray) -> float:
    return float(work.max() / work.mean()) if work.any() else 1.0
