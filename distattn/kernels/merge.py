"""Merging partial results of attention, right also where either side, or both, saw no key.

A carry ``(acc, m, l)`` stands for ``out = acc / l`` and ``lse = m + log l``; a partial ``(out, lse)`` of a kernel is the
carry ``(out, lse, 1)``. Merging rescales both sides to the larger of the two maxima:

    M = max(m_a, m_b);  acc = e^(m_a − M) acc_a + e^(m_b − M) acc_b;  l likewise;  m = M

A row that saw nothing has m = −inf, acc = 0 and l = 0. Its weight e^(−inf − M) is 0 for any finite M, so the only care
needed is M = −inf, where −inf − (−inf) would be NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distattn.kernels.protocol import Carry
from distattn.kernels.triton_here import TRITON_DTYPES, why_no_triton

NEGATIVE_INFINITY = float("-inf")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of carries, LSE and gradients of inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_carry(batch: int, rows: int, heads: int, value_dim: int, *, dtype: torch.dtype, device: torch.device | str) -> Carry:
    """A carry whose rows have seen nothing: acc [batch, rows, heads, value_dim], m and l [batch, rows, heads].

    dtype: that of the inputs; the carry is fp32, or fp64 for fp64 inputs.
    """
    dtype = accumulation_dtype(dtype)
    acc = torch.zeros(batch, rows, heads, value_dim, dtype=dtype, device=device)
    m = torch.full((batch, rows, heads), NEGATIVE_INFINITY, dtype=dtype, device=device)
    return Carry(acc, m, torch.zeros_like(m))


def merge_partial(carry: Carry, out: Tensor, lse: Tensor, *, fresh: bool = False, all_seen: bool = False) -> None:
    """Merge a partial result into a carry, or into views of one, in place.

    carry: acc [..., Dv]; m, l [...]. out [..., Dv] of any floating dtype, lse [...]; any strides. Where lse is −inf or
    +inf (as FlashAttention 2 marks it) the row saw no key and ``out`` is ignored, whatever it holds.

    fresh: the carry's rows are known to have seen nothing; they are overwritten and not read.
    all_seen: every row of the partial saw a key, so that the pass that guards against garbage is left out.
    """
    if not all_seen:
        empty = torch.isinf(lse)
        lse = lse.masked_fill(empty, NEGATIVE_INFINITY)
        out = out.masked_fill(empty.unsqueeze(-1), 0)
    if fresh:
        carry.acc.copy_(out)
        carry.m.copy_(lse)
        carry.l.copy_(lse != NEGATIVE_INFINITY)
        return
    m = torch.maximum(carry.m, lse)
    base = m if all_seen else m.masked_fill(m == NEGATIVE_INFINITY, 0)
    weight_carry, weight = torch.exp(carry.m - base), torch.exp(lse - base)
    carry.acc.mul_(weight_carry.unsqueeze(-1)).addcmul_(weight.unsqueeze(-1), out)
    carry.l.mul_(weight_carry).add_(weight)
    carry.m.copy_(m)


def merge_finished(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge a finished result into another in place, in fp32 (fp64) and rounded once.

    out, other [..., Dv] of any floating dtype, lse, other_lse [...]; any strides. Every row of both saw a key.
    """
    if _in_one_pass(out, lse, other, other_lse):
        # Imported here: Triton decides at its import whether it interprets kernels.
        from distattn.kernels.softmax.triton_merge import merge_in_one_pass

        merge_in_one_pass(out, lse, other, other_lse)
        return
    m = torch.maximum(lse, other_lse)
    weight, other_weight = torch.exp(lse - m), torch.exp(other_lse - m)
    total = weight + other_weight
    merged = out * (weight / total).unsqueeze(-1)
    out.copy_(merged.addcmul_((other_weight / total).unsqueeze(-1), other))
    lse.copy_(m + torch.log(total))


def _in_one_pass(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> bool:
    """Whether a Triton kernel merges these."""
    if why_no_triton(out.device.type, out.dtype) is not None or out.ndim != 4:
        return False
    side_by_side = out.stride(-1) == other.stride(-1) == 1
    return side_by_side and other.dtype in TRITON_DTYPES and lse.dtype == other_lse.dtype == torch.float32


def finish(carry: Carry, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out [..., Dv] in ``dtype``, lse [...] in the carry's dtype); rows that saw nothing give 0 and −inf."""
    empty = carry.l == 0
    weight = carry.l.masked_fill(empty, 1).unsqueeze(-1)
    # Dividing into the narrow dtype saves the full-width quotient, which is one more pass over a long shard.
    out = torch.empty(carry.acc.shape, dtype=dtype, device=carry.acc.device)
    torch.div(carry.acc, weight, out=out)
    return out, carry.m + torch.log(carry.l)


def merge_outputs(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two finished results: out [..., Dv], lse [...]; returns (out, lse) in fp32, or fp64 for fp64 inputs.

    The result is free of NaN, whatever ``out`` holds in rows whose lse is ±inf.
    """
    dtype = accumulation_dtype(out_a.dtype)
    acc = torch.empty(out_a.shape, dtype=dtype, device=out_a.device)
    m, l = torch.empty_like(lse_a, dtype=dtype), torch.empty_like(lse_a, dtype=dtype)
    carry = Carry(acc, m, l)
    merge_partial(carry, out_a, lse_a, fresh=True)
    merge_partial(carry, out_b, lse_b)
    return finish(carry, dtype)
