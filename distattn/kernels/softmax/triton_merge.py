"""Two finished results of attention merged in one pass over memory, in Triton.

    m = max(lse, lse');  w = e^(lse − m);  w' = e^(lse' − m)
    out = (w out + w' out') / (w + w');  lse = m + log(w + w')

Plain torch takes ten kernels for it, which write the full-width intermediates to memory.
"""

# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_LINES = 32


@triton.jit
def merge_kernel(
    out, lse, other, other_lse,
    out_b, out_n, out_h, lse_b, lse_n, lse_h, other_b, other_n, other_h, other_lse_b, other_lse_n, other_lse_h,
    num_rows, num_heads, num_lines,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_LINES: tl.constexpr,
):  # fmt: skip
    """One program merges BLOCK_LINES (batch, row, head), heads fastest. Strides in elements; features lie side by side."""
    i_line = tl.program_id(0).to(tl.int64) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    m_line = i_line < num_lines
    i_head = i_line % num_heads
    i_row = i_line // num_heads % num_rows
    i_batch = i_line // num_heads // num_rows
    o_dim = tl.arange(0, BLOCK_WIDTH)
    m_tile = m_line[:, None] & (o_dim < WIDTH)[None, :]

    p_lse = lse + i_batch * lse_b + i_row * lse_n + i_head * lse_h
    p_other_lse = other_lse + i_batch * other_lse_b + i_row * other_lse_n + i_head * other_lse_h
    b_lse = tl.load(p_lse, mask=m_line, other=0.0)  # [BLOCK_LINES]
    b_other_lse = tl.load(p_other_lse, mask=m_line, other=0.0)
    b_max = tl.maximum(b_lse, b_other_lse)
    b_weight, b_other_weight = tl.exp(b_lse - b_max), tl.exp(b_other_lse - b_max)
    b_total = b_weight + b_other_weight

    p_out = out + (i_batch * out_b + i_row * out_n + i_head * out_h)[:, None] + o_dim[None, :]
    p_other = other + (i_batch * other_b + i_row * other_n + i_head * other_h)[:, None] + o_dim[None, :]
    b_out = tl.load(p_out, mask=m_tile, other=0.0).to(tl.float32)  # [BLOCK_LINES, BLOCK_WIDTH]
    b_other = tl.load(p_other, mask=m_tile, other=0.0).to(tl.float32)
    b_merged = b_out * (b_weight / b_total)[:, None] + b_other * (b_other_weight / b_total)[:, None]
    tl.store(p_out, b_merged.to(out.dtype.element_ty), mask=m_tile)
    tl.store(p_lse, b_max + tl.log(b_total), mask=m_line)


def merge_in_one_pass(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge (other, other_lse) into (out, lse) in place: out, other [B, n, H, Dv] in bf16, fp16 or fp32 with features side by
    side; lse, other_lse [B, n, H] in fp32, any strides. Every row of both saw a key."""
    batch, num_rows, num_heads, width = out.shape
    num_lines = batch * num_rows * num_heads
    if not num_lines:
        return
    with torch.cuda.device_of(out):
        merge_kernel[(triton.cdiv(num_lines, BLOCK_LINES),)](
            out, lse, other, other_lse,
            *out.stride()[:3], *lse.stride(), *other.stride()[:3], *other_lse.stride(), num_rows, num_heads, num_lines,
            WIDTH=width, BLOCK_WIDTH=triton.next_power_of_2(width), BLOCK_LINES=BLOCK_LINES,
        )  # fmt: skip
