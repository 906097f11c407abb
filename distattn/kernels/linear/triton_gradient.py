"""Every gradient of a chunk in one pass over its values, in Triton, from the states and gradients at its borders.

S enters the chunk, S' leaves it, dS' is the gradient of S'. s: scale; ·~ under the chunk's decay.

    dP  = s tril(dO V'ᵀ)                    decay family   dV  = Pᵀ dO + (K ⊙ e^{G_C − G}) dS'
    dQ  = s e^G ⊙ (dO Sᵀ) + dP~ K           delta family   E   = Tᵀ dV';   dV = β ⊙ E;   dA = −tril(E V'ᵀ, −1)
    dKw = e^{G_C − G} ⊙ (V' dS'ᵀ) + dP~ᵀ Q + (β dA~)ᵀ K     R   = dA~ K − e^G ⊙ (E Sᵀ);   dK = dKw + β R
    dG  = Q ⊙ dQ − K ⊙ dKw + β K ⊙ R                        dβ  = ⟨E, V⟩ + ⟨K, R⟩
    dg  = reversed running sum of dG, plus rowsum(S' ⊙ dS') = e^{G_C} ⊙ rowsum(S ⊙ dS') + Σ_j K_j ⊙ e^{G_C − G_j} ⊙ (V' dS'ᵀ)_j
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.linear.triton_chunks import program_chunk
from distattn.kernels.linear.triton_output import REACH_ALL, REACH_NEAR, add_late, is_reached, scalar_scores
from distattn.kernels.linear.triton_rows import (
    CHUNK,
    GATE_NONE,
    GATE_VECTOR,
    chunk_rows,
    decay_matrix,
    is_mild,
    load_state,
    load_tile,
    row_gate,
    store_tile,
    vector_to_reader,
    vector_to_writer,
)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "num_emit", "scale"])
def gradient_kernel(
    q, k, v, g, beta, P, Kt, last_G, T, values, do, dvalues, h, dh, dleft, suffix, dq, dk, dv, dg, dbeta,
    cu_seqlens, chunks, rows_emit, scale, num_rows, num_chunks, num_emit,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, LATE: tl.constexpr, REACH: tl.constexpr, MILD: tl.constexpr,
    WITH_DG: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, VECTOR_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk [B, T, HV, K], dv [B, T, HV, V], dg [B, T, HV(, K)], dbeta [B, T, HV] of one chunk and value head.

    BLOCK_K spans K. LATE (decay family): add to dh what left emitting pieces, as ``suffix`` decays it. REACH: which chunks to
    compute, by what that leaves of it. MILD: of a vector of gates, the chunks to compute, those that are mild or those that are
    not; last_G [B, M, HV, K] tells. dg of a vector may lie where g does: a program reads no G but its own chunk's.
    WITH_DG: whether to make it.
    """
    i_b, i_h, i_m, i_piece, i_chunk = program_chunk(chunks, num_chunks, HV)
    if REACH != REACH_ALL:  # noqa: SIM102 - one is known when compiling
        if is_reached(rows_emit, suffix, i_piece, i_b, i_h, i_m, num_chunks, HV, K, BLOCK_K, GATE) != (REACH == REACH_NEAR):
            return
    row0, num_valid = chunk_rows(cu_seqlens, i_piece, i_chunk)
    o_r, o_k = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    m_row = o_r < num_valid
    first = i_b * num_rows + row0
    i_hq = i_h // (HV // H)
    p_q, p_k = q + (first * H + i_hq) * K, k + (first * H + i_hq) * K
    at_k, at_v = (first * HV + i_h) * K, (first * HV + i_h) * V
    at_c, at_h = (first * HV + i_h) * CHUNK, ((i_b * num_chunks + i_m) * HV + i_h) * K * V
    if GATE == GATE_VECTOR:
        b_last = tl.load(last_G + ((i_b * num_chunks + i_m) * HV + i_h) * K + o_k, mask=o_k < K, other=0.0)
        if is_mild(b_last) != MILD:
            return
    elif GATE != GATE_NONE:
        b_G, last = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
    if DELTA:
        b_Tt = tl.trans(load_tile(T + at_c, m_row, o_r, o_r, HV * CHUNK, CHUNK))
        b_beta = tl.load(beta + first * HV + i_h + o_r * HV, mask=m_row, other=0.0).to(tl.float32)
    elif GATE == GATE_VECTOR:
        b_Pt = tl.trans(load_tile(P + at_c, m_row, o_r, o_r, HV * CHUNK, CHUNK).to(COMPUTE))
        b_kt = load_tile(Kt + at_k, m_row, o_r, o_k, HV * K, K)
    else:
        b_kt = load_tile(p_k, m_row, o_r, o_k, H * K, K).to(COMPUTE)
        b_P = tl.dot(load_tile(p_q, m_row, o_r, o_k, H * K, K).to(COMPUTE), tl.trans(b_kt), input_precision=PRECISION)
        b_P = scale * scalar_scores(b_P, g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
        b_Pt = tl.trans(b_P.to(COMPUTE))

    # One pass over the values.
    b_dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    b_dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    b_R = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    b_dP = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_dA = tl.zeros([CHUNK, CHUNK], tl.float32)
    b_dbeta = tl.zeros([CHUNK], tl.float32)
    b_border = tl.zeros([BLOCK_K], tl.float32)
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_do = load_tile(do + at_v, m_row, o_r, o_v, HV * V, V).to(COMPUTE)
        b_v = load_tile(values + at_v, m_row, o_r, o_v, HV * V, V).to(COMPUTE)
        b_h = load_state(h + at_h, o_k, o_v, K, V).to(COMPUTE)
        b_dh = load_state(dh + at_h, o_k, o_v, K, V)
        if LATE:
            b_dh = add_late(
                b_dh, dleft, rows_emit, suffix, i_piece, i_b, i_h, i_m, o_k, o_v, num_emit, num_chunks, HV, K, V, GATE
            )
        b_dh = b_dh.to(COMPUTE)
        b_dq = tl.dot(b_do, tl.trans(b_h), b_dq, input_precision=PRECISION)
        b_dk = tl.dot(b_v, tl.trans(b_dh), b_dk, input_precision=PRECISION)
        b_dP = tl.dot(b_do, tl.trans(b_v), b_dP, input_precision=PRECISION)
        if WITH_DG:
            b_border += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
        if DELTA:
            b_E = tl.dot(b_Tt, load_tile(dvalues + at_v, m_row, o_r, o_v, HV * V, V).to(COMPUTE), input_precision=PRECISION)
            b_dbeta += tl.sum(b_E * load_tile(v + at_v, m_row, o_r, o_v, HV * V, V).to(tl.float32), 1)
            store_tile(dv + at_v, b_E * b_beta[:, None], m_row, o_r, o_v, HV * V, V)
            b_Ec = b_E.to(COMPUTE)
            b_R = tl.dot(b_Ec, tl.trans(b_h), b_R, input_precision=PRECISION)
            b_dA = tl.dot(b_Ec, tl.trans(b_v), b_dA, input_precision=PRECISION)
        else:
            b_dv = tl.dot(b_kt, b_dh, input_precision=PRECISION)
            if GATE != GATE_NONE and GATE != GATE_VECTOR:
                b_dv *= tl.exp2(last - b_G)[:, None]
            b_dv = tl.dot(b_Pt, b_do, b_dv, input_precision=PRECISION)
            store_tile(dv + at_v, b_dv, m_row, o_r, o_v, HV * V, V)

    # Loaded here, not above: what lives through the loop costs registers.
    b_k = load_tile(p_k, m_row, o_r, o_k, H * K, K).to(COMPUTE)
    if GATE == GATE_VECTOR:
        b_G = load_tile(g + at_k, m_row, o_r, o_k, HV * K, K)

    # Decay between the chunk's borders and its rows.
    if GATE == GATE_VECTOR:
        b_dq *= scale * tl.exp2(b_G)
        b_dk *= tl.exp2(b_last[None, :] - b_G)
        b_R = -tl.exp2(b_G) * b_R
        if WITH_DG:
            b_border = tl.exp2(b_last) * b_border + tl.sum(b_k.to(tl.float32) * b_dk, 0)
    elif GATE == GATE_NONE:
        b_dq *= scale
        b_R = -b_R
    else:
        b_dq *= (scale * tl.exp2(b_G))[:, None]
        b_dk *= tl.exp2(last - b_G)[:, None]
        b_R = -tl.exp2(b_G)[:, None] * b_R
        if WITH_DG:
            b_border = tl.exp2(last) * b_border + tl.sum(b_k.to(tl.float32) * b_dk, 0)

    # Inside the chunk: k as reader, q and k as what the writer k is read by.
    b_dP = tl.where(o_r[:, None] >= o_r[None, :], scale * b_dP, 0.0)
    if GATE != GATE_NONE and GATE != GATE_VECTOR:
        b_dP *= decay_matrix(b_G, num_valid, False)
    if DELTA:
        b_dA = tl.where(o_r[:, None] > o_r[None, :], -b_dA, 0.0)
        if GATE != GATE_NONE and GATE != GATE_VECTOR:
            b_dA *= decay_matrix(b_G, num_valid, True)
    if GATE == GATE_VECTOR:
        b_kf = b_k.to(tl.float32)
        p_G = g + at_k
        b_dq += vector_to_reader(b_dP, b_kf, b_G, b_last, p_k, p_G, o_k, num_valid, H * K, K, HV, MILD, VECTOR_PRECISION)
        if DELTA:
            b_R += vector_to_reader(b_dA, b_kf, b_G, b_last, p_k, p_G, o_k, num_valid, H * K, K, HV, MILD, VECTOR_PRECISION)
            b_dA *= b_beta[:, None]
            b_dk += vector_to_writer(b_dA, b_kf, b_G, b_last, p_k, p_G, o_k, num_valid, H * K, K, HV, MILD, VECTOR_PRECISION)
        b_qf = load_tile(p_q, m_row, o_r, o_k, H * K, K).to(tl.float32)
        b_dk += vector_to_writer(b_dP, b_qf, b_G, b_last, p_q, p_G, o_k, num_valid, H * K, K, HV, MILD, VECTOR_PRECISION)
    else:
        b_dP = b_dP.to(COMPUTE)
        b_dq = tl.dot(b_dP, b_k, b_dq, input_precision=PRECISION)
        if DELTA:
            b_R = tl.dot(b_dA.to(COMPUTE), b_k, b_R, input_precision=PRECISION)
            b_dA = (b_dA * b_beta[:, None]).to(COMPUTE)
            b_dk = tl.dot(tl.trans(b_dA), b_k, b_dk, input_precision=PRECISION)
        b_q = load_tile(p_q, m_row, o_r, o_k, H * K, K).to(COMPUTE)
        b_dk = tl.dot(tl.trans(b_dP), b_q, b_dk, input_precision=PRECISION)
        b_qf, b_kf = b_q.to(tl.float32), b_k.to(tl.float32)

    store_tile(dq + at_k, b_dq, m_row, o_r, o_k, HV * K, K)
    if WITH_DG:
        b_dG = b_qf * b_dq - b_kf * b_dk
    if DELTA:
        b_dbeta += tl.sum(b_kf * b_R, 1)
        tl.store(dbeta + first * HV + i_h + o_r * HV, b_dbeta, mask=m_row)
        b_R *= b_beta[:, None]
        if WITH_DG:
            b_dG += b_kf * b_R
        b_dk += b_R
    store_tile(dk + at_k, b_dk, m_row, o_r, o_k, HV * K, K)
    if WITH_DG and GATE == GATE_VECTOR:
        b_dg = tl.cumsum(b_dG, 0, reverse=True) + b_border[None, :]
        tl.debug_barrier()  # all of the program has read G
        store_tile(dg + at_k, b_dg, m_row, o_r, o_k, HV * K, K)
    elif WITH_DG:
        b_dg = tl.cumsum(tl.sum(b_dG, 1), 0, reverse=True) + tl.sum(b_border, 0)
        tl.store(dg + first * HV + i_h + o_r * HV, b_dg, mask=m_row)
