"""Which reductions carry a result that is one kernel's alone, so that it travels in the input dtype: rounded once, as there."""

from __future__ import annotations

import numpy as np

from distattn.parallel.csr import expand
from distattn.parallel.program import (
    ATTEND_KV,
    ATTEND_Q,
    KV_OUT,
    MOVE_DST,
    MOVE_KIND,
    MOVE_ROWS,
    MOVE_SRC,
    Q_OUT,
    Program,
)


def results_alone(program: Program, heads: np.ndarray) -> np.ndarray:
    """Which Moves bring a home its only result for those rows and heads, bool [m]; alike on every rank.

    Decided for whole slots: nothing is computed in the slot itself, and no two results into it share rows and heads.
    """
    moves, slots = program.moves, program.slots
    alone = moves[:, MOVE_KIND] == Q_OUT
    alone &= moves[:, MOVE_DST] < 2 * program.num_ranks
    computed = np.zeros(len(slots), bool)
    computed[program.attends[:, ATTEND_Q]] = True
    alone &= ~computed[moves[:, MOVE_DST]]
    which = np.flatnonzero(alone)
    sets = moves[which, MOVE_ROWS]
    box, flat = expand(program.row_ptr[sets], program.row_ptr[sets + 1] - program.row_ptr[sets])
    move = which[box]
    dst, (h0, h1), (start, stop) = moves[move, MOVE_DST], heads[move].T, program.row_ranges[flat].T
    order = np.lexsort((start, h1, h0, dst))
    dst, h0, h1, start, stop = (x[order] for x in (dst, h0, h1, start, stop))
    same_heads = (dst[1:] == dst[:-1]) & (h0[1:] == h0[:-1]) & (h1[1:] == h1[:-1])
    shares_rows = same_heads & (start[1:] < stop[:-1])
    shares_heads = ~same_heads & (dst[1:] == dst[:-1]) & (h0[1:] < h1[:-1])
    alone &= ~np.isin(moves[:, MOVE_DST], dst[1:][shares_rows | shares_heads])
    return alone


def gradients_alone(program: Program) -> np.ndarray:
    """Which Moves of a backward carry what one Attend gave a slot that got no other gradient, bool [m]; alike on every rank.

    Their first hop, as it were: what is added up from several ranks or stages travels in fp32.
    """
    moves = program.moves
    reduces = np.isin(moves[:, MOVE_KIND], (Q_OUT, KV_OUT))
    given = np.bincount(program.attends[:, [ATTEND_Q, ATTEND_KV]].ravel(), minlength=len(program.slots))
    np.add.at(given, moves[reduces, MOVE_DST], 1)
    return reduces & (given[moves[:, MOVE_SRC]] == 1)
