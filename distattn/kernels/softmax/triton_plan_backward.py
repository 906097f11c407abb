"""Backward of softmax attention under a block plan, in Triton: dq over the plan's lists, dk and dv over their transposes.

The sums are those of ``triton_backward``; what a program visits is found as in ``triton_plan_forward``. The dk and dv of a
block of keys go over the lists of every query head of the group in turn, which may be those of different plan heads. A program
of dq takes PACK query heads that follow the same lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.softmax.triton_backward import dkdv_columns, dq_columns, key_program, store_sum
from distattn.kernels.softmax.triton_forward import load_line, load_tile, query_program
from distattn.kernels.softmax.triton_plan_forward import PLAN_RANGE, block_at, stretch_of_lists


@triton.jit
def _dq_plan(
    b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, k, v, bias, pos_k, o_q, ranges, first_range, end_range, positions,
    full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_h, i_plan_row,
    plan_heads, plan_batch, heads, num_lists, num_ranges, group,
    score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr, PLAN_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The ranges' blocks that need no test, or those that do, into dq."""
    parts: tl.constexpr = PLAN_K // BLOCK_K
    for i_range in range(first_range, end_range):
        p_range = ranges + i_range * PLAN_RANGE
        start, stop, lo, hi = tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2), tl.load(p_range + 3)
        i_kh = (i_h + tl.load(p_range + 6)) // group
        offset = tl.load(p_range + 7)
        i_plan_head = (i_h + tl.load(p_range + 8)) * plan_heads // heads
        i_list = tl.minimum(i_b, plan_batch - 1) * plan_heads + i_plan_head
        p_full, p_partial, num_blocks, num_edges, num_left, right = stretch_of_lists(  # pyright: ignore[reportGeneralTypeIssues]
            positions, full_starts, full_blocks, partial_starts, partial_blocks, i_list, i_range, num_ranges, i_plan_row,
            num_lists, MASKED,
        )  # fmt: skip
        p_k, p_v, p_bias = k + i_kh * stride_kh, v + i_kh * stride_vh, bias + i_kh * stride_bias_h
        j = 0
        if num_blocks > 0:
            j = block_at(p_full, p_partial, 0, num_edges, num_left, right, MASKED)
        for i in range(num_blocks * parts):
            i_k = j * PLAN_K + (i % parts) * BLOCK_K - offset
            b_dq = dq_columns(
                b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, i_k, start, stop, lo, hi,
                (i // parts >= num_edges).to(tl.int32), score_scale, cap_scale, stride_kn, stride_vn,
                D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, MASKED,
            )  # fmt: skip
            i_next = tl.minimum((i + 1) // parts, num_blocks - 1)
            j = block_at(p_full, p_partial, i_next, num_edges, num_left, right, MASKED)
    return b_dq


@triton.jit(do_not_specialize=[
    "num_blocks", "num_long", "group", "stride_lse_b", "stride_lse_h", "stride_delta_b", "stride_delta_h",
    "stride_bias_b", "stride_bias_h", "plan_heads", "plan_batch", "heads", "num_lists", "num_ranges",
])  # fmt: skip
def plan_dq_kernel(
    q, k, v, do, lse, delta, bias, pos_q, pos_k, dq, blocks, ranges,
    positions, full_starts, full_blocks, partial_starts, partial_blocks,
    plan_heads, plan_batch, heads, num_lists, num_ranges, num_blocks, num_long, group, score_scale, cap_scale, out_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_lse_b, stride_lse_h, stride_delta_b, stride_delta_h,
    stride_bias_b, stride_bias_h, stride_dqb, stride_dqn, stride_dqh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCORES: tl.constexpr,
    BIAS: tl.constexpr, POSITIONS: tl.constexpr, WHOLE: tl.constexpr, PLAN_Q: tl.constexpr, PLAN_K: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    p_block, i_pack, i_b = query_program(  # pyright: ignore[reportGeneralTypeIssues]
        blocks, num_blocks, num_long, group // PACK
    )
    first_head = tl.load(p_block + 5)
    i_h = first_head + (i_pack - first_head) * PACK
    if i_h >= tl.load(p_block + 6):
        return
    row0, row1, first_range, end_range = tl.load(p_block), tl.load(p_block + 1), tl.load(p_block + 2), tl.load(p_block + 4)
    i_plan_row = tl.load(p_block + 3) // PLAN_Q

    # Rows of head i_h, then the same ones of each head behind it: all see the same keys, so that these are read once.
    o_pack = tl.arange(0, PACK * BLOCK_Q)
    o_r, i_heads = o_pack % BLOCK_Q, i_h + o_pack // BLOCK_Q
    o_q = row0 + o_r
    o_d = tl.arange(0, BLOCK_D)
    first, num_rows = row0.to(tl.int64), row1 - row0
    p_q = q + i_b * stride_qb + i_heads * stride_qh + first * stride_qn
    b_q = load_tile(p_q[:, None], o_r, o_d, stride_qn, 0, num_rows, D, True)
    p_do = do + i_b * stride_ob + i_heads * stride_oh + first * stride_on
    b_do = load_tile(p_do[:, None], o_r, tl.arange(0, BLOCK_DV), stride_on, 0, num_rows, DV, True)
    b_lse = load_line(lse + i_b * stride_lse_b + i_heads * stride_lse_h + first, o_r, 0, num_rows, float("inf"), True)
    b_delta = load_line(delta + i_b * stride_delta_b + i_heads * stride_delta_h + first, o_r, 0, num_rows, 0.0, True)
    b_pos_q = 0
    if POSITIONS:
        b_pos_q = load_line(pos_q + row0, o_r, 0, num_rows, 0, True)
    b_dq = tl.zeros([PACK * BLOCK_Q, BLOCK_D], tl.float32)

    p_k, p_v, p_bias = k + i_b * stride_kb, v + i_b * stride_vb, bias + i_b * stride_bias_b
    b_dq = _dq_plan(
        b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, first_range, end_range, positions,
        full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_h, i_plan_row,
        plan_heads, plan_batch, heads, num_lists, num_ranges, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, PLAN_K, False,
    )  # fmt: skip
    b_dq = _dq_plan(
        b_dq, b_q, b_do, b_lse, b_delta, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, first_range, end_range, positions,
        full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_h, i_plan_row,
        plan_heads, plan_batch, heads, num_lists, num_ranges, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, PLAN_K, True,
    )  # fmt: skip
    p_dq = dq + i_b * stride_dqb + i_heads * stride_dqh + first * stride_dqn
    store_sum(p_dq[:, None], b_dq * out_scale, o_r, o_d, stride_dqn, num_rows, D, WHOLE)


@triton.jit
def _dkdv_plan(
    b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, q, do, lse, delta, pos_q, o_k, ranges, first_range, end_range, positions,
    full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_g, i_plan_row,
    plan_heads, plan_batch, heads, num_lists, num_ranges, group,
    score_scale, cap_scale, stride_qn, stride_qh, stride_on, stride_oh, stride_lse_h, stride_delta_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr, PLAN_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The ranges' blocks that need no test, or those that do, of all heads of the group, into dk, dv and dbias."""
    parts: tl.constexpr = PLAN_Q // BLOCK_Q
    # One loop over pairs (range, head of the group): a third level would keep ptxas from overlapping the products.
    for i_pair in range(first_range * group, end_range * group):
        i_range = i_pair // group
        p_range = ranges + i_range * PLAN_RANGE
        i_head = i_g * group - tl.load(p_range + 6) + i_pair % group
        inside = (i_head >= tl.load(p_range + 4)) & (i_head < tl.load(p_range + 5))
        start, stop, lo, hi = tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2), tl.load(p_range + 3)
        i_h = tl.where(inside, i_head, 0).to(tl.int64)
        offset = tl.load(p_range + 7)
        i_plan_head = (i_h + tl.load(p_range + 8)) * plan_heads // heads
        i_list = tl.minimum(i_b, plan_batch - 1) * plan_heads + i_plan_head
        p_full, p_partial, num_blocks, num_edges, num_left, right = stretch_of_lists(  # pyright: ignore[reportGeneralTypeIssues]
            positions, full_starts, full_blocks, partial_starts, partial_blocks, i_list, i_range, num_ranges, i_plan_row,
            num_lists, MASKED,
        )  # fmt: skip
        num_blocks = tl.where(inside, num_blocks, 0)
        p_q, p_do = q + i_h * stride_qh, do + i_h * stride_oh
        p_lse, p_delta = lse + i_h * stride_lse_h, delta + i_h * stride_delta_h
        j = 0
        if num_blocks > 0:
            j = block_at(p_full, p_partial, 0, num_edges, num_left, right, MASKED)
        for i in range(num_blocks * parts):
            i_q = j * PLAN_Q + (i % parts) * BLOCK_Q - offset
            b_dk, b_dv, b_dbias = dkdv_columns(
                b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, p_q, p_do, p_lse, p_delta, pos_q, o_k, i_q, start, stop,
                lo, hi, (i // parts >= num_edges).to(tl.int32), score_scale, cap_scale, stride_qn, stride_on,
                D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, MASKED,
            )  # fmt: skip
            i_next = tl.minimum((i + 1) // parts, num_blocks - 1)
            j = block_at(p_full, p_partial, i_next, num_edges, num_left, right, MASKED)
    return b_dk, b_dv, b_dbias


@triton.jit(do_not_specialize=[
    "num_blocks", "num_long", "group", "stride_lse_b", "stride_lse_h", "stride_delta_b", "stride_delta_h",
    "stride_bias_b", "stride_bias_h", "stride_dbias_b", "stride_dbias_h",
    "plan_heads", "plan_batch", "heads", "num_lists", "num_ranges",
])  # fmt: skip
def plan_dkdv_kernel(
    q, k, v, do, lse, delta, bias, pos_q, pos_k, dk, dv, dbias, blocks, ranges,
    positions, full_starts, full_blocks, partial_starts, partial_blocks,
    plan_heads, plan_batch, heads, num_lists, num_ranges, num_blocks, num_long, group, score_scale, cap_scale, out_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ob, stride_on, stride_oh, stride_lse_b, stride_lse_h, stride_delta_b, stride_delta_h,
    stride_bias_b, stride_bias_h, stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    stride_dbias_b, stride_dbias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCORES: tl.constexpr,
    BIAS: tl.constexpr, POSITIONS: tl.constexpr, WHOLE: tl.constexpr, PLAN_Q: tl.constexpr, PLAN_K: tl.constexpr,
):  # fmt: skip
    p_block, i_g = key_program(blocks, num_blocks, num_long)  # pyright: ignore[reportGeneralTypeIssues]
    if i_g >= tl.load(p_block + 6):
        return
    i_kh, i_b = i_g.to(tl.int64), tl.program_id(1).to(tl.int64)
    row0, row1, first_range, end_range = tl.load(p_block), tl.load(p_block + 1), tl.load(p_block + 2), tl.load(p_block + 4)
    i_plan_row = tl.load(p_block + 3) // PLAN_K

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
    b_dk, b_dv, b_dbias = _dkdv_plan(
        b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, p_q, p_do, p_lse, p_delta, pos_q, o_k, ranges, first_range, end_range,
        positions, full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_g, i_plan_row,
        plan_heads, plan_batch, heads, num_lists, num_ranges, group,
        score_scale, cap_scale, stride_qn, stride_qh, stride_on, stride_oh, stride_lse_h, stride_delta_h,
        D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, PLAN_Q, False,
    )  # fmt: skip
    b_dk, b_dv, b_dbias = _dkdv_plan(
        b_dk, b_dv, b_dbias, b_k, b_v, b_bias, b_pos_k, p_q, p_do, p_lse, p_delta, pos_q, o_k, ranges, first_range, end_range,
        positions, full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_g, i_plan_row,
        plan_heads, plan_batch, heads, num_lists, num_ranges, group,
        score_scale, cap_scale, stride_qn, stride_qh, stride_on, stride_oh, stride_lse_h, stride_delta_h,
        D, DV, BLOCK_Q, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, PLAN_Q, True,
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
