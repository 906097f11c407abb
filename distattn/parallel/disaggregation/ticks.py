"""Ping-pong of two nano-batches, tick by tick: one computes while the other's data travel; and what one alone takes.

    tick      computes        travels
    4l        CI(0)           O(1) of layer l − 1
    4l + 1    CI(1)           QKV(0)
    4l + 2    CA(0)           QKV(1)
    4l + 3    CA(1)           O(0)

CI is what is done at home: the end of layer l − 1 and the beginning of layer l. The backward runs the ticks reversed, its
transfers one tick earlier. Ranks of a pool end each tick together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from distattn.parallel.cost import Shape, move_bytes
from distattn.parallel.hardware import Hardware
from distattn.parallel.program import KV_IN, MOVE_DST, MOVE_KIND, MOVE_SRC, Q_IN, SLOT_RANK, Program
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
    """The times of a nano-batch whose attention, or its backward, is ``program``. linear_seconds: of each rank's rows in this
    direction, float64 [P]."""
    line = prediction.timeline
    attention = (line.done - line.go[:, :-1]).sum(1)
    arrives = np.isin(program.moves[:, MOVE_KIND], (Q_IN, KV_IN))
    into, out_of = (travel_seconds(program, prediction.shape, prediction.hardware, chosen) for chosen in (arrives, ~arrives))
    # Reversed, results' gradients come first: they are what the backward's attention waits for.
    inputs, results = (out_of, into) if program.backward else (into, out_of)
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


@dataclass(frozen=True, eq=False)
class Half:
    """One nano-batch of a stream, or all of it: its attention forward and backward, and the rows that are its own.

    rows: int64 [P], of each rank, those that are computed outside attention; joined: int64 [P], rows of q, k and v that are
    put together for its attention with those of the half before; 0 where nothing is carried.
    """

    programs: tuple[Program, Program] = field(repr=False)
    predictions: tuple[Prediction, Prediction] = field(repr=False)
    rows: np.ndarray = field(repr=False)
    joined: np.ndarray = field(repr=False)

    def times(self, flops_per_token: float, *, backward: bool) -> NanoTimes:
        """flops_per_token: of a layer outside attention, forward; they run at the rate of the attention kernels."""
        prediction = self.predictions[backward]
        hardware, shape = prediction.hardware, prediction.shape
        linear = (1 + backward) * flops_per_token * self.rows / hardware.flops_per_second(backward=False)
        found = nano_times(self.programs[backward], prediction, linear)
        features = self.programs[0].heads * shape.head_dim + self.programs[0].kv_heads * (shape.head_dim + shape.value_dim)
        copied = 2 * self.joined * features * shape.input_bytes / (hardware.copy_gb_per_second * 1e9)
        return replace(found, attention=found.attention + copied)


def alone_seconds(whole: Half, flops_per_token: float, layers: int) -> float:
    """Forward and backward of so many layers by one nano-batch, whose attention hides what it can of its transfers."""
    linear = sum(float(whole.times(flops_per_token, backward=back).linear.max()) for back in (False, True))
    device = linear + sum(prediction.seconds for prediction in whole.predictions)
    return layers * max(device, sum(prediction.host_seconds for prediction in whole.predictions))


def turns_seconds(halves: tuple[Half, Half], flops_per_token: float, layers: int) -> float:
    """The same by two nano-batches in turns, the exposed transfers of the first and the last tick included."""
    device = 0.0
    for back in (False, True):
        first, second = (half.times(flops_per_token, backward=back) for half in halves)
        device += ping_pong((first, second), layers, backward=back)[-1].end
    host = layers * sum(prediction.host_seconds for half in halves for prediction in half.predictions)
    return max(device, host)
