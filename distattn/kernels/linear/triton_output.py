"""Outputs of chunks from the states that enter them, and the part of dV' that stays inside a chunk, in Triton.

O     = s (Q ⊙ e^G) S + P V'         P = s · tril(q kᵀ under decay)         output_kernel
dV_in = Pᵀ dO                                                                values_grad_kernel

Under a gate, a state that crosses a border fades. Chunks where nothing of it is left in fp32 (``is_reached``) need not wait for
it: kernels pass over the chunks of one sort (argument ``REACH``) and leave the others alone.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.linear.triton_chunks import program_chunk
from distattn.kernels.linear.triton_rows import (
    CHUNK,
    GATE_NONE,
    GATE_VECTOR,
    chunk_rows,
    decay_matrix,
    load_state,
    load_tile,
    row_gate,
    store_tile,
)

# Which chunks to compute (argument ``REACH``).
REACH_ALL = tl.constexpr(0)
REACH_FAR = tl.constexpr(1)
REACH_NEAR = tl.constexpr(2)

FADED_POWERS = tl.constexpr(150.0)
"""Powers of two: a factor of 2^−150 is 0 in fp32."""


@triton.jit
def is_reached(
    rows, sums, i_piece, i_b, i_h, i_m, num_chunks,
    HV: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Whether the piece has a state that crosses its border, of which anything is left at this chunk. Arguments as add_late."""
    at = (i_b * num_chunks + i_m) * HV + i_h
    if GATE == GATE_VECTOR:
        b_top = tl.full([BLOCK_K], -float("inf"), tl.float32)
        for i_k in range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            b_top = tl.maximum(b_top, tl.load(sums + at * K + o_k, mask=o_k < K, other=-float("inf")))
        top = tl.max(b_top, 0)
    else:
        top = tl.load(sums + at)
    return (tl.load(rows + i_piece) >= 0) & (top > -FADED_POWERS)


