"""dk and dv of softmax attention over a work list for Hopper, in Gluon: four products a step.

    a program   a block of 128 keys and KV head; a step is 64 query rows of one head of the group that see it
    producer    k, v;  q, do, lse and delta of every step → shared memory       TMA, STAGES steps ahead
    consumer    64 of the keys; at each step, whose s = k qᵀ is there
                dp = v doᵀ                                          issued; meanwhile p = 2^(s₂ − log₂e · lse)
                dv += p do                                          issued; meanwhile ds = p ∘ (dp − delta)
                dk += ds q;  s = k qᵀ of the next step

Scores are kᵀ-major, so that p and ds are operands in registers. Every row has one writer, and reruns are bitwise equal.
"""

# Gluon is a language of its own: its compiler, not Python, gives layouts, constants and calls their types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distattn.kernels.softmax.hopper_forward import ROWS, copy_rows, steps_of, turn


@gluon.jit
def _head(p_range, i_g, i_member, group):
    """(query head, first row, end): the group member's, and the range's rows, or none if it has no such head."""
    i_h = i_g * group - gl.load(p_range + 6) + i_member
    start, stop = gl.load(p_range), gl.load(p_range + 1)
    inside = (i_h >= gl.load(p_range + 4)) & (i_h < gl.load(p_range + 5))
    return i_h, start, gl.where(inside, stop, start)


