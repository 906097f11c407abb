"""Transitions of the delta family, in Triton: what a piece does to a state that enters it.

    M ← e^{G_C} ⊙ M − (K ⊙ e^{G_C − G})ᵀ W M, from the identity, chunk by chunk

A program walks through one piece with some columns of M in registers, in fp32. Under a gate a state fades: a program ends where
nothing is left of its columns, which is often long before the piece does.
"""

# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from distattn.kernels.linear.triton_rows import CHUNK, GATE_NONE, GATE_VECTOR, load_tile, row_gate, store_state
from distattn.kernels.linear.triton_states import piece_program, state_of

CHECKED = tl.constexpr(4)
"""Chunks between two looks at whether anything is left."""

NOTHING = tl.constexpr(2.0**-126)
"""The least normal number of fp32: what is smaller counts as nothing."""


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "num_pieces", "num_maps"])
def transition_kernel(
    k, w, g, found, cu_seqlens, first_chunk, rows_maps, only, num_rows, num_chunks, num_pieces, num_maps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """found [B, num_maps, HV, K, K]: M of the pieces that ``rows_maps`` and ``only`` number. k and g as ``state_kernel``."""
    i_b, i_h, i_n, _, i_v = piece_program(num_pieces, HV, K, BLOCK_K)
    if tl.load(only + i_n) < 0:
        return
    o_r, o_k, o_v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    i_m = tl.load(first_chunk + i_n)
    num_steps = tl.load(first_chunk + i_n + 1) - i_m
    row0 = tl.load(cu_seqlens + i_n)
    end = tl.load(cu_seqlens + i_n + 1)
    first = i_b * num_rows + row0
    p_k = k + (first * H + i_h // (HV // H)) * K
    p_w = w + (first * HV + i_h) * K
    b_M = tl.where((o_k[:, None] == o_v[None, :]) & (o_k < K)[:, None], 1.0, 0.0)
    i_step = 0
    while i_step < num_steps:
        stop = tl.minimum(i_step + CHECKED, num_steps)
        for i_now in range(i_step, stop):
            num_valid = tl.minimum(end - row0, CHUNK)
            m_row = o_r < num_valid
            b_k = load_tile(p_k, m_row, o_r, o_k, H * K, K).to(tl.float32)
            b_w = load_tile(p_w, m_row, o_r, o_k, HV * K, K).to(tl.float32)
            b_v = -tl.dot(b_w, b_M, input_precision=PRECISION)
            if GATE == GATE_VECTOR:
                b_last = tl.load(g + ((i_b * num_chunks + i_m + i_now) * HV + i_h) * K + o_k, mask=o_k < K, other=0.0)
                b_M *= tl.exp2(b_last)[:, None]
            elif GATE != GATE_NONE:
                b_G, last = row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV, GATE)
                b_v *= tl.exp2(last - b_G)[:, None]
                b_M *= tl.exp2(last)
            b_M = tl.dot(tl.trans(b_k), b_v, b_M, input_precision=PRECISION)
            row0 += CHUNK
            p_k += CHUNK * H * K
            p_w += CHUNK * HV * K
        i_step = stop
        if GATE != GATE_NONE:  # noqa: SIM102 - one is known when compiling
            if tl.max(tl.abs(b_M)) < NOTHING:
                b_M = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
                i_step = num_steps
    p_state, kept = state_of(found, rows_maps, i_n, i_b, i_h, num_maps, HV, K, K)
    store_state(p_state, b_M, o_k, o_v, kept, K, K)
