"""Forward of softmax attention over a work list, in Triton.

    for each block of keys, in each range of the block's list:
        s₂ = scale · log₂e · q kᵀ + log₂e · bias            or log₂e · softcap · tanh((scale · q kᵀ + bias) / softcap)
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
def load_tile(p_row, o_row, o_dim, stride, first_row, num_rows, DIM: tl.constexpr, ROWS_MASKED: tl.constexpr):
    """[rows, BLOCK_DIM] from row 0's address; zeros outside first_row … num_rows (if masked) and past DIM."""
    p_tile = p_row + o_row[:, None] * stride + o_dim[None, :]
    padded: tl.constexpr = o_dim.shape[0] != DIM
    if ROWS_MASKED:
        m_row = (o_row >= first_row) & (o_row < num_rows)
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
def load_line(p_line, o_row, first_row, num_rows, fill, MASKED: tl.constexpr):
    """[rows] from row 0's address, rows next to each other; ``fill`` outside first_row … num_rows (if masked)."""
    if MASKED:
        b_line = tl.load(p_line + o_row, mask=(o_row >= first_row) & (o_row < num_rows), other=fill)
    else:
        b_line = tl.load(p_line + o_row)
    return b_line


@triton.jit
def scores(b_a, b_b, b_bias, score_scale, cap_scale, SCORES: tl.constexpr, BIAS: tl.constexpr):
    """(s, factor): s · factor [rows, columns] in fp32 counts in powers of two; capped scores are s = tanh(…).

    b_bias: of a shape that broadcasts, times log₂e, or over the soft-cap.
    """
    b_s = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
    if SCORES == SCORES_CAPPED:
        # tanh x = 1 − 2 / (e^(2x) + 1) keeps its limits where e^(2x) overflows; near 0 it cancels, and the series takes over.
        b_x = b_s * cap_scale
        if BIAS:
            b_x += b_bias
        b_x2 = b_x * b_x
        b_near = b_x * (1.0 + b_x2 * (-0.33333333 + b_x2 * (0.13333333 + b_x2 * (-0.053968254 + b_x2 * 0.021869489))))
        b_s = tl.where(b_x2 < 0.0625, b_near, 1.0 - 2.0 / (tl.exp2(b_x * (2.0 * LOG2E)) + 1.0))
        factor = score_scale
    else:
        if SCORES == SCORES_NEGATED:
            b_s = -b_s
        if BIAS:
            b_s = b_s * score_scale + b_bias
            factor = 1.0
        else:
            factor = score_scale
    return b_s, factor


