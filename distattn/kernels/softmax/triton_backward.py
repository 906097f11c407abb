"""Backward of softmax attention over work lists, in Triton: one kernel for dq and one for dk and dv.

    p  = 2^(s₂ − log₂e · lse)        ds = p ∘ (do vᵀ − delta) ∘ (1 − tanh²)     the last factor with a soft-cap only
    dq += scale · ds k               dv += pᵀ do               dk += scale · dsᵀ q

dq: a program for each block of query rows and head, over the keys that they see. dk, dv: a program for each block of keys and
KV head, over the query rows that see them, for all query heads of the group, so that grouped KV heads are never expanded. Each
program is the only writer of its rows. Recomputing s and do vᵀ in both kernels costs 7 products for 5, and no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.softmax.triton_forward import LOG2E, SCORES_CAPPED, load_tile, query_program, scores


@triton.jit
def _weights(b_a, b_b, b_lse, score_scale, cap_scale, SCORES: tl.constexpr):
    """(p, slope) of a block of scores a bᵀ; b_lse in powers of two, of a shape that broadcasts; slope 1 unless capped."""
    b_s = scores(b_a, b_b, cap_scale, SCORES)
    b_p = tl.exp2(b_s * score_scale - b_lse)
    if SCORES == SCORES_CAPPED:
        b_slope = 1.0 - b_s * b_s
    else:
        b_slope = 1.0
    return b_p, b_slope


@triton.jit
def _lse_of(p_lse, o_row, num_rows, MASKED: tl.constexpr):
    """LSE in powers of two; +∞ for rows that saw nothing and past ``num_rows``, so that they give p = 0."""
    if MASKED:
        b_lse = tl.load(p_lse + o_row, mask=o_row < num_rows, other=float("inf"))
    else:
        b_lse = tl.load(p_lse + o_row)
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def _dq_range(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, o_q, start, stop, lo, hi, score_scale, cap_scale, stride_kn, stride_vn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [start, stop) into the block's dq, without the factor ``scale``."""
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for i_k in range(start, stop, BLOCK_K):
        b_k = load_tile(p_k + tl.cast(stride_kn, tl.int64) * i_k, o_k, o_d, stride_kn, stop - i_k, D, MASKED)
        b_v = load_tile(p_v + tl.cast(stride_vn, tl.int64) * i_k, o_k, o_dv, stride_vn, stop - i_k, DV, MASKED)
        b_p, b_slope = _weights(b_q, b_k, b_lse[:, None], score_scale, cap_scale, SCORES)  # [BLOCK_Q, BLOCK_K]
        if MASKED:
            diagonal = (i_k + o_k)[None, :] - o_q[:, None]
            b_p = tl.where((diagonal >= lo) & (diagonal <= hi) & (i_k + o_k < stop)[None, :], b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None]) * b_slope
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=[
    "num_blocks", "group", "stride_lse_b", "stride_lse_h", "stride_delta_b", "stride_delta_h",
])  # fmt: skip
def dq_kernel(
    q, k, v, do, lse, delta, dq, blocks, ranges, num_blocks, group, score_scale, cap_scale, out_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_lse_b, stride_lse_h, stride_delta_b, stride_delta_h,
    stride_dqb, stride_dqn, stride_dqh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    p_block, i_h, i_b = query_program(blocks, num_blocks, group)  # pyright: ignore[reportGeneralTypeIssues]
    if i_h >= tl.load(p_block + 6):
        return
    row0, row1 = tl.load(p_block), tl.load(p_block + 1)
    full, boundary, end = tl.load(p_block + 2), tl.load(p_block + 3), tl.load(p_block + 4)

    o_r = tl.arange(0, BLOCK_Q)
    o_q = row0 + o_r
    o_d = tl.arange(0, BLOCK_D)
    m_q = o_q < row1
    first, num_rows = row0.to(tl.int64), row1 - row0
    p_q = q + i_b * stride_qb + i_h * stride_qh + first * stride_qn
    b_q = load_tile(p_q, o_r, o_d, stride_qn, num_rows, D, True)
    p_do = do + i_b * stride_ob + i_h * stride_oh + first * stride_on
    b_do = load_tile(p_do, o_r, tl.arange(0, BLOCK_DV), stride_on, num_rows, DV, True)
    b_lse = _lse_of(lse + i_b * stride_lse_b + i_h * stride_lse_h + first, o_r, num_rows, True)
    p_delta = delta + i_b * stride_delta_b + i_h * stride_delta_h + first
    b_delta = tl.load(p_delta + o_r, mask=m_q, other=0.0)
    b_dq = tl.full([BLOCK_Q, BLOCK_D], 0.0, tl.float32)

    p_k, p_v = k + i_b * stride_kb, v + i_b * stride_vb
    for i_range in range(full, boundary):
        p_range = ranges + i_range * 8
        i_kh = (i_h + tl.load(p_range + 6)) // group
        b_dq = _dq_range(
            b_dq, b_q, b_do, b_lse, b_delta, p_k + i_kh * stride_kh, p_v + i_kh * stride_vh, o_q,
            tl.load(p_range), tl.load(p_range + 1), 0, 0, score_scale, cap_scale, stride_kn, stride_vn,
            D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, False,
        )  # fmt: skip
    for i_range in range(boundary, end):
        p_range = ranges + i_range * 8
        i_kh = (i_h + tl.load(p_range + 6)) // group
        b_dq = _dq_range(
            b_dq, b_q, b_do, b_lse, b_delta, p_k + i_kh * stride_kh, p_v + i_kh * stride_vh, o_q,
            tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2), tl.load(p_range + 3),
            score_scale, cap_scale, stride_kn, stride_vn, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, True,
        )  # fmt: skip

    p_dq = dq + i_b * stride_dqb + i_h * stride_dqh + first * stride_dqn
    p_dq += o_r[:, None] * stride_dqn + o_d[None, :]
    m_dq = m_q[:, None] & (o_d < D)[None, :]
    tl.store(p_dq, tl.load(p_dq, mask=m_dq, other=0.0) + b_dq * out_scale, mask=m_dq)


