"""Forward of softmax attention over a work list, in Triton.

    for each block of keys, in each range of the block's list:
        s₂ = scale · log₂e · q kᵀ                       or log₂e · softcap · tanh(scale / softcap · q kᵀ)
        s₂ = −∞ outside the band                        boundary ranges only
        m' = max(m, rowmax s₂);  α = 2^(m − m');  p = 2^(s₂ − m')
        (acc, m, l) ← (α acc + p v, m', α l + Σ p)

One program computes one block of query rows for one head, over all tiles that touch it. It is the only writer of its rows of
the carry, so results are deterministic and need no atomics. Inside, m counts in powers of two; in memory in powers of e.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# How raw scores q·k become the values that the kernels exponentiate (argument ``SCORES`` of every kernel).
SCORES_PLAIN = tl.constexpr(0)
SCORES_NEGATED = tl.constexpr(1)
SCORES_CAPPED = tl.constexpr(2)


@triton.jit
def load_tile(p_row, o_row, o_dim, stride, num_rows, DIM: tl.constexpr, ROWS_MASKED: tl.constexpr):
    """[rows, BLOCK_DIM] from the first row's address; zeros past ``num_rows`` (if masked) and past DIM."""
    p_tile = p_row + o_row[:, None] * stride + o_dim[None, :]
    padded: tl.constexpr = o_dim.shape[0] != DIM
    if ROWS_MASKED:
        m_row = o_row < num_rows
        if padded:
            b_tile = tl.load(p_tile, mask=m_row[:, None] & (o_dim < DIM)[None, :], other=0.0)
        else:
            b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif padded:
        b_tile = tl.load(p_tile, mask=(o_dim < DIM)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def scores(b_a, b_b, cap_scale, SCORES: tl.constexpr):
    """a bᵀ [rows, columns] in fp32: plain, negated, or tanh(cap_scale · a bᵀ)."""
    b_s = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
    if SCORES == SCORES_CAPPED:
        # tanh x = 1 − 2 / (e^(2x) + 1) keeps its limits where e^(2x) overflows; near 0 it cancels, and the series takes over.
        b_x = b_s * cap_scale
        b_x2 = b_x * b_x
        b_near = b_x * (1.0 + b_x2 * (-0.33333333 + b_x2 * (0.13333333 + b_x2 * (-0.053968254 + b_x2 * 0.021869489))))
        b_s = tl.where(b_x2 < 0.0625, b_near, 1.0 - 2.0 / (tl.exp2(b_x * (2.0 * LOG2E)) + 1.0))
    elif SCORES == SCORES_NEGATED:
        b_s = -b_s
    return b_s


@triton.jit
def _attend_range(
    b_acc, b_m, b_l, b_q, p_k, p_v, o_q, start, stop, lo, hi, score_scale, cap_scale, stride_kn, stride_vn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys [start, stop) into the block's (acc, m, l). p_k, p_v: row 0 of the KV head."""
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    for i_k in range(start, stop, BLOCK_K):
        b_k = load_tile(p_k + tl.cast(stride_kn, tl.int64) * i_k, o_k, o_d, stride_kn, stop - i_k, D, MASKED)
        b_s = scores(b_q, b_k, cap_scale, SCORES)  # [BLOCK_Q, BLOCK_K]
        if MASKED:
            diagonal = (i_k + o_k)[None, :] - o_q[:, None]
            b_s = tl.where((diagonal >= lo) & (diagonal <= hi) & (i_k + o_k < stop)[None, :], b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * score_scale)
        if MASKED:
            # A row that has seen no key yet: 0 instead of −∞, so that −∞ − (−∞) is not formed.
            b_base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
        else:
            b_base = b_m_new
        b_p = tl.exp2(b_s * score_scale - b_base[:, None])
        b_alpha = tl.exp2(b_m - b_base)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_acc = b_acc * b_alpha[:, None]
        b_v = load_tile(p_v + tl.cast(stride_vn, tl.int64) * i_k, o_k, o_dv, stride_vn, stop - i_k, DV, MASKED)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_m = b_m_new
    return b_acc, b_m, b_l


@triton.jit
def query_program(blocks, num_blocks, group):
    """(block's line, head, batch) of this program: heads of one KV group are neighbours, then blocks, then groups."""
    i_program = tl.program_id(0)
    i_chunk = i_program // group
    p_block = blocks + (i_chunk % num_blocks) * 8
    i_h = tl.load(p_block + 5) + (i_chunk // num_blocks) * group + i_program % group
    return p_block, i_h.to(tl.int64), tl.program_id(1).to(tl.int64)


@triton.jit(do_not_specialize=[
    "num_blocks", "group", "stride_mb", "stride_mn", "stride_mh", "stride_lb", "stride_ln", "stride_lh",
])  # fmt: skip
def forward_kernel(
    q, k, v, acc, m, l, blocks, ranges, num_blocks, group, score_scale, cap_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh,
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
    o_dv = tl.arange(0, BLOCK_DV)
    m_q = o_q < row1
    first = row0.to(tl.int64)
    p_q = q + i_b * stride_qb + i_h * stride_qh + first * stride_qn
    b_q = load_tile(p_q, o_r, tl.arange(0, BLOCK_D), stride_qn, row1 - row0, D, True)
    p_acc = acc + i_b * stride_ab + i_h * stride_ah + first * stride_an
    p_acc += o_r[:, None] * stride_an + o_dv[None, :]
    m_acc = m_q[:, None] & (o_dv < DV)[None, :]
    p_m = m + i_b * stride_mb + i_h * stride_mh + (first + o_r) * stride_mn
    p_l = l + i_b * stride_lb + i_h * stride_lh + (first + o_r) * stride_ln
    b_acc = tl.load(p_acc, mask=m_acc, other=0.0)
    b_m = tl.load(p_m, mask=m_q, other=0.0) * LOG2E
    b_l = tl.load(p_l, mask=m_q, other=0.0)

    p_k, p_v = k + i_b * stride_kb, v + i_b * stride_vb
    for i_range in range(full, boundary):
        p_range = ranges + i_range * 8
        i_kh = (i_h + tl.load(p_range + 6)) // group
        b_acc, b_m, b_l = _attend_range(
            b_acc, b_m, b_l, b_q, p_k + i_kh * stride_kh, p_v + i_kh * stride_vh, o_q,
            tl.load(p_range), tl.load(p_range + 1), 0, 0, score_scale, cap_scale, stride_kn, stride_vn,
            D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, False,
        )  # fmt: skip
    for i_range in range(boundary, end):
        p_range = ranges + i_range * 8
        i_kh = (i_h + tl.load(p_range + 6)) // group
        b_acc, b_m, b_l = _attend_range(
            b_acc, b_m, b_l, b_q, p_k + i_kh * stride_kh, p_v + i_kh * stride_vh, o_q,
            tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2), tl.load(p_range + 3),
            score_scale, cap_scale, stride_kn, stride_vn, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, True,
        )  # fmt: skip

    tl.store(p_acc, b_acc, mask=m_acc)
    tl.store(p_m, b_m * LN2, mask=m_q)
    tl.store(p_l, b_l, mask=m_q)
