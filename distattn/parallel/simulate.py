"""When everything in a Program happens on given hardware: an event model over its counted costs.

At time t a rank waits for the messages that it sends or receives with ``due == t``, posts those with ``issue == t``, then
computes stage t. What is assumed:

- A message starts when both ends have posted it (the receiver has no buffer before), and holds the sender's outgoing and the
  receiver's incoming link until its last byte. A rank has one such pair of links inside its node and one between nodes.
- A link serves its messages in the order of their posting; those of one posting go round, each rank beginning with its next
  node and its next neighbour, as collectives do, so that an all-to-all does not queue at rank 0.
- Kernels run at one rate whatever their tiles, and every stage that computes pays one launch; with measured rates a rank's
  take what ``tile_time`` says of its tiles, spread over stages as ``kernel_time`` says of its pairs. Transfers cost
  the kernels nothing. Adding up what arrives takes its bytes three times over the device's memory; packing some of a slot's
  heads, and placing some of its rows or heads, twice. Some of the heads are moved element by element, which is slower.
- Each rank begins the backward when it is done with the forward: who has less to do in one may have more in the other.
- The host's work counts where it is longer than all the device's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from distattn.kernels import BACKENDS
from distattn.kernels.fresh import gives_input_dtype
from distattn.parallel import kernel_time, tile_time
from distattn.parallel.cost import M_BYTES, M_DST, M_DUE, M_ISSUE, M_SRC, Cost, Shape, attend_areas, count, move_bytes
from distattn.parallel.csr import segment_starts
from distattn.parallel.hardware import Hardware
from distattn.parallel.program import (
    ATTEND_Q,
    ATTEND_STAGE,
    KV_OUT,
    MOVE_DST,
    MOVE_DUE,
    MOVE_ISSUE,
    MOVE_KIND,
    MOVE_ROWS,
    MOVE_SRC,
    Q_OUT,
    SLOT_H0,
    SLOT_H1,
    SLOT_RANK,
    SLOT_ROWS,
    Program,
)

if TYPE_CHECKING:
    from distattn.mask import Mask

STRIDED_GB_PER_SECOND = 1450.0
"""What a device moves, read and written, where torch copies some of the heads of many rows: 18 copies of 33.5 MB took 0.86 ms
on an H100 (profile of ``ulysses`` in benchmarks/results/context-h100-x2.json) and 0.82 ms on an H200."""


@dataclass(frozen=True)
class Span:
    """What a rank does from ``start`` to ``end`` (seconds). ``peer`` is the sender of a transfer, else −1."""

    kind: Literal["wait", "compute", "transfer"]
    stage: int
    start: float
    end: float
    peer: int = -1


@dataclass(frozen=True, eq=False)
class Timeline:
    """Seconds at which everything happens; float64.

    arrive [P, S+1]: the rank has finished stage t − 1 and waits; go [P, S+1]: all that is due at t has come, the rank posts
    and computes; done [P, S]: the end of stage t's compute. sent, received [m]: first and last byte of each row of
    ``Cost.messages``.
    """

    arrive: np.ndarray = field(repr=False)
    go: np.ndarray = field(repr=False)
    done: np.ndarray = field(repr=False)
    sent: np.ndarray = field(repr=False)
    received: np.ndarray = field(repr=False)

    @property
    def seconds(self) -> float:
        """When the last rank is done."""
        return float(self.go[:, -1].max())

    @property
    def wait_seconds_per_rank(self) -> np.ndarray:
        """Time that each rank spends waiting, until the last rank is done; float64 [P]."""
        return (self.go - self.arrive).sum(1) + self.seconds - self.go[:, -1]


@dataclass(frozen=True, eq=False)
class Prediction:
    """A Program's costs and its timeline on ``hardware``.

    seconds: when the last rank is done, if its host keeps ahead of it. host_seconds: what the busiest host takes to start all
    of it. ideal_seconds: all work spread evenly at the kernel's rate. free_links_seconds: the
    same timeline with transfers that take no time, so that what it takes beyond the ideal is imbalance and launches.
    busy [P, S+1]: seconds of each rank's device in every stage, and after the last one.
    """

    hardware: Hardware
    shape: Shape
    cost: Cost
    timeline: Timeline = field(repr=False)
    seconds: float
    ideal_seconds: float
    free_links_seconds: float
    busy: np.ndarray = field(repr=False)
    host_seconds: float = 0.0

    @property
    def exposed_communication_seconds(self) -> float:
        """By how much transfers prolong the whole."""
        return self.seconds - self.free_links_seconds

    @property
    def efficiency(self) -> float:
        """Ideal over predicted time; 1 where there is nothing to do."""
        return self.ideal_seconds / self.seconds if self.seconds else 1.0

    def spans(self, rank: int) -> list[Span]:
        """What one rank does, by start; transfers are those that it receives and overlap the rest."""
        line, stages = self.timeline, self.cost.flops.shape[1]
        spans = []
        for t in range(stages + 1):
            if line.go[rank, t] > line.arrive[rank, t]:
                spans.append(Span("wait", t, float(line.arrive[rank, t]), float(line.go[rank, t])))
            if t < stages and line.done[rank, t] > line.go[rank, t]:
                spans.append(Span("compute", t, float(line.go[rank, t]), float(line.done[rank, t])))
        for i in np.flatnonzero(self.cost.messages[:, M_DST] == rank).tolist():
            message = self.cost.messages[i]
            span = (int(message[M_ISSUE]), float(line.sent[i]), float(line.received[i]), int(message[M_SRC]))
            spans.append(Span("transfer", *span))
        return sorted(spans, key=lambda span: (span.start, span.end))


def predict(
    program: Program,
    mask: Mask,
    hardware: Hardware,
    head_dim: int,
    value_dim: int | None = None,
    dtype: str = "bfloat16",
    price: kernel_time.Price | None = None,
    kernel: str | None = None,
) -> Prediction:
    """Count a forward or backward Program's costs and lay them out in time.

    value_dim: head_dim where None; dtype: name of the input dtype ("bfloat16", also "torch.bfloat16"). price: what the
    kernels take on this mask; None: the least by the hardware's rates, if it has any. kernel: the backend that computes;
    None: the fastest by these rates.
    """
    value_dim = head_dim if value_dim is None else value_dim
    width, given = max(head_dim, value_dim), price is not None
    if price is None:
        group = program.heads // program.kv_heads
        price = kernel_time.price(
            mask, hardware, program.heads, width, backward=program.backward, group=group, kernel=kernel
        )  # fmt: skip
    pairs = attend_areas(program, mask)
    tiles = tile_time.of_program(program, mask, pairs, hardware, head_dim, value_dim, kernel=kernel)
    backend = None if price is None else BACKENDS[tiles.backend if tiles else price.backend]
    needs_out = hardware.needs_out if backend is None else backend.needs_out
    narrow = hardware.name != "cpu" if backend is None else gives_input_dtype(backend)
    shape = Shape(head_dim, value_dim, str(dtype).removeprefix("torch."), needs_out, narrow)
    cost = count(program, mask, shape)
    if price is None:
        rate = hardware.flops_per_second(backward=program.backward)
        compute = cost.flops / rate + (cost.flops > 0) * hardware.launch_us * 1e-6
        ideal_seconds = float(cost.flops.sum()) / rate / program.num_ranks
    else:
        compute = kernel_time.stage_seconds(program, mask, cost.attend_area, price)
        whole_seconds = price.call_s + mask.num_queries * program.heads * price.row_s + cost.area * price.pair_s
        if tiles is not None:
            whole_seconds, scale = _scale(
                program, mask, hardware, width, tiles.backend, price if given else None, whole_seconds, kernel
            )
            compute *= tile_time.factors(tiles.ranks, scale * tiles.seconds, compute.sum(1))[:, None]
        ideal_seconds = whole_seconds / program.num_ranks
    # What arrives at time t is added, and what leaves then packed, before stage t; the last of it comes after all stages.
    busy = _memory_seconds(program, shape, hardware)
    busy[:, :-1] += compute
    line = _lay_out(busy, cost.messages, hardware)
    return Prediction(
        hardware=hardware,
        shape=shape,
        cost=cost,
        timeline=line,
        seconds=float(_ends(line, busy).max()),
        ideal_seconds=ideal_seconds,
        free_links_seconds=float(_ends(_lay_out(busy, cost.messages, hardware, free_links=True), busy).max()),
        busy=busy,
        host_seconds=_host_seconds(program, hardware, tiles),
    )


def _lay_out(
    busy: np.ndarray, messages: np.ndarray, hardware: Hardware, start: np.ndarray | None = None, *, free_links: bool = False
) -> Timeline:
    sources, destinations, sizes = (messages[:, column] for column in (M_SRC, M_DST, M_BYTES))
    transfer = np.zeros(len(messages)) if free_links else hardware.transfer_seconds(sources, destinations, sizes)
    return simulate(busy[:, :-1], messages, transfer, hardware, start)


def _ends(line: Timeline, busy: np.ndarray) -> np.ndarray:
    """When each rank is done, float64 [P]. What comes after all stages waits for the last rank's: transfers end together."""
    return line.go[:, -1] + busy[:, -1]