@triton.jit
def _dkdv_range(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_lse, p_delta, o_k, start, stop, lo, hi, score_scale, cap_scale,
    stride_qn, stride_on,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Query rows [start, stop) of one head into the block's dk (without the factor ``scale``) and dv. Scores are kᵀ-major."""
    o_q = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for i_q in range(start, stop, BLOCK_Q):
        b_q = load_tile(p_q + tl.cast(stride_qn, tl.int64) * i_q, o_q, o_d, stride_qn, stop - i_q, D, MASKED)
        b_lse = _lse_of(p_lse + i_q, o_q, stop - i_q, MASKED)
        b_p, b_slope = _weights(b_k, b_q, b_lse[None, :], score_scale, cap_scale, SCORES)  # [BLOCK_K, BLOCK_Q]
        if MASKED:
            diagonal = (i_q + o_q)[None, :] - o_k[:, None]
            b_p = tl.where((diagonal >= lo) & (diagonal <= hi), b_p, 0.0)
        b_do = load_tile(p_do + tl.cast(stride_on, tl.int64) * i_q, o_q, o_dv, stride_on, stop - i_q, DV, MASKED)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        if MASKED:
            b_delta = tl.load(p_delta + i_q + o_q, mask=i_q + o_q < stop, other=0.0)
        else:
            b_delta = tl.load(p_delta + i_q + o_q)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[None, :]) * b_slope
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit
def _head_of_range(p_range, i_g, i_member, group):
    """(query head, first row, end): the KV head's group member, and the range's rows, or none if it has no such head."""
    i_h = i_g * group - tl.load(p_range + 6) + i_member
    start, stop = tl.load(p_range), tl.load(p_range + 1)
    inside = (i_h >= tl.load(p_range + 4)) & (i_h < tl.load(p_range + 5))
    return i_h.to(tl.int64), start, tl.where(inside, stop, start)


