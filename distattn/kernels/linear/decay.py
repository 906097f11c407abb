"""Products of rows under decay, inside chunks, that exponentiate nothing above 0.

scores(a, b)_ij    = Σ_d a_id b_jd e^{G_id − G_jd}       i ≥ j, 0 above the diagonal
to_reader(w, b)_i  = Σ_j w_ij e^{G_i − G_j} ⊙ b_j        w: 0 above the diagonal
to_writer(w, a)_j  = Σ_i w_ij e^{G_i − G_j} ⊙ a_i

G is the running sum of the gate in its chunk. e^{G_i} · e^{−G_j} would overflow for strong decay, so differences are formed
first: as one C × C matrix for a gate per head, and for a gate per key dimension column by column, in memory of one column.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Decay(Protocol):
    """a, b [..., C, K]; w [..., C, C]."""

    def scores(self, a: Tensor, b: Tensor) -> Tensor: ...

    def to_reader(self, w: Tensor, b: Tensor) -> Tensor: ...

    def to_writer(self, w: Tensor, a: Tensor) -> Tensor: ...


class ScalarDecay:
    """One gate a head: G [..., C, 1]."""

    def __init__(self, G: Tensor) -> None:
        difference = G - G.transpose(-1, -2)
        self.factor = difference.clamp(max=0).exp().tril()

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.transpose(-1, -2) * self.factor

    def to_reader(self, w: Tensor, b: Tensor) -> Tensor:
        return (w * self.factor) @ b

    def to_writer(self, w: Tensor, a: Tensor) -> Tensor:
        return (w * self.factor).transpose(-1, -2) @ a


class VectorDecay:
    """One gate a key dimension: G [..., C, K]."""

    def __init__(self, G: Tensor) -> None:
        self.G = G

    def _column(self, j: int) -> Tensor:
        """e^{G_i − G_j} for i ≥ j: [..., C − j, K]."""
        return (self.G[..., j:, :] - self.G[..., j : j + 1, :]).exp()

    def scores(self, a: Tensor, b: Tensor) -> Tensor:
        length = a.shape[-2]
        out = a.new_zeros((*a.shape[:-1], length))
        for j in range(length):
            out[..., j:, j] = (a[..., j:, :] * self._column(j) * b[..., j : j + 1, :]).sum(-1)
        return out

    def to_reader(self, w: Tensor, b: Tensor) -> Tensor:
        out = torch.zeros_like(b)
        for j in range(b.shape[-2]):
            out[..., j:, :] += w[..., j:, j : j + 1] * self._column(j) * b[..., j : j + 1, :]
        return out

    def to_writer(self, w: Tensor, a: Tensor) -> Tensor:
        out = torch.zeros_like(a)
        for j in range(a.shape[-2]):
            out[..., j, :] = (w[..., j:, j : j + 1] * self._column(j) * a[..., j:, :]).sum(-2)
        return out


def make_decay(G: Tensor) -> Decay:
    """For running sums [..., C, 1] or [..., C, K]."""
    return ScalarDecay(G) if G.shape[-1] == 1 else VectorDecay(G)
