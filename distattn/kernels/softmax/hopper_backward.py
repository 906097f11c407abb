"""Backward of softmax attention over a work list for Hopper, in Gluon: dq, dk and dv in one kernel, five products a step.

    a program   a block of 128 keys and KV head; a step is 64 query rows of one head of the group that see it
    producer    k, v;  q, do, lse and delta of every step → shared memory       TMA, STAGES steps ahead
    consumer    64 of the keys; at each step
                p = 2^(s₂ − log₂e · lse);  dv += p do                           s = k qᵀ was issued at the step before
                ds = p ∘ (v doᵀ − delta);  dk += ds q
                dq = dsᵀ k → shared memory                                      half of its columns, of both consumers' keys
    reducer     dq to memory, by atomic addition: a consumer's next fence would wait for that

The order in which dq is summed is not fixed. Everything else is, and has one writer.
"""

# Gluon is a language of its own: its compiler, not Python, gives layouts, constants and calls their types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

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

from distattn.kernels.softmax.hopper_forward import LOG2E, ROWS, clear_rows, steps_of, turn

CHUNK_ROWS = gl.constexpr(8)
"""Rows of dq that the reducer holds at once, in the few registers that are left to it."""


@gluon.jit
def _copy(desc, i_b, i_h, row, num_rows, tile, full, landed, num_landed, D: gl.constexpr):
    """64 rows into a tile, zeros past ``num_rows``, with one arrival at ``full``. Returns how often ``landed`` was used."""
    if num_rows >= ROWS:
        mbarrier.expect(full, ROWS * D * 2)
        tma.async_copy_global_to_shared(desc, [i_b, i_h, row, 0], full, tile)
    else:
        mbarrier.expect(landed, ROWS * D * 2)
        tma.async_copy_global_to_shared(desc, [i_b, i_h, row, 0], landed, tile)
        mbarrier.wait(landed, num_landed & 1)
        clear_rows(tile, num_rows, D, ROWS)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
        num_landed += 1
    return num_landed


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
            num_landed = _copy(
                k_desc, i_b, i_g, row0 + w * ROWS, row1 - row0 - w * ROWS, k_s.index(w), kv_full, landed, num_landed, D
            )
            num_landed = _copy(
                v_desc, i_b, i_g, row0 + w * ROWS, row1 - row0 - w * ROWS, v_s.index(w), kv_full, landed, num_landed, D
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
                num_landed = _copy(q_desc, i_b, i_h, i_q, stop - i_q, q_s.index(s), q_full.index(s), landed, num_landed, D)
                num_landed = _copy(do_desc, i_b, i_h, i_q, stop - i_q, do_s.index(s), do_full.index(s), landed, num_landed, D)
                lse_s.index(s).store(gl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E))
                delta_s.index(s).store(b_delta)
                mbarrier.arrive(q_full.index(s), count=1)
                n += 1


