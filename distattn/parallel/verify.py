"""Proof that a program computes its mask: what is shown here needs no run and no S×S array.

Rows that are members of the same row sets are one *class*; everything is shown on classes, of which there are few even where
ranks hold thousands of ranges. Membership is compared by two independent 64-bit sums of random words per row set, so classes
are exact up to a chance of about 1e-30. What can't be shown here is that lowering and kernels do as the tables say; tests run
them with NaN-filled slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from distattn import bands as band_algebra
from distattn.errors import VerifyError
from distattn.mask import Mask
from distattn.parallel.csr import expand, pointers
from distattn.parallel.program import (
    ATTEND_H0,
    ATTEND_H1,
    ATTEND_KV,
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
    Q,
)

_PIECES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Report:
    """What verify counted."""

    num_classes: int
    num_attends: int
    num_moves: int
    area: int
    peak_rows: np.ndarray = field(repr=False)
    """Most rows × heads that each rank holds outside its home slots at any stage, int64 [P]."""


def verify(program: Program, mask: Mask, *, max_rows_per_rank: int | None = None) -> Report:
    """Prove the invariants of a forward or derived backward program; raise VerifyError naming the one that fails.

    max_rows_per_rank: cap on rows × heads resident outside the home slots.
    """
    _check_tables(program, mask)
    classes = _Classes(program)
    _check_membership(program, classes)
    _check_copies(program, classes)
    _check_results(program, classes)
    _check_coverage(program, mask)
    peak = _peak_rows(program)
    if max_rows_per_rank is not None and peak.max(initial=0) > max_rows_per_rank:
        raise VerifyError(
            f"rank {int(peak.argmax())} would hold {int(peak.max())} rows × heads in received slots, over the cap of "
            f"{max_rows_per_rank}"
        )
    return Report(classes.count, len(program.attends), len(program.moves), mask.area, peak)


def _require(condition: np.ndarray | bool, message: str) -> None:
    if not np.all(condition):
        raise VerifyError(message)


def _check_tables(program: Program, mask: Mask) -> None:
    """Ids in range, kinds that fit, times in order, one rank an Attend, heads resident."""
    slots, moves, attends = program.slots, program.moves, program.attends
    ranks, sets = program.num_ranks, len(program.row_ptr) - 1
    held = program.layout.num_rows, program.key_layout.num_rows
    _require(
        mask.shape == held,
        f"the mask is {mask.num_queries} × {mask.num_keys} but the layout has {held[0]} rows and the keys' {held[1]}",
    )
    _require(program.key_layout.num_ranks == ranks, "the layouts of queries and keys are for different numbers of ranks")
    inside = (
        (slots[:, SLOT_RANK] >= 0) & (slots[:, SLOT_RANK] < ranks) & (slots[:, SLOT_ROWS] >= 0)
        & (slots[:, SLOT_ROWS] < sets) & (slots[:, SLOT_H0] >= 0) & (slots[:, SLOT_H0] < slots[:, SLOT_H1])
        & (slots[:, SLOT_H1] <= np.where(slots[:, SLOT_KIND] == Q, program.heads, program.kv_heads))
        & ((slots[:, SLOT_KIND] == Q) | (slots[:, SLOT_KIND] == KV))
    )  # fmt: skip
    _require(inside, "a slot names a rank, row set, kind or head that does not exist")
    _check_homes(program)
    for table, columns, limit in (
        (moves, (MOVE_SRC, MOVE_DST), len(slots)), (moves, (MOVE_ROWS,), sets),
        (attends, (ATTEND_Q, ATTEND_KV), len(slots)), (attends, (ATTEND_Q_ROWS, ATTEND_KV_ROWS), sets),
    ):  # fmt: skip
        part = table[:, list(columns)]
        _require((part >= 0) & (part < limit), "a Move or an Attend names a slot or row set that does not exist")
    kind = moves[:, MOVE_KIND]
    allowed = (Q_IN, KV_IN, Q_OUT, KV_OUT) if program.backward else (Q_IN, KV_IN, Q_OUT)
    _require(np.isin(kind, allowed), "a Move has a kind that this direction does not know")
    expected = np.where(np.isin(kind, (Q_IN, Q_OUT)), Q, KV)
    for end in (MOVE_SRC, MOVE_DST):
        _require(slots[moves[:, end], SLOT_KIND] == expected, "a Move joins slots of another kind than its own")
    _require(
        (moves[:, MOVE_ISSUE] >= 0) & (moves[:, MOVE_ISSUE] < moves[:, MOVE_DUE]) & (moves[:, MOVE_DUE] <= program.num_stages),
        "a Move breaks 0 ≤ issue < due ≤ number of stages",
    )
    _require(
        (attends[:, ATTEND_STAGE] >= 0) & (attends[:, ATTEND_STAGE] < program.num_stages),
        "an Attend lies outside the program's stages",
    )
    q, kv = slots[attends[:, ATTEND_Q]], slots[attends[:, ATTEND_KV]]
    _require((q[:, SLOT_KIND] == Q) & (kv[:, SLOT_KIND] == KV), "an Attend needs a query slot and a KV slot")
    _require(q[:, SLOT_RANK] == kv[:, SLOT_RANK], "an Attend's two slots are on different ranks")
    h0, h1, group = attends[:, ATTEND_H0], attends[:, ATTEND_H1], program.group_size
    _require(
        (h0 < h1) & (q[:, SLOT_H0] <= h0) & (h1 <= q[:, SLOT_H1])
        & (kv[:, SLOT_H0] <= h0 // group) & ((h1 - 1) // group < kv[:, SLOT_H1]),
        "an Attend uses heads that its slots do not hold",
    )  # fmt: skip


def _check_homes(program: Program) -> None:
    """Slots 2r and 2r+1 are rank r's rows with all heads."""
    ranks = program.num_ranks
    home = program.slots[: 2 * ranks].reshape(-1, 2, 5)
    _require(len(home) == ranks, "every rank needs its two home slots")
    _require(home[:, :, SLOT_RANK] == np.arange(ranks)[:, None], "home slots are not in rank order")
    _require((home[:, 0, SLOT_KIND] == Q) & (home[:, 1, SLOT_KIND] == KV), "home slots are not one Q and one KV")
    _require(home[:, :, SLOT_H0] == 0, "a home slot does not hold all heads")
    _require(home[:, :, SLOT_H1] == (program.heads, program.kv_heads), "a home slot does not hold all heads")
    for kind, layout in enumerate((program.layout, program.key_layout)):
        sets = home[:, kind, SLOT_ROWS]
        counts = program.row_ptr[sets + 1] - program.row_ptr[sets]
        _, flat = expand(program.row_ptr[sets], counts)
        same = np.array_equal(counts, np.diff(layout.ptr)) and np.array_equal(program.row_ranges[flat], layout.ranges)
        _require(same, "a home slot does not hold its rank's rows of the layout")


