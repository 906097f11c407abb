"""Ping-pong of two nano-batches, tick by tick: one computes while the other's data travel.

    tick      computes        travels
    4l        CI(0)           O(1) of layer l − 1
    4l + 1    CI(1)           QKV(0)
    4l + 2    CA(0)           QKV(1)
    4l + 3    CA(1)           O(0)

CI is what is done at home: the end of layer l − 1 and the beginning of layer l. The backward runs the ticks reversed, its
transfers one tick earlier. Ranks of a pool end each tick together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distattn.parallel.cost import Shape, move_bytes
from distattn.parallel.hardware import Hardware
from distattn.parallel.program import MOVE_DST, MOVE_KIND, MOVE_SRC, Q_OUT, SLOT_RANK, Program
from distattn.parallel.simulate import Prediction

INPUTS, RESULTS = "QKV", "O"


@dataclass(frozen=True, eq=False)
class NanoTimes:
    """Seconds of one nano-batch and layer by rank, float64 [P].

    linear: what is done at home; attention; inputs, results: of attention, travelling.
    """

    linear: np.ndarray = field(repr=False)
    attention: np.ndarray = field(repr=False)
    inputs: np.ndarray = field(repr=False)
    results: np.ndarray = field(repr=False)

    @property
    def one_by_one(self) -> float:
        """Of a layer without ping-pong: every phase ends on all ranks before the next begins."""
        return float(sum(part.max() for part in (self.linear, self.inputs, self.attention, self.results)))


@dataclass(frozen=True, eq=False)
class Tick:
    """What computes and what travels between ``start`` and ``end`` (seconds); "" for nothing. By rank, float64 [P]."""

    computes: str
    travels: str
    compute_seconds: np.ndarray = field(repr=False)
    travel_seconds: np.ndarray = field(repr=False)
    start: float
    end: float

    @property
    def exposed_seconds(self) -> float:
        """By how much the transfer outlasts the slowest computation."""
        return max(0.0, float(self.travel_seconds.max() - self.compute_seconds.max()))


def nano_times(program: Program, prediction: Prediction, linear_seconds: np.ndarray) -> NanoTimes:
    """The times of a nano-batch whose attention is ``program``, forward. linear_seconds: of each rank's rows, float64 [P]."""
    line = prediction.timeline
    attention = (line.done - line.go[:, :-1]).sum(1)
    kind = program.moves[:, MOVE_KIND]
    inputs, results = (
        travel_seconds(program, prediction.shape, prediction.hardware, chosen) for chosen in (kind != Q_OUT, kind == Q_OUT)
    )
    return NanoTimes(linear_seconds, attention, inputs, results)


def travel_seconds(program: Program, shape: Shape, hardware: Hardware, chosen: np.ndarray) -> np.ndarray:
    """How long each rank's links are busy with the chosen Moves (bool [m]): the longest of both directions, in and between
    nodes; float64 [P]."""
    moves, rank = program.moves[chosen], program.slots[:, SLOT_RANK]
    src, dst, size = rank[moves[:, MOVE_SRC]], rank[moves[:, MOVE_DST]], move_bytes(program, shape)[chosen]
    between = hardware.crosses_nodes(src, dst)
    busiest = np.zeros(program.num_ranks)
    for on_link, rate, latency in (
        (~between & (src != dst), hardware.inside_gb_per_second, hardware.inside_latency_us),
        (between, hardware.between_gb_per_second, hardware.between_latency_us),
    ):
        for end in (src, dst):
            total = np.bincount(end[on_link], weights=size[on_link], minlength=program.num_ranks)
            busiest = np.maximum(busiest, total / (rate * 1e9) + (total > 0) * latency * 1e-6)
    return busiest


def ping_pong(nanos: tuple[NanoTimes, NanoTimes], layers: int, *, backward: bool = False) -> list[Tick]:
    """The ticks of ``layers`` layers. nanos: forward times, or for the backward those of the gradients: ``results`` is then dO,
    which travels first, and ``inputs`` dQ, dK and dV."""
    steps: list[tuple[str, int, str, int]] = []
    for layer in range(layers):
        steps += [
            ("CI", 0, RESULTS if layer else "", 1),
            ("CI", 1, INPUTS, 0),
            ("CA", 0, INPUTS, 1),
            ("CA", 1, RESULTS, 0),
        ]
    # What follows the last attention has no attention to fetch for.
    steps += [("CI", 0, RESULTS, 1), ("CI", 1, "", 0)]
    if backward:  # each tick's transfer is the gradient of what travelled in it, and comes one tick before its use
        steps.reverse()
    zero = np.zeros_like(nanos[0].linear)
    ticks, now = [], 0.0
    for index, (phase, i, transfer, j) in enumerate(steps):
        compute = nanos[i].linear if phase == "CI" else nanos[i].attention
        if phase == "CI" and (index < 2 or index >= len(steps) - 2):
            compute = compute / 2  # the first and the last have only one half of it
        travel = {"": zero, INPUTS: nanos[j].inputs, RESULTS: nanos[j].results}[transfer]
        length = float(max(compute.max(), travel.max()))
        travels = f"{'d' * backward}{transfer}({j})" if transfer else ""
        ticks.append(Tick(f"{phase}({i})", travels, compute, travel, now, now + length))
        now += length
    return ticks