@gluon.jit
def _reducer(
    dq_s, dq_full, dq_empty, dq, blocks, ranges, num_blocks, num_long, group, out_scale,
    stride_dqb, stride_dqn, stride_dqh, D: gl.constexpr,
):  # fmt: skip
    """Adds every step's tile of dq to memory: consumers that did so would wait for it at their next fence."""
    half: gl.constexpr = D // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // half, half // 4], [gl.num_warps(), 1], [1, 0])
    p_block, i_g, i_b = _block(blocks, num_blocks, num_long)
    if i_g < gl.load(p_block + 6):
        full, end = gl.load(p_block + 2), gl.load(p_block + 4)
        n = 0
        o_row = gl.arange(0, CHUNK_ROWS, gl.SliceLayout(1, layout))
        o_d = gl.arange(0, half, gl.SliceLayout(0, layout))
        o_tile = o_row[:, None] * stride_dqn + o_d[None, :]
        for i_pair in range(full * group, end * group):
            i_h, start, stop = _head(ranges + (i_pair // group) * 8, i_g, i_pair % group, group)
            p_dq = dq + i_b.to(gl.int64) * stride_dqb + i_h.to(gl.int64) * stride_dqh
            for i_q in range(start, stop, ROWS):
                p_tile = p_dq + i_q.to(gl.int64) * stride_dqn + o_tile
                num_rows = stop - i_q
                mbarrier.wait(dq_full, n & 1)
                if num_rows >= ROWS:
                    for c in gl.static_range(0, 64, CHUNK_ROWS):
                        for h in gl.static_range(2):
                            b = dq_s.index(h).slice(c, CHUNK_ROWS, dim=0).load(layout)
                            gl.atomic_add(p_tile + h * half, b * out_scale, sem="relaxed")
                        p_tile += CHUNK_ROWS * stride_dqn
                else:
                    for c in gl.static_range(0, 64, CHUNK_ROWS):
                        for h in gl.static_range(2):
                            b = dq_s.index(h).slice(c, CHUNK_ROWS, dim=0).load(layout)
                            m = (c + o_row < num_rows)[:, None]
                            gl.atomic_add(p_tile + h * half, b * out_scale, mask=m, sem="relaxed")
                        p_tile += CHUNK_ROWS * stride_dqn
                mbarrier.arrive(dq_empty, count=1)
                n += 1


@gluon.jit
def _step(
    b_dk, b_dv, b_s, b_k, b_v, k_s, q_s, do_s, lse_s, delta_s, ds_s, q_full, do_full, empty, ds_full, n, is_more,
    dq_s, dq_full, dq_empty, o_k, i_q, stop, row1, lo, hi, score_scale,
    WG: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
    dq_layout: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s = n % STAGES
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
    ds_mine, ds_other = ds_s.index(n % 2 * 2 + WG), ds_s.index(n % 2 * 2 + 1 - WG)
    ds_mine.store(b_ds)
    fence_async_shared()
    mbarrier.arrive(ds_full, count=1)
    dk_token = warpgroup_mma(gl.convert_layout(b_ds, p_layout), b_q, b_dk, is_async=True)
    b_dv = warpgroup_mma_wait(1, deps=[dv_token])
    half: gl.constexpr = D // 2
    zero_dq = gl.full([ROWS, half], 0.0, gl.float32, dq_layout)
    mine = k_s.index(WG).reshape([ROWS, D]).slice(WG * half, half, dim=1)
    other = k_s.index(1 - WG).reshape([ROWS, D]).slice(WG * half, half, dim=1)
    dq_token = warpgroup_mma(ds_mine.permute((1, 0)), mine, zero_dq, use_acc=False, is_async=True)
    mbarrier.wait(ds_full, n & 1)
    dq_token = warpgroup_mma(ds_other.permute((1, 0)), other, dq_token, is_async=True)
    # The next scores run while dq goes out.
    t = (n + 1) % STAGES
    mbarrier.wait(q_full.index(t), ((n + 1) // STAGES) & 1, pred=is_more)
    zero_s = gl.full([ROWS, ROWS], 0.0, gl.float32, s_layout)
    s_token = warpgroup_mma(b_k, q_s.index(t).reshape([ROWS, D]).permute((1, 0)), zero_s, use_acc=False, is_async=True)
    b_dk, b_dq = warpgroup_mma_wait(1, deps=[dk_token, dq_token])
    mbarrier.arrive(empty.index(s), count=1)
    mbarrier.wait(dq_empty, (n & 1) ^ 1)
    dq_s.index(WG).store(b_dq)
    mbarrier.arrive(dq_full, count=1)
    b_s = warpgroup_mma_wait(0, deps=[s_token])
    return b_dk, b_dv, b_s


@gluon.jit
def _consumer(
    q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, kv_full, q_full, do_full, empty, ds_full, dq_s, dq_full, dq_empty,
    dk, dv, blocks, ranges, num_blocks, num_long, group, score_scale, out_scale,
    stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    WG: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
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
                b_dk, b_dv, b_s, b_k, b_v, k_s, q_s, do_s, lse_s, delta_s, ds_s, q_full, do_full, empty,
                ds_full, n, n + 1 < num_steps, dq_s, dq_full, dq_empty, o_k, 0, 0, row1, 0, 0, score_scale,
                WG, D, STAGES, s_layout, o_layout, dq_layout, False,
            )  # fmt: skip
        n = num_full
        for i_pair in range(boundary * group, end * group):
            p_range = ranges + (i_pair // group) * 8
            _, start, stop = _head(p_range, i_g, i_pair % group, group)
            for i_q in range(start, stop, ROWS):
                b_dk, b_dv, b_s = _step(
                    b_dk, b_dv, b_s, b_k, b_v, k_s, q_s, do_s, lse_s, delta_s, ds_s, q_full, do_full, empty,
                    ds_full, n, n + 1 < num_steps, dq_s, dq_full, dq_empty, o_k, i_q, stop, row1,
                    gl.load(p_range + 2), gl.load(p_range + 3), score_scale,
                    WG, D, STAGES, s_layout, o_layout, dq_layout, True,
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
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, lse, delta, dq, dk, dv, blocks, ranges, num_blocks, num_long, stride_lb, stride_lh, group,
    score_scale, out_scale,
    stride_dqb, stride_dqn, stride_dqh, stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
    D: gl.constexpr, STAGES: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], do_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], v_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    ds_s = gl.allocate_shared_memory(dtype, [4, ROWS, ROWS], ds_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    dq_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, D // 16, [1, 0])
    dq_s = gl.allocate_shared_memory(gl.float32, [2, ROWS, D // 2], dq_layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    landed = gl.allocate_shared_memory(gl.int64, [1], bar)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    mbarrier.init(kv_full, count=4)
    mbarrier.init(landed, count=1)
    mbarrier.init(ds_full, count=2)
    dq_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    dq_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(dq_full, count=2)
    mbarrier.init(dq_empty, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, kv_full, q_full, do_full, empty, ds_full,
                    dq_s, dq_full, dq_empty, dk, dv, blocks, ranges, num_blocks, num_long, group, score_scale, out_scale,
                    stride_dkb, stride_dkn, stride_dkh, stride_dvb, stride_dvn, stride_dvh,
                    gl.constexpr(0), D, STAGES, WHOLE,
                ),
            ),
            (
                _consumer,
                (
                    q_s, k_s, v_s, do_s, lse_s, delta_s, ds_s, kv_full, q_full, do_full, empty, ds_full,
                    dq_s, dq_full, dq_empty, dk, dv, blocks, ranges, num_blocks, num_long, group, score_scale, out_scale,
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
            (
                _reducer,
                (
                    dq_s, dq_full, dq_empty, dq, blocks, ranges, num_blocks, num_long, group, out_scale,
                    stride_dqb, stride_dqn, stride_dqh, D,
                ),
            ),
        ],
        [4, 1, 2],
        [240, 24, 24],
    )  # fmt: skip