def _scale(
    program: Program, mask: Mask, hardware: Hardware, width: int, backend: str, price: kernel_time.Price | None, seconds: float,
    kernel: str | None,
) -> tuple[float, float]:  # fmt: skip
    """(seconds of one device for the whole mask, by how much more ``backend`` takes than its rates say).

    With a given price the ``seconds`` are known, and say how wrong the rates of its backend are on this mask: of another one
    they say nothing. Without one they are those of ``kernel``; None: of the fastest.
    """
    group, kernel = program.heads // program.kv_heads, kernel if price is None else price.backend
    whole = tile_time.of_whole(mask, hardware, kernel, heads=program.heads, group=group, width=width, backward=program.backward)
    if price is None or whole is None:
        return float(whole.seconds[0]) if whole else seconds, 1.0
    return seconds, seconds / float(whole.seconds[0]) if price.backend == backend else 1.0


def total_seconds(forward: Prediction, backward: Prediction, *, free_links: bool = False) -> float:
    """Of a forward and its backward, one after the other on each rank: the device's time, or the host's where that is longer
    even with its head start. free_links: with transfers that take no time."""
    hardware, start = forward.hardware, np.zeros(len(forward.busy))
    for x in (forward, backward):
        start = _ends(_lay_out(x.busy, x.cost.messages, hardware, start, free_links=free_links), x.busy)
    host = forward.host_seconds + backward.host_seconds - 1e-6 * hardware.host_ahead_us
    return max(float(start.max()), host)


