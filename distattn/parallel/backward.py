"""The backward program, derived from the forward one by time reversal t → S − t. No scheduler writes or overrides it.

    Attend at s              its backward at S − 1 − s, with the final (out, lse) and delta
    KV_IN  a→b [i, d)        KV_OUT b→a [S − d, S − i)   dK, dV add up along the transposed forward tree
    Q_IN   a→b [i, d)        Q_OUT  b→a [S − d, S − i)   dQ
    Q_OUT  a→b [i, d)        Q_IN   b→a [S − d, S − i)   dO, LSE, delta (and q)

Keys and values that are needed again are routed, not reversed: reversed, a chunk would have to come from the far end of its
way. Each slot is filled in time for its first use, from a rank of its node that holds the same rows by then, else from home.
Where that takes a stage before the first one, a third of what ranks compute at home is done there, for it needs no
arrivals, if they wait for long enough.
"""

from __future__ import annotations

import numpy as np

from distattn.parallel.csr import expand
from distattn.parallel.need import split_by_owner
from distattn.parallel.program import (
    ATTEND_H0,
    ATTEND_H1,
    ATTEND_KV,
    ATTEND_Q,
    ATTEND_STAGE,
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
    SLOT_RANK,
    SLOT_ROWS,
    Program,
)
from distattn.parallel.rounds import in_rounds

_UNUSED = 1 << 40
_COPIED_MEANWHILE = 4
"""What a device copies within its memory while one from the same node arrives: 1,250 GB/s, against some 330 (H100, NVLink)."""

_SLOWER_BETWEEN_NODES = 7
"""A link between nodes (400 Gb/s a GPU) against one inside."""


def derive_backward(program: Program, *, keep: bool = False, ranks_per_node: int | None = None) -> Program:
    """The gradient program of a forward program.

    keep: received keys and values were kept in the forward, so none are sent again.
    ranks_per_node: size of a node, for which a chunk crosses once; None: all ranks are one node.
    """
    stages = program.num_stages
    moves = program.moves.copy()
    kind = program.moves[:, MOVE_KIND]
    moves[:, MOVE_SRC], moves[:, MOVE_DST] = program.moves[:, MOVE_DST], program.moves[:, MOVE_SRC]
    moves[:, MOVE_ISSUE] = stages - program.moves[:, MOVE_DUE]
    moves[:, MOVE_DUE] = stages - program.moves[:, MOVE_ISSUE]
    for forward, backward in ((Q_IN, Q_OUT), (KV_IN, KV_OUT), (Q_OUT, Q_IN)):
        moves[kind == forward, MOVE_KIND] = backward
    attends = program.attends.copy()
    attends[:, ATTEND_STAGE] = stages - 1 - attends[:, ATTEND_STAGE]
    moves = _without_empty_results(moves, attends, program)
    row_ptr, row_ranges = program.row_ptr, program.row_ranges
    prologue = 0
    if not keep:
        refill, row_ptr, row_ranges = _route_keys(program, attends, ranks_per_node or program.num_ranks)
        prologue = max(0, -int(refill[:, MOVE_ISSUE].min(initial=0)))
        moves = np.concatenate([moves, refill])
    moves[:, [MOVE_ISSUE, MOVE_DUE]] += prologue
    if prologue and (kind == Q_OUT).any():
        _send_from_home_at_once(moves, prologue, program)
    attends[:, ATTEND_STAGE] += prologue
    if prologue:
        wait = _rows_awaited(moves, program, np.cumsum(np.append(0, np.diff(row_ranges).ravel()))[row_ptr], ranks_per_node)
        attends = _with_work_for_the_prologue(attends, program, wait)
    moves = moves[np.lexsort((moves[:, MOVE_DUE], moves[:, MOVE_ISSUE]))]
    attends = attends[np.argsort(attends[:, ATTEND_STAGE], kind="stable")]
    derived = Program(
        heads=program.heads,
        kv_heads=program.kv_heads,
        layout=program.layout,
        row_ptr=row_ptr,
        row_ranges=row_ranges,
        slots=program.slots,
        moves=moves,
        attends=attends,
        num_stages=stages + prologue,
        backward=True,
        keep=keep,
        version=program.version,
        keys=program.keys,
    )
    return derived if program.rounds is None else in_rounds(derived, program.rounds)


