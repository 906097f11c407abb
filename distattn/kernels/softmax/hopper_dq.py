"""dq of softmax attention over a work list for Hopper, in Gluon: three products a step.

    a program   a block of 128 query rows and head; a step is BLOCK_K keys of its ranges, FULL ones first
    producer    q, do;  k(n), v(n) → shared memory                             TMA, STAGES steps ahead
    consumer    64 of the rows; at step n, whose s = q k(n)ᵀ is there
                dp = do v(n)ᵀ                                       issued; meanwhile p = 2^(s₂ − log₂e · lse)
                s = q k(n + 1)ᵀ                                     issued; meanwhile ds = p ∘ (dp − delta)
                dq += ds k(n)

Every row has one writer, and reruns are bitwise equal.
"""

# Gluon is a language of its own: its compiler, not Python, gives layouts, constants and calls their types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false

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

from distattn.kernels.softmax.hopper_forward import ROWS, copy_rows, steps_of, turn


@gluon.jit
def _item(blocks, num_blocks, num_long, group, PACK: gl.constexpr):
    """(block's line, first head, batch): heads of a KV group are neighbours; the groups take turns."""
    i_program, num_packs = gl.program_id(0), group // PACK
    i_block, i_group = turn(i_program // num_packs, gl.num_programs(0) // (num_blocks * num_packs), num_blocks, num_long)
    p_block = blocks + i_block * 8
    return p_block, gl.load(p_block + 5) + i_group * group + i_program % num_packs * PACK, gl.program_id(1)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, do_desc, q_s, k_s, v_s, do_s, rows_full, k_full, v_full, empty, landed,
    blocks, ranges, num_blocks, num_long, group,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    p_block, i_h, i_b = _item(blocks, num_blocks, num_long, group, PACK)
    if i_h < gl.load(p_block + 6):
        row0, full, end = gl.load(p_block), gl.load(p_block + 2), gl.load(p_block + 4)
        mbarrier.expect(rows_full, 4 * ROWS * D * 2)
        for w in gl.static_range(2):
            place = [i_b, i_h + w * (PACK - 1), row0 + w * (2 - PACK) * ROWS, 0]
            tma.async_copy_global_to_shared(q_desc, place, rows_full, q_s.index(w))
            tma.async_copy_global_to_shared(do_desc, place, rows_full, do_s.index(w))
        n, num_landed = 0, 0
        for i_range in range(full, end):
            p_range = ranges + i_range * 8
            start, stop = gl.load(p_range), gl.load(p_range + 1)
            i_kh = (i_h + gl.load(p_range + 6)) // group
            for i_k in range(start, stop, BLOCK_K):
                s = n % STAGES
                mbarrier.wait(empty.index(s), ((n // STAGES) & 1) ^ 1)
                num_rows = stop - i_k
                num_landed = copy_rows(
                    k_desc, i_b, i_kh, i_k, num_rows, k_s.index(s), k_full.index(s), landed, num_landed, D, BLOCK_K
                )
                num_landed = copy_rows(
                    v_desc, i_b, i_kh, i_k, num_rows, v_s.index(s), v_full.index(s), landed, num_landed, D, BLOCK_K
                )
                n += 1


@gluon.jit
def _step(
    b_dq, b_s, b_q, b_do, b_lse, b_delta, k_s, v_s, k_full, v_full, empty, n, is_more, o_q, i_k, stop, lo, hi, score_scale,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    # Scores of twice the keys, and the next ones beside them, are more than there are registers.
    EARLY: gl.constexpr = BLOCK_K <= ROWS
    s, t = n % STAGES, (n + 1) % STAGES
    b_k = k_s.index(s).reshape([BLOCK_K, D])
    b_next = k_s.index(t).reshape([BLOCK_K, D]).permute((1, 0))
    zero = gl.full([ROWS, BLOCK_K], 0.0, gl.float32, s_layout)
    mbarrier.wait(v_full.index(s), (n // STAGES) & 1)
    dp_token = warpgroup_mma(b_do, v_s.index(s).reshape([BLOCK_K, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    b_p = gl.exp2(b_s * score_scale - b_lse[:, None])
    if MASKED:
        o_k = i_k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, s_layout))
        diagonal = o_k[None, :] - o_q[:, None]
        b_p = gl.where((diagonal >= lo) & (diagonal <= hi) & (o_k < stop)[None, :], b_p, 0.0)
    # Here, because ptxas would move the exponentials behind the wait for dp, but not past a branch.
    mbarrier.wait(k_full.index(t), ((n + 1) // STAGES) & 1, pred=is_more)
    if EARLY:
        s_token = warpgroup_mma(b_q, b_next, zero, use_acc=False, is_async=True)
        b_dp = warpgroup_mma_wait(1, deps=[dp_token])
    else:
        b_dp = warpgroup_mma_wait(0, deps=[dp_token])
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
    dq_token = warpgroup_mma(gl.convert_layout(b_ds, p_layout), b_k, b_dq, is_async=True)
    if not EARLY:
        s_token = warpgroup_mma(b_q, b_next, zero, use_acc=False, is_async=True)
        b_dq = warpgroup_mma_wait(1, deps=[dq_token])
        mbarrier.arrive(empty.index(s), count=1)
        b_s = warpgroup_mma_wait(0, deps=[s_token])
    else:
        b_s, b_dq = warpgroup_mma_wait(0, deps=[s_token, dq_token])
        mbarrier.arrive(empty.index(s), count=1)
    return b_dq, b_s


@gluon.jit
def _consumer(
    q_s, k_s, v_s, do_s, rows_full, k_full, v_full, empty, lse, delta, dq,
    blocks, ranges, num_blocks, num_long, group, score_scale, out_scale, stride_lb, stride_lh,
    stride_dqb, stride_dqn, stride_dqh,
    WG: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_block, i_h, i_b = _item(blocks, num_blocks, num_long, group, PACK)
    if i_h < gl.load(p_block + 6):
        row0, row1 = gl.load(p_block), gl.load(p_block + 1)
        full, boundary, end = gl.load(p_block + 2), gl.load(p_block + 3), gl.load(p_block + 4)
        num_full = steps_of(ranges, full, boundary)
        num_steps = num_full + steps_of(ranges, boundary, end)
        i_h += WG * (PACK - 1)
        row0 += WG * (2 - PACK) * ROWS
        o_q = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        line = i_b.to(gl.int64) * stride_lb + i_h.to(gl.int64) * stride_lh
        b_lse = gl.load(lse + line + o_q, mask=o_q < row1, other=float("inf"))
        b_delta = gl.load(delta + line + o_q, mask=o_q < row1, other=0.0)
        b_q = q_s.index(WG).reshape([ROWS, D])
        b_do = do_s.index(WG).reshape([ROWS, D])
        b_dq = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
        mbarrier.wait(rows_full, 0)
        mbarrier.wait(k_full.index(0), 0)
        zero = gl.full([ROWS, BLOCK_K], 0.0, gl.float32, s_layout)
        b_first = k_s.index(0).reshape([BLOCK_K, D]).permute((1, 0))
        s_token = warpgroup_mma(b_q, b_first, zero, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=[s_token])
        for n in range(num_full):
            b_dq, b_s = _step(
                b_dq, b_s, b_q, b_do, b_lse, b_delta, k_s, v_s, k_full, v_full, empty, n, n + 1 < num_steps,
                o_q, 0, 0, 0, 0, score_scale, D, BLOCK_K, STAGES, s_layout, o_layout, False,
            )  # fmt: skip
        n = num_full
        for i_range in range(boundary, end):
            p_range = ranges + i_range * 8
            start, stop, lo, hi = gl.load(p_range), gl.load(p_range + 1), gl.load(p_range + 2), gl.load(p_range + 3)
            for i_k in range(start, stop, BLOCK_K):
                b_dq, b_s = _step(
                    b_dq, b_s, b_q, b_do, b_lse, b_delta, k_s, v_s, k_full, v_full, empty, n, n + 1 < num_steps,
                    o_q, i_k, stop, lo, hi, score_scale, D, BLOCK_K, STAGES, s_layout, o_layout, True,
                )  # fmt: skip
                n += 1

        o_r = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
        o_d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        m_r = (o_r < row1)[:, None]
        p_dq = dq + i_b.to(gl.int64) * stride_dqb + i_h.to(gl.int64) * stride_dqh
        p_dq = (p_dq + o_r.to(gl.int64) * stride_dqn)[:, None] + o_d[None, :]
        b_dq = b_dq * out_scale
        if not WHOLE:
            b_dq += gl.load(p_dq, mask=m_r, other=0.0)
        gl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_r)


@gluon.jit(do_not_specialize=["num_blocks", "num_long", "stride_lb", "stride_lh", "group"])
def dq_kernel(
    q_desc, k_desc, v_desc, do_desc, lse, delta, dq, blocks, ranges, num_blocks, num_long, stride_lb, stride_lh, group,
    score_scale, out_scale, stride_dqb, stride_dqn, stride_dqh,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """q, do and k, v: descriptors of [B, H, N, D] with blocks of 64 and BLOCK_K rows. lse in powers of two, +∞ for no key.

    PACK: as for the forward.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], do_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_K, D], v_desc.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    rows_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    landed = gl.allocate_shared_memory(gl.int64, [1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(rows_full, count=1)
    mbarrier.init(landed, count=1)
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
                    q_s, k_s, v_s, do_s, rows_full, k_full, v_full, empty, lse, delta, dq,
                    blocks, ranges, num_blocks, num_long, group, score_scale, out_scale, stride_lb, stride_lh,
                    stride_dqb, stride_dqn, stride_dqh, gl.constexpr(0), D, BLOCK_K, STAGES, WHOLE, PACK,
                ),
            ),
            (
                _consumer,
                (
                    q_s, k_s, v_s, do_s, rows_full, k_full, v_full, empty, lse, delta, dq,
                    blocks, ranges, num_blocks, num_long, group, score_scale, out_scale, stride_lb, stride_lh,
                    stride_dqb, stride_dqn, stride_dqh, gl.constexpr(1), D, BLOCK_K, STAGES, WHOLE, PACK,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, do_desc, q_s, k_s, v_s, do_s, rows_full, k_full, v_full, empty, landed,
                    blocks, ranges, num_blocks, num_long, group, D, BLOCK_K, STAGES, PACK,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
