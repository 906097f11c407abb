"""Forward of softmax attention under a block plan, in Triton.

    for each range of keys in the block's list, with the plan's key blocks j of the program's query block:
        full list      ·  [ j ] [ j ] [ j ]  ·      blocks that lie where all rows see all keys: no test at all
        and partial      ◥                 ◣        blocks on an edge of the range, and partial ones: band, end, positions

Lists are ascending, so that the blocks of a range are a stretch of each list. Where it begins and ends, and where the part
that needs no test does, a kernel of its own counts beforehand (``positions_kernel``), once for each plan and table of tiles:
every program would wait for it. The list is read a block ahead of its keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.softmax.triton_forward import attend_columns, begin_rows, end_rows, load_line, load_tile, query_program

LIST_BLOCK = tl.constexpr(512)
"""Entries of a list that are counted at once."""
PLAN_RANGE = tl.constexpr(9)
"""Columns of a range under a plan."""
POSITION_COLUMNS = tl.constexpr(8)
"""Positions a, b, c, d in the full list and e, f in the partial one; two are unused, so that a line is 32 bytes."""


@triton.jit
def count_blocks(p_list, count, size: tl.constexpr, first, inner_first, inner_end, end):
    """How many entries j lie wholly before ``first``, begin before ``inner_first``, end by ``inner_end``, begin before ``end``.

    As the list is ascending, these are positions: blocks [a, d) touch [first, end), and [b, c) lie in the inner part.
    """
    o_list = tl.arange(0, LIST_BLOCK)
    a, b, c, d = 0, 0, 0, 0
    for i in range(0, count, LIST_BLOCK):
        m_list = i + o_list < count
        b_start = tl.load(p_list + i + o_list, mask=m_list, other=0) * size
        a += tl.sum((m_list & (b_start + size <= first)).to(tl.int32), 0)
        b += tl.sum((m_list & (b_start < inner_first)).to(tl.int32), 0)
        c += tl.sum((m_list & (b_start + size <= inner_end)).to(tl.int32), 0)
        d += tl.sum((m_list & (b_start < end)).to(tl.int32), 0)
    b = tl.minimum(tl.maximum(a, b), d)
    return a, b, tl.minimum(tl.maximum(b, c), d), d


@triton.jit(do_not_specialize=["plan_heads", "num_lists", "num_ranges"])
def positions_kernel(
    positions, blocks, ranges, full_starts, full_counts, full_blocks, partial_starts, partial_counts, partial_blocks,
    plan_heads, num_lists, num_ranges, PLAN_ROWS: tl.constexpr, PLAN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """For every plan head and range, where the lists' parts begin and end: int32 [b, p, ranges, 8]."""
    p_block = blocks + tl.program_id(0) * 8
    i_list = tl.program_id(2).to(tl.int64) * plan_heads + tl.program_id(1)
    row0, row1 = tl.load(p_block), tl.load(p_block + 1)
    i_line = i_list * num_lists + tl.load(p_block + 3) // PLAN_ROWS
    p_full, num_full = full_blocks + tl.load(full_starts + i_line), tl.load(full_counts + i_line)
    p_partial, num_partial = partial_blocks + tl.load(partial_starts + i_line), tl.load(partial_counts + i_line)
    for i_range in range(tl.load(p_block + 2), tl.load(p_block + 4)):
        p_range = ranges + i_range * PLAN_RANGE
        start, stop, lo, hi = tl.load(p_range), tl.load(p_range + 1), tl.load(p_range + 2), tl.load(p_range + 3)
        offset = tl.load(p_range + 7)
        inner_first, inner_end = tl.maximum(start, row1 - 1 + lo) + offset, tl.minimum(stop, row0 + hi + 1) + offset
        a, b, c, d = count_blocks(  # pyright: ignore[reportGeneralTypeIssues]
            p_full, num_full, PLAN_COLUMNS, start + offset, inner_first, inner_end, stop + offset
        )
        e, _, _, f = count_blocks(p_partial, num_partial, PLAN_COLUMNS, start + offset, 0, 0, stop + offset)
        p_out = positions + (i_list * num_ranges + i_range) * POSITION_COLUMNS
        tl.store(p_out, a)
        tl.store(p_out + 1, b)
        tl.store(p_out + 2, c)
        tl.store(p_out + 3, d)
        tl.store(p_out + 4, e)
        tl.store(p_out + 5, f)


