"""What a Program costs, counted exactly and without running it: FLOPs, bytes on each link, resident bytes.

Counts hold for one sequence and one layer. Padding does not exist here: work is the mask's area inside the Attends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from distattn import bands as band_algebra
from distattn.errors import ConfigError
from distattn.parallel.alone import gradients_alone
from distattn.parallel.csr import expand, pointers, segment_starts
from distattn.parallel.program import (
    ATTEND_H0,
    ATTEND_H1,
    ATTEND_KV_ROWS,
    ATTEND_Q,
    ATTEND_Q_ROWS,
    ATTEND_STAGE,
    KV,
    KV_IN,
    KV_OUT,
    MOVE_DST,
    MOVE_DUE,
    MOVE_ISSUE,
    MOVE_KIND,
    MOVE_ROWS,
    MOVE_SRC,
    Q_IN,
    Q_OUT,
    SLOT_H0,
    SLOT_H1,
    SLOT_KIND,
    SLOT_RANK,
    SLOT_ROWS,
    Program,
)
from distattn.parallel.verify import slot_lifetimes

if TYPE_CHECKING:
    from distattn.mask import Mask

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MESSAGE_COLUMNS = ("issue", "due", "src", "dst", "bytes")
M_ISSUE, M_DUE, M_SRC, M_DST, M_BYTES = range(5)


@dataclass(frozen=True)
class Shape:
    """The sizes that a Program leaves open: features per head of q, k and of v, o, and the input dtype's name.

    needs_out: the backward kernel reads the forward's output (``Backend.needs_out``), which then travels with dO. narrow: it
    gives gradients in the input dtype, in which the first hop then leaves them.
    """

    head_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    needs_out: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.head_dim < 1 or self.value_dim < 1:
            raise ConfigError(
                f"head_dim and value_dim must be positive, got head_dim={self.head_dim} and value_dim={self.value_dim}"
            )
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPE_BYTES)}")

    @property
    def input_bytes(self) -> int:
        """Bytes of one element of q, k, v, dO."""
        return DTYPE_BYTES[self.dtype]

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of one element of partial results and gradients: fp32, or fp64 for fp64 inputs."""
        return max(4, self.input_bytes)

    def flops_per_pair(self, *, backward: bool) -> int:
        """Per allowed (query, key, head). Forward: s = qkᵀ, o = pv. Backward: s, dq, dk over D; dp, dv over Dv."""
        if backward:
            return 2 * (3 * self.head_dim + 2 * self.value_dim)
        return 2 * (self.head_dim + self.value_dim)

    def bundle_bytes(self, *, backward: bool, keep: bool = False) -> np.ndarray:
        """Bytes per (row, head) of a Move of each kind, int64 [4].

        Forward: Q_IN q; KV_IN k, v; Q_OUT o as accumulated, and lse. Backward: Q_IN dO, lse, delta, q where it was not kept,
        and o where the kernel needs it; KV_IN k, v; Q_OUT dq; KV_OUT dk, dv.
        """
        query, value, e, acc = self.head_dim, self.value_dim, self.input_bytes, self.accumulator_bytes
        out = np.zeros(4, np.int64)
        out[KV_IN] = (query + value) * e
        if backward:
            out[Q_IN] = ((0 if keep else query) + (2 if self.needs_out else 1) * value) * e + 2 * acc
            out[Q_OUT] = query * acc
            out[KV_OUT] = (query + value) * acc
        else:
            out[Q_IN] = query * e
            out[Q_OUT] = (value + 1) * acc
        return out

    def slot_bytes(self, *, backward: bool) -> np.ndarray:
        """Bytes per (row, head) that a slot of each kind (Q, KV) holds, int64 [2]."""
        query, value, e, acc = self.head_dim, self.value_dim, self.input_bytes, self.accumulator_bytes
        if backward:
            values = (2 if self.needs_out else 1) * value
            return np.array([(query + values) * e + 2 * acc + query * acc, (query + value) * (e + acc)])
        return np.array([query * e + (value + 2) * acc, (query + value) * e])


