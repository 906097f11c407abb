"""Softmax attention in plain torch: any dtype up to fp64, any device, any tile. What the other backends must equal.

Queries go in blocks, so that the scores of a block, and not those of a tile, are what memory must hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.block_plan import BlockOperand
from distattn.kernels.merge import NEGATIVE_INFINITY, accumulation_dtype
from distattn.kernels.protocol import Carry, Case, Extras
from distattn.kernels.tiles import UNBOUNDED, HeadSpan, clip_tiles, head_spans

MAX_SCORE_BYTES = 64 << 20
BANDED_BLOCK = 256
"""Queries a block where a diagonal bounds the keys: smaller blocks compute fewer pairs that the band then removes."""


class _Block(NamedTuple):
    """Rows × keys × heads whose scores are computed at once; ``hidden`` marks the pairs that do not attend, if any.

    hidden: [rows, keys], or [B or 1, KV heads, query heads per KV head, rows, keys] where a plan differs by head.
    """

    q: slice
    k: slice
    span: HeadSpan
    hidden: Tensor | None


class ReferenceBackend:
    """Plain torch, in fp32 (fp64 for fp64 inputs)."""

    name = "reference"
    needs_out = False

    def why_not(self, case: Case) -> str | None:
        if not case.dtype.is_floating_point or case.dtype.itemsize == 1:
            return f"computes fp64, fp32, bf16 and fp16, not {case.dtype}"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, *, group: int, scale: float,
        softcap: float | None, extras: Extras | None = None,
    ) -> None:  # fmt: skip
        bias = None if extras is None else extras.key_bias
        for block in _blocks(tiles, q, group, extras):
            scores = _scores(q, k, bias, block, scale, softcap)
            if block.hidden is not None:
                scores.masked_fill_(block.hidden, NEGATIVE_INFINITY)
            acc, m, l = (_query_heads(x, block) for x in carry)
            m_new = torch.maximum(m, scores.amax(-1))
            base = m_new.masked_fill(m_new == NEGATIVE_INFINITY, 0)
            p = scores.sub_(base.unsqueeze(-1)).exp_()
            rescale = torch.exp(m - base)
            l.mul_(rescale).add_(p.sum(-1))
            acc.mul_(rescale.unsqueeze(-1)).add_(_per_kv_head(p, _kv_heads(v, block, p.dtype)))
            m.copy_(m_new)

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, delta: Tensor,
        tiles: np.ndarray, dq: Tensor, dk: Tensor, dv: Tensor, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> None:  # fmt: skip
        bias, dbias = (None, None) if extras is None else (extras.key_bias, extras.dkey_bias)
        for block in _blocks(tiles, q, group, extras):
            scores = _scores(q, k, bias, block, scale, softcap)
            slope = None if softcap is None else 1 - (scores / softcap).square()
            b_lse = _query_heads(lse, block).unsqueeze(-1)
            # +inf, so that a row that saw nothing gives e^(−inf) = 0 and not NaN.
            p = scores.sub_(b_lse.masked_fill(b_lse == NEGATIVE_INFINITY, float("inf"))).exp_()
            if block.hidden is not None:
                p.masked_fill_(block.hidden, 0)
            b_q, b_do = (_query_heads(x, block).to(p.dtype) for x in (q, do))
            b_k, b_v = (_kv_heads(x, block, p.dtype) for x in (k, v))
            _kv_heads(dv, block).add_(_over_queries(p, b_do))
            ds = _per_kv_head(b_do, b_v.mT).sub_(_query_heads(delta, block).unsqueeze(-1)).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            if dbias is not None:
                dbias[:, block.k, block.span.kv0 : block.span.kv1].add_(ds.sum((2, 3)).transpose(1, 2))
            ds.mul_(scale)
            _query_heads(dq, block).add_(_per_kv_head(ds, b_k))
            _kv_heads(dk, block).add_(_over_queries(ds, b_q))


def _blocks(tiles: np.ndarray, q: Tensor, group: int, extras: Extras | None) -> Iterator[_Block]:
    """Every tile in blocks of queries, each with the keys that its rows see."""
    itemsize = accumulation_dtype(q.dtype).itemsize
    operand = None if extras is None else extras.blocks
    if extras is not None and operand is not None:
        operand.check(tiles, q.shape[0])
        extras = replace(extras, blocks=replace(operand, plan=operand.plan.to(q.device)))
    offsets = np.zeros((len(tiles), 3), np.int64) if operand is None else operand.offsets_of(tiles)
    for tile, offset in zip(tiles, offsets.tolist()):
        for q0, q1, k0, k1, lo, hi, h0, h1, shift in clip_tiles(tile[None]).tolist():
            banded = lo > -UNBOUNDED or hi < UNBOUNDED
            for span in head_spans(h0, h1, shift, group):
                rows = max(1, MAX_SCORE_BYTES // (q.shape[0] * (span.h1 - span.h0) * (k1 - k0) * itemsize))
                rows = min(rows, BANDED_BLOCK) if banded else rows
                for a in range(q0, q1, rows):
                    b = min(a + rows, q1)
                    first, end = max(k0, a + lo), min(k1, b + hi)
                    hidden = _hidden(a, b, first, end, lo, hi, q.device) if banded else None
                    block = _Block(slice(a, b), slice(first, end), span, hidden)
                    yield block if extras is None else block._replace(hidden=_hidden_by_extras(block, extras, offset))


def _hidden(q0: int, q1: int, k0: int, k1: int, lo: int, hi: int, device: torch.device) -> Tensor | None:
    """[q1 − q0, k1 − k0], True outside the band; None if the band hides nothing here."""
    if k0 - (q1 - 1) >= lo and (k1 - 1) - q0 <= hi:
        return None
    diagonal = torch.arange(k0, k1, device=device) - torch.arange(q0, q1, device=device).unsqueeze(1)
    return (diagonal < lo) | (diagonal > hi)


def _hidden_by_extras(block: _Block, extras: Extras, offset: list[int]) -> Tensor | None:
    """``block.hidden`` with what positions and the plan hide."""
    hidden, vouched = block.hidden, None
    if extras.blocks is not None:
        listed, vouched = _listed(extras.blocks, block, offset)
        hidden = ~listed if hidden is None else ~listed | hidden
    if extras.positions is not None:
        pos_q, pos_k = extras.positions
        later = pos_q[block.q].unsqueeze(1) < pos_k[block.k]
        later = later if vouched is None else later & ~vouched
        hidden = later if hidden is None else hidden | later
    return hidden


def _listed(operand: BlockOperand, block: _Block, offset: list[int]) -> tuple[Tensor, Tensor]:
    """(listed, listed as full): booleans [b, KV heads, query heads per KV head, rows, keys] of one block."""
    plan, span = operand.plan, block.span
    device = plan.device
    row = (torch.arange(block.q.start, block.q.stop, device=device) + offset[0]) // plan.block_q
    column = (torch.arange(block.k.start, block.k.stop, device=device) + offset[1]) // plan.block_k
    head = (torch.arange(span.h0, span.h1, device=device) + offset[2]) * plan.heads // operand.heads
    first = int(row[0])
    full, partial = (x[:, head][:, :, row - first][..., column] for x in plan.seen(first, int(row[-1]) + 1))
    shape = (-1, span.group)
    return (full | partial).unflatten(1, shape), full.unflatten(1, shape)


def _query_heads(x: Tensor, block: _Block) -> Tensor:
    """The block's view of x [B, N, H, ...]: [B, KV heads, query heads per KV head, rows, ...]."""
    view = x[:, block.q, block.span.h0 : block.span.h1].unflatten(2, (-1, block.span.group))
    return view.permute(0, 2, 3, 1, *range(4, view.dim()))