@triton.jit
def stretch_of_lists(
    positions, full_starts, full_blocks, partial_starts, partial_blocks, i_list, i_range, num_ranges, i_row, num_lists,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(full list, partial list, number of blocks, of edges, of left edges, where the right edge begins) of a range's blocks.

    Lists are addresses of their first block that is visited. Without a mask all are blocks of the full list, else those of its
    left edge, of its right edge, and of the partial list, in this order.
    """
    p_at = positions + (i_list * num_ranges + i_range) * POSITION_COLUMNS
    i_line = i_list * num_lists + i_row
    p_full = full_blocks + tl.load(full_starts + i_line)
    b, c = tl.load(p_at + 1), tl.load(p_at + 2)
    if MASKED:
        a, d, e, f = tl.load(p_at), tl.load(p_at + 3), tl.load(p_at + 4), tl.load(p_at + 5)
        p_full += a
        p_partial = partial_blocks + tl.load(partial_starts + i_line) + e
        num_left = b - a
        num_edges = num_left + d - c
        num_blocks = num_edges + f - e
        right = c - a
    else:
        p_full += b
        p_partial = p_full
        num_blocks = c - b
        num_edges, num_left, right = num_blocks, num_blocks, num_blocks
    return p_full, p_partial, num_blocks, num_edges, num_left, right


@triton.jit
def block_at(p_full, p_partial, i, num_edges, num_left, right, MASKED: tl.constexpr):
    """Block i of a range's blocks."""
    if MASKED:
        p_edge = p_full + tl.where(i < num_left, i, right + i - num_left)
        j = tl.load(tl.where(i < num_edges, p_edge, p_partial + i - num_edges))
    else:
        j = tl.load(p_full + i)
    return j


@triton.jit
def _attend_plan(
    b_acc, b_m, b_l, b_q, b_pos_q, k, v, bias, pos_k, o_q, ranges, first_range, end_range, positions,
    full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_h, i_plan_row,
    plan_heads, plan_batch, heads, num_lists, num_ranges, group,
    score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCORES: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr, PLAN_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The ranges' blocks that need no test, or those that do, into the block's (acc, m, l)."""
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
            b_acc, b_m, b_l = attend_columns(
                b_acc, b_m, b_l, b_q, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, i_k, start, stop, lo, hi,
                (i // parts >= num_edges).to(tl.int32), score_scale, cap_scale, stride_kn, stride_vn,
                D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, MASKED,
            )  # fmt: skip
            i_next = tl.minimum((i + 1) // parts, num_blocks - 1)
            j = block_at(p_full, p_partial, i_next, num_edges, num_left, right, MASKED)
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=[
    "num_blocks", "num_long", "group", "stride_mb", "stride_mn", "stride_mh", "stride_lb", "stride_ln", "stride_lh",
    "stride_bias_b", "stride_bias_h", "plan_heads", "plan_batch", "heads", "num_lists", "num_ranges",
])  # fmt: skip
def plan_forward_kernel(
    q, k, v, acc, m, l, bias, pos_q, pos_k, blocks, ranges,
    positions, full_starts, full_blocks, partial_starts, partial_blocks,
    plan_heads, plan_batch, heads, num_lists, num_ranges, num_blocks, num_long, group, score_scale, cap_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh,
    stride_bias_b, stride_bias_h,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SCORES: tl.constexpr,
    BIAS: tl.constexpr, POSITIONS: tl.constexpr, WHOLE: tl.constexpr, PLAN_Q: tl.constexpr, PLAN_K: tl.constexpr,
):  # fmt: skip
    p_block, i_h, i_b = query_program(blocks, num_blocks, num_long, group)  # pyright: ignore[reportGeneralTypeIssues]
    if i_h >= tl.load(p_block + 6):
        return
    row0, row1, first_range, end_range = tl.load(p_block), tl.load(p_block + 1), tl.load(p_block + 2), tl.load(p_block + 4)
    i_plan_row = tl.load(p_block + 3) // PLAN_Q

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
    b_acc, b_m, b_l = _attend_plan(
        b_acc, b_m, b_l, b_q, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, first_range, end_range, positions,
        full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_h, i_plan_row,
        plan_heads, plan_batch, heads, num_lists, num_ranges, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, PLAN_K, False,
    )  # fmt: skip
    b_acc, b_m, b_l = _attend_plan(
        b_acc, b_m, b_l, b_q, b_pos_q, p_k, p_v, p_bias, pos_k, o_q, ranges, first_range, end_range, positions,
        full_starts, full_blocks, partial_starts, partial_blocks, i_b, i_h, i_plan_row,
        plan_heads, plan_batch, heads, num_lists, num_ranges, group,
        score_scale, cap_scale, stride_kn, stride_kh, stride_vn, stride_vh, stride_bias_h,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCORES, BIAS, POSITIONS, PLAN_K, True,
    )  # fmt: skip
    end_rows(
        b_acc, b_m, b_l, acc, m, l, i_b, i_h, row0, row1, stride_ab, stride_an, stride_ah,
        stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh, DV, BLOCK_Q, BLOCK_DV, WHOLE,
    )  # fmt: skip