@dataclass(frozen=True, eq=False)
class Cost:
    """Counts of one Program; ``backward`` says of which direction.

    area: allowed (query, key, head) triples that are computed; attend_area: pairs of each Attend, int64 [n].
    flops: int64 [P, S] by rank and stage. messages: int64 [m, 5], columns ``MESSAGE_COLUMNS``, one row per message between
    two ranks, sorted by (issue, due). resident_bytes: int64 [P, S + 1] by rank and time: slots only, the home ones included,
    without the transport's staging buffers.
    """

    backward: bool
    area: int
    attend_area: np.ndarray = field(repr=False)
    flops: np.ndarray = field(repr=False)
    messages: np.ndarray = field(repr=False)
    resident_bytes: np.ndarray = field(repr=False)

    @cached_property
    def flops_per_rank(self) -> np.ndarray:
        return self.flops.sum(1)

    @cached_property
    def traffic(self) -> np.ndarray:
        """Bytes from rank to rank, int64 [P, P]."""
        ranks = len(self.flops)
        out = np.zeros((ranks, ranks), np.int64)
        np.add.at(out, (self.messages[:, M_SRC], self.messages[:, M_DST]), self.messages[:, M_BYTES])
        return out

    @property
    def bytes_sent_per_rank(self) -> np.ndarray:
        return self.traffic.sum(1)

    @property
    def bytes_received_per_rank(self) -> np.ndarray:
        return self.traffic.sum(0)

    @property
    def peak_memory_bytes_per_rank(self) -> np.ndarray:
        return self.resident_bytes.max(1)

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank over the mean; 1 where there is no work."""
        mean = float(self.flops_per_rank.mean())
        return float(self.flops_per_rank.max()) / mean if mean else 1.0


def count(program: Program, mask: Mask, shape: Shape) -> Cost:
    """Count FLOPs, messages and resident bytes of a forward or backward Program."""
    attends = program.attends
    pairs = attend_areas(program, mask)
    work = pairs * (attends[:, ATTEND_H1] - attends[:, ATTEND_H0])
    flops = np.zeros((program.num_ranks, program.num_stages), np.int64)
    rank = program.slots[attends[:, ATTEND_Q], SLOT_RANK]
    np.add.at(flops, (rank, attends[:, ATTEND_STAGE]), work * shape.flops_per_pair(backward=program.backward))
    return Cost(
        backward=program.backward,
        area=int(work.sum()),
        attend_area=pairs,
        flops=flops,
        messages=_messages(program, shape),
        resident_bytes=_resident_bytes(program, shape),
    )


def attend_areas(program: Program, mask: Mask) -> np.ndarray:
    """Pairs of mask ∩ (q_rows × kv_rows) of each Attend, exact, int64 [n].

    The mask is cut at the query ranges of each distinct query row set, then only at the key borders that this set's Attends
    have; sums up to each border then answer every Attend by two look-ups per key range. No box × box product is built.
    """
    num_sets = len(program.row_ptr) - 1
    attends = program.attends
    pairs, pair_of = np.unique(attends[:, ATTEND_Q_ROWS] * num_sets + attends[:, ATTEND_KV_ROWS], return_inverse=True)
    query_sets, query_of = np.unique(pairs // max(num_sets, 1), return_inverse=True)
    owner, pieces = _pieces_of_row_sets(program, mask, query_sets)
    # Borders of one query set are kept apart from those of the others by a stride longer than any key.
    stride = mask.num_keys + 1
    pair, ranges = _ranges_of(program, pairs % max(num_sets, 1))
    start = query_of[pair] * stride + program.row_ranges[ranges, 0]
    end = query_of[pair] * stride + program.row_ranges[ranges, 1]
    borders = np.unique(np.concatenate([start, end]))
    first = np.searchsorted(borders, owner * stride + pieces[:, 2], "right")
    last = np.searchsorted(borders, owner * stride + pieces[:, 3], "left")
    source, strip = expand(first, last - first + 1)
    cut = pieces[source]
    far = np.int64(1) << 61
    edges = np.concatenate([[-far], borders, [far]])
    cut[:, 2] = np.maximum(cut[:, 2], edges[strip] - owner[source] * stride)
    cut[:, 3] = np.minimum(cut[:, 3], edges[strip + 1] - owner[source] * stride)
    in_strip = np.zeros(len(borders) + 1, np.int64)
    np.add.at(in_strip, strip, band_algebra.area(cut))
    up_to = np.cumsum(in_strip)
    area = np.zeros(len(pairs), np.int64)
    np.add.at(area, pair, up_to[np.searchsorted(borders, end)] - up_to[np.searchsorted(borders, start)])
    return area[pair_of.reshape(-1)]


def _pieces_of_row_sets(program: Program, mask: Mask, row_sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask inside the query rows of each row set: (index into row_sets [n], bands [n, 6])."""
    which, ranges = _ranges_of(program, row_sets)
    q = program.row_ranges[ranges]
    breaks = np.unique(q)
    pieces, _, strip = band_algebra.cut_axis(mask.bands, breaks, 0)
    filled = band_algebra.area(pieces) > 0
    pieces, strip = band_algebra.tighten(pieces[filled]), strip[filled]
    order = np.argsort(strip, kind="stable")
    pieces, ptr = pieces[order], pointers(strip[order], len(breaks) + 1)
    first, last = np.searchsorted(breaks, q[:, 0]) + 1, np.searchsorted(breaks, q[:, 1])
    member, strips = expand(first, last - first + 1)
    part, flat = expand(ptr[strips], ptr[strips + 1] - ptr[strips])
    return which[member[part]], pieces[flat]


