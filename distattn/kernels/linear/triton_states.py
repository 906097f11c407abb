"""States from chunk to chunk, in Triton: forward, and their gradients backward.

    state_kernel         store S;   V' = U − W S (delta) or V;   S ← e^{G_C} ⊙ S + (K ⊙ e^{G_C − G})ᵀ V'
    state_grad_kernel    store dS'; dV' = dV_in + (K ⊙ e^{G_C − G}) dS' (delta);
                         dS' ← e^{G_C} ⊙ dS' + s (Q ⊙ e^G)ᵀ dO − Wᵀ dV' (delta)

A program walks through one piece with one tile of the state in registers: BLOCK_K × BLOCK_V of it in the decay family, all of K
in the delta family, whose rows mix. S is in fp32 there, and stored in the compute dtype for the kernels that come after.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.linear.triton_rows import (
    CHUNK,
    GATE_NONE,
    GATE_VECTOR,
    load_state,
    load_tile,
    row_gate,
    store_state,
    store_tile,
)


@triton.jit
def piece_program(num_pieces, HV: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(batch, value head, piece, first row of the tile, block of its columns) of a program; tiles of a head are neighbours."""
    i_program = tl.program_id(1)
    i_h = (i_program % HV).to(tl.int64)
    i_n = (i_program // HV) % num_pieces
    i_b = (i_program // HV // num_pieces).to(tl.int64)
    num_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    return i_b, i_h, i_n, (tl.program_id(0) % num_k) * BLOCK_K, tl.program_id(0) // num_k


@triton.jit
def state_of(states, rows, i_n, i_b, i_h, num_states, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """(address of a piece's state in [B, num_states, HV, K, V], whether it has one)."""
    i_row = tl.load(rows + i_n)
    at = ((i_b * num_states + tl.maximum(i_row, 0)) * HV + i_h) * K * V
    return states + at, i_row >= 0


@triton.jit
def store_sums(sums, b_sum, at, o_k, i_k, i_v, K: tl.constexpr, GATE: tl.constexpr):
    """Running sums of the gate, one a head or one a key dimension, by the program whose share it is. at: number of the head."""
    if GATE == GATE_VECTOR:
        tl.store(sums + at * K + o_k, b_sum, mask=(o_k < K) & (i_v == 0))
    elif GATE != GATE_NONE:
        tl.store(sums + at, tl.max(b_sum, 0), mask=(i_v == 0) & (i_k == 0))


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "num_pieces", "num_enter", "num_late", "num_emit", "num_final"])
def state_kernel(
    k, written, w, g, entering, late, h, values, emitted, final, prefix, total,
    cu_seqlens, first_chunk, rows_enter, rows_late, rows_emit, rows_final, only,
    num_rows, num_chunks, num_pieces, num_enter, num_late, num_emit, num_final,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, LATE: tl.constexpr, ONLY: tl.constexpr, STORE: tl.constexpr,
    PREFIX: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h [B, M, HV, K, V], values (V') [B, T, HV, V]; emitted, final, entering, late: states of sets of pieces.

    LATE: late pieces start from ``late``, else from zero. ONLY: pieces that ``only`` numbers, else all. PREFIX: store the
    gate's sums before each chunk, [B, M, HV(, K)], and over each piece, [B, N, HV(, K)]. Of a vector of gates, k is Kt,
    with HV heads, and g holds G of each chunk's last row, [B, M, HV, K].
    """
    i_b, i_h, i_n, i_k, i_v = piece_program(num_pieces, HV, K, BLOCK_K)
    if ONLY:  # noqa: SIM102 - one is known when compiling
        if tl.load(only + i_n) < 0:
            return
    o_r, o_k, o_v = tl.arange(0, CHUNK), i_k + tl.arange(0, BLOCK_K), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    i_m = tl.load(first_chunk + i_n)
    num_steps = tl.load(first_chunk + i_n + 1) - i_m
    b_S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    p_state, found = state_of(entering, rows_enter, i_n, i_b, i_h, num_enter, HV, K, V)
    if found:
        b_S += load_state(p_state, o_k, o_v, K, V)
    if LATE:
        p_state, found = state_of(late, rows_late, i_n, i_b, i_h, num_late, HV, K, V)
        if found:
            b_S += load_state(p_state, o_k, o_v, K, V)
    b_sum = tl.zeros([BLOCK_K], tl.float32)
    row0 = tl.load(cu_seqlens + i_n)
    end = tl.load(cu_seqlens + i_n + 1)
    first = i_b * num_rows + row0
    p_k = k + (first * H + i_h // (HV // H)) * K
    p_w = w + (first * HV + i_h) * K
    p_v = written + (first * HV + i_h) * V
    p_values = values + (first * HV + i_h) * V
    p_h = h + ((i_b * num_chunks + i_m) * HV + i_h) * K * V
    for i_step in range(num_steps):
        num_valid = tl.minimum(end - row0, CHUNK)
        m_row = o_r < num_valid
        if STORE:
            store_state(p_h, b_S, o_k, o_v, True, K, V)
        if PREFIX:
            store_sums(prefix, b_sum, (i_b * num_chunks + i_m + i_step) * HV + i_h, o_k, i_k, i_v, K, GATE)
        b_k = load_tile(p_k, m_row, o_r, o_k, H * K, K)
        if DELTA:
            b_w = load_tile(p_w, m_row, o_r, o_k, HV * K, K).to(COMPUTE)
            b_v = -tl.dot(b_w, b_S.to(COMPUTE), input_precision=PRECISION)
            b_v += load_tile(p_v, m_row, o_r, o_v, HV * V, V).to(tl.float32)
            if STORE:
                store_tile(p_values, b_v, m_row, o_r, o_v, HV * V, V)
        else:
            b_v = load_tile(p_v, m_row, o_r, o_v, HV * V, V)
        if GATE == GATE_VECTOR:
            b_last = tl.load(g + ((i_b * num_chunks + i_m + i_step) * HV + i_h) * K + o_k, mask=o_k < K, other=0.0)
            b_S *= tl.exp2(b_last)[:, None]
            b_S = tl.dot(tl.trans(b_k.to(COMPUTE)), b_v.to(COMPUTE), b_S, input_precision=PRECISION)
            b_sum += b_last
        elif GATE == GATE_NONE:
            b_S = tl.dot(tl.trans(b_k.to(COMPUTE)), b_v.to(COMPUTE), b_S, input_precision=PRECISION)
        else:
            b_G, last = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
            b_v = (b_v.to(tl.float32) * tl.exp2(last - b_G)[:, None]).to(COMPUTE)
            b_S *= tl.exp2(last)
            b_S = tl.dot(tl.trans(b_k.to(COMPUTE)), b_v, b_S, input_precision=PRECISION)
            b_sum += last
        row0 += CHUNK
        p_k += CHUNK * H * K
        p_w += CHUNK * HV * K
        p_v += CHUNK * HV * V
        p_values += CHUNK * HV * V
        p_h += HV * K * V
    p_state, found = state_of(emitted, rows_emit, i_n, i_b, i_h, num_emit, HV, K, V)
    store_state(p_state, b_S, o_k, o_v, found, K, V)
    p_state, found = state_of(final, rows_final, i_n, i_b, i_h, num_final, HV, K, V)
    store_state(p_state, b_S, o_k, o_v, found, K, V)
    if PREFIX:
        store_sums(total, b_sum, (i_b * num_pieces + i_n) * HV + i_h, o_k, i_k, i_v, K, GATE)


@triton.jit(
    do_not_specialize=["num_rows", "num_chunks", "num_pieces", "num_enter", "num_late", "num_emit", "num_final", "scale"]
)
def state_grad_kernel(
    q, k, w, g, do, dv_inside, dfinal, dleft, dh, dvalues, emitted, dentering, suffix, total,
    cu_seqlens, first_chunk, rows_enter, rows_late, rows_emit, rows_final, only,
    scale, num_rows, num_chunks, num_pieces, num_enter, num_late, num_emit, num_final,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, LATE: tl.constexpr, ONLY: tl.constexpr, STORE: tl.constexpr,
    PREFIX: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh [B, M, HV, K, V]: gradient of the state that leaves each chunk. dvalues (dV') [B, T, HV, V].

    STORE: dh and dvalues. LATE: what emitting pieces left has the gradient ``dleft``, else zero. emitted, dentering: gradients
    of the states that enter the pieces in ``late`` and ``enter``. PREFIX: suffix, the gate's sums after each chunk. Of a vector
    of gates, q is Qr. The rest as state_kernel.
    """
    i_b, i_h, i_n, i_k, i_v = piece_program(num_pieces, HV, K, BLOCK_K)
    if ONLY:  # noqa: SIM102 - one is known when compiling
        if tl.load(only + i_n) < 0:
            return
    o_r, o_k, o_v = tl.arange(0, CHUNK), i_k + tl.arange(0, BLOCK_K), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    i_m = tl.load(first_chunk + i_n)
    num_steps = tl.load(first_chunk + i_n + 1) - i_m
    b_dS = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    p_state, found = state_of(dfinal, rows_final, i_n, i_b, i_h, num_final, HV, K, V)
    if found:
        b_dS += load_state(p_state, o_k, o_v, K, V)
    if LATE:
        p_state, found = state_of(dleft, rows_emit, i_n, i_b, i_h, num_emit, HV, K, V)
        if found:
            b_dS += load_state(p_state, o_k, o_v, K, V)
    b_sum = tl.zeros([BLOCK_K], tl.float32)
    end = tl.load(cu_seqlens + i_n + 1)
    row0 = tl.load(cu_seqlens + i_n) + (num_steps - 1) * CHUNK
    first = i_b * num_rows + row0
    i_hq = i_h // (HV // H)
    p_q, p_k = q + (first * H + i_hq) * K, k + (first * H + i_hq) * K
    p_w = w + (first * HV + i_h) * K
    p_do, p_in, p_dv = do + (first * HV + i_h) * V, dv_inside + (first * HV + i_h) * V, dvalues + (first * HV + i_h) * V
    p_dh = dh + ((i_b * num_chunks + i_m + num_steps - 1) * HV + i_h) * K * V
    for i_step in range(num_steps):
        num_valid = tl.minimum(end - row0, CHUNK)
        m_row = o_r < num_valid
        if STORE:
            store_state(p_dh, b_dS, o_k, o_v, True, K, V)
        if PREFIX:
            store_sums(suffix, b_sum, (i_b * num_chunks + i_m + num_steps - 1 - i_step) * HV + i_h, o_k, i_k, i_v, K, GATE)
        b_q = load_tile(p_q, m_row, o_r, o_k, H * K, K)
        b_do = load_tile(p_do, m_row, o_r, o_v, HV * V, V)
        if GATE == GATE_VECTOR:
            i_now = i_m + num_steps - 1 - i_step
            b_last = tl.load(g + ((i_b * num_chunks + i_now) * HV + i_h) * K + o_k, mask=o_k < K, other=0.0)
            b_qr, b_dor = b_q.to(COMPUTE), b_do.to(COMPUTE)
        elif GATE == GATE_NONE:
            b_qr, b_dor = b_q.to(COMPUTE), (b_do.to(tl.float32) * scale).to(COMPUTE)
        else:
            b_G, last = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
            b_qr, b_dor = b_q.to(COMPUTE), (b_do.to(tl.float32) * (scale * tl.exp2(b_G))[:, None]).to(COMPUTE)
        if DELTA:
            b_k = load_tile(p_k, m_row, o_r, o_k, H * K, K)
            b_w = load_tile(p_w, m_row, o_r, o_k, HV * K, K).to(COMPUTE)
            b_in = load_tile(p_in, m_row, o_r, o_v, HV * V, V).to(tl.float32)
            b_dv = tl.dot(b_k.to(COMPUTE), b_dS.to(COMPUTE), input_precision=PRECISION)
            if GATE != GATE_NONE and GATE != GATE_VECTOR:
                b_dv *= tl.exp2(last - b_G)[:, None]
            b_dv += b_in
            if STORE:
                store_tile(p_dv, b_dv, m_row, o_r, o_v, HV * V, V)
        if GATE == GATE_VECTOR:
            b_dS *= tl.exp2(b_last)[:, None]
            b_sum += b_last
        elif GATE != GATE_NONE:
            b_dS *= tl.exp2(last)
            b_sum += last
        b_dS = tl.dot(tl.trans(b_qr), b_dor, b_dS, input_precision=PRECISION)
        if DELTA:
            b_dS -= tl.dot(tl.trans(b_w), b_dv.to(COMPUTE), input_precision=PRECISION)
        row0 -= CHUNK
        p_q -= CHUNK * H * K
        p_k -= CHUNK * H * K
        p_w -= CHUNK * HV * K
        p_do -= CHUNK * HV * V
        p_in -= CHUNK * HV * V
        p_dv -= CHUNK * HV * V
        p_dh -= HV * K * V
    p_state, found = state_of(emitted, rows_late, i_n, i_b, i_h, num_late, HV, K, V)
    store_state(p_state, b_dS, o_k, o_v, found, K, V)
    p_state, found = state_of(dentering, rows_enter, i_n, i_b, i_h, num_enter, HV, K, V)
    store_state(p_state, b_dS, o_k, o_v, found, K, V)
    if PREFIX:
        store_sums(total, b_sum, (i_b * num_pieces + i_n) * HV + i_h, o_k, i_k, i_v, K, GATE)
