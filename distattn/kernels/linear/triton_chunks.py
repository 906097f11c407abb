"""What chunks need before any state is known, in Triton: running sums of gates, scores, and the delta rule's triangular solve.

    G = cumsum g                                            gate_sums_kernel
    P = scale · tril(q kᵀ under decay);  Γ = strict tril(k kᵀ under decay);
    Qr = scale · Q ⊙ e^G;  Kt = K ⊙ e^{G_C − G}               vector_scores_kernel, for a vector of gates
    T = (I + β Γ)⁻¹;  U = T β V;  W = T β (K ⊙ e^G)           solve_kernel

T comes by blocks of 16 rows: the four diagonal blocks by substitution, all at once, as D; then with N = D · (what is left of
β Γ), which is nilpotent of order 4, T = (I − N)(I + N²) D.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.linear.triton_rows import (
    CHUNK,
    GATE_NONE,
    GATE_SCALAR,
    GATE_VECTOR,
    LOG2E,
    SUB,
    chunk_rows,
    decay_matrix,
    is_mild,
    load_tile,
    row_gate,
    store_tile,
    vector_scores,
)


@triton.jit
def program_chunk(chunks, num_chunks, HV: tl.constexpr):
    """(batch, value head, chunk, piece, number of the chunk in its piece) of a program; heads are neighbours."""
    i_program = tl.program_id(0)
    i_h = (i_program % HV).to(tl.int64)
    i_m = (i_program // HV) % num_chunks
    i_b = (i_program // HV // num_chunks).to(tl.int64)
    return i_b, i_h, i_m, tl.load(chunks + 2 * i_m), tl.load(chunks + 2 * i_m + 1)


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def gate_sums_kernel(
    g, G, cu_seqlens, chunks, num_rows, num_chunks,
    HV: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """g [B, T, HV(, K)] → G: [B, HV, T] of a scalar gate, [B, T, HV, K] of a vector; fp32, powers of two."""
    i_b, i_h, _, i_piece, i_chunk = program_chunk(chunks, num_chunks, HV)
    row0, num_valid = chunk_rows(cu_seqlens, i_piece, i_chunk)
    o_r = tl.arange(0, CHUNK)
    m_row = o_r < num_valid
    first = i_b * num_rows + row0
    if GATE == GATE_SCALAR:
        b_g = tl.load(g + first * HV + i_h + o_r * HV, mask=m_row, other=0.0).to(tl.float32)
        tl.store(G + (i_b * HV + i_h) * num_rows + row0 + o_r, tl.cumsum(b_g * LOG2E, 0), mask=m_row)
    else:
        o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        at = (first * HV + i_h) * K
        b_g = load_tile(g + at, m_row, o_r, o_k, HV * K, K).to(tl.float32)
        store_tile(G + at, tl.cumsum(b_g * LOG2E, 0), m_row, o_r, o_k, HV * K, K)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "scale"])
def vector_scores_kernel(
    q, k, G, P, overlap, Qr, Kt, last, cu_seqlens, chunks, scale, num_rows, num_chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, DELTA: tl.constexpr, MILD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of chunks that are mild, or of those that are not: P [B, T, HV, CHUNK], the delta rule's Γ likewise, Qr and Kt
    [B, T, HV, K], and G of the last row, last [B, M, HV, K]. Entries above the diagonal are 0."""
    i_b, i_h, i_m, i_piece, i_chunk = program_chunk(chunks, num_chunks, HV)
    row0, num_valid = chunk_rows(cu_seqlens, i_piece, i_chunk)
    o_r, o_k = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    m_row = o_r < num_valid
    first = i_b * num_rows + row0
    p_G = G + (first * HV + i_h) * K
    b_last = tl.load(p_G + (num_valid - 1) * (HV * K) + o_k, mask=o_k < K, other=0.0)
    if is_mild(b_last) != MILD:
        return
    p_q, p_k = q + (first * H + i_h // (HV // H)) * K, k + (first * H + i_h // (HV // H)) * K
    b_q = load_tile(p_q, m_row, o_r, o_k, H * K, K).to(tl.float32)
    b_k = load_tile(p_k, m_row, o_r, o_k, H * K, K).to(tl.float32)
    b_G = load_tile(p_G, m_row, o_r, o_k, HV * K, K)
    at_k, at_c = (first * HV + i_h) * K, (first * HV + i_h) * CHUNK
    tl.store(last + ((i_b * num_chunks + i_m) * HV + i_h) * K + o_k, b_last, mask=o_k < K)
    store_tile(Qr + at_k, scale * b_q * tl.exp2(b_G), m_row, o_r, o_k, HV * K, K)
    store_tile(Kt + at_k, b_k * tl.exp2(b_last[None, :] - b_G), m_row, o_r, o_k, HV * K, K)
    b_P = vector_scores(b_q, b_k, b_G, b_last, p_k, p_G, o_k, num_valid, H * K, K, HV, MILD, PRECISION)
    store_tile(P + at_c, tl.where(o_r[:, None] >= o_r[None, :], scale * b_P, 0.0), m_row, o_r, o_r, HV * CHUNK, CHUNK)
    if DELTA:
        b_A = vector_scores(b_k, b_k, b_G, b_last, p_k, p_G, o_k, num_valid, H * K, K, HV, MILD, PRECISION)
        store_tile(overlap + at_c, tl.where(o_r[:, None] > o_r[None, :], b_A, 0.0), m_row, o_r, o_r, HV * CHUNK, CHUNK)


@triton.jit
def unit_lower_inverse(b_A, PRECISION: tl.constexpr):
    """(I + A)⁻¹ of a strictly lower triangular A [CHUNK, CHUNK], fp32."""
    NUM: tl.constexpr = CHUNK // SUB
    o_r, o_s = tl.arange(0, CHUNK), tl.arange(0, SUB)
    m_same = (o_r // SUB)[:, None] == (o_r // SUB)[None, :]
    # The diagonal blocks as [NUM, SUB, SUB]: of a row of blocks, all but one are 0.
    b_blocks = tl.sum(tl.reshape(tl.where(m_same, b_A, 0.0), [NUM, SUB, NUM, SUB]), 2)
    b_inverse = tl.where((o_s[:, None] == o_s[None, :])[None, :, :], 1.0, 0.0) + tl.zeros([NUM, SUB, SUB], tl.float32)
    for i_row in range(1, SUB):
        b_row = tl.sum(tl.where((o_s == i_row)[None, :, None], b_blocks, 0.0), 1)  # [NUM, SUB]
        b_new = tl.sum(b_row[:, :, None] * b_inverse, 1)
        b_inverse = tl.where((o_s == i_row)[None, :, None], b_inverse - b_new[:, None, :], b_inverse)
    b_wide = tl.broadcast_to(b_inverse[:, :, None, :], [NUM, SUB, NUM, SUB])
    b_D = tl.where(m_same, tl.reshape(b_wide, [CHUNK, CHUNK]), 0.0)
    b_N = tl.dot(b_D, tl.where(m_same, 0.0, b_A), input_precision=PRECISION)
    b_eye = tl.where(o_r[:, None] == o_r[None, :], 1.0, 0.0)
    b_T = tl.dot(b_N, b_N, input_precision=PRECISION) + b_eye
    b_T = tl.dot(b_eye - b_N, b_T, input_precision=PRECISION)
    return tl.dot(b_T, b_D, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def solve_kernel(
    k, v, g, beta, overlap, T, U, W, cu_seqlens, chunks, num_rows, num_chunks,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, SOLVE_PRECISION: tl.constexpr,
):  # fmt: skip
    """T [B, T, HV, CHUNK], U [B, T, HV, V], W [B, T, HV, K] in the compute dtype."""
    i_b, i_h, _, i_piece, i_chunk = program_chunk(chunks, num_chunks, HV)
    row0, num_valid = chunk_rows(cu_seqlens, i_piece, i_chunk)
    o_r = tl.arange(0, CHUNK)
    m_row = o_r < num_valid
    first = i_b * num_rows + row0
    p_k = k + (first * H + i_h // (HV // H)) * K
    b_beta = tl.load(beta + first * HV + i_h + o_r * HV, mask=m_row, other=0.0).to(tl.float32)
    if GATE == GATE_VECTOR:
        b_A = load_tile(overlap + (first * HV + i_h) * CHUNK, m_row, o_r, o_r, HV * CHUNK, CHUNK)
    else:
        b_A = tl.zeros([CHUNK, CHUNK], tl.float32)
        for i_k in range(0, K, BLOCK_K):
            b_k = load_tile(p_k, m_row, o_r, i_k + tl.arange(0, BLOCK_K), H * K, K).to(COMPUTE)
            b_A += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        if GATE == GATE_NONE:
            b_A = tl.where(o_r[:, None] > o_r[None, :], b_A, 0.0)
        else:
            b_G, _ = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
            b_A *= decay_matrix(b_G, num_valid, True)
    b_T = unit_lower_inverse(b_A * b_beta[:, None], SOLVE_PRECISION).to(COMPUTE)
    store_tile(T + (first * HV + i_h) * CHUNK, b_T, m_row, o_r, o_r, HV * CHUNK, CHUNK)
    at = (first * HV + i_h) * V
    for i_v in range(0, V, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        b_v = load_tile(v + at, m_row, o_r, o_v, HV * V, V).to(tl.float32) * b_beta[:, None]
        store_tile(U + at, tl.dot(b_T, b_v.to(COMPUTE), input_precision=PRECISION), m_row, o_r, o_v, HV * V, V)
    at = (first * HV + i_h) * K
    for i_k in range(0, K, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_k = load_tile(p_k, m_row, o_r, o_k, H * K, K).to(tl.float32) * b_beta[:, None]
        if GATE == GATE_VECTOR:
            b_k *= tl.exp2(load_tile(g + at, m_row, o_r, o_k, HV * K, K))
        elif GATE != GATE_NONE:
            b_k *= tl.exp2(b_G)[:, None]
        store_tile(W + at, tl.dot(b_T, b_k.to(COMPUTE), input_precision=PRECISION), m_row, o_r, o_k, HV * K, K)