def _memory_seconds(program: Program, shape: Shape, hardware: Hardware) -> np.ndarray:
    """What copies and sums around transfers take on each rank from time to time, float64 [P, S + 1].

    Some of a slot's heads are packed before they leave; what fills some of a slot's rows or heads is copied to its place, and
    results and gradients are added to what is there.
    """
    moves, slots, heads = program.moves, program.slots, program.move_heads()
    src, dst = moves[:, MOVE_SRC], moves[:, MOVE_DST]
    some_heads = [(heads != slots[slot][:, [SLOT_H0, SLOT_H1]]).any(1) for slot in (src, dst)]
    some_rows = program.row_counts[moves[:, MOVE_ROWS]] != program.row_counts[slots[dst, SLOT_ROWS]]
    crossing = slots[src, SLOT_RANK] != slots[dst, SLOT_RANK]
    fast = hardware.copy_gb_per_second * 1e9
    slow = min(fast, STRIDED_GB_PER_SECOND * 1e9) if np.isfinite(fast) else fast
    size = move_bytes(program, shape)
    out = np.zeros((program.num_ranks, program.num_stages + 1))
    packed = crossing & some_heads[0]
    np.add.at(out, (slots[src, SLOT_RANK], moves[:, MOVE_ISSUE]), 2 * size * packed / slow)
    adds = np.isin(moves[:, MOVE_KIND], (Q_OUT, KV_OUT))
    times = np.where(adds, 3, 2 * (some_heads[1] | some_rows))
    rate = np.where(some_heads[1] | (some_heads[0] & ~crossing), slow, fast)
    np.add.at(out, (slots[dst, SLOT_RANK], moves[:, MOVE_DUE]), times * size / rate)
    return out