@triton.jit
def add_late(
    b_S, states, rows, sums, i_piece, i_b, i_h, i_m, o_k, o_v, num_states, num_chunks,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """S plus what a state that crossed the piece's border has become at this chunk: e^{sum of gates between} ⊙ state."""
    i_row = tl.load(rows + i_piece)
    if i_row >= 0:
        b_late = load_state(states + ((i_b * num_states + i_row) * HV + i_h) * K * V, o_k, o_v, K, V)
        at = (i_b * num_chunks + i_m) * HV + i_h
        if GATE == GATE_VECTOR:
            b_late *= tl.exp2(tl.load(sums + at * K + o_k, mask=o_k < K, other=0.0))[:, None]
        elif GATE != GATE_NONE:
            b_late *= tl.exp2(tl.load(sums + at))
        b_S = (b_S.to(tl.float32) + b_late).to(b_S.dtype)
    return b_S


@triton.jit
def scalar_scores(b_P, g, i_b, i_h, row0, num_valid, num_rows, HV: tl.constexpr, GATE: tl.constexpr):
    """tril(P) under the decay of one gate a head, or of none."""
    o_r = tl.arange(0, CHUNK)
    if GATE == GATE_NONE:
        b_P = tl.where(o_r[:, None] >= o_r[None, :], b_P, 0.0)
    else:
        b_G, _ = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
        b_P *= decay_matrix(b_G, num_valid, False)
    return b_P


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "num_late", "scale"])
def output_kernel(
    q, k, values, g, P, h, late, prefix, o, cu_seqlens, chunks, rows_late, scale, num_rows, num_chunks, num_late,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, LATE: tl.constexpr, REACH: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o [B, T, HV, V]. P is read for a vector of gates only, whose q is Qr, with HV heads.

    LATE: add what entered late pieces, as ``prefix`` decays it. REACH: which chunks to compute, by what that leaves of it.
    """
    i_b, i_h, i_m, i_piece, i_chunk = program_chunk(chunks, num_chunks, HV)
    if REACH != REACH_ALL:  # noqa: SIM102 - one is known when compiling
        if is_reached(rows_late, prefix, i_piece, i_b, i_h, i_m, num_chunks, HV, K, BLOCK_K, GATE) != (REACH == REACH_NEAR):
            return
    row0, num_valid = chunk_rows(cu_seqlens, i_piece, i_chunk)
    o_r, o_v = tl.arange(0, CHUNK), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    m_row = o_r < num_valid
    first = i_b * num_rows + row0
    i_hq = i_h // (HV // H)
    p_q, p_k = q + (first * H + i_hq) * K, k + (first * H + i_hq) * K
    p_h = h + ((i_b * num_chunks + i_m) * HV + i_h) * K * V
    b_o = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    b_P = tl.zeros([CHUNK, CHUNK], tl.float32)
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_q = load_tile(p_q, m_row, o_r, o_k, H * K, K).to(COMPUTE)
        b_h = load_state(p_h, o_k, o_v, K, V)
        if LATE:
            b_h = add_late(b_h, late, rows_late, prefix, i_piece, i_b, i_h, i_m, o_k, o_v, num_late, num_chunks, HV, K, V, GATE)
        if GATE != GATE_VECTOR:
            b_k = load_tile(p_k, m_row, o_r, o_k, H * K, K).to(COMPUTE)
            b_P = tl.dot(b_q, tl.trans(b_k), b_P, input_precision=PRECISION)
        b_o = tl.dot(b_q, b_h.to(COMPUTE), b_o, input_precision=PRECISION)
    if GATE == GATE_VECTOR:
        b_P = load_tile(P + (first * HV + i_h) * CHUNK, m_row, o_r, o_r, HV * CHUNK, CHUNK)
    else:
        if GATE != GATE_NONE:
            b_G, _ = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
            b_o *= (scale * tl.exp2(b_G))[:, None]
        else:
            b_o *= scale
        b_P = scale * scalar_scores(b_P, g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
    b_v = load_tile(values + (first * HV + i_h) * V, m_row, o_r, o_v, HV * V, V).to(COMPUTE)
    b_o = tl.dot(b_P.to(COMPUTE), b_v, b_o, input_precision=PRECISION)
    store_tile(o + (first * HV + i_h) * V, b_o, m_row, o_r, o_v, HV * V, V)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "scale"])
def values_grad_kernel(
    q, k, g, P, do, dv_inside, cu_seqlens, chunks, scale, num_rows, num_chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv_inside [B, T, HV, V] = Pᵀ dO."""
    i_b, i_h, _, i_piece, i_chunk = program_chunk(chunks, num_chunks, HV)
    row0, num_valid = chunk_rows(cu_seqlens, i_piece, i_chunk)
    o_r = tl.arange(0, CHUNK)
    m_row = o_r < num_valid
    first = i_b * num_rows + row0
    if GATE == GATE_VECTOR:
        b_P = load_tile(P + (first * HV + i_h) * CHUNK, m_row, o_r, o_r, HV * CHUNK, CHUNK)
    else:
        i_hq = i_h // (HV // H)
        b_P = tl.zeros([CHUNK, CHUNK], tl.float32)
        for i_k in range(0, K, BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            b_q = load_tile(q + (first * H + i_hq) * K, m_row, o_r, o_k, H * K, K).to(COMPUTE)
            b_k = load_tile(k + (first * H + i_hq) * K, m_row, o_r, o_k, H * K, K).to(COMPUTE)
            b_P = tl.dot(b_q, tl.trans(b_k), b_P, input_precision=PRECISION)
        b_P = scale * scalar_scores(b_P, g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
    b_Pt = tl.trans(b_P.to(COMPUTE))
    at = (first * HV + i_h) * V
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_do = load_tile(do + at, m_row, o_r, o_v, HV * V, V).to(COMPUTE)
        store_tile(dv_inside + at, tl.dot(b_Pt, b_do, input_precision=PRECISION), m_row, o_r, o_v, HV * V, V)
