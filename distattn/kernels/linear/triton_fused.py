"""Walks by spans (``triton_walk.py``) of pieces that no state crosses into or out of, in one launch a direction, in Triton.

    forward     what spans add, of k and v | what enters them | o
    backward    what spans add, of q and dO | what enters them | dv and dk, dq

A program has one span, head and block of columns. All programs of a head's piece meet at each bar; between the two they add
up its states together, a share of the numbers each.

Argument ADD, ENTER, WALK: which of the three a launch does. Triton's interpreter runs one program after the other, which cannot
meet, and takes three launches.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.linear.triton_walk import add_flat, add_rows, enter_spans, load_entering, store_flat, walk_rows

FLAT_BLOCK = tl.constexpr(1024)
"""Numbers of a state that a program adds up at once."""


@triton.jit
def span_program(piece_of, first_span, num_spans, HV: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """(batch, head, piece, span, block of columns, place among the programs that meet, how many those are).

    Those that meet are neighbours, so that a device with room for as many as meet, which starts programs in order, never holds
    programs that wait for one that cannot start.
    """
    i_program = tl.program_id(0)
    each: tl.constexpr = HV * NUM_BLOCKS
    i_b = (i_program // (num_spans * each)).to(tl.int64)
    i_x = i_program % (num_spans * each)
    i_n = tl.load(piece_of + i_x // each)
    first = tl.load(first_span + i_n)
    meeting = (tl.load(first_span + i_n + 1) - first) * NUM_BLOCKS
    i_x -= first * each
    i_place = i_x % meeting
    return i_b, (i_x // meeting).to(tl.int64), i_n, first + i_place // NUM_BLOCKS, i_place % NUM_BLOCKS, i_place, meeting


@triton.jit
def meet(p_arrived, number):
    """Wait until programs have come ``number`` times, and see what they stored before."""
    tl.debug_barrier()
    tl.atomic_add(p_arrived, 1, sem="release")
    while tl.atomic_add(p_arrived, 0, sem="acquire") < number:
        pass
    tl.debug_barrier()


@triton.jit
def enter_together(
    states, totals, before, given, last, arrived, rows_given, rows_last, i_b, i_h, i_n, i_place, meeting, first, num_spans,
    num_given, num_last, HV: tl.constexpr, SIZE: tl.constexpr, NUM_BLOCKS: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, ADD: tl.constexpr, ENTER: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """What enters the spans of a piece, and what leaves it, by the programs that meet: after all added, before any walks."""
    p_arrived = arrived + (i_b * num_spans + first) * HV + i_h
    if ADD and ENTER:
        meet(p_arrived, meeting)
    if ENTER:
        for begin in range(i_place * FLAT_BLOCK, SIZE, meeting * FLAT_BLOCK):
            o_x = begin + tl.arange(0, FLAT_BLOCK)
            b_x = tl.zeros([FLAT_BLOCK], tl.float32)
            b_x = add_flat(b_x, given, rows_given, i_n, i_b, i_h, num_given, o_x, HV, SIZE)
            b_x, _ = enter_spans(
                b_x, states, totals, before, i_b, i_h, first, meeting // NUM_BLOCKS, num_spans, o_x, o_x < SIZE, HV, SIZE, GATE,
                REVERSE,
            )  # fmt: skip
            store_flat(b_x, last, rows_last, i_n, i_b, i_h, num_last, o_x, HV, SIZE)
    if ENTER and WALK:
        meet(p_arrived, 2 * meeting)
        # The last to leave leaves the counter at zero.
        if tl.atomic_add(p_arrived, 1, sem="relaxed") == 3 * meeting - 1:
            tl.store(p_arrived, 0)


@triton.jit(do_not_specialize=["num_rows", "num_spans", "num_given", "num_final", "scale"])
def fused_forward_kernel(
    q, k, v, g, states, totals, before, given, final, o, arrived, cu_spans, piece_of, first_span, rows_given, rows_final,
    scale, num_rows, num_spans, num_given, num_final,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, NUM_BLOCKS: tl.constexpr, GATE: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, ADD_STAGES: tl.constexpr, ADD: tl.constexpr, ENTER: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """o [B, T, HV, V]; states [B, P, HV, K, V], before [B, P, HV], fp32: what enters each span, and the gate's sum before it.

    totals [B, P, HV]: room. given, final: states that pieces start from and end with. arrived [B, P, HV]: zeros, and left so.
    WIDTH_K, WIDTH_V: columns of a block, of BLOCK_K and BLOCK_V in all.
    """
    i_b, i_h, i_n, i_s, i_block, i_place, meeting = span_program(piece_of, first_span, num_spans, HV, NUM_BLOCKS)
    at = (i_b * num_spans + i_s) * HV + i_h
    first = i_s - i_place // NUM_BLOCKS
    begin, end = tl.load(cu_spans + i_s), tl.load(cu_spans + i_s + 1)
    o_k, o_v = tl.arange(0, BLOCK_K), i_block * WIDTH_V + tl.arange(0, WIDTH_V)
    if ADD:
        add_rows(
            k, v, g, states, totals, at, i_b, i_h, begin, end, o_k, o_v, scale, num_rows,
            HV, H, HV, K, V, GATE, False, COMPUTE, PRECISION, ADD_STAGES,
        )  # fmt: skip
    enter_together(
        states, totals, before, given, final, arrived, rows_given, rows_final, i_b, i_h, i_n, i_place, meeting, first,
        num_spans, num_given, num_final, HV, K * V, NUM_BLOCKS, GATE, False, ADD, ENTER, WALK,
    )  # fmt: skip
    if WALK:
        b_S = load_entering(states, at, o_k, o_v, K, V, V, 1)
        walk_rows(
            b_S, q, k, v, g, o, i_b, i_h, begin, end, o_k, o_v, scale, num_rows,
            HV, H, HV, K, V, GATE, False, COMPUTE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_spans", "num_given", "num_final", "scale"])
def fused_backward_kernel(
    q, k, v, g, do, states, dstates, totals, before, dfinal, dgiven, dq, dk, dv, arrived, cu_spans, piece_of, first_span,
    rows_final, rows_given, scale, num_rows, num_spans, num_final, num_given,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, NUM_BLOCKS: tl.constexpr, GATE: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, ADD_STAGES: tl.constexpr, ADD: tl.constexpr, ENTER: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """dq, dk [B, T, HV, K], dv [B, T, HV, V]; dgiven: gradients of given states.

    states: what enters each span forwards; dstates, totals, before: room. The rest as fused_forward_kernel.
    """
    i_b, i_h, i_n, i_s, i_block, i_place, meeting = span_program(piece_of, first_span, num_spans, HV, NUM_BLOCKS)
    at = (i_b * num_spans + i_s) * HV + i_h
    first = i_s - i_place // NUM_BLOCKS
    begin, end = tl.load(cu_spans + i_s), tl.load(cu_spans + i_s + 1)
    o_k, o_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    o_own_k, o_own_v = i_block * WIDTH_K + tl.arange(0, WIDTH_K), i_block * WIDTH_V + tl.arange(0, WIDTH_V)
    if ADD:
        add_rows(
            q, do, g, dstates, totals, at, i_b, i_h, begin, end, o_k, o_own_v, scale, num_rows,
            HV, H, HV, K, V, GATE, True, COMPUTE, PRECISION, ADD_STAGES,
        )  # fmt: skip
    enter_together(
        dstates, totals, before, dfinal, dgiven, arrived, rows_final, rows_given, i_b, i_h, i_n, i_place, meeting, first,
        num_spans, num_final, num_given, HV, K * V, NUM_BLOCKS, GATE, True, ADD, ENTER, WALK,
    )  # fmt: skip
    if WALK:
        # Of two spans one makes dv of both, the other dk: side by side they read the same rows.
        i_pair = i_s - (i_s - first) % 2
        i_last = tl.minimum(i_pair + 1, first + meeting // NUM_BLOCKS - 1)
        pair_begin, pair_end = tl.load(cu_spans + i_pair), tl.load(cu_spans + i_last + 1)
        at_last = (i_b * num_spans + i_last) * HV + i_h
        if i_s == i_pair:
            b_dS = load_entering(dstates, at_last, o_k, o_own_v, K, V, V, 1)
            walk_rows(
                b_dS, k, q, do, g, dv, i_b, i_h, pair_begin, pair_end, o_k, o_own_v, scale, num_rows,
                HV, H, HV, K, V, GATE, True, COMPUTE, PRECISION,
            )  # fmt: skip
        if i_s == i_last:
            b_dS = load_entering(dstates, at_last, o_v, o_own_k, V, K, 1, V)
            walk_rows(
                b_dS, v, do, q, g, dk, i_b, i_h, pair_begin, pair_end, o_v, o_own_k, scale, num_rows,
                HV, HV, H, V, K, GATE, True, COMPUTE, PRECISION,
            )  # fmt: skip
        b_S = load_entering(states, at, o_v, o_own_k, V, K, 1, V)
        walk_rows(
            b_S, do, v, k, g, dq, i_b, i_h, begin, end, o_v, o_own_k, scale, num_rows,
            HV, HV, H, V, K, GATE, False, COMPUTE, PRECISION,
        )  # fmt: skip