def _kv_heads(x: Tensor, block: _Block, dtype: torch.dtype | None = None) -> Tensor:
    """The block's view of x [B, N, Hk, D]: [B, KV heads, keys, D], in ``dtype`` if one is given."""
    view = x[:, block.k, block.span.kv0 : block.span.kv1].transpose(1, 2)
    return view if dtype is None else view.to(dtype)


def _per_kv_head(a: Tensor, b: Tensor) -> Tensor:
    """a [B, KV, G, n, x] @ b [B, KV, x, y] → [B, KV, G, n, y]: one product per KV head for all heads that share it."""
    return (a.flatten(2, 3) @ b).unflatten(2, a.shape[2:4])


def _over_queries(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b over rows and the heads of a group: a [B, KV, G, n, x], b [B, KV, G, n, y] → [B, KV, x, y]."""
    return a.flatten(2, 3).mT @ b.flatten(2, 3)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, block: _Block, scale: float, softcap: float | None) -> Tensor:
    """softcap(scale · q kᵀ + bias) of a block: [B, KV heads, query heads per KV head, rows, keys]."""
    dtype = accumulation_dtype(q.dtype)
    scores = _per_kv_head(_query_heads(q, block).to(dtype), _kv_heads(k, block, dtype).mT).mul_(scale)
    if bias is not None:
        scores.add_(_kv_heads(bias, block, dtype)[:, :, None, None])
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