@gluon.jit
def _block(blocks, num_blocks, num_long):
    """(block's line, KV head, batch). Blocks of one KV head run together, so that their query rows are found in L2."""
    i_block, i_head = turn(gl.program_id(0), gl.num_programs(0) // num_blocks, num_blocks, num_long)
    p_block = blocks + i_block * 8
    return p_block, gl.load(p_block + 5) + i_head, gl.program_id(1)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, do_desc, lse, delta, q_s, k_s, v_s, do_s, lse_s, delta_s,
    kv_full, q_full, do_full, empty, landed,
    blocks, ranges, num_blocks, num_long, stride_lb, stride_lh, group, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    p_block, i_g, i_b = _block(blocks, num_blocks, num_long)
    if i_g < gl.load(p_block + 6):
        row0, row1 = gl.load(p_block), gl.load(p_block + 1)
        full, end = gl.load(p_block + 2), gl.load(p_block + 4)
        num_landed = 0
        line: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
        p_lse, p_delta = lse + i_b.to(gl.int64) * stride_lb, delta + i_b.to(gl.int64) * stride_lb
        for w in gl.static_range(2):
            num_landed = copy_rows(
                k_desc, i_b, i_g, row0 + w * ROWS, row1 - row0 - w * ROWS, k_s.index(w), kv_full, landed, num_landed, D, ROWS
            )
            num_landed = copy_rows(
                v_desc, i_b, i_g, row0 + w * ROWS, row1 - row0 - w * ROWS, v_s.index(w), kv_full, landed, num_landed, D, ROWS
            )
        n = 0
        for i_pair in range(full * group, end * group):
            i_h, start, stop = _head(ranges + (i_pair // group) * 8, i_g, i_pair % group, group)
            for i_q in range(start, stop, ROWS):
                s = n % STAGES
                free = ((n // STAGES) & 1) ^ 1
                mbarrier.wait(empty.index(s), free)
                o_q = i_q + gl.arange(0, ROWS, line)
                b_lse = gl.load(p_lse + i_h * stride_lh + o_q, mask=o_q < stop, other=float("inf"))
                b_delta = gl.load(p_delta + i_h * stride_lh + o_q, mask=o_q < stop, other=0.0)
                num_landed = copy_rows(
                    q_desc, i_b, i_h, i_q, stop - i_q, q_s.index(s), q_full.index(s), landed, num_landed, D, ROWS
                )
                num_landed = copy_rows(
                    do_desc, i_b, i_h, i_q, stop - i_q, do_s.index(s), do_full.index(s), landed, num_landed, D, ROWS
                )
                lse_s.index(s).store(b_lse)
                delta_s.index(s).store(b_delta)
                mbarrier.arrive(q_full.index(s), count=1)
                n += 1


@gluon.jit
def _step(
    b_dk, b_dv, b_s, b_k, b_v, q_s, do_s, lse_s, delta_s, q_full, do_full, empty, n, is_more,
    o_k, i_q, stop, row1, lo, hi, score_scale,
    D: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s, t = n % STAGES, (n + 1) % STAGES
    b_q = q_s.index(s).reshape([ROWS, D])
    b_do = do_s.index(s).reshape([ROWS, D])
    mbarrier.wait(do_full.index(s), (n // STAGES) & 1)
    zero = gl.full([ROWS, ROWS], 0.0, gl.float32, s_layout)
    dp_token = warpgroup_mma(b_v, b_do.permute((1, 0)), zero, use_acc=False, is_async=True)
    b_lse = lse_s.index(s).load(gl.SliceLayout(0, s_layout))
    b_p = gl.exp2(b_s * score_scale - b_lse[None, :])
    if MASKED:
        o_q = i_q + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
        diagonal = o_q[None, :] - o_k[:, None]
        seen = (diagonal >= lo) & (diagonal <= hi) & (o_q < stop)[None, :] & (o_k < row1)[:, None]
        b_p = gl.where(seen, b_p, 0.0)
    dv_token = warpgroup_mma(gl.convert_layout(b_p.to(b_q.dtype), p_layout), b_do, b_dv, is_async=True)
    b_delta = delta_s.index(s).load(gl.SliceLayout(0, s_layout))
    b_dp = warpgroup_mma_wait(1, deps=[dp_token])
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    dk_token = warpgroup_mma(gl.convert_layout(b_ds, p_layout), b_q, b_dk, is_async=True)
    mbarrier.wait(q_full.index(t), ((n + 1) // STAGES) & 1, pred=is_more)
    b_next = q_s.index(t).reshape([ROWS, D]).permute((1, 0))
    s_token = warpgroup_mma(b_k, b_next, zero, use_acc=False, is_async=True)
    b_dv, b_dk = warpgroup_mma_wait(1, deps=[dv_token, dk_token])
    mbarrier.arrive(empty.index(s), count=1)
    b_s = warpgroup_mma_wait(0, deps=[s_token])
    return b_dk, b_dv, b_s


@gluon.jit
def _consumer(
    q_s, k_s, v_s, do_s, lse_s, delta_s, kv_full, q_full, do_full, empty, dk, dv,
    blocks, ranges, num_blocks, num_long, group, score_scale, out_scale,
    stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    WG: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_block, i_g, i_b = _block(blocks, num_blocks, num_long)
    if i_g < gl.load(p_block + 6):
        row0, row1 = gl.load(p_block), gl.load(p_block + 1)
        full, boundary, end = gl.load(p_block + 2), gl.load(p_block + 3), gl.load(p_block + 4)
        num_full = steps_of(ranges, full, boundary)
        num_steps = num_full + steps_of(ranges, boundary, end)
        if row1 - row0 < 2 * ROWS:
            # Rows that a short block does not have are left to the mask.
            boundary = full
            num_full = 0
        o_k = row0 + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        b_k = k_s.index(WG).reshape([ROWS, D])
        b_v = v_s.index(WG).reshape([ROWS, D])
        b_dk = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
        b_dv = gl.full([ROWS, D], 0.0, gl.float32, o_layout)
        n = 0
        mbarrier.wait(kv_full, 0)
        mbarrier.wait(q_full.index(0), 0)
        zero_s = gl.full([ROWS, ROWS], 0.0, gl.float32, s_layout)
        s_token = warpgroup_mma(b_k, q_s.index(0).reshape([ROWS, D]).permute((1, 0)), zero_s, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=[s_token])
        for n in range(num_full):
            b_dk, b_dv, b_s = _step(
                b_dk, b_dv, b_s, b_k, b_v, q_s, do_s, lse_s, delta_s, q_full, do_full, empty, n, n + 1 < num_steps,
                o_k, 0, 0, row1, 0, 0, score_scale, D, STAGES, s_layout, o_layout, False,
            )  # fmt: skip
        n = num_full
        for i_pair in range(boundary * group, end * group):
            p_range = ranges + (i_pair // group) * 8
            _, start, stop = _head(p_range, i_g, i_pair % group, group)
            for i_q in range(start, stop, ROWS):
                b_dk, b_dv, b_s = _step(
                    b_dk, b_dv, b_s, b_k, b_v, q_s, do_s, lse_s, delta_s, q_full, do_full, empty, n, n + 1 < num_steps,
                    o_k, i_q, stop, row1, gl.load(p_range + 2), gl.load(p_range + 3), score_scale,
                    D, STAGES, s_layout, o_layout, True,
                )  # fmt: skip
                n += 1

        o_r = row0 + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
        o_d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        m_r = (o_r < row1)[:, None]
        p_dk = dk + i_b.to(gl.int64) * stride_dkb + i_g.to(gl.int64) * stride_dkh
        p_dk = (p_dk + o_r.to(gl.int64) * stride_dkn)[:, None] + o_d[None, :]
        p_dv = dv + i_b.to(gl.int64) * stride_dvb + i_g.to(gl.int64) * stride_dvh
        p_dv = (p_dv + o_r.to(gl.int64) * stride_dvn)[:, None] + o_d[None, :]
        b_dk = b_dk * out_scale
        if not WHOLE:
            b_dk += gl.load(p_dk, mask=m_r, other=0.0)
            b_dv += gl.load(p_dv, mask=m_r, other=0.0)
        gl.store(p_dk, b_dk.to(dk.dtype.element_ty), mask=m_r)
        gl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_r)


@gluon.jit(do_not_specialize=["num_blocks", "num_long", "stride_lb", "stride_lh", "group"])
def dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, lse, delta, dk, dv, blocks, ranges, num_blocks, num_long, stride_lb, stride_lh, group,
    score_scale, out_scale, stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """q, k, v, do: descriptors of [B, H, N, D] with blocks of 64 rows. lse in powers of two, +∞ for rows that see no key."""
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], do_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], v_desc.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    landed = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(kv_full, count=4)
    mbarrier.init(landed, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_s, k_s, v_s, do_s, lse_s, delta_s, kv_full, q_full, do_full, empty, dk, dv,
                    blocks, ranges, num_blocks, num_long, group, score_scale, out_scale,
                    stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
                    gl.constexpr(0), D, STAGES, WHOLE,
                ),
            ),
            (
                _consumer,
                (
                    q_s, k_s, v_s, do_s, lse_s, delta_s, kv_full, q_full, do_full, empty, dk, dv,
                    blocks, ranges, num_blocks, num_long, group, score_scale, out_scale,
                    stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
                    gl.constexpr(1), D, STAGES, WHOLE,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, do_desc, lse, delta, q_s, k_s, v_s, do_s, lse_s, delta_s,
                    kv_full, q_full, do_full, empty, landed,
                    blocks, ranges, num_blocks, num_long, stride_lb, stride_lh, group, D, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
