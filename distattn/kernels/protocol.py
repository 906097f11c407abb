"""What a kernel backend computes: a table of tiles over a query arena and a KV arena.

Arenas are strided tensors ``q [B, Nq, Hq, D]``, ``k [B, Nk, Hk, D]``, ``v [B, Nk, Hk, Dv]``; an arena may hold the rows of
several slots. A tile is one row of an int64 numpy table with the columns ``TILE_COLUMNS``: queries ``q0 ≤ i < q1`` and keys
``k0 ≤ j < k1`` (arena rows), on the diagonals ``lo ≤ j − i ≤ hi``, for the arena's query heads ``h0 ≤ h < h1``. Query head h
uses the arena's KV head ``(h + shift) // group``. Tiles of one table never compute a (query, key, head) twice, but several
tiles may share queries or keys.

forward   s = softcap(scale · q kᵀ);  (acc, m, l) ← online softmax of s, carried in place, fp32 (fp64 for fp64 inputs)
backward  p = exp(s − lse);  dv += pᵀ do;  ds = p ∘ (do vᵀ − delta);  dq += scale · ds k;  dk += scale · dsᵀ q

``Extras`` are run-time operands of a call: a block plan and positions remove pairs, a key bias is added to scale · q kᵀ.
Keys are read where they lie: a tile addresses arena rows, so that what several tiles share is never copied for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from distattn.kernels.block_plan import BlockOperand

TILE_COLUMNS = ("q0", "q1", "k0", "k1", "lo", "hi", "h0", "h1", "shift")
T_Q0, T_Q1, T_K0, T_K1, T_LO, T_HI, T_H0, T_H1, T_SHIFT = range(9)


@dataclass(frozen=True)
class Case:
    """What a backend must be able to compute; capability checks and the automatic choice look at nothing else.

    lse_gradient: the caller differentiates through the returned LSE, so that ``delta`` is not Σ do∘out.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    heads: int
    kv_heads: int
    softcap: bool = False
    lse_gradient: bool = False
    deterministic: bool = False
    block_plan: bool = False
    key_bias: bool = False
    positions: bool = False


EXTRAS = {"block_plan": "block plans", "key_bias": "bias of keys", "positions": "positions"}
"""Flags of ``Case`` that stand for parts of ``Extras``, in words."""


def why_no_extras(case: Case, taken: tuple[str, ...] = ()) -> str | None:
    """Why a backend that takes only the extras ``taken`` (names of ``EXTRAS``) cannot compute the case, or None."""
    missing = [words for name, words in EXTRAS.items() if getattr(case, name) and name not in taken]
    return f"takes no {' and no '.join(missing)}" if missing else None


@dataclass(frozen=True, eq=False)
class Extras:
    """What a call adds to its tiles. Every part may be None.

    blocks: a pair needs a block of the plan. positions: (pos_q int32 [Nq], pos_k int32 [Nk]) of the arenas' rows; a pair
    needs pos_q ≥ pos_k, except in full blocks of the plan, which the plan vouches for. key_bias [B, Nk, Hk] fp32 (fp64 for
    fp64 inputs): added to scale · q kᵀ, before the soft-cap. dkey_bias: its gradient, accumulated in the backward.
    """

    blocks: BlockOperand | None = None
    key_bias: Tensor | None = None
    dkey_bias: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None


class Carry(NamedTuple):
    """Partial result of attention: out = acc / l, lse = m + log l; a row that saw no key has m = −inf and l = 0.

    acc [B, N, H, Dv]; m, l [B, N, H]; fp32, or fp64 for fp64 inputs.
    """

    acc: Tensor
    m: Tensor
    l: Tensor


class Backend(Protocol):
    """One way to compute tiles. Both calls work in place and never read what they have not been given."""

    name: str
    needs_out: bool
    """Whether ``attend_backward`` needs ``out`` (vendor kernels recompute delta) or only ``delta``."""

    def why_not(self, case: Case) -> str | None:
        """Why this backend cannot compute the case here, as half a sentence, or None if it can."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: np.ndarray,
        carry: Carry,
        *,
        group: int,
        scale: float,
        softcap: float | None,
        extras: Extras | None = None,
    ) -> None:
        """Accumulate the tiles into ``carry`` (over the query arena's rows and heads)."""
        ...

    def attend_backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None,
        lse: Tensor,
        do: Tensor,
        delta: Tensor,
        tiles: np.ndarray,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        group: int,
        scale: float,
        softcap: float | None,
        extras: Extras | None = None,
    ) -> None:
        """Accumulate the tiles' gradients into dq, dk, dv (fp32, or fp64 for fp64 inputs; shapes of q, k, v).

        out, do [B, Nq, Hq, Dv]; lse, delta [B, Nq, Hq] fp32/fp64: the *global* LSE (−inf where a row saw no key) and
        delta = Σ do∘out − dlse.
        """
        ...


@runtime_checkable
class WholeBackend(Backend, Protocol):
    """A backend that can finish where the tiles of one call are all that the queries and keys take part in.

    No carry is then read or written, and nothing is rounded twice. Rows and keys that no tile holds get zeros (LSE −∞).
    """

    def attend_whole(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: np.ndarray,
        *,
        group: int,
        scale: float,
        softcap: float | None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out [B, Nq, Hq, Dv] in q's dtype, lse [B, Nq, Hq] fp32)."""
        ...

    def attend_backward_whole(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        do: Tensor,
        dlse: Tensor | None,
        tiles: np.ndarray,
        *,
        group: int,
        scale: float,
        softcap: float | None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) in q's dtype. dlse [B, Nq, Hq]: the gradient that comes through the LSE."""
        ...