@triton.jit
def attend_columns(
    b_acc, b_m, b_l, b_q, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, i_k, start, stop, lo, hi, tested, score_scale, cap_scale,
    stride_kn, stride_vn,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys i_k … i_k + BLOCK_K into the block's (acc, m, l); if masked, those in [start, stop) and in the band.

    p_k, p_v, p_bias: key 0 of the KV head. tested: whether positions are.
    """
    o_k = tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_k = load_tile(p_k + tl.cast(stride_kn, tl.int64) * i_k, o_k, o_d, stride_kn, start - i_k, stop - i_k, D, MASKED)
    b_bias = 0.0
    if BIAS:
        b_bias = load_line(p_bias + i_k, o_k, start - i_k, stop - i_k, 0.0, MASKED)[None, :]
    b_s, factor = scores(b_q, b_k, b_bias, score_scale, cap_scale, SCORES, BIAS)  # [BLOCK_Q, BLOCK_K]
    if MASKED:
        diagonal = (i_k + o_k)[None, :] - o_q[:, None]
        m_seen = (diagonal >= lo) & (diagonal <= hi) & ((i_k + o_k >= start) & (i_k + o_k < stop))[None, :]
        if POSITIONS:
            b_pos_k = load_line(pos_k + i_k, o_k, start - i_k, stop - i_k, 0, MASKED)
            m_seen &= (b_pos_q[:, None] >= b_pos_k[None, :]) | (tested == 0)
        b_s = tl.where(m_seen, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
    if MASKED:
        # A row that has seen no key yet: 0 instead of −∞, so that −∞ − (−∞) is not formed.
        b_base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    else:
        b_base = b_m_new
    b_p = tl.exp2(b_s * factor - b_base[:, None])
    b_alpha = tl.exp2(b_m - b_base)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    b_v = load_tile(p_v + tl.cast(stride_vn, tl.int64) * i_k, o_k, o_dv, stride_vn, start - i_k, stop - i_k, DV, MASKED)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_m_new, b_l


@triton.jit
def turn(i, num_heads, num_blocks, num_long):
    """(block, head) of turn i: the long blocks first, each for all heads; then all others, head by head."""
    num_first = num_long * num_heads
    num_rest = tl.maximum(num_blocks - num_long, 1)
    if i < num_first:
        i_block, i_head = i // num_heads, i % num_heads
    else:
        i_block, i_head = num_long + (i - num_first) % num_rest, (i - num_first) // num_rest
    return i_block, i_head


@triton.jit
def query_program(blocks, num_blocks, num_long, group):
    """(block's line, head, batch) of this program: heads of one KV group are neighbours; the groups take turns."""
    i_program = tl.program_id(0)
    num_groups = tl.num_programs(0) // (num_blocks * group)
    i_block, i_group = turn(i_program // group, num_groups, num_blocks, num_long)  # pyright: ignore[reportGeneralTypeIssues]
    p_block = blocks + i_block * 8
    i_h = tl.load(p_block + 5) + i_group * group + i_program % group
    return p_block, i_h.to(tl.int64), tl.program_id(1).to(tl.int64)


@triton.jit
def read_range(ranges, i_range, i_h, group):
    """(start, stop, lo, hi, KV head) of a range of keys."""
    p_range = ranges + i_range * 8
    i_kh = (i_h + tl.load(p_range + 6)) // group
    return tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2), tl.load(p_range + 3), i_kh


@triton.jit
def begin_rows(
    acc, m, l, i_b, i_h, row0, row1, stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh,
    stride_lb, stride_ln, stride_lh,
    DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The block's (acc, m, l), m in powers of two: as carried, or empty if these tiles are the whole of it."""
    o_r = tl.arange(0, BLOCK_Q)
    if WHOLE:
        b_acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        b_m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        b_l = tl.zeros([BLOCK_Q], tl.float32)
    else:
        m_q = row0 + o_r < row1
        first = row0.to(tl.int64)
        o_dv = tl.arange(0, BLOCK_DV)
        p_acc = acc + i_b * stride_ab + i_h * stride_ah + first * stride_an
        p_acc += o_r[:, None] * stride_an + o_dv[None, :]
        b_acc = tl.load(p_acc, mask=m_q[:, None] & (o_dv < DV)[None, :], other=0.0)
        b_m = tl.load(m + i_b * stride_mb + i_h * stride_mh + (first + o_r) * stride_mn, mask=m_q, other=0.0) * LOG2E
        b_l = tl.load(l + i_b * stride_lb + i_h * stride_lh + (first + o_r) * stride_ln, mask=m_q, other=0.0)
    return b_acc, b_m, b_l


@triton.jit
def end_rows(
    b_acc, b_m, b_l, acc, m, l, i_b, i_h, row0, row1, stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh,
    stride_lb, stride_ln, stride_lh,
    DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Store the carry; or, of the whole, out into ``acc`` and the LSE into ``m``."""
    o_r = tl.arange(0, BLOCK_Q)
    o_dv = tl.arange(0, BLOCK_DV)
    m_q = row0 + o_r < row1
    first = row0.to(tl.int64)
    if WHOLE:
        b_empty = b_l == 0.0
        b_weight = tl.where(b_empty, 1.0, b_l)
        b_acc = b_acc * (1.0 / b_weight)[:, None]
        b_m = tl.where(b_empty, float("-inf"), b_m + tl.log2(b_weight))
    else:
        tl.store(l + i_b * stride_lb + i_h * stride_lh + (first + o_r) * stride_ln, b_l, mask=m_q)
    tl.store(m + i_b * stride_mb + i_h * stride_mh + (first + o_r) * stride_mn, b_m * LN2, mask=m_q)
    p_acc = acc + i_b * stride_ab + i_h * stride_ah + first * stride_an
    p_acc += o_r[:, None] * stride_an + o_dv[None, :]
    tl.store(p_acc, b_acc.to(acc.dtype.element_ty), mask=m_q[:, None] & (o_dv < DV)[None, :])


@triton.jit
def _attend_full(
    b_acc, b_m, b_l, b_q, b_pos_q, k, v, bias, pos_k, o_q, ranges, first_range, end_range, i_h, group,
    score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """FULL ranges into (acc, m, l), one loop each: a branch in a long loop costs more than filling its pipeline."""
    for i_range in range(first_range, end_range):
        start, stop, lo, hi, i_kh = read_range(ranges, i_range, i_h, group)  # pyright: ignore[reportGeneralTypeIssues]
        p_k, p_v, p_bias = k + i_kh * stride_kh, v + i_kh * stride_vh, bias + i_kh * stride_bias_h
        for i_k in range(start, stop, BLOCK_K):
            b_acc, b_m, b_l = attend_columns(
                b_acc, b_m, b_l, b_q, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, i_k, start, stop, lo, hi, 1,
                score_scale, cap_scale, stride_kn, stride_vn, D, DV, BLOCK_K, BLOCK_D, BLOCK_DV,
                SCORES, BIAS, POSITIONS, POSITIONS,
            )  # fmt: skip
    return b_acc, b_m, b_l


@triton.jit
def _attend_boundary(
    b_acc, b_m, b_l, b_q, b_pos_q, k, v, bias, pos_k, o_q, ranges, first_range, end_range, i_h, group,
    score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Boundary ranges into (acc, m, l), as one loop over their few column blocks: every loop fills its pipeline anew."""
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
        b_acc, b_m, b_l = attend_columns(
            b_acc, b_m, b_l, b_q, b_pos_q, k + i_kh * stride_kh, v + i_kh * stride_vh, bias + i_kh * stride_bias_h, pos_k,
            o_q, i_k, start, stop, lo, hi, 1, score_scale, cap_scale, stride_kn, stride_vn,
            D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, True,
        )  # fmt: skip
        i_k += BLOCK_K
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=[
    "num_blocks", "num_long", "group", "stride_mb", "stride_mn", "stride_mh", "stride_lb", "stride_ln", "stride_lh",
    "stride_bias_b", "stride_bias_h",
])  # fmt: skip
def forward_kernel(
    q, k, v, acc, m, l, bias, pos_q, pos_k, blocks, ranges, num_blocks, num_long, group, score_scale, cap_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh,
    stride_bias_b, stride_bias_h,
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
    p_q = q + i_b * stride_qb + i_h * stride_qh + row0.to(tl.int64) * stride_qn
    b_q = load_tile(p_q, o_r, tl.arange(0, BLOCK_D), stride_qn, 0, row1 - row0, D, True)
    b_pos_q = 0
    if POSITIONS:
        b_pos_q = load_line(pos_q + row0, o_r, 0, row1 - row0, 0, True)
    b_acc, b_m, b_l = begin_rows(
        acc, m, l, i_b, i_h, row0, row1, stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh,
        stride_lb, stride_ln, stride_lh, DV, BLOCK_Q, BLOCK_DV, WHOLE,
    )  # fmt: skip
    p_k, p_v, p_bias = k + i_b * stride_kb, v + i_b * stride_vb, bias + i_b * stride_bias_b
    b_acc, b_m, b_l = _attend_full(
        b_acc, b_m, b_l, b_q, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, full, boundary, i_h, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS,
    )  # fmt: skip
    b_acc, b_m, b_l = _attend_boundary(
        b_acc, b_m, b_l, b_q, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, boundary, end, i_h, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS,
    )  # fmt: skip
    end_rows(
        b_acc, b_m, b_l, acc, m, l, i_b, i_h, row0, row1, stride_ab, stride_an, stride_ah,
        stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh, DV, BLOCK_Q, BLOCK_DV, WHOLE,
    )  # fmt: skip
