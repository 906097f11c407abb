"""Transfers cut into rounds: no rank sends or receives more at once than a budget allows.

    stage t    all its transfers at once          ─▶    sub-stages t.0, t.1, …: a round of transfers each
               its computation                          a share of the heads in each, so that rounds stay hidden

Chunks of at most half the budget go, largest first, to the first round in which both ends have room (first-fit descending).
What a stage needs comes in earlier rounds, what it makes leaves in later ones: the program's order is kept, and its proof.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from distattn.errors import PlanError
from distattn.parallel.cost import Shape
from distattn.parallel.csr import expand
from distattn.parallel.program import (
    ATTEND_H0,
    ATTEND_H1,
    ATTEND_STAGE,
    MOVE_DST,
    MOVE_DUE,
    MOVE_ISSUE,
    MOVE_KIND,
    MOVE_ROWS,
    MOVE_SRC,
    SLOT_RANK,
    Program,
    RoundBudget,
)


def in_rounds(program: Program, budget: RoundBudget) -> Program:
    """The same program with at most ``budget.num_bytes`` to and from each rank in any stage's transfers.

    Transfers that may take several stages keep that freedom. The backward that is derived from the result keeps the budget
    too. Raises PlanError where not even one row fits.
    """
    row_bytes = _row_bytes(program, budget)
    needed = 2 * int(row_bytes.max(initial=0))
    if needed > budget.num_bytes:
        raise PlanError(
            f"a round of {budget.num_bytes} bytes is too small: one row of the widest transfer has {needed // 2}, and two must "
            f"fit; give round_bytes of at least {needed}"
        )
    moves, ptr, ranges, size = _chunks(program, row_bytes, budget.num_bytes // 2)
    rank = program.slots[:, SLOT_RANK]
    src, dst = rank[moves[:, MOVE_SRC]], rank[moves[:, MOVE_DST]]
    chosen = np.zeros(len(moves), np.int64)
    rounds = np.ones(program.num_stages, np.int64)
    for stage in np.unique(moves[:, MOVE_ISSUE]).tolist():
        of_stage = np.flatnonzero((moves[:, MOVE_ISSUE] == stage) & (src != dst))
        chosen[of_stage] = _first_fit(src[of_stage], dst[of_stage], size[of_stage], program.num_ranks, budget.num_bytes)
        rounds[stage] = chosen[of_stage].max(initial=0) + 1
    start = np.concatenate([[0], np.cumsum(rounds)])
    moves, direct = moves.copy(), moves[:, MOVE_DUE] == moves[:, MOVE_ISSUE] + 1
    moves[:, MOVE_DUE] = np.where(direct & (src != dst), start[moves[:, MOVE_ISSUE]] + chosen + 1, start[moves[:, MOVE_DUE]])
    moves[:, MOVE_ISSUE] = start[moves[:, MOVE_ISSUE]] + chosen
    attends = _spread(program, start, rounds)
    return replace(
        program,
        row_ptr=ptr,
        row_ranges=ranges,
        moves=moves[np.lexsort((moves[:, MOVE_DUE], moves[:, MOVE_ISSUE]))],
        attends=attends[np.argsort(attends[:, ATTEND_STAGE], kind="stable")],
        num_stages=int(start[-1]),
        rounds=budget,
    )


def _row_bytes(program: Program, budget: RoundBudget) -> np.ndarray:
    """Bytes of one row of each Move, int64 [m]; as much as any kernel may need of it."""
    shape = Shape(budget.head_dim, budget.head_dim, {2: "bfloat16", 4: "float32", 8: "float64"}[budget.element_bytes], True)
    heads = program.move_heads()
    bundle = shape.bundle_bytes(backward=program.backward, keep=program.keep)
    return bundle[program.moves[:, MOVE_KIND]] * (heads[:, 1] - heads[:, 0])


def _chunks(program: Program, row_bytes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Moves cut by rows into equal parts of at most ``most`` bytes: (moves, row_ptr, row_ranges, bytes of each)."""
    moves, rows = program.moves, program.row_counts[program.moves[:, MOVE_ROWS]]
    parts = np.maximum(-(-rows // np.maximum(most // np.maximum(row_bytes, 1), 1)), 1)
    cut = np.flatnonzero(parts > 1)
    count = np.where(parts > 1, parts, 1)
    which, part = expand(0 * count, count)
    out = moves[which]
    first = rows[which] * part // count[which]
    size = (rows[which] * (part + 1) // count[which] - first) * row_bytes[which]
    if not len(cut):
        return out, program.row_ptr, program.row_ranges, size
    # Rows of the cut moves on one line, as ranges and as parts: their borders together are those of the pieces.
    sets = moves[cut, MOVE_ROWS]
    _, flat = expand(program.row_ptr[sets], program.row_ptr[sets + 1] - program.row_ptr[sets])
    ranges = program.row_ranges[flat]
    length = ranges[:, 1] - ranges[:, 0]
    range_start = np.cumsum(length) - length
    base = np.cumsum(rows[cut]) - rows[cut]
    in_cut = np.flatnonzero(parts[which] > 1)
    part_start = np.repeat(base, parts[cut]) + first[in_cut]
    borders = np.union1d(range_start, part_start)
    ends = np.append(borders[1:], int(length.sum()))
    source = np.searchsorted(range_start, borders, "right") - 1
    owner = np.searchsorted(part_start, borders, "right") - 1
    begin = ranges[source, 0] + borders - range_start[source]
    pieces = np.stack([begin, begin + ends - borders], 1)
    counts = np.bincount(owner, minlength=len(in_cut))
    new = len(program.row_ptr) - 1 + np.arange(len(in_cut))
    out = out.copy()
    out[in_cut, MOVE_ROWS] = new
    ptr = np.concatenate([program.row_ptr, program.row_ptr[-1] + np.cumsum(counts)])
    return out, ptr, np.concatenate([program.row_ranges, pieces]), size


def _first_fit(src: np.ndarray, dst: np.ndarray, size: np.ndarray, num_ranks: int, budget: int) -> np.ndarray:
    """The round of each chunk, int64 [n]: the largest first, each to the first in which both ends have room."""
    room = np.full((2, num_ranks, 8), float(budget))
    chosen = np.zeros(len(src), np.int64)
    for index in np.lexsort((dst, src, -size)).tolist():
        a, b, amount = src[index], dst[index], size[index]
        fits = np.minimum(room[0, a], room[1, b]) >= amount
        at = int(fits.argmax())
        if not fits[at]:
            at = room.shape[2]
            room = np.concatenate([room, np.full_like(room, float(budget))], 2)
        room[0, a, at] -= amount
        room[1, b, at] -= amount
        chosen[index] = at
    return chosen


def _spread(program: Program, start: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """Each stage's Attends over its sub-stages, by heads: whole groups where there are enough of them."""
    attends, group = program.attends, program.group_size
    count = rounds[attends[:, ATTEND_STAGE]]
    which, part = expand(0 * count, count)
    out = attends[which]
    width, parts = out[:, ATTEND_H1] - out[:, ATTEND_H0], count[which]
    unit = np.where((width >= group) & (width % group == 0), group, 1)
    first, last = (width // unit * step // parts * unit for step in (part, part + 1))
    out[:, ATTEND_H1] = out[:, ATTEND_H0] + last
    out[:, ATTEND_H0] += first
    out[:, ATTEND_STAGE] = start[out[:, ATTEND_STAGE]] + part
    return out[first < last]