class _Classes:
    """Classes of rows, and which of them each row set holds.

    starts: first row of each elementary segment; of_segment: its class (−1: in no row set); ptr/members: CSR of classes by
    row set, sorted; rows: rows of each class.
    """

    def __init__(self, program: Program, only: np.ndarray | None = None) -> None:
        """only: ids of the row sets to look at, default all; the others count as empty."""
        num_sets = len(program.row_ptr) - 1
        counts = np.diff(program.row_ptr)
        if only is not None:
            counts = np.where(np.isin(np.arange(num_sets), only), counts, 0)
        _, flat = expand(program.row_ptr[:-1], counts)
        ranges, ptr = program.row_ranges[flat], np.concatenate([[0], np.cumsum(counts)])
        _require((ranges[:, 0] < ranges[:, 1]) & (ranges[:, 0] >= 0), "a row set holds an empty or negative range")
        limit = max(program.layout.num_rows, program.key_layout.num_rows)
        _require(ranges[:, 1] <= limit, "a row set holds rows beyond the layout")
        edges = np.unique(ranges)
        set_of = np.repeat(np.arange(num_sets), np.diff(ptr))
        words = np.random.default_rng(0).integers(0, 1 << 63, (num_sets, 2), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        sums = np.zeros((len(edges) + 1, 2), np.uint64)
        depth = np.zeros(len(edges) + 1, np.int64)
        begin, end = np.searchsorted(edges, ranges[:, 0]), np.searchsorted(edges, ranges[:, 1])
        for at, sign in ((begin, 1), (end, -1)):
            with np.errstate(over="ignore"):
                np.add.at(sums, at, words[set_of] if sign > 0 else np.uint64(0) - words[set_of])
            np.add.at(depth, at, sign)
        with np.errstate(over="ignore"):
            sums = np.cumsum(sums, axis=0, dtype=np.uint64)
        depth = np.cumsum(depth)
        self.starts = edges
        num_segments = max(len(edges) - 1, 0)
        _, inverse = np.unique(sums[:num_segments], axis=0, return_inverse=True)
        self.of_segment = np.where(depth[:num_segments] > 0, inverse.ravel(), -1)
        self.count = int(self.of_segment.max(initial=-1)) + 1
        lengths = np.diff(edges)
        self.rows = np.zeros(self.count, np.int64)
        inside = self.of_segment >= 0
        np.add.at(self.rows, self.of_segment[inside], lengths[inside])
        which, segment = expand(begin, end - begin)
        pairs = set_of[which] * max(self.count, 1) + self.of_segment[segment]
        # A set that covers a segment twice has overlapping ranges.
        covered = np.zeros(num_sets, np.int64)
        np.add.at(covered, set_of, ranges[:, 1] - ranges[:, 0])
        keys = np.unique(pairs)
        distinct = np.zeros(num_sets, np.int64)
        owner, member = keys // max(self.count, 1), keys % max(self.count, 1)
        np.add.at(distinct, owner, self.rows[member])
        _require(distinct == covered, "a row set names a row twice")
        self.keys, self.members, self.ptr = keys, member, pointers(owner, num_sets)

    def expand(self, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index into ``sets``, class) for every class of every named row set."""
        which, flat = expand(self.ptr[sets], self.ptr[sets + 1] - self.ptr[sets])
        return which, self.members[flat]

    def subset(self, inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
        """Whether each row set inner[i] lies in outer[i]."""
        base = max(self.count, 1)
        num_sets = len(self.ptr) - 1
        pairs, inverse = np.unique(inner * num_sets + outer, return_inverse=True)
        which, cls = self.expand(pairs // num_sets)
        wanted = (pairs % num_sets)[which] * base + cls
        at = np.searchsorted(self.keys, wanted)
        found = np.zeros(len(wanted), bool)
        found[at < len(self.keys)] = self.keys[at[at < len(self.keys)]] == wanted[at < len(self.keys)]
        missing = np.zeros(len(pairs), bool)
        missing[which[~found]] = True
        return ~missing[inverse.ravel()]


def _check_membership(program: Program, classes: _Classes) -> None:
    """Rows named by Attends and Moves lie in their slots; heads of a Move are those of its narrow end."""
    slots, moves, attends = program.slots, program.moves, program.attends
    for rows, slot, what in (
        (attends[:, ATTEND_Q_ROWS], attends[:, ATTEND_Q], "an Attend uses query rows that its slot does not hold"),
        (attends[:, ATTEND_KV_ROWS], attends[:, ATTEND_KV], "an Attend uses key rows that its slot does not hold"),
        (moves[:, MOVE_ROWS], moves[:, MOVE_SRC], "a Move takes rows that its source does not hold"),
        (moves[:, MOVE_ROWS], moves[:, MOVE_DST], "a Move brings rows that its destination does not hold"),
    ):
        _require(classes.subset(rows, slots[slot, SLOT_ROWS]), what)
    copy = np.isin(moves[:, MOVE_KIND], (Q_IN, KV_IN))
    src, dst = slots[moves[:, MOVE_SRC]], slots[moves[:, MOVE_DST]]
    narrow, wide = np.where(copy[:, None], dst, src), np.where(copy[:, None], src, dst)
    _require(
        (wide[:, SLOT_H0] <= narrow[:, SLOT_H0]) & (narrow[:, SLOT_H1] <= wide[:, SLOT_H1]),
        "a copy's source, or a reduction's destination, does not hold the heads of the other end",
    )


def _check_copies(program: Program, classes: _Classes) -> None:
    """Every slot that is read and is not a home is filled exactly once, before its first use."""
    slots, moves, attends = program.slots, program.moves, program.attends
    homes = 2 * program.num_ranks
    copies = moves[np.isin(moves[:, MOVE_KIND], (Q_IN, KV_IN))]
    _require(copies[:, MOVE_DST] >= homes, "a copy overwrites a home slot")
    which, cls = classes.expand(copies[:, MOVE_ROWS])
    key = copies[which, MOVE_DST] * max(classes.count, 1) + cls
    _require(len(np.unique(key)) == len(key), "a row of a slot is filled twice")
    filled = np.zeros(len(slots), np.int64)
    np.add.at(filled, copies[which, MOVE_DST], classes.rows[cls])
    wanted = program.row_counts[slots[:, SLOT_ROWS]]
    must = np.zeros(len(slots), bool)
    must[attends[:, [ATTEND_Q, ATTEND_KV]]] = True
    must[copies[:, MOVE_SRC]] = True
    must[:homes] = False
    if program.keep:
        must &= slots[:, SLOT_KIND] == Q
    _require((filled == wanted)[must], "a slot is not filled completely")
    ready = np.zeros(len(slots), np.int64)
    np.maximum.at(ready, copies[:, MOVE_DST], copies[:, MOVE_DUE])
    _require(copies[:, MOVE_ISSUE] >= ready[copies[:, MOVE_SRC]], "a copy is issued before its source is full")
    for column in (ATTEND_Q, ATTEND_KV):
        _require(ready[attends[:, column]] <= attends[:, ATTEND_STAGE], "an Attend runs before its rows arrive")


def _check_results(program: Program, classes: _Classes) -> None:
    """Every partial result outside the homes leaves exactly once, when it is complete."""
    slots, moves, attends = program.slots, program.moves, program.attends
    homes = 2 * program.num_ranks
    reduces = moves[np.isin(moves[:, MOVE_KIND], (Q_OUT, KV_OUT))]
    _require(reduces[:, MOVE_SRC] >= homes, "a home slot sends its result away")
    last = np.full(len(slots), -1, np.int64)
    np.maximum.at(last, attends[:, ATTEND_Q], attends[:, ATTEND_STAGE])
    if program.backward:
        np.maximum.at(last, attends[:, ATTEND_KV], attends[:, ATTEND_STAGE])
    received = np.zeros(len(slots), np.int64)
    np.maximum.at(received, reduces[:, MOVE_DST], reduces[:, MOVE_DUE])
    source = reduces[:, MOVE_SRC]
    _require(
        (reduces[:, MOVE_ISSUE] > last[source]) & (reduces[:, MOVE_ISSUE] >= received[source]),
        "a result leaves before it is complete",
    )
    which, cls = classes.expand(reduces[:, MOVE_ROWS])
    key = reduces[which, MOVE_SRC] * max(classes.count, 1) + cls
    _require(len(np.unique(key)) == len(key), "a partial result is sent twice")
    sent = np.zeros(len(slots), np.int64)
    np.add.at(sent, reduces[which, MOVE_SRC], classes.rows[cls])
    has_result = (last >= 0) | (received > 0)
    has_result[:homes] = False
    if not program.backward:
        has_result &= slots[:, SLOT_KIND] == Q
    wanted = program.row_counts[slots[:, SLOT_ROWS]]
    _require((sent == wanted)[has_result], "a partial result never reaches its owner")
    _require(sent[~has_result] == 0, "a slot without a result sends one")


def _check_coverage(program: Program, mask: Mask) -> None:
    """Boxes are pairwise disjoint, and every allowed pair lies in a box for every head."""
    attends = program.attends
    classes = _Classes(program, only=attends[:, [ATTEND_Q_ROWS, ATTEND_KV_ROWS]])
    base = max(classes.count, 1)
    head_edges = np.unique(attends[:, [ATTEND_H0, ATTEND_H1]])
    at, q_class = classes.expand(attends[:, ATTEND_Q_ROWS])
    which, k_class = classes.expand(attends[at, ATTEND_KV_ROWS])
    attend, q_class = at[which], q_class[which]
    first = np.searchsorted(head_edges, attends[attend, ATTEND_H0])
    box, head = expand(first, np.searchsorted(head_edges, attends[attend, ATTEND_H1]) - first)
    pair = q_class[box] * base + k_class[box]
    order = np.lexsort((head, pair))
    pair, head, box = pair[order], head[order], box[order]
    twice = np.flatnonzero((pair[1:] == pair[:-1]) & (head[1:] == head[:-1]))
    if len(twice):
        first_row = classes.starts[np.flatnonzero(classes.of_segment == pair[twice[0]] // base)[0]]
        raise VerifyError(f"a (query, key, head) is computed twice, among the queries from row {int(first_row)} on")
    covered, inverse = np.unique(pair, return_inverse=True)
    width = np.zeros(len(covered), np.int64)
    np.add.at(width, inverse, np.diff(head_edges)[head] if len(head_edges) > 1 else 0)
    total = 0
    for start in range(0, len(mask.bands), 4096):
        total += _covered_area(mask.bands[start : start + 4096], classes, covered, width, program.heads)
    if total != mask.area * program.heads:
        raise VerifyError(f"covered {total} of {mask.area * program.heads} (query, key, head)")


def _covered_area(bands: np.ndarray, classes: _Classes, covered: np.ndarray, width: np.ndarray, heads: int) -> int:
    """Area × heads of the bands that lies in covered class pairs; raises at the first pair that misses a head."""
    inner = classes.starts[1:-1]
    pieces = band_algebra.tighten(band_algebra.cut_axis(bands, inner, 0)[0])
    spans = np.searchsorted(inner, pieces[:, 3], "left") - np.searchsorted(inner, pieces[:, 2], "right") + 1
    total = 0
    cuts = np.searchsorted(np.cumsum(spans), np.arange(_PIECES_AT_ONCE, int(spans.sum()) + _PIECES_AT_ONCE, _PIECES_AT_ONCE))
    begin = 0
    for end in np.minimum(cuts + 1, len(pieces)).tolist():
        cut, _, key_segment = band_algebra.cut_axis(pieces[begin:end], inner, 2)
        begin = end
        area = band_algebra.area(cut)
        cut, key_segment, area = cut[area > 0], key_segment[area > 0], area[area > 0]
        query_segment = np.searchsorted(inner, cut[:, 0], "right")
        q_class, k_class = classes.of_segment[query_segment], classes.of_segment[key_segment]
        pair = q_class * max(classes.count, 1) + k_class
        at = np.minimum(np.searchsorted(covered, pair), max(len(covered) - 1, 0))
        whole = np.zeros(len(pair), bool)
        if len(covered):
            whole = (q_class >= 0) & (k_class >= 0) & (covered[at] == pair) & (width[at] == heads)
        if not whole.all():
            q0, q1, k0, k1 = cut[np.flatnonzero(~whole)[0], :4].tolist()
            raise VerifyError(f"queries {q0}:{q1} × keys {k0}:{k1} are not computed for every head")
        total += int(area.sum()) * heads
    return total


def slot_lifetimes(program: Program) -> tuple[np.ndarray, np.ndarray]:
    """First and last time at which each slot is in use, int64 [n]: from the first issue into it to its last read.

    Home slots live throughout; a slot that nothing uses has first > last.
    """
    moves, attends = program.moves, program.attends
    first = np.full(len(program.slots), program.num_stages + 1, np.int64)
    last = np.full(len(program.slots), -1, np.int64)
    for slot, begin, end in (
        (moves[:, MOVE_DST], moves[:, MOVE_ISSUE], moves[:, MOVE_DUE]),
        (moves[:, MOVE_SRC], moves[:, MOVE_ISSUE], moves[:, MOVE_ISSUE]),
        (attends[:, ATTEND_Q], attends[:, ATTEND_STAGE], attends[:, ATTEND_STAGE]),
        (attends[:, ATTEND_KV], attends[:, ATTEND_STAGE], attends[:, ATTEND_STAGE]),
    ):
        np.minimum.at(first, slot, begin)
        np.maximum.at(last, slot, end)
    homes = 2 * program.num_ranks
    first[:homes], last[:homes] = 0, program.num_stages
    return first, last


def _peak_rows(program: Program) -> np.ndarray:
    first, last = slot_lifetimes(program)
    slots = program.slots
    live = np.flatnonzero((np.arange(len(slots)) >= 2 * program.num_ranks) & (first <= last))
    size = program.row_counts[slots[live, SLOT_ROWS]] * (slots[live, SLOT_H1] - slots[live, SLOT_H0])
    held = np.zeros((program.num_ranks, program.num_stages + 3), np.int64)
    np.add.at(held, (slots[live, SLOT_RANK], first[live]), size)
    np.add.at(held, (slots[live, SLOT_RANK], last[live] + 1), -size)
    return np.cumsum(held, axis=1).max(axis=1, initial=0)