def _ranges_of(program: Program, row_sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges of each row set: (index into row_sets, index into program.row_ranges)."""
    return expand(program.row_ptr[row_sets], program.row_ptr[row_sets + 1] - program.row_ptr[row_sets])


def move_bytes(program: Program, shape: Shape) -> np.ndarray:
    """Bytes of each Move, int64 [m]."""
    moves, heads = program.moves, program.move_heads()
    bundle = shape.bundle_bytes(backward=program.backward, keep=program.keep)
    per_row = bundle[moves[:, MOVE_KIND]]
    cells = program.row_counts[moves[:, MOVE_ROWS]] * (heads[:, 1] - heads[:, 0])
    if not program.backward:
        rounded = shape.value_dim * (shape.accumulator_bytes - shape.input_bytes)
        per_row = per_row - rounded * _arrives_final(program, cells)
    elif shape.narrow:
        rounded = np.zeros_like(bundle)
        rounded[Q_OUT], rounded[KV_OUT] = shape.head_dim, shape.head_dim + shape.value_dim
        narrower = (shape.accumulator_bytes - shape.input_bytes) * (shape.input_bytes == 2)
        per_row = per_row - narrower * rounded[moves[:, MOVE_KIND]] * gradients_alone(program)
    return cells * per_row


def _messages(program: Program, shape: Shape) -> np.ndarray:
    """Bytes by (issue, due, src, dst) of all Moves between ranks, int64 [m, 5]."""
    moves = program.moves
    src, dst = program.slots[moves[:, MOVE_SRC], SLOT_RANK], program.slots[moves[:, MOVE_DST], SLOT_RANK]
    size = move_bytes(program, shape)
    table = np.stack([moves[:, MOVE_ISSUE], moves[:, MOVE_DUE], src, dst, size], 1)[src != dst]
    table = table[np.lexsort(tuple(table[:, c] for c in (M_DST, M_SRC, M_DUE, M_ISSUE)))]
    first = segment_starts(*(table[:, c] for c in (M_ISSUE, M_DUE, M_SRC, M_DST)))
    merged = table[first]
    if len(first):
        merged[:, M_BYTES] = np.add.reduceat(table[:, M_BYTES], first)
    return merged


def _arrives_final(program: Program, cells: np.ndarray) -> np.ndarray:
    """Which Q_OUT Moves bring a home results that nothing is merged with, so that o travels in the input dtype; bool [m].

    cells: rows × heads of each Move. A home that computes nothing itself and receives no more cells than it has, in a
    program that covers its mask, receives each once.
    """
    moves, slots = program.moves, program.slots
    out = (moves[:, MOVE_KIND] == Q_OUT) & (moves[:, MOVE_DST] < 2 * program.num_ranks)
    room = program.row_counts[slots[:, SLOT_ROWS]] * (slots[:, SLOT_H1] - slots[:, SLOT_H0])
    np.subtract.at(room, moves[out, MOVE_DST], cells[out])
    room[program.attends[:, ATTEND_Q]] = -1
    return out & (room[moves[:, MOVE_DST]] >= 0)


def _resident_bytes(program: Program, shape: Shape) -> np.ndarray:
    """Bytes of live slots by rank and time, int64 [P, S + 1]."""
    slots = program.slots
    first, last = slot_lifetimes(program)
    size = program.row_counts[slots[:, SLOT_ROWS]] * (slots[:, SLOT_H1] - slots[:, SLOT_H0])
    size = size * shape.slot_bytes(backward=program.backward)[(slots[:, SLOT_KIND] == KV).astype(np.int64)]
    live = np.flatnonzero(first <= last)
    change = np.zeros((program.num_ranks, program.num_stages + 3), np.int64)
    np.add.at(change, (slots[live, SLOT_RANK], first[live]), size[live])
    np.add.at(change, (slots[live, SLOT_RANK], last[live] + 1), -size[live])
    return np.cumsum(change, 1)[:, : program.num_stages + 1]
