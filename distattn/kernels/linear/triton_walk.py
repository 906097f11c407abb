"""Outputs and gradients of the decay family by walks side by side, in Triton, for a gate a head or none.

With such a gate one operation gives all four. Of rows a, b, c and a state S, forwards:

    y_i = s Σ_{j ≤ i} 2^(G_i − G_j) (a_i · b_j) c_j + s 2^(G_i) a_i S        S ← 2^(G_C) S + Σ_j 2^(G_C − G_j) b_jᵀ c_j

and backwards:

    y_i = s Σ_{j ≥ i} 2^(G_j − G_i) (a_i · b_j) c_j + 2^(G_C − G_i) a_i S    S ← 2^(G_C) S + s Σ_j 2^(G_j) b_jᵀ c_j

    o   forwards (q, k, v), from S         dq  forwards (dO, v, k), from Sᵀ
    dv  backwards (k, q, dO), from dS'     dk  backwards (v, dO, q), from dS'ᵀ

A piece is cut into spans. ``add_kernel`` makes what each span adds to a state, ``span_states_kernel`` from that what enters
each span, and ``walk_kernel`` goes through the chunks of all spans side by side, so that no state of a chunk is ever in memory.
Where no state crosses a border, one launch does all three (``triton_fused.py``).
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.linear.triton_output import FADED_POWERS, REACH_ALL, REACH_NEAR
from distattn.kernels.linear.triton_rows import CHUNK, GATE_CONSTANT, GATE_NONE, LOG2E, load_tile, row_gate, store_tile


@triton.jit
def add_flat(b_x, states, rows, i_n, i_b, i_h, num_states, o_x, HV: tl.constexpr, SIZE: tl.constexpr):
    """A block of a state plus that of a piece's state in a set, if it has one."""
    i_row = tl.load(rows + i_n)
    at = ((i_b * num_states + tl.maximum(i_row, 0)) * HV + i_h) * SIZE
    return b_x + tl.load(states + at + o_x, mask=(o_x < SIZE) & (i_row >= 0), other=0.0)


@triton.jit
def store_flat(b_x, states, rows, i_n, i_b, i_h, num_states, o_x, HV: tl.constexpr, SIZE: tl.constexpr):
    i_row = tl.load(rows + i_n)
    at = ((i_b * num_states + tl.maximum(i_row, 0)) * HV + i_h) * SIZE
    tl.store(states + at + o_x, b_x, mask=(o_x < SIZE) & (i_row >= 0))