def _send_from_home_at_once(moves: np.ndarray, prologue: int, program: Program) -> None:
    """Where queries travel, what homes send for the first stage leaves with the keys of the prologue: dO is there from the
    start, and in split phase it then travels while another call computes."""
    copies = np.isin(moves[:, MOVE_KIND], (Q_IN, KV_IN)) & (moves[:, MOVE_SRC] < 2 * program.num_ranks)
    moves[copies & (moves[:, MOVE_ISSUE] <= prologue), MOVE_ISSUE] = 0


def _rows_awaited(moves: np.ndarray, program: Program, row_sums: np.ndarray, ranks_per_node: int | None) -> np.ndarray:
    """KV rows × heads that come to each rank in stage 0, those from other nodes ``_SLOWER_BETWEEN_NODES`` times; int64 [P].

    row_sums: rows before each row set, int64 [sets + 1].
    """
    slots = program.slots
    first = moves[(moves[:, MOVE_KIND] == KV_IN) & (moves[:, MOVE_ISSUE] == 0)]
    source, target = slots[first[:, MOVE_SRC], SLOT_RANK], slots[first[:, MOVE_DST]]
    cells = (row_sums[first[:, MOVE_ROWS] + 1] - row_sums[first[:, MOVE_ROWS]]) * (target[:, SLOT_H1] - target[:, SLOT_H0])
    nodes = ranks_per_node or program.num_ranks
    cells = np.where(source // nodes == target[:, SLOT_RANK] // nodes, cells, _SLOWER_BETWEEN_NODES * cells)
    awaited = np.zeros(program.num_ranks, np.int64)
    np.add.at(awaited, target[:, SLOT_RANK], np.where(source == target[:, SLOT_RANK], 0, cells))
    return awaited


def _with_work_for_the_prologue(attends: np.ndarray, program: Program, awaited: np.ndarray) -> np.ndarray:
    """Move a third of the heads of Attends between home slots to stage 0, on ranks that would wait there for longer than it
    takes to put the two parts of their gradients together (a copy of dq, dk and dv).

    The rest stays where it hides the last gradients that come home: dK and dV in fp32 are twice the bytes of K and V.
    """
    homes, group = 2 * program.num_ranks, program.group_size
    rows, keys = program.layout.counts * program.heads, program.key_layout.counts * program.kv_heads
    waits = 2 * awaited * _COPIED_MEANWHILE > rows + 2 * keys
    width = attends[:, ATTEND_H1] - attends[:, ATTEND_H0]
    at_home = (attends[:, ATTEND_Q] < homes) & (attends[:, ATTEND_KV] < homes) & (width > 1)
    at_home &= waits[program.slots[attends[:, ATTEND_Q], SLOT_RANK]]
    third = np.maximum(width // 3, 1)
    third = np.where(width > group, np.maximum(third // group, 1) * group, third)
    early = attends[at_home]
    cut = (attends[:, ATTEND_H0] + third)[at_home]
    early[:, ATTEND_STAGE], early[:, ATTEND_H1] = 0, cut
    attends[at_home, ATTEND_H0] = cut
    return np.concatenate([early, attends])


def _without_empty_results(moves: np.ndarray, attends: np.ndarray, program: Program) -> np.ndarray:
    """Drop reductions out of slots that neither compute nor receive a gradient: a copy that the forward made for nothing."""
    computes = np.zeros(len(program.slots), bool)
    computes[attends[:, [ATTEND_Q, ATTEND_KV]]] = True
    while True:
        reduces = np.isin(moves[:, MOVE_KIND], (Q_OUT, KV_OUT))
        has_result = computes.copy()
        has_result[moves[reduces, MOVE_DST]] = True
        empty = reduces & ~has_result[moves[:, MOVE_SRC]]
        if not empty.any():
            return moves
        moves = moves[~empty]


def _route_keys(program: Program, attends: np.ndarray, ranks_per_node: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KV_IN moves that fill every received KV slot by its first backward use, and the row sets with those added."""
    slots = program.slots
    filled = np.unique(program.moves[program.moves[:, MOVE_KIND] == KV_IN, MOVE_DST])
    first_use = np.full(len(slots), _UNUSED, np.int64)
    np.minimum.at(first_use, attends[:, ATTEND_KV], attends[:, ATTEND_STAGE])
    # A slot that only passed keys on is not computed with: dK, dV pass through it, but its keys are not needed again.
    filled = filled[first_use[filled] < _UNUSED]
    filled = filled[np.argsort(first_use[filled], kind="stable")]
    time = first_use[filled]
    by_home, row_ptr, row_ranges = _owners(program, slots[filled, SLOT_ROWS])
    source, from_home = _nearest(program, filled, time, by_home, ranks_per_node)
    relayed = np.flatnonzero(~from_home)
    relays = np.stack(
        [
            np.full(len(relayed), KV_IN), source[relayed], filled[relayed], slots[filled[relayed], SLOT_ROWS],
            time[relayed] - 1, time[relayed],
        ],
        1,
    )  # fmt: skip
    owner_ptr, owner, part = by_home
    which, flat = expand(owner_ptr[:-1][from_home], np.diff(owner_ptr)[from_home])
    direct = np.flatnonzero(from_home)[which]
    homes = np.stack(
        [np.full(len(direct), KV_IN), 2 * owner[flat] + 1, filled[direct], part[flat], time[direct] - 1, time[direct]],
        1,
    )
    return np.concatenate([relays, homes]), row_ptr, row_ranges


def _owners(program: Program, row_sets: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """Split row sets by the rank that owns the rows: ((CSR pointer, owner, row set of the part), new row_ptr, new ranges)."""
    distinct, inverse = np.unique(row_sets, return_inverse=True)
    _, flat = expand(program.row_ptr[distinct], program.row_ptr[distinct + 1] - program.row_ptr[distinct])
    set_ptr = np.append(0, np.cumsum(program.row_ptr[distinct + 1] - program.row_ptr[distinct]))
    parts = split_by_owner(program.key_layout, set_ptr, program.row_ranges[flat])
    new_ids = len(program.row_ptr) - 1 + np.arange(len(parts.owner))
    row_ptr = np.concatenate([program.row_ptr, program.row_ptr[-1] + parts.ptr[1:]])
    row_ranges = np.concatenate([program.row_ranges, parts.ranges])
    ptr = np.searchsorted(parts.row_set, np.arange(len(distinct) + 1))
    _, flat = expand(ptr[inverse], (ptr[1:] - ptr[:-1])[inverse])
    out_ptr = np.concatenate([[0], np.cumsum((ptr[1:] - ptr[:-1])[inverse])])
    return (out_ptr, parts.owner[flat], new_ids[flat]), row_ptr, row_ranges


def _nearest(
    program: Program,
    filled: np.ndarray,
    time: np.ndarray,
    by_home: tuple[np.ndarray, np.ndarray, np.ndarray],
    ranks_per_node: int,
) -> tuple[np.ndarray, np.ndarray]:
    """For each filled slot (sorted by time): the holder in its node to copy from, or whether to ask the homes.

    A home in the same node is as near as any holder; otherwise the holder that got the same rows last before this slot's time.
    """
    slots = program.slots
    owner_ptr, owner, _ = by_home
    node = slots[filled, SLOT_RANK] // ranks_per_node
    which, flat = expand(owner_ptr[:-1], np.diff(owner_ptr))
    local = np.ones(len(filled), bool)
    local[which[owner[flat] // ranks_per_node != node[which]]] = False
    same = np.stack([slots[filled, SLOT_ROWS], slots[filled, SLOT_H0], slots[filled, SLOT_H1], node], 1)
    _, group = np.unique(same, axis=0, return_inverse=True)
    group = group.ravel()
    order = np.lexsort((time, group))
    group_s, time_s = group[order], time[order]
    span = int(time.max(initial=0)) + 2
    # The last member of the same group with a strictly smaller time.
    key = group_s * span + time_s
    before = np.searchsorted(key, key, "left") - 1
    found = before >= 0
    found[found] = group_s[before[found]] == group_s[found]
    source = np.full(len(filled), -1, np.int64)
    source[order[found]] = filled[order[before[found]]]
    return source, local | (source < 0)