def _host_seconds(program: Program, hardware: Hardware, tiles: tile_time.TileTime | None) -> float:
    """Of the rank whose host has most to do."""
    moves, slots = program.moves, program.slots
    src, dst = slots[moves[:, MOVE_SRC], SLOT_RANK], slots[moves[:, MOVE_DST], SLOT_RANK]
    crossing = src != dst
    ends = np.bincount(np.concatenate([src, dst[crossing]]), minlength=program.num_ranks)
    exchanges = len(np.unique(moves[crossing][:, [MOVE_ISSUE, MOVE_DUE]], axis=0))
    stages = program.attends[:, ATTEND_STAGE] * program.num_ranks + slots[program.attends[:, ATTEND_Q], SLOT_RANK]
    launches = np.bincount(np.unique(stages) % program.num_ranks, minlength=program.num_ranks).astype(float)
    if tiles is not None:
        launches = launches * tile_time.factors(tiles.ranks, tiles.launches, launches)
    busiest = float((ends * hardware.host_message_us + launches * hardware.host_launch_us).max(initial=0.0))
    return 1e-6 * (busiest + exchanges * hardware.host_exchange_us)


def simulate(
    compute: np.ndarray, messages: np.ndarray, transfer: np.ndarray, hardware: Hardware, start: np.ndarray | None = None
) -> Timeline:
    """Run the event model.

    compute: seconds of each rank's stages, float64 [P, S]; messages: int64 [m, 5] as in ``Cost.messages``; transfer: seconds
    of each message on free links, float64 [m]; hardware: which ranks share a node; start: when each rank begins, float64 [P],
    at 0 where None.
    """
    ranks, stages = compute.shape
    arrive, go, done = np.zeros((ranks, stages + 1)), np.zeros((ranks, stages + 1)), np.zeros((ranks, stages))
    sent, received = np.zeros(len(messages)), np.zeros(len(messages))
    out_free, in_free = np.zeros((2, ranks)), np.zeros((2, ranks))  # [inside, between] × rank
    src, dst = messages[:, M_SRC], messages[:, M_DST]
    link = hardware.crosses_nodes(src, dst).astype(np.int64)
    by_due = np.argsort(messages[:, M_DUE], kind="stable")
    due_ptr = np.searchsorted(messages[by_due, M_DUE], np.arange(stages + 2))
    rounds = _rounds(messages, ranks, min(hardware.ranks_per_node, ranks))
    for t in range(stages + 1):
        arrive[:, t] = done[:, t - 1] if t else 0 if start is None else start
        go[:, t] = arrive[:, t]
        due = by_due[due_ptr[t] : due_ptr[t + 1]]
        np.maximum.at(go[:, t], src[due], received[due])
        np.maximum.at(go[:, t], dst[due], received[due])
        for batch in rounds.get(t, ()):
            a, b, on = src[batch], dst[batch], link[batch]
            posted = np.maximum(go[a, t], go[b, t])
            sent[batch] = np.maximum(posted, np.maximum(out_free[on, a], in_free[on, b]))
            received[batch] = sent[batch] + transfer[batch]
            out_free[on, a] = received[batch]
            in_free[on, b] = received[batch]
        if t < stages:
            done[:, t] = go[:, t] + compute[:, t]
    return Timeline(arrive, go, done, sent, received)


def _rounds(messages: np.ndarray, ranks: int, ranks_per_node: int) -> dict[int, list[np.ndarray]]:
    """Messages by issue, in rounds: by due, then by distance in nodes and within them.

    All of a round have the same distance, so that no rank sends or receives twice in it.
    """
    src, dst, nodes = messages[:, M_SRC], messages[:, M_DST], -(-ranks // ranks_per_node)
    distance = (dst // ranks_per_node - src // ranks_per_node) % nodes * ranks_per_node
    distance += (dst - src) % ranks_per_node
    order = np.lexsort((distance, messages[:, M_DUE], messages[:, M_ISSUE]))
    table = messages[order]
    starts = segment_starts(table[:, M_ISSUE], table[:, M_DUE], distance[order])
    rounds: dict[int, list[np.ndarray]] = {}
    for batch in np.split(order, starts[1:]) if len(starts) else []:
        rounds.setdefault(int(messages[batch[0], M_ISSUE]), []).append(batch)
    return rounds