@triton.jit
def load_four(p_x, m_x, number, step: tl.constexpr):
    """What the next spans add, four or as many as there are, past a cache that other multiprocessors do not write."""
    return (
        tl.load(p_x, mask=m_x & (number > 0), other=0.0, cache_modifier=".cg"),
        tl.load(p_x + step, mask=m_x & (number > 1), other=0.0, cache_modifier=".cg"),
        tl.load(p_x + 2 * step, mask=m_x & (number > 2), other=0.0, cache_modifier=".cg"),
        tl.load(p_x + 3 * step, mask=m_x & (number > 3), other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def enter_span(b_x, b_added, gates, total, states, before, at, there, o_x, m_x, SIZE: tl.constexpr, GATE: tl.constexpr):
    """Store what enters a span in place of what it adds; (what leaves it, the gate's sum to its end). there: if it exists."""
    tl.store(states + at * SIZE + o_x, b_x, mask=m_x & there)
    if GATE != GATE_NONE:
        tl.store(before + at, gates, mask=there & (tl.min(o_x, 0) == 0))
        gates += total
        b_x *= tl.exp2(total)
    return b_x + b_added, gates


@triton.jit
def enter_spans(
    b_x, states, totals, before, i_b, i_h, first, number, num_spans, o_x, m_x,
    HV: tl.constexpr, SIZE: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Numbers o_x of the states of a piece's spans: what each adds becomes what enters it, b_x what enters the first in the
    direction of the walk. (What leaves the last, the gate's sum over the piece)."""
    step: tl.constexpr = -HV if REVERSE else HV
    at = (i_b * num_spans + first + (number - 1 if REVERSE else 0)) * HV + i_h
    gates = tl.full([], 0.0, tl.float32)
    p_x, p_t = states + at * SIZE + o_x, totals + at
    b_0, b_1, b_2, b_3 = load_four(p_x, m_x, number, step * SIZE)
    t_0, t_1, t_2, t_3 = load_four(p_t, GATE != GATE_NONE, number, step)
    for left_over in range(number, 0, -4):
        # A group ahead: four loads are under way at once, and none waits behind a store.
        p_x += 4 * step * SIZE
        p_t += 4 * step
        b_4, b_5, b_6, b_7 = load_four(p_x, m_x, left_over - 4, step * SIZE)
        t_4, t_5, t_6, t_7 = load_four(p_t, GATE != GATE_NONE, left_over - 4, step)
        b_x, gates = enter_span(b_x, b_0, gates, t_0, states, before, at, left_over > 0, o_x, m_x, SIZE, GATE)
        b_x, gates = enter_span(b_x, b_1, gates, t_1, states, before, at + step, left_over > 1, o_x, m_x, SIZE, GATE)
        b_x, gates = enter_span(b_x, b_2, gates, t_2, states, before, at + 2 * step, left_over > 2, o_x, m_x, SIZE, GATE)
        b_x, gates = enter_span(b_x, b_3, gates, t_3, states, before, at + 3 * step, left_over > 3, o_x, m_x, SIZE, GATE)
        at += 4 * step
        b_0, b_1, b_2, b_3 = b_4, b_5, b_6, b_7
        t_0, t_1, t_2, t_3 = t_4, t_5, t_6, t_7
    return b_x, gates


@triton.jit
def add_rows(
    b, c, g, states, totals, at, i_b, i_h, begin, end, o_d, o_e, scale, num_rows,
    HV: tl.constexpr, HB: tl.constexpr, HC: tl.constexpr, D: tl.constexpr, E: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store rows o_d and columns o_e of what a span adds to the state, and the gate's sum over it, as number ``at``.

    Against the direction of the walk, so that what that reads first has just been read: a chunk's part decays by the gates of
    the chunks that come before it here, after it there.
    """
    o_r = tl.arange(0, CHUNK)
    num_steps = tl.cdiv(end - begin, CHUNK)
    row0 = begin if REVERSE else begin + (num_steps - 1) * CHUNK
    step: tl.constexpr = CHUNK if REVERSE else -CHUNK
    first = i_b * num_rows + row0
    p_b, p_c = b + (first * HB + i_h // (HV // HB)) * D, c + (first * HC + i_h // (HV // HC)) * E
    b_S = tl.zeros([o_d.shape[0], o_e.shape[0]], tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for _ in tl.range(num_steps, num_stages=STAGES):
        num_valid = tl.minimum(end - row0, CHUNK)
        m_row = o_r < num_valid
        b_b = load_tile(p_b, m_row, o_r, o_d, HB * D, D).to(COMPUTE)
        b_c = load_tile(p_c, m_row, o_r, o_e, HC * E, E)
        if GATE != GATE_NONE:
            b_G, last = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
            b_c = b_c.to(tl.float32) * tl.exp2((b_G if REVERSE else last - b_G) + total)[:, None]
            total += last
        b_S = tl.dot(tl.trans(b_b), b_c.to(COMPUTE), b_S, input_precision=PRECISION)
        row0 += step
        p_b += step * HB * D
        p_c += step * HC * E
    if REVERSE:
        b_S *= scale
    m_state = (o_d < D)[:, None] & (o_e < E)[None, :]
    tl.store(states + at * (D * E) + o_d[:, None] * E + o_e[None, :], b_S, mask=m_state)
    if GATE != GATE_NONE:
        tl.store(totals + at, total, mask=(tl.min(o_d, 0) == 0) & (tl.min(o_e, 0) == 0))


@triton.jit(do_not_specialize=["num_rows", "num_spans", "scale"])
def add_kernel(
    b, c, g, states, totals, cu_spans, scale, num_rows, num_spans,
    HV: tl.constexpr, HB: tl.constexpr, HC: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """states [B, P, HV, D, E], fp32: what each span adds; totals [B, P, HV]: the gate's sum over it. b [B, T, HB, D],
    c [B, T, HC, E]."""
    i_program = tl.program_id(1)
    i_h = (i_program % HV).to(tl.int64)
    i_s = (i_program // HV) % num_spans
    i_b = (i_program // HV // num_spans).to(tl.int64)
    num_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    o_d = (tl.program_id(0) % num_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_e = (tl.program_id(0) // num_d) * BLOCK_E + tl.arange(0, BLOCK_E)
    begin, end = tl.load(cu_spans + i_s), tl.load(cu_spans + i_s + 1)
    add_rows(
        b, c, g, states, totals, (i_b * num_spans + i_s) * HV + i_h, i_b, i_h, begin, end, o_d, o_e, scale, num_rows,
        HV, HB, HC, D, E, GATE, REVERSE, COMPUTE, PRECISION, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pieces", "num_spans", "num_given", "num_late", "num_left", "num_last"])
def span_states_kernel(
    states, totals, given, late, left, last, before, through, first_span, rows_given, rows_late, rows_left, rows_last,
    num_pieces, num_spans, num_given, num_late, num_left, num_last,
    HV: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, LATE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """states [B, P, HV, K·V], fp32: what each span adds becomes what enters it, in the direction of the walk.

    totals [B, P, HV]: the gate's sum over each span. given, late: states that pieces start from; left, last: those they end
    with.
    before [B, P, HV], through [B, N, HV]: the gate's sums from a piece's beginning to each span, and over the piece.
    """
    i_program = tl.program_id(1)
    i_h = (i_program % HV).to(tl.int64)
    i_n = (i_program // HV) % num_pieces
    i_b = (i_program // HV // num_pieces).to(tl.int64)
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < SIZE
    first = tl.load(first_span + i_n)
    number = tl.load(first_span + i_n + 1) - first
    b_x = add_flat(tl.zeros([BLOCK], tl.float32), given, rows_given, i_n, i_b, i_h, num_given, o_x, HV, SIZE)
    if LATE:
        b_x = add_flat(b_x, late, rows_late, i_n, i_b, i_h, num_late, o_x, HV, SIZE)
    b_x, gates = enter_spans(b_x, states, totals, before, i_b, i_h, first, number, num_spans, o_x, m_x, HV, SIZE, GATE, REVERSE)
    store_flat(b_x, left, rows_left, i_n, i_b, i_h, num_left, o_x, HV, SIZE)
    store_flat(b_x, last, rows_last, i_n, i_b, i_h, num_last, o_x, HV, SIZE)
    if GATE != GATE_NONE:
        tl.store(through + (i_b * num_pieces + i_n) * HV + i_h, gates, mask=tl.program_id(0) == 0)


@triton.jit
def load_entering(states, at, o_d, o_e, D: tl.constexpr, E: tl.constexpr, STRIDE_D: tl.constexpr, STRIDE_E: tl.constexpr):
    """What enters a span, in which row d and column e of S lie STRIDE_D and STRIDE_E apart."""
    m_state = (o_d < D)[:, None] & (o_e < E)[None, :]
    p_state = states + at * (D * E) + o_d[:, None] * STRIDE_D + o_e[None, :] * STRIDE_E
    return tl.load(p_state, mask=m_state, other=0.0, cache_modifier=".cg")


@triton.jit
def decay_between(b_G, num_valid, REVERSE: tl.constexpr):
    """[CHUNK, CHUNK]: 2^(G_i − G_j) for j ≤ i, or 2^(G_j − G_i) for j ≥ i, else 0."""
    o_r = tl.arange(0, CHUNK)
    if REVERSE:
        m_seen = (o_r[:, None] <= o_r[None, :]) & (o_r < num_valid)[None, :]
    else:
        m_seen = (o_r[:, None] >= o_r[None, :]) & (o_r < num_valid)[:, None]
    b_between = b_G[None, :] - b_G[:, None] if REVERSE else b_G[:, None] - b_G[None, :]
    return tl.where(m_seen, tl.exp2(tl.where(m_seen, b_between, 0.0)), 0.0)


@triton.jit
def walk_rows(
    b_S, a, b, c, g, y, i_b, i_h, begin, end, o_d, o_e, scale, num_rows,
    HV: tl.constexpr, HA: tl.constexpr, HC: tl.constexpr, D: tl.constexpr, E: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns o_e of y for the rows of a span, from what enters it, b_S."""
    o_r = tl.arange(0, CHUNK)
    num_steps = tl.cdiv(end - begin, CHUNK)
    row0 = begin + (num_steps - 1) * CHUNK if REVERSE else begin
    step: tl.constexpr = -CHUNK if REVERSE else CHUNK
    first = i_b * num_rows + row0
    p_a, p_b = a + (first * HA + i_h // (HV // HA)) * D, b + (first * HA + i_h // (HV // HA)) * D
    p_c, p_y = c + (first * HC + i_h // (HV // HC)) * E, y + (first * HV + i_h) * E
    if GATE == GATE_CONSTANT:
        b_decay = scale * decay_between(tl.load(g + i_h).to(tl.float32) * LOG2E * o_r, CHUNK, REVERSE)
    for _ in range(num_steps):
        num_valid = tl.minimum(end - row0, CHUNK)
        m_row = o_r < num_valid
        b_a = load_tile(p_a, m_row, o_r, o_d, HA * D, D).to(COMPUTE)
        b_b = load_tile(p_b, m_row, o_r, o_d, HA * D, D).to(COMPUTE)
        b_c = load_tile(p_c, m_row, o_r, o_e, HC * E, E)
        b_P = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
        b_y = tl.dot(b_a, b_S.to(COMPUTE), input_precision=PRECISION)
        if GATE == GATE_NONE:
            b_P = tl.where(o_r[:, None] <= o_r[None, :] if REVERSE else o_r[:, None] >= o_r[None, :], b_P * scale, 0.0)
            b_added = (b_c.to(tl.float32) * scale).to(COMPUTE) if REVERSE else b_c.to(COMPUTE)
            if not REVERSE:
                b_y *= scale
        else:
            b_G, last = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
            if GATE == GATE_CONSTANT:
                b_P *= b_decay
            else:
                b_P *= scale * decay_between(b_G, num_valid, REVERSE)
            b_out = tl.exp2(last - b_G) if REVERSE else scale * tl.exp2(b_G)
            b_in = scale * tl.exp2(b_G) if REVERSE else tl.exp2(last - b_G)
            b_added = (b_c.to(tl.float32) * b_in[:, None]).to(COMPUTE)
            b_y *= b_out[:, None]
            b_S *= tl.exp2(last)
        b_y = tl.dot(b_P.to(COMPUTE), b_c.to(COMPUTE), b_y, input_precision=PRECISION)
        b_S = tl.dot(tl.trans(b_b), b_added, b_S, input_precision=PRECISION)
        store_tile(p_y, b_y, m_row, o_r, o_e, HV * E, E)
        row0 += step
        p_a += step * HA * D
        p_b += step * HA * D
        p_c += step * HC * E
        p_y += step * HV * E


@triton.jit(do_not_specialize=["num_rows", "num_spans", "num_late", "scale"])
def walk_kernel(
    a, b, c, g, states, late, before, y, cu_spans, piece_of, rows_late, scale, num_rows, num_spans, num_late,
    HV: tl.constexpr, HA: tl.constexpr, HC: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, STRIDE_D: tl.constexpr, STRIDE_E: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr,
    LATE: tl.constexpr, REACH: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [B, T, HV, E]. a, b [B, T, HA, D], c [B, T, HC, E]; states [B, P, HV, ·]: what enters each span, in which row d and
    column e of S lie STRIDE_D and STRIDE_E apart.

    LATE: add what crossed into late pieces, decayed by the gate's sum ``before`` each span. REACH: which spans to compute, by
    whether that leaves anything of it (``triton_output.py``).
    """
    i_program = tl.program_id(1)
    i_h = (i_program % HV).to(tl.int64)
    i_s = (i_program // HV) % num_spans
    i_b = (i_program // HV // num_spans).to(tl.int64)
    at = (i_b * num_spans + i_s) * HV + i_h
    if LATE or REACH != REACH_ALL:
        i_row = tl.load(rows_late + tl.load(piece_of + i_s))
    if REACH != REACH_ALL:  # noqa: SIM102 - one is known when compiling
        if ((i_row >= 0) & (tl.load(before + at) > -FADED_POWERS)) != (REACH == REACH_NEAR):
            return
    o_d, o_e = tl.arange(0, BLOCK_D), tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    b_S = load_entering(states, at, o_d, o_e, D, E, STRIDE_D, STRIDE_E)
    if LATE:  # noqa: SIM102 - one is known when compiling
        if i_row >= 0:
            b_late = load_entering(late, (i_b * num_late + i_row) * HV + i_h, o_d, o_e, D, E, STRIDE_D, STRIDE_E)
            if GATE != GATE_NONE:
                b_late *= tl.exp2(tl.load(before + at))
            b_S += b_late
    begin, end = tl.load(cu_spans + i_s), tl.load(cu_spans + i_s + 1)
    walk_rows(
        b_S, a, b, c, g, y, i_b, i_h, begin, end, o_d, o_e, scale, num_rows, HV, HA, HC, D, E, GATE, REVERSE, COMPUTE, PRECISION
    )
