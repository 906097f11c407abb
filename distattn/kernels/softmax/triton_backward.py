"""Backward of softmax attention over work lists, in Triton: one kernel for dq and one for dk and dv.

    p  = 2^(s₂ − log₂e · lse)        ds = p ∘ (do vᵀ − delta) ∘ (1 − tanh²)     the last factor with a soft-cap only
    dq += scale · ds k               dv += pᵀ do               dk += scale · dsᵀ q               dbias += Σ ds over queries

dq: a program for each block of query rows and head, over the keys that they see. dk, dv: a program for each block of keys and
KV head, over the query rows that see them, for all query heads of the group, so that grouped KV heads are never expanded. Each
program is the only writer of its rows. lse comes times log₂e, and +∞ where a row saw nothing, so that p is 0 there.
Recomputing s and do vᵀ in both kernels costs 7 products for 5, and no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.softmax.triton_forward import (
    SCORES_CAPPED,
    load_line,
    load_tile,
    query_program,
    read_range,
    scores,
    turn,
)


@triton.jit
def delta_kernel(
    out, do, dlse, delta, num_rows,
    stride_ob, stride_on, stride_oh, stride_do_b, stride_do_n, stride_do_h, stride_dlse_b, stride_dlse_n, stride_dlse_h,
    stride_delta_b, stride_delta_h,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = Σ do∘out − dlse, rows next to each other: [B, H, N]."""
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_dv = tl.arange(0, BLOCK_DV)
    m_q = o_q < num_rows
    m_tile = m_q[:, None] & (o_dv < DV)[None, :]
    p_out = out + i_b * stride_ob + i_h * stride_oh + o_q[:, None] * stride_on + o_dv[None, :]
    p_do = do + i_b * stride_do_b + i_h * stride_do_h + o_q[:, None] * stride_do_n + o_dv[None, :]
    b_out = tl.load(p_out, mask=m_tile, other=0.0).to(tl.float32)
    b_delta = tl.sum(b_out * tl.load(p_do, mask=m_tile, other=0.0).to(tl.float32), 1)
    if HAS_DLSE:
        p_dlse = dlse + i_b * stride_dlse_b + i_h * stride_dlse_h + o_q * stride_dlse_n
        b_delta -= tl.load(p_dlse, mask=m_q, other=0.0).to(tl.float32)
    tl.store(delta + i_b * stride_delta_b + i_h * stride_delta_h + o_q, b_delta, mask=m_q)


@triton.jit
def weights(b_a, b_b, b_bias, b_lse, score_scale, cap_scale, SCORES: tl.constexpr, BIAS: tl.constexpr):
    """(p, slope) of a block of scores a bᵀ; b_lse in powers of two, of a shape that broadcasts; slope 1 unless capped."""
    b_s, factor = scores(  # pyright: ignore[reportGeneralTypeIssues]
        b_a, b_b, b_bias, score_scale, cap_scale, SCORES, BIAS
    )
    b_p = tl.exp2(b_s * factor - b_lse)
    if SCORES == SCORES_CAPPED:
        b_slope = 1.0 - b_s * b_s
    else:
        b_slope = 1.0
    return b_p, b_slope


