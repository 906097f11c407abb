"""Forward of softmax attention over a work list for Hopper, in Gluon: a producer warp and two consumer warpgroups.

    producer    for each block of 128 query rows and head, for each step of BLOCK_K keys in its ranges, boundary ranges first:
                    q, k(n), v(n) → shared memory                       TMA, STAGES steps ahead
    consumer    64 of the rows; at step n
                    s = q k(n)ᵀ                                         issued
                    acc += p(n − 1) v(n − 1)                            issued; meanwhile, as soon as s is there,
                    m' = max(m, rowmax s₂);  α = 2^(m − m');  p(n) = 2^(s₂ − m');  l = α l + Σ p(n)
                    acc ← α acc                                         once the product is there

The consumers take turns in issuing products, so that one's softmax runs beside the other's products. The work lists, the
carry and what is computed are those of ``triton_forward``: every row has one writer, and reruns are bitwise equal.
"""

# Gluon is a language of its own: its compiler, not Python, gives layouts, constants and calls their types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)
"""Query rows of a consumer warpgroup: those of one wgmma instruction."""


@gluon.jit
def clear_rows(tile, num_rows, D: gl.constexpr, NUM_ROWS: gl.constexpr):
    """Zeros into rows ``num_rows`` … of a tile [1, 1, NUM_ROWS, D], by one warp: whatever lies there, and 0 · NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    rows = tile.reshape([NUM_ROWS, D])
    for i_row in gl.static_range(0, NUM_ROWS, 8):
        if i_row + 8 > num_rows:
            part = rows.slice(i_row, 8, dim=0)
            b_part = part.load(layout)
            o_row = i_row + gl.arange(0, 8, gl.SliceLayout(1, layout))
            part.store(gl.where((o_row < num_rows)[:, None], b_part, gl.zeros_like(b_part)))


@gluon.jit
def copy_rows(desc, i_b, i_h, row, num_rows, tile, full, landed, num_landed, D: gl.constexpr, NUM_ROWS: gl.constexpr):
    """Rows into a tile, zeros past ``num_rows``, with one arrival at ``full``. Returns how often ``landed`` was used."""
    if num_rows >= NUM_ROWS:
        mbarrier.expect(full, NUM_ROWS * D * 2)
        tma.async_copy_global_to_shared(desc, [i_b, i_h, row, 0], full, tile)
    else:
        mbarrier.expect(landed, NUM_ROWS * D * 2)
        tma.async_copy_global_to_shared(desc, [i_b, i_h, row, 0], landed, tile)
        mbarrier.wait(landed, num_landed & 1)
        clear_rows(tile, num_rows, D, NUM_ROWS)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
        num_landed += 1
    return num_landed


@gluon.jit
def steps_of(ranges, first, end):
    """Steps of the ranges [first, end) of one block and kind."""
    return gl.where(first < end, gl.load(ranges + first * 8 + 7), 0)


@gluon.jit
def turn(i, num_heads, num_blocks, num_long):
    """(block, head) of turn i: the long blocks first, each for all heads; then all others, head by head."""
    num_first = num_long * num_heads
    num_rest = gl.maximum(num_blocks - num_long, 1)
    is_long = i < num_first
    i_block = gl.where(is_long, i // num_heads, num_long + (i - num_first) % num_rest)
    i_head = gl.where(is_long, i % num_heads, (i - num_first) // num_rest)
    return i_block, i_head


@gluon.jit
def _item(blocks, i_wave, num_items, num_blocks, num_long, num_chunks, group, PACK: gl.constexpr):
    """(block's line, first head, batch, whether there is work) of this program's turn.

    Heads of one KV group are neighbours; the groups of all batches take turns. Every other wave runs backwards, as blocks fall
    in cost.
    """
    size, i_program = gl.num_programs(0), gl.program_id(0)
    i_item = i_wave * size + gl.where(i_wave % 2 == 0, i_program, size - 1 - i_program)
    inside = i_item < num_items
    i_item = gl.where(inside, i_item, 0)
    num_packs = group // PACK
    i_block, i_group = turn(i_item // num_packs, num_items // (num_blocks * num_packs), num_blocks, num_long)
    p_block = blocks + i_block * 8
    i_h = gl.load(p_block + 5) + (i_group % num_chunks) * group + i_item % num_packs * PACK
    return p_block, i_h, i_group // num_chunks, inside & (i_h < gl.load(p_block + 6))


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_empty, k_full, v_full, empty, landed,
    blocks, ranges, num_items, num_blocks, num_long, num_chunks, group,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    n, num_q, num_landed = 0, 0, 0
    for i_wave in range(gl.cdiv(num_items, gl.num_programs(0))):
        p_block, i_h, i_b, is_work = _item(blocks, i_wave, num_items, num_blocks, num_long, num_chunks, group, PACK)
        if is_work:
            row0 = gl.load(p_block)
            full, boundary, end = gl.load(p_block + 2), gl.load(p_block + 3), gl.load(p_block + 4)
            mbarrier.wait(q_empty, (num_q & 1) ^ 1)
            mbarrier.expect(q_full, 2 * ROWS * D * 2)
            for w in gl.static_range(2):
                place = [i_b, i_h + w * (PACK - 1), row0 + w * (2 - PACK) * ROWS, 0]
                tma.async_copy_global_to_shared(q_desc, place, q_full, q_s.index(w))
            num_q += 1
            num_boundary = end - boundary
            for i in range(end - full):
                p_range = ranges + gl.where(i < num_boundary, boundary + i, full + i - num_boundary) * 8
                start, stop = gl.load(p_range), gl.load(p_range + 1)
                i_kh = (i_h + gl.load(p_range + 6)) // group
                for i_k in range(start, stop, BLOCK_K):
                    s = n % STAGES
                    mbarrier.wait(empty.index(s), ((n // STAGES) & 1) ^ 1)
                    mbarrier.expect(k_full.index(s), BLOCK_K * D * 2)
                    tma.async_copy_global_to_shared(k_desc, [i_b, i_kh, i_k, 0], k_full.index(s), k_s.index(s))
                    # Values are used a step later than keys, so that the step after that one frees their buffer.
                    mbarrier.wait(empty.index((n + 1) % STAGES), (((n + 1) // STAGES) & 1) ^ 1)
                    if i_k + BLOCK_K <= stop:
                        mbarrier.expect(v_full.index(s), BLOCK_K * D * 2)
                        tma.async_copy_global_to_shared(v_desc, [i_b, i_kh, i_k, 0], v_full.index(s), v_s.index(s))
                    else:
                        mbarrier.expect(landed, BLOCK_K * D * 2)
                        tma.async_copy_global_to_shared(v_desc, [i_b, i_kh, i_k, 0], landed, v_s.index(s))
                        mbarrier.wait(landed, num_landed & 1)
                        num_landed += 1
                        clear_rows(v_s.index(s), stop - i_k, D, BLOCK_K)
                        fence_async_shared()
                        mbarrier.arrive(v_full.index(s), count=1)
                    n += 1


@gluon.jit
def _masked(b_s, o_q, i_k, stop, lo, hi, BLOCK_K: gl.constexpr, layout: gl.constexpr):
    o_k = i_k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
    diagonal = o_k[None, :] - o_q[:, None]
    return gl.where((diagonal >= lo) & (diagonal <= hi) & (o_k < stop)[None, :], b_s, float("-inf"))


@gluon.jit
def _softmax(b_s, b_m, b_l, score_scale, MASKED: gl.constexpr):
    """(p, α, m', l')"""
    b_m_new = gl.maximum(b_m, gl.max(b_s, 1) * score_scale)
    if MASKED:
        # A row that has seen no key yet: 0 instead of −∞, so that −∞ − (−∞) is not formed.
        b_base = gl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    else:
        b_base = b_m_new
    b_p = gl.exp2(b_s * score_scale - b_base[:, None])
    b_alpha = gl.exp2(b_m - b_base)
    return b_p, b_alpha, b_m_new, b_l * b_alpha + gl.sum(b_p, 1)


@gluon.jit
def _step(
    b_acc, b_m, b_l, b_p, b_q, k_s, v_s, k_full, v_full, empty, my_turn, other_turn, n, is_more,
    o_q, i_k, stop, lo, hi, score_scale,
    WG: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Step n, whose keys have been waited for, into (acc, m, l); p comes in from the step before and goes out for the next."""
    s, s_v = n % STAGES, (n - 1) % STAGES
    mbarrier.wait(my_turn, (n & 1) ^ (1 - WG))
    b_k = k_s.index(s).reshape([BLOCK_K, D]).permute((1, 0))
    b_s = gl.full([ROWS, BLOCK_K], 0.0, gl.float32, s_layout)
    s_token = warpgroup_mma(b_q, b_k, b_s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(s_v), ((n - 1) // STAGES) & 1)
    b_v = v_s.index(s_v).reshape([BLOCK_K, D])
    acc_token = warpgroup_mma(b_p, b_v, b_acc, is_async=True)
    mbarrier.arrive(other_turn, count=1)
    b_s = warpgroup_mma_wait(1, deps=[s_token])
    if MASKED:
        b_s = _masked(b_s, o_q, i_k, stop, lo, hi, BLOCK_K, s_layout)
    b_new, b_alpha, b_m, b_l = _softmax(b_s, b_m, b_l, score_scale, MASKED)
    # Here, because ptxas would move the softmax behind the wait for the product beside it, but not past a branch.
    mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=is_more)
    b_acc = warpgroup_mma_wait(0, deps=[acc_token])
    mbarrier.arrive(empty.index(s), count=1)
    b_acc = b_acc * gl.convert_layout(b_alpha, gl.SliceLayout(1, o_layout))[:, None]
    return b_acc, b_m, b_l, gl.convert_layout(b_new.to(b_v.dtype), gl.DotOperandLayout(0, o_layout, 2))


@gluon.jit
def _consumer(
    q_s, k_s, v_s, q_full, q_empty, k_full, v_full, empty, my_turn, other_turn,
    acc, m, l, blocks, ranges, num_items, num_blocks, num_long, num_chunks, group, score_scale,
    stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh,
    WG: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    n, num_q = 0, 0
    for i_wave in range(gl.cdiv(num_items, gl.num_programs(0))):
        p_block, i_h, i_b, is_work = _item(blocks, i_wave, num_items, num_blocks, num_long, num_chunks, group, PACK)
        if is_work:
            row0, row1 = gl.load(p_block), gl.load(p_block + 1)
            full, boundary, end = gl.load(p_block + 2), gl.load(p_block + 3), gl.load(p_block + 4)
            num_steps = steps_of(ranges, full, boundary) + steps_of(ranges, boundary, end)
            i_head, i_batch = (i_h + WG * (PACK - 1)).to(gl.int64), i_b.to(gl.int64)
            row0 += WG * (2 - PACK) * ROWS
            o_q = row0 + gl.arange(0, ROWS, s_rows)
            m_q = o_q < row1
            p_m = m + i_batch * stride_mb + i_head * stride_mh + o_q.to(gl.int64) * stride_mn
            p_l = l + i_batch * stride_lb + i_head * stride_lh + o_q.to(gl.int64) * stride_ln
            o_row = row0 + gl.arange(0, ROWS, o_rows)
            o_d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
            p_acc = acc + i_batch * stride_ab + i_head * stride_ah + o_row.to(gl.int64) * stride_an
            p_acc = p_acc[:, None] + o_d[None, :]
            m_acc = (o_row < row1)[:, None]
            if WHOLE:
                b_m = gl.full([ROWS], float("-inf"), gl.float32, s_rows)
                b_l = gl.full([ROWS], 0.0, gl.float32, s_rows)
                b_acc = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
            else:
                b_m = gl.load(p_m, mask=m_q, other=0.0) * LOG2E
                b_l = gl.load(p_l, mask=m_q, other=0.0)
                b_acc = gl.load(p_acc, mask=m_acc, other=0.0)

            # First step: of the boundary ranges if there are any; its mask holds for FULL ranges, too.
            p_range = ranges + gl.where(boundary < end, boundary, full) * 8
            start, stop, lo, hi = gl.load(p_range), gl.load(p_range + 1), gl.load(p_range + 2), gl.load(p_range + 3)
            b_q = q_s.index(WG).reshape([ROWS, D])
            mbarrier.wait(q_full, num_q & 1)
            s = n % STAGES
            mbarrier.wait(k_full.index(s), (n // STAGES) & 1)
            mbarrier.wait(my_turn, (n & 1) ^ (1 - WG))
            b_k = k_s.index(s).reshape([BLOCK_K, D]).permute((1, 0))
            b_s = gl.full([ROWS, BLOCK_K], 0.0, gl.float32, s_layout)
            s_token = warpgroup_mma(b_q, b_k, b_s, use_acc=False, is_async=True)
            mbarrier.arrive(other_turn, count=1)
            b_s = warpgroup_mma_wait(0, deps=[s_token])
            mbarrier.arrive(empty.index(s), count=1)
            b_s = _masked(b_s, o_q, start, stop, lo, hi, BLOCK_K, s_layout)
            b_new, b_alpha, b_m, b_l = _softmax(b_s, b_m, b_l, score_scale, True)
            b_acc = b_acc * gl.convert_layout(b_alpha, o_rows)[:, None]
            b_p = gl.convert_layout(b_new.to(k_s.dtype), gl.DotOperandLayout(0, o_layout, 2))
            n += 1
            mbarrier.wait(k_full.index(n % STAGES), (n // STAGES) & 1, pred=num_steps > 1)

            i_step = 1
            for i_range in range(boundary, end):
                p_range = ranges + i_range * 8
                start, stop, lo, hi = gl.load(p_range), gl.load(p_range + 1), gl.load(p_range + 2), gl.load(p_range + 3)
                start = gl.where(i_range == boundary, start + BLOCK_K, start)
                for i_k in range(start, stop, BLOCK_K):
                    b_acc, b_m, b_l, b_p = _step(
                        b_acc, b_m, b_l, b_p, b_q, k_s, v_s, k_full, v_full, empty, my_turn, other_turn,
                        n, i_step + 1 < num_steps, o_q, i_k, stop, lo, hi, score_scale,
                        WG, D, BLOCK_K, STAGES, s_layout, o_layout, True,
                    )  # fmt: skip
                    n += 1
                    i_step += 1
            for i_full in range(i_step, num_steps):
                b_acc, b_m, b_l, b_p = _step(
                    b_acc, b_m, b_l, b_p, b_q, k_s, v_s, k_full, v_full, empty, my_turn, other_turn,
                    n, i_full + 1 < num_steps, o_q, 0, 0, 0, 0, score_scale,
                    WG, D, BLOCK_K, STAGES, s_layout, o_layout, False,
                )  # fmt: skip
                n += 1
            mbarrier.arrive(q_empty, count=1)
            num_q += 1
            s = (n - 1) % STAGES
            mbarrier.wait(v_full.index(s), ((n - 1) // STAGES) & 1)
            acc_token = warpgroup_mma(b_p, v_s.index(s).reshape([BLOCK_K, D]), b_acc, is_async=True)
            b_acc = warpgroup_mma_wait(0, deps=[acc_token])

            if WHOLE:
                b_scale = gl.where(b_l > 0.0, 1.0 / b_l, 0.0)
                b_out = b_acc * gl.convert_layout(b_scale, o_rows)[:, None]
                gl.store(p_acc, b_out.to(acc.dtype.element_ty), mask=m_acc)
                gl.store(p_m, (b_m + gl.log2(b_l)) * LN2, mask=m_q)
            else:
                gl.store(p_acc, b_acc, mask=m_acc)
                gl.store(p_m, b_m * LN2, mask=m_q)
                gl.store(p_l, b_l, mask=m_q)


@gluon.jit(do_not_specialize=[
    "num_items", "num_blocks", "num_long", "num_chunks", "group",
    "stride_mb", "stride_mn", "stride_mh", "stride_lb", "stride_ln", "stride_lh",
])  # fmt: skip
def forward_kernel(
    q_desc, k_desc, v_desc, acc, m, l, blocks, ranges, num_items, num_blocks, num_long, num_chunks, group, score_scale,
    stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """q, k, v: descriptors of [B, H, N, D] with blocks of 64, BLOCK_K and BLOCK_K rows. WHOLE: acc and m take out and LSE.

    PACK 1: a program takes up to 128 rows of one head; 2: up to 64 rows of two heads that see the same keys of one KV head.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], v_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    landed = gl.allocate_shared_memory(gl.int64, [1], bar)
    turn_0 = gl.allocate_shared_memory(gl.int64, [1], bar)
    turn_1 = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(landed, count=1)
    mbarrier.init(turn_0, count=1)
    mbarrier.init(turn_1, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_s, k_s, v_s, q_full, q_empty, k_full, v_full, empty, turn_0, turn_1,
                    acc, m, l, blocks, ranges, num_items, num_blocks, num_long, num_chunks, group, score_scale,
                    stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh,
                    gl.constexpr(0), D, BLOCK_K, STAGES, WHOLE, PACK,
                ),
            ),
            (
                _consumer,
                (
                    q_s, k_s, v_s, q_full, q_empty, k_full, v_full, empty, turn_1, turn_0,
                    acc, m, l, blocks, ranges, num_items, num_blocks, num_long, num_chunks, group, score_scale,
                    stride_ab, stride_an, stride_ah, stride_mb, stride_mn, stride_mh, stride_lb, stride_ln, stride_lh,
                    gl.constexpr(1), D, BLOCK_K, STAGES, WHOLE, PACK,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, q_s, k_s, v_s, q_full, q_empty, k_full, v_full, empty, landed,
                    blocks, ranges, num_items, num_blocks, num_long, num_chunks, group, D, BLOCK_K, STAGES, PACK,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