@triton.jit(do_not_specialize=[
    "num_blocks", "group", "stride_lse_b", "stride_lse_h", "stride_delta_b", "stride_delta_h",
])  # fmt: skip
def dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, blocks, ranges, num_blocks, group, score_scale, cap_scale, out_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_lse_b, stride_lse_h, stride_delta_b, stride_delta_h,
    stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    p_block = blocks + (i_program % num_blocks) * 8
    i_g = tl.load(p_block + 5) + i_program // num_blocks
    if i_g >= tl.load(p_block + 6):
        return
    i_kh, i_b = i_g.to(tl.int64), tl.program_id(1).to(tl.int64)
    row0, row1 = tl.load(p_block), tl.load(p_block + 1)
    full, boundary, end = tl.load(p_block + 2), tl.load(p_block + 3), tl.load(p_block + 4)

    o_r = tl.arange(0, BLOCK_K)
    o_k = row0 + o_r
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_k = o_k < row1
    first, num_rows = row0.to(tl.int64), row1 - row0
    b_k = load_tile(k + i_b * stride_kb + i_kh * stride_kh + first * stride_kn, o_r, o_d, stride_kn, num_rows, D, True)
    b_v = load_tile(v + i_b * stride_vb + i_kh * stride_vh + first * stride_vn, o_r, o_dv, stride_vn, num_rows, DV, True)
    b_dk = tl.full([BLOCK_K, BLOCK_D], 0.0, tl.float32)
    b_dv = tl.full([BLOCK_K, BLOCK_DV], 0.0, tl.float32)

    p_q, p_do = q + i_b * stride_qb, do + i_b * stride_ob
    p_lse, p_delta = lse + i_b * stride_lse_b, delta + i_b * stride_delta_b
    # One loop over pairs (range, head of the group): a third level would keep ptxas from overlapping the products.
    for i_pair in range(full * group, boundary * group):
        p_range = ranges + (i_pair // group) * 8
        i_h, start, stop = _head_of_range(p_range, i_g, i_pair % group, group)
        b_dk, b_dv = _dkdv_range(
            b_dk, b_dv, b_k, b_v, p_q + i_h * stride_qh, p_do + i_h * stride_oh,
            p_lse + i_h * stride_lse_h, p_delta + i_h * stride_delta_h, o_k, start, stop, 0, 0,
            score_scale, cap_scale, stride_qn, stride_on, D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV, SCORES, False,
        )  # fmt: skip
    for i_pair in range(boundary * group, end * group):
        p_range = ranges + (i_pair // group) * 8
        i_h, start, stop = _head_of_range(p_range, i_g, i_pair % group, group)
        b_dk, b_dv = _dkdv_range(
            b_dk, b_dv, b_k, b_v, p_q + i_h * stride_qh, p_do + i_h * stride_oh,
            p_lse + i_h * stride_lse_h, p_delta + i_h * stride_delta_h, o_k, start, stop,
            tl.load(p_range + 2), tl.load(p_range + 3),
            score_scale, cap_scale, stride_qn, stride_on, D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV, SCORES, True,
        )  # fmt: skip

    p_dk = dk + i_b * stride_dkb + i_kh * stride_dkh + first * stride_dkn
    p_dk += o_r[:, None] * stride_dkn + o_d[None, :]
    m_dk = m_k[:, None] & (o_d < D)[None, :]
    tl.store(p_dk, tl.load(p_dk, mask=m_dk, other=0.0) + b_dk * out_scale, mask=m_dk)
    p_dv = dv + i_b * stride_dvb + i_kh * stride_dvh + first * stride_dvn
    p_dv += o_r[:, None] * stride_dvn + o_dv[None, :]
    m_dv = m_k[:, None] & (o_dv < DV)[None, :]
    tl.store(p_dv, tl.load(p_dv, mask=m_dv, other=0.0) + b_dv, mask=m_dv)
