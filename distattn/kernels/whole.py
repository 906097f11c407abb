"""Attention whose queries and keys take part in the tiles of one call alone, as on a single rank: no carry is needed.

A backend that can finish at once (``WholeBackend``) does; for the others the carry is made, finished and cast here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.merge import accumulation_dtype, empty_carry, finish
from distattn.kernels.protocol import Backend, Extras, WholeBackend


def attend_whole(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, *, group: int, scale: float,
    softcap: float | None, extras: Extras | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Nq, Hq, Dv] in q's dtype, lse [B, Nq, Hq] in fp32, or fp64 for fp64 inputs)."""
    settings = _settings(group, scale, softcap, extras)
    if isinstance(backend, WholeBackend):
        return backend.attend_whole(q, k, v, tiles, **settings)
    batch, rows, heads, _ = q.shape
    carry = empty_carry(batch, rows, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    backend.attend(q, k, v, tiles, carry, **settings)
    return finish(carry, q.dtype)


def attend_backward_whole(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
    tiles: np.ndarray, *, group: int, scale: float, softcap: float | None, extras: Extras | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in q's dtype. out, lse as from ``attend_whole``; dlse [B, Nq, Hq] or None: the LSE's gradient."""
    settings = _settings(group, scale, softcap, extras)
    if isinstance(backend, WholeBackend):
        return backend.attend_backward_whole(q, k, v, out, lse, do, dlse, tiles, **settings)
    sums = accumulation_dtype(q.dtype)
    delta = (do.to(sums) * out.to(sums)).sum(-1)
    delta = delta if dlse is None else delta - dlse.to(sums)
    gradients = [torch.zeros(x.shape, dtype=sums, device=x.device) for x in (q, k, v)]
    given = out if backend.needs_out else None
    backend.attend_backward(q, k, v, given, lse, do, delta, tiles, *gradients, **settings)
    dq, dk, dv = (x.to(q.dtype) for x in gradients)
    return dq, dk, dv


def _settings(group: int, scale: float, softcap: float | None, extras: Extras | None) -> dict[str, Any]:
    return {"group": group, "scale": scale, "softcap": softcap, "extras": extras}
