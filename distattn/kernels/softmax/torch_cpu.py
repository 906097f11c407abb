"""Softmax attention by torch's fused CPU kernel, which returns the LSE (``_scaled_dot_product_flash_attention_for_cpu``).

The kernel takes all or a square causal triangle at full speed, and anything else through an additive mask; only the thin
edges of windows need one. It knows no grouped KV heads (fewer KV heads than query heads read past the end of the
tensor, without an error), but it honours strides: KV heads become its batch dimension, and the query heads that share one
see it through a stride of 0, so nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from distattn.kernels.merge import NEGATIVE_INFINITY, merge_partial
from distattn.kernels.protocol import Carry, Case, Extras, why_no_extras
from distattn.kernels.tiles import HeadSpan, Kind, Piece, decompose, head_spans

BAND_BLOCK = 128
"""Queries in a masked piece: its mask and the pairs it computes in vain grow with the square."""

SUPPORTED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FlashCpuBackend:
    """torch's flash attention for CPU. In fp64 it is exact to rounding (1e-14)."""

    name = "flash_cpu"
    needs_out = True

    def why_not(self, case: Case) -> str | None:
        if case.device_type != "cpu":
            return f"runs on cpu, not on {case.device_type}"
        if case.dtype not in SUPPORTED_DTYPES:
            return f"computes fp64, fp32, bf16 and fp16, not {case.dtype}"
        if case.softcap:
            return "has no soft-cap"
        if case.lse_gradient:
            return "recomputes delta from out, which leaves out the gradient that comes through the LSE"
        return why_no_extras(case)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, *, group: int, scale: float,
        softcap: float | None, extras: Extras | None = None,
    ) -> None:  # fmt: skip
        assert softcap is None
        assert extras is None
        value_dim = v.shape[-1]
        q, k, v = _equal_width(q, k, v)
        masks = _MaskCache(q.dtype)
        for piece, span in _pieces(tiles, group):
            rows, keys = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
            queries, partial = _per_query_head(q, rows, span), [_per_query_head(x, rows, span) for x in carry]
            k_views, v_views = _per_kv_head(k, keys, span), _per_kv_head(v, keys, span)
            for b_q, b_k, b_v, acc, m, l in zip(queries, k_views, v_views, *partial):
                out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    b_q, b_k, b_v, 0.0, piece.kind == Kind.CAUSAL, attn_mask=masks.get(piece), scale=scale
                )
                # The first piece of a row is most of the work of packed documents, and m is small beside acc.
                fresh = bool((m == NEGATIVE_INFINITY).all())
                merge_partial(Carry(acc, m, l), out[..., :value_dim], lse, fresh=fresh, all_seen=True)

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, delta: Tensor,
        tiles: np.ndarray, dq: Tensor, dk: Tensor, dv: Tensor, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> None:  # fmt: skip
        assert softcap is None
        assert extras is None
        assert out is not None
        head_dim, value_dim = q.shape[-1], v.shape[-1]
        q, k, v, out, do = _equal_width(q, k, v, out.to(q.dtype), do.to(q.dtype))
        masks = _MaskCache(q.dtype)
        for piece, span in _pieces(tiles, group):
            rows, keys = slice(piece.q0, piece.q1), slice(piece.k0, piece.k1)
            inputs = zip(
                *(_per_query_head(x, rows, span) for x in (do, q)),
                *(_per_kv_head(x, keys, span) for x in (k, v)),
                *(_per_query_head(x, rows, span) for x in (out, lse, dq)),
                *(_kv_gradient(x, keys, span) for x in (dk, dv)),
            )
            for b_do, b_q, b_k, b_v, b_out, b_lse, b_dq, b_dk, b_dv in inputs:
                g_q, g_k, g_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    b_do, b_q, b_k, b_v, b_out, b_lse, 0.0, piece.kind == Kind.CAUSAL,
                    attn_mask=masks.get(piece), scale=scale,
                )  # fmt: skip
                b_dq.add_(g_q[..., :head_dim])
                b_dk.add_(_sum_group(g_k, span)[..., :head_dim])
                b_dv.add_(_sum_group(g_v, span)[..., :value_dim])


class _MaskCache:
    """Additive masks of BAND pieces. The blocks of a window have the same one, so it is made once a call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.masks: dict[tuple[int, ...], Tensor] = {}

    def get(self, piece: Piece) -> Tensor | None:
        if piece.kind != Kind.BAND:
            return None
        rows, keys, offset = piece.q1 - piece.q0, piece.k1 - piece.k0, piece.k0 - piece.q0
        key = (rows, keys, piece.lo - offset, piece.hi - offset)
        if key not in self.masks:
            diagonal = torch.arange(keys) - torch.arange(rows).unsqueeze(1)
            hidden = (diagonal < key[2]) | (diagonal > key[3])
            self.masks[key] = torch.zeros(rows, keys, dtype=self.dtype).masked_fill_(hidden, NEGATIVE_INFINITY)
        return self.masks[key]


def _pieces(tiles: np.ndarray, group: int) -> Iterator[tuple[Piece, HeadSpan]]:
    for piece in decompose(tiles, block=BAND_BLOCK):
        for span in head_spans(piece.h0, piece.h1, piece.shift, group):
            yield piece, span


def _equal_width(*tensors: Tensor) -> list[Tensor]:
    """Zero columns where D and Dv differ, since the kernel knows one width; and a last dimension of stride 1."""
    width = max(x.shape[-1] for x in tensors)
    padded = [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _per_query_head(x: Tensor, rows: slice, span: HeadSpan) -> list[Tensor]:
    """Views of x [B, N, H, ...] as the kernel wants them.

    One view [B, H, n, ...] where each query head has a KV head of its own, else one [KV, group, n, ...] per batch entry.
    """
    view = x[:, rows, span.h0 : span.h1]
    if span.group == 1:
        return [view.transpose(1, 2)]
    grouped = view.unflatten(2, (-1, span.group))
    return [entry.permute(1, 2, 0, *range(3, entry.dim())) for entry in grouped]


def _per_kv_head(x: Tensor, keys: slice, span: HeadSpan) -> list[Tensor]:
    """Views of x [B, N, Hk, D] that match those of ``_per_query_head``, by a stride of 0 over the group."""
    view = x[:, keys, span.kv0 : span.kv1].transpose(1, 2)
    if span.group == 1:
        return [view]
    return [entry.unsqueeze(1).expand(-1, span.group, -1, -1) for entry in view]


def _kv_gradient(x: Tensor, keys: slice, span: HeadSpan) -> list[Tensor]:
    """Where the gradient of each of ``_per_kv_head``'s views goes, the group summed away."""
    view = x[:, keys, span.kv0 : span.kv1].transpose(1, 2)
    return [view] if span.group == 1 else list(view)


def _sum_group(gradient: Tensor, span: HeadSpan) -> Tensor:
    return gradient if span.group == 1 else gradient.sum(1)