@triton.jit
def dq_columns(
    b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, i_k, start, stop, lo, hi, tested,
    score_scale, cap_scale, stride_kn, stride_vn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys i_k … i_k + BLOCK_K (if masked, those in [start, stop) and in the band) into dq, without the factor ``scale``."""
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_k = load_tile(p_k + tl.cast(stride_kn, tl.int64) * i_k, o_k, o_d, stride_kn, start - i_k, stop - i_k, D, MASKED)
    b_v = load_tile(p_v + tl.cast(stride_vn, tl.int64) * i_k, o_k, o_dv, stride_vn, start - i_k, stop - i_k, DV, MASKED)
    b_bias = 0.0
    if BIAS:
        b_bias = load_line(p_bias + i_k, o_k, start - i_k, stop - i_k, 0.0, MASKED)[None, :]
    b_p, b_slope = weights(b_q, b_k, b_bias, b_lse[:, None], score_scale, cap_scale, SCORES, BIAS)  # [BLOCK_Q, BLOCK_K]
    if MASKED:
        diagonal = (i_k + o_k)[None, :] - o_q[:, None]
        m_seen = (diagonal >= lo) & (diagonal <= hi) & ((i_k + o_k >= start) & (i_k + o_k < stop))[None, :]
        if POSITIONS:
            b_pos_k = load_line(pos_k + i_k, o_k, start - i_k, stop - i_k, 0, MASKED)
            m_seen &= (b_pos_q[:, None] >= b_pos_k[None, :]) | (tested == 0)
        b_p = tl.where(m_seen, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[:, None]) * b_slope
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")


@triton.jit
def store_sum(p_sum, b_sum, o_row, o_dim, stride, num_rows, DIM: tl.constexpr, WHOLE: tl.constexpr):
    """Store rows [rows, DIM] from row 0's address on; add them to what is there unless they are the whole sum."""
    p_tile = p_sum + o_row[:, None] * stride + o_dim[None, :]
    m_tile = (o_row < num_rows)[:, None] & (o_dim < DIM)[None, :]
    if not WHOLE:
        b_sum += tl.load(p_tile, mask=m_tile, other=0.0)
    tl.store(p_tile, b_sum.to(p_sum.dtype.element_ty), mask=m_tile)


@triton.jit
def _dq_full(
    b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, k, v, bias, pos_k, o_q, ranges, first_range, end_range, i_h, group,
    score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """FULL ranges into dq, one loop each."""
    for i_range in range(first_range, end_range):
        start, stop, lo, hi, i_kh = read_range(ranges, i_range, i_h, group)  # pyright: ignore[reportGeneralTypeIssues]
        p_k, p_v, p_bias = k + i_kh * stride_kh, v + i_kh * stride_vh, bias + i_kh * stride_bias_h
        for i_k in range(start, stop, BLOCK_K):
            b_dq = dq_columns(
                b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, i_k, start, stop, lo, hi, 1,
                score_scale, cap_scale, stride_kn, stride_vn, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV,
                SCORES, BIAS, POSITIONS, POSITIONS,
            )  # fmt: skip
    return b_dq


@triton.jit
def _dq_boundary(
    b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, k, v, bias, pos_k, o_q, ranges, first_range, end_range, i_h, group,
    score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Boundary ranges into dq, as one loop over their column blocks."""
    num_steps = tl.where(first_range < end_range, tl.load(ranges + first_range * 8 + 7), 0)
    i_range = first_range
    start, stop, lo, hi, i_kh = read_range(ranges, i_range, i_h, group)  # pyright: ignore[reportGeneralTypeIssues]
    i_k = start
    for _ in range(num_steps):
        # At the loop's top, where the pipeliner lets loads run ahead of it.
        if i_k >= stop:
            i_range += 1
            start, stop, lo, hi, i_kh = read_range(ranges, i_range, i_h, group)
            i_k = start
        b_dq = dq_columns(
            b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, k + i_kh * stride_kh, v + i_kh * stride_vh,
            bias + i_kh * stride_bias_h, pos_k, o_q, i_k, start, stop, lo, hi, 1, score_scale, cap_scale,
            stride_kn, stride_vn, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, True,
        )  # fmt: skip
        i_k += BLOCK_K
    return b_dq


@triton.jit(do_not_specialize=[
    "num_blocks", "num_long", "group", "stride_lse_b", "stride_lse_h", "stride_delta_b", "stride_delta_h",
    "stride_bias_b", "stride_bias_h",
])  # fmt: skip
def dq_kernel(
    q, k, v, do, lse, delta, bias, pos_q, pos_k, dq, blocks, ranges, num_blocks, num_long, group,
    score_scale, cap_scale, out_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_lse_b, stride_lse_h, stride_delta_b, stride_delta_h,
    stride_bias_b, stride_bias_h, stride_dqb, stride_dqn, stride_dqh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCORES: tl.constexpr,
    BIAS: tl.constexpr, POSITIONS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    p_block, i_h, i_b = query_program(blocks, num_blocks, num_long, group)  # pyright: ignore[reportGeneralTypeIssues]
    if i_h >= tl.load(p_block + 6):
        return
    row0, row1 = tl.load(p_block), tl.load(p_block + 1)
    full, boundary, end = tl.load(p_block + 2), tl.load(p_block + 3), tl.load(p_block + 4)

    o_r = tl.arange(0, BLOCK_Q)
    o_q = row0 + o_r
    o_d = tl.arange(0, BLOCK_D)
    first, num_rows = row0.to(tl.int64), row1 - row0
    p_q = q + i_b * stride_qb + i_h * stride_qh + first * stride_qn
    b_q = load_tile(p_q, o_r, o_d, stride_qn, 0, num_rows, D, True)
    p_do = do + i_b * stride_ob + i_h * stride_oh + first * stride_on
    b_do = load_tile(p_do, o_r, tl.arange(0, BLOCK_DV), stride_on, 0, num_rows, DV, True)
    b_lse = load_line(lse + i_b * stride_lse_b + i_h * stride_lse_h + first, o_r, 0, num_rows, float("inf"), True)
    b_delta = load_line(delta + i_b * stride_delta_b + i_h * stride_delta_h + first, o_r, 0, num_rows, 0.0, True)
    b_pos_q = 0
    if POSITIONS:
        b_pos_q = load_line(pos_q + row0, o_r, 0, num_rows, 0, True)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    p_k, p_v, p_bias = k + i_b * stride_kb, v + i_b * stride_vb, bias + i_b * stride_bias_b
    b_dq = _dq_full(
        b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, full, boundary, i_h, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS,
    )  # fmt: skip
    b_dq = _dq_boundary(
        b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, boundary, end, i_h, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS,
    )  # fmt: skip
    p_dq = dq + i_b * stride_dqb + i_h * stride_dqh + first * stride_dqn
    store_sum(p_dq, b_dq * out_scale, o_r, o_d, stride_dqn, num_rows, D, WHOLE)


@triton.jit
def dkdv_columns(
    b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, p_q, p_do, p_lse, p_delta, pos_q, o_k, i_q, start, stop, lo, hi, tested,
    score_scale, cap_scale, stride_qn, stride_on,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Query rows i_q … i_q + BLOCK_Q of one head (if masked, those in [start, stop) and in the band) into the block's dk
    (without the factor ``scale``), dv and dbias. Scores are kᵀ-major."""
    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    first_row, num_rows = start - i_q, stop - i_q
    b_q = load_tile(p_q + tl.cast(stride_qn, tl.int64) * i_q, o_q, o_d, stride_qn, first_row, num_rows, D, MASKED)
    b_lse = load_line(p_lse + i_q, o_q, first_row, num_rows, float("inf"), MASKED)
    # [BLOCK_K, BLOCK_Q]
    b_p, b_slope = weights(b_k, b_q, b_bias, b_lse[None, :], score_scale, cap_scale, SCORES, BIAS)
    if MASKED:
        diagonal = (i_q + o_q)[None, :] - o_k[:, None]
        m_seen = (diagonal >= lo) & (diagonal <= hi)
        if POSITIONS:
            b_pos_q = load_line(pos_q + i_q, o_q, first_row, num_rows, 0, MASKED)
            m_seen &= (b_pos_q[None, :] >= b_pos_k[:, None]) | (tested == 0)
        b_p = tl.where(m_seen, b_p, 0.0)
    b_do = load_tile(p_do + tl.cast(stride_on, tl.int64) * i_q, o_q, o_dv, stride_on, first_row, num_rows, DV, MASKED)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
    b_delta = load_line(p_delta + i_q, o_q, first_row, num_rows, 0.0, MASKED)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    b_ds = b_p * (b_dp - b_delta[None, :]) * b_slope
    if BIAS:
        b_dbias += tl.sum(b_ds, 1)
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv, b_dbias


@triton.jit
def key_program(blocks, num_blocks, num_long):
    """(block's line, KV head) of this program."""
    num_heads = tl.num_programs(0) // num_blocks
    i_block, i_head = turn(tl.program_id(0), num_heads, num_blocks, num_long)  # pyright: ignore[reportGeneralTypeIssues]
    p_block = blocks + i_block * 8
    return p_block, tl.load(p_block + 5) + i_head


@triton.jit
def _read_rows(ranges, i_range, i_g, group):
    """(start, stop, lo, hi, first query head, end of heads) of a range of query rows, for one KV head."""
    p_range = ranges + i_range * 8
    i_first = i_g * group - tl.load(p_range + 6)
    i_h = tl.maximum(i_first, tl.load(p_range + 4))
    end_h = tl.minimum(i_first + group, tl.load(p_range + 5))
    return tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2), tl.load(p_range + 3), i_h, end_h


@triton.jit
def _dkdv_full(
    b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, q, do, lse, delta, pos_q, o_k, ranges, first_range, end_range,
    i_g, group, score_scale, cap_scale,
    stride_qn, stride_qh, stride_on, stride_oh, stride_lse_h, stride_delta_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """FULL ranges into dk and dv, one loop for each and query head of the group."""
    # One loop over pairs (range, head): a third level would keep ptxas from overlapping the products.
    for i_pair in range(first_range * group, end_range * group):
        start, stop, lo, hi, i_first, end_h = _read_rows(  # pyright: ignore[reportGeneralTypeIssues]
            ranges, i_pair // group, i_g, group
        )
        i_h = i_first + i_pair % group
        stop = tl.where(i_h < end_h, stop, start)
        p_head = i_h.to(tl.int64)
        p_q, p_do = q + p_head * stride_qh, do + p_head * stride_oh
        p_lse, p_delta = lse + p_head * stride_lse_h, delta + p_head * stride_delta_h
        for i_q in range(start, stop, BLOCK_Q):
            b_dk, b_dv, b_dbias = dkdv_columns(
                b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, p_q, p_do, p_lse, p_delta, pos_q, o_k, i_q, start, stop,
                lo, hi, 1, score_scale, cap_scale, stride_qn, stride_on, D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV,
                SCORES, BIAS, POSITIONS, POSITIONS,
            )  # fmt: skip
    return b_dk, b_dv, b_dbias


@triton.jit
def _dkdv_boundary(
    b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, q, do, lse, delta, pos_q, o_k, ranges, first_range, end_range,
    i_g, group, score_scale, cap_scale,
    stride_qn, stride_qh, stride_on, stride_oh, stride_lse_h, stride_delta_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Boundary ranges, for all heads of the group, into dk and dv, as one loop over their blocks of rows."""
    num_steps = tl.where(first_range < end_range, tl.load(ranges + first_range * 8 + 7), 0)
    i_range = first_range
    start, stop, lo, hi, i_h, end_h = _read_rows(ranges, i_range, i_g, group)  # pyright: ignore[reportGeneralTypeIssues]
    i_q = start
    for _ in range(num_steps):
        if i_q >= stop:
            i_h += 1
            if i_h >= end_h:
                i_range += 1
                start, stop, lo, hi, i_h, end_h = _read_rows(ranges, i_range, i_g, group)
            i_q = start
        p_head = i_h.to(tl.int64)
        b_dk, b_dv, b_dbias = dkdv_columns(
            b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, q + p_head * stride_qh, do + p_head * stride_oh,
            lse + p_head * stride_lse_h, delta + p_head * stride_delta_h, pos_q, o_k, i_q, start, stop, lo, hi, 1,
            score_scale, cap_scale, stride_qn, stride_on, D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV,
            SCORES, BIAS, POSITIONS, True,
        )  # fmt: skip
        i_q += BLOCK_Q
    return b_dk, b_dv, b_dbias


@triton.jit(do_not_specialize=[
    "num_blocks", "num_long", "group", "stride_lse_b", "stride_lse_h", "stride_delta_b", "stride_delta_h",
    "stride_bias_b", "stride_bias_h", "stride_dbias_b", "stride_dbias_h",
])  # fmt: skip
def dkdv_kernel(
    q, k, v, do, lse, delta, bias, pos_q, pos_k, dk, dv, dbias, blocks, ranges, num_blocks, num_long, group,
    score_scale, cap_scale, out_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_lse_b, stride_lse_h, stride_delta_b, stride_delta_h,
    stride_bias_b, stride_bias_h, stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    stride_dbias_b, stride_dbias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCORES: tl.constexpr,
    BIAS: tl.constexpr, POSITIONS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    p_block, i_g = key_program(blocks, num_blocks, num_long)  # pyright: ignore[reportGeneralTypeIssues]
    if i_g >= tl.load(p_block + 6):
        return
    i_kh, i_b = i_g.to(tl.int64), tl.program_id(1).to(tl.int64)
    row0, row1 = tl.load(p_block), tl.load(p_block + 1)
    full, boundary, end = tl.load(p_block + 2), tl.load(p_block + 3), tl.load(p_block + 4)

    o_r = tl.arange(0, BLOCK_K)
    o_k = row0 + o_r
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    first, num_rows = row0.to(tl.int64), row1 - row0
    b_k = load_tile(k + i_b * stride_kb + i_kh * stride_kh + first * stride_kn, o_r, o_d, stride_kn, 0, num_rows, D, True)
    b_v = load_tile(v + i_b * stride_vb + i_kh * stride_vh + first * stride_vn, o_r, o_dv, stride_vn, 0, num_rows, DV, True)
    b_bias, b_pos_k = 0.0, 0
    if BIAS:
        b_bias = load_line(bias + i_b * stride_bias_b + i_kh * stride_bias_h + first, o_r, 0, num_rows, 0.0, True)[:, None]
    if POSITIONS:
        b_pos_k = load_line(pos_k + row0, o_r, 0, num_rows, 0, True)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    b_dbias = tl.zeros([BLOCK_K], tl.float32)

    p_q, p_do = q + i_b * stride_qb, do + i_b * stride_ob
    p_lse, p_delta = lse + i_b * stride_lse_b, delta + i_b * stride_delta_b
    b_dk, b_dv, b_dbias = _dkdv_full(
        b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, p_q, p_do, p_lse, p_delta, pos_q, o_k, ranges, full, boundary,
        i_g, group, score_scale, cap_scale, stride_qn, stride_qh, stride_on, stride_oh, stride_lse_h, stride_delta_h,
        D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS,
    )  # fmt: skip
    b_dk, b_dv, b_dbias = _dkdv_boundary(
        b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, p_q, p_do, p_lse, p_delta, pos_q, o_k, ranges, boundary, end,
        i_g, group, score_scale, cap_scale, stride_qn, stride_qh, stride_on, stride_oh, stride_lse_h, stride_delta_h,
        D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS,
    )  # fmt: skip
    store_sum(
        dk + i_b * stride_dkb + i_kh * stride_dkh + first * stride_dkn, b_dk * out_scale, o_r, o_d, stride_dkn, num_rows,
        D, WHOLE,
    )  # fmt: skip
    store_sum(dv + i_b * stride_dvb + i_kh * stride_dvh + first * stride_dvn, b_dv, o_r, o_dv, stride_dvn, num_rows, DV, WHOLE)
    if BIAS:
        p_dbias = dbias + i_b * stride_dbias_b + i_kh * stride_dbias_h + first + o_r
        m_k = o_r < num_rows
        tl.store(p_dbias, tl.load(p_dbias, mask=m_k, other=0.0) + b_dbias, mask=m_k)
