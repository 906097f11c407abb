"""Linear attention in chunks, in plain torch: the CPU's kernel, and the one that any device and dtype can run.

Symbols, per value head and chunk of C rows (S: state that enters, S': that leaves; ~ over K: decayed to the chunk's end):

G = cumsum g      Kr = K ⊙ e^G      K~ = K ⊙ e^{G_C − G}      Qr = scale · Q ⊙ e^G      P = scale · tril(q kᵀ under decay)
delta family:       A = strict tril(β k kᵀ under decay)    U = (I + A)⁻¹ β V    W = (I + A)⁻¹ β Kr    V' = U − W S
decay family:       V' = V
O = Qr S + P V'                                           S' = e^{G_C} ⊙ S + K~ᵀ V'

The backward solves the same triangular system once, transposed: see docs/linear.md for the derivation. Rows beyond a piece's
end are padding that changes nothing: q = k = v = 0, g = 0, β = 0.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.decay import make_decay
from distattn.kernels.linear.protocol import VECTOR, Gradients, LinearCase, Operands, Pieces, nothing_kept
from distattn.kernels.linear.reference import expand_gate, spread_heads, state_dtype

_CHUNK = 64
_VECTOR_CHUNK = 16
"""Shorter where each key dimension decays on its own: scores then cost C elementwise passes over the keys."""


class TorchLinear:
    """``LinearBackend`` in plain torch: every case, any device, fp32 and fp64 arithmetic."""

    name = "torch"

    def why_not(self, case: LinearCase) -> str | None:
        return None

    def forward_begin(self, x: Operands, pieces: Pieces, entering: Tensor) -> _Forward:
        return _Forward(_Chunks(x, pieces), entering)

    def num_kept(self, x: Operands, pieces: Pieces) -> int:
        return 0

    def backward_begin(
        self,
        x: Operands,
        pieces: Pieces,
        entering: Tensor,
        late: Tensor,
        do: Tensor,
        dfinal: Tensor,
        kept: Tensor | None = None,
    ) -> _Backward:
        return _Backward(_Chunks(x, pieces), entering, late, do, dfinal)


class _Forward:
    """``ForwardPass``."""

    def __init__(self, chunks: _Chunks, entering: Tensor) -> None:
        self.c = c = chunks
        pieces = c.pieces
        self.states, left = c.run(c.start(pieces.enter, entering), c.written)
        self.left = left
        self.emitted = left[:, c.index(pieces.emit)].contiguous()
        self.transition, self.kept = c.transition(), nothing_kept(c.device)

    def intra(self) -> None:
        c = self.c
        self.out = c.Qr @ self.states + c.P @ c.values(self.states)

    def finish(self, late: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        if len(c.pieces.late):
            # Linear in the state: what entered late adds its own, unwritten, run through the late pieces.
            added, left = c.run(c.start(c.pieces.late, late), None, c.pieces.late)
            m = c.chunks_of(c.pieces.late)
            added = added[:, m]
            gain = c.Qr[:, m] @ added
            if c.W is not None:
                gain = gain - c.P[:, m] @ (c.W[:, m] @ added)
            self.out = self.out.index_add(1, m, gain)
            self.left = self.left + left
        final = self.left[:, c.index(c.pieces.final)].contiguous()
        return c.rows(self.out).to(c.x.v.dtype), final


class _Backward:
    """``BackwardPass``."""

    def __init__(self, chunks: _Chunks, entering: Tensor, late: Tensor, do: Tensor, dfinal: Tensor) -> None:
        self.c = c = chunks
        pieces = c.pieces
        self.do = c.cut(do)
        self.dv_inside = c.P.transpose(-1, -2) @ self.do
        start = c.start(pieces.enter, entering) + c.start(pieces.late, late)
        self.start = start
        source = c.Qr.transpose(-1, -2) @ self.do
        if c.W is not None:
            source = source - c.W.transpose(-1, -2) @ self.dv_inside
        self.dleaving, self.dstart = c.run_back(c.start(pieces.final, dfinal), source)
        self.emitted = self.dstart[:, c.index(pieces.late)].contiguous()

    def intra(self) -> None:
        self.states, _ = self.c.run(self.start, self.c.written)

    def finish(self, late: Tensor) -> Gradients:
        c, S = self.c, self.states
        dS, dstart = self.dleaving, self.dstart
        if len(c.pieces.emit):
            added, dstart_added = c.run_back(c.start(c.pieces.emit, late), None, c.pieces.emit)
            dS, dstart = dS + added, dstart + dstart_added
        values = c.values(S)
        dvalues = self.dv_inside + c.Kt @ dS
        dP = (c.x.scale * self.do @ values.transpose(-1, -2)).tril()
        dq = c.x.scale * c.eG * (self.do @ S.transpose(-1, -2)) + c.decay.to_reader(dP, c.k)
        writer = c.eR * (values @ dS.transpose(-1, -2)) + c.decay.to_writer(dP, c.q)
        reader, dv, dbeta = None, dvalues, None
        if c.beta is not None:
            E = torch.linalg.solve_triangular(c.unit.transpose(-1, -2), dvalues, upper=True, unitriangular=True)
            dv = c.beta * E
            dA = -(E @ values.transpose(-1, -2)).tril(-1)
            dbeta = (E * (c.v - c.Kr @ S)).sum(-1, keepdim=True) + (dA * c.overlap).sum(-1, keepdim=True)
            reader = c.beta * (c.decay.to_reader(dA, c.k) - c.eG * (E @ S.transpose(-1, -2)))
            writer = writer + c.decay.to_writer(c.beta * dA, c.k)
        left = c.eC * S + c.Kt.transpose(-1, -2) @ values
        dg = self._gate(c.q * dq - c.k * writer + (0 if reader is None else c.k * reader), (left * dS).sum(-1))
        dk = writer if reader is None else writer + reader
        return Gradients(
            c.group_sum(c.rows(dq), c.x.q),
            c.group_sum(c.rows(dk), c.x.k),
            c.rows(dv).to(c.x.v.dtype),
            dg,
            None if dbeta is None else c.rows(dbeta).squeeze(-1),
            dstart[:, c.index(c.pieces.enter)].contiguous(),
        )

    def _gate(self, dG: Tensor, boundary: Tensor) -> Tensor | None:
        """dg from the gradient of the running sums; the boundary's part is that of the whole chunk's decay."""
        g = self.c.x.g
        if g is None or not self.c.x.with_dg:
            return None
        dG[..., -1, :] += boundary
        dg = self.c.rows(dG.flip(-2).cumsum(-2).flip(-2))
        if g.ndim == 4:
            return dg
        dg = dg.sum(-1)
        return dg.sum((0, 1)) if g.ndim == 1 else dg


class _Chunks:
    """One call's operands cut into chunks, [B, M, HV, C, ·], and what follows from them alone."""

    def __init__(self, x: Operands, pieces: Pieces) -> None:
        self.x, self.pieces = x, pieces
        self.device = x.v.device
        self.dtype = state_dtype(x.v.dtype)
        self.batch, self.num_rows, self.heads, self.value_dim = x.v.shape
        self.length = _VECTOR_CHUNK if x.gate == VECTOR else _CHUNK
        self.length = min(self.length, int(pieces.lengths.max()))
        self.counts = -(-pieces.lengths // self.length)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self._index_rows()
        self.q, self.k = self.cut(spread_heads(x.q, self.heads)), self.cut(spread_heads(x.k, self.heads))
        self.v = self.cut(x.v)
        if x.g is None:
            G = self.q.new_zeros((1, 1, 1, self.length, 1))
        else:
            G = self.cut(expand_gate(x.g, self.batch, self.num_rows)).cumsum(-2)
        self.G, self.eG = G, G.exp()
        self.eR = (G[..., -1:, :] - G).exp()
        self.eC = self.eG[..., -1, :].unsqueeze(-1)  # over the rows of the state
        self.decay = make_decay(G)
        self.Kr, self.Kt, self.Qr = self.k * self.eG, self.k * self.eR, x.scale * self.q * self.eG
        self.beta = None if x.beta is None else self.cut(x.beta.unsqueeze(-1))
        self.W: Tensor | None = None
        self.written = self.v
        if self.beta is not None:
            self.overlap = self.decay.scores(self.k, self.k).tril(-1)
            self.unit = self.beta * self.overlap + torch.eye(self.length, dtype=self.dtype, device=self.device)
            right = self.beta * torch.cat([self.v, self.Kr], -1)
            solved = torch.linalg.solve_triangular(self.unit, right, upper=False, unitriangular=True)
            self.written, self.W = solved.split([self.value_dim, self.q.shape[-1]], -1)

    @cached_property
    def P(self) -> Tensor:
        return self.x.scale * self.decay.scores(self.q, self.k)

    def values(self, states: Tensor) -> Tensor:
        """V': what is written, given the states that enter each chunk."""
        return self.written if self.W is None else self.written - self.W @ states

    # --- rows and chunks ---------------------------------------------------------------------------------------------

    def _index_rows(self) -> None:
        """row_of [M·C]: row of each chunk position, the row past the end for padding; place_of [T]: its inverse."""
        piece = np.repeat(np.arange(len(self.counts)), self.counts)
        offset = (np.arange(self.first[-1]) - self.first[piece]) * self.length
        row = offset[:, None] + np.arange(self.length)
        inside = row < self.pieces.lengths[piece][:, None]
        row = np.where(inside, row + self.pieces.starts[piece][:, None], self.num_rows).ravel()
        self.row_of = torch.from_numpy(row).to(self.device)
        self.place_of = torch.from_numpy(np.flatnonzero(inside.ravel())).to(self.device)

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, HV, D] to [B, M, HV, C, D], padded with zeros."""
        x = x.to(self.dtype)
        padded = torch.cat([x, x.new_zeros((x.shape[0], 1, *x.shape[2:]))], 1)[:, self.row_of]
        return padded.unflatten(1, (-1, self.length)).transpose(2, 3).contiguous()

    def rows(self, x: Tensor) -> Tensor:
        """The inverse of ``cut``."""
        x = x.expand(self.batch, len(self.row_of) // self.length, self.heads, *x.shape[3:])
        return x.transpose(2, 3).flatten(1, 2)[:, self.place_of]

    def group_sum(self, x: Tensor, like: Tensor) -> Tensor:
        """[B, T, HV, K] summed to the heads of ``like``, in its dtype."""
        heads = like.shape[2]
        return (x if heads == self.heads else x.unflatten(2, (heads, -1)).sum(3)).to(like.dtype)

    def chunks_of(self, members: np.ndarray) -> Tensor:
        """Numbers of all chunks of some pieces."""
        return self.index(np.flatnonzero(np.repeat(np.isin(np.arange(len(self.counts)), members), self.counts)))

    def index(self, members: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(members, np.int64)).to(self.device)

    def start(self, members: np.ndarray, states: Tensor) -> Tensor:
        """[B, N, HV, K, V]: the states of a set in the order of all pieces, 0 for the others."""
        shape = (self.batch, len(self.counts), self.heads, self.q.shape[-1], self.value_dim)
        every = self.q.new_zeros(shape)
        return every.index_copy_(1, self.index(members), states.to(self.dtype)) if len(members) else every

    # --- states ------------------------------------------------------------------------------------------------------

    def run(self, start: Tensor, written: Tensor | None, members: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """(state that enters each chunk [B, M, HV, K, ·], state that leaves each piece [B, N, HV, K, ·]).

        start: states that enter the pieces; written: U or V, None for the state's own run; members: pieces to run, the others
        leave zeros.
        """
        K, W = self.Kt.transpose(-1, -2), self.W
        added = None if written is None else K @ written
        steps = range(int(self.counts.max()))
        return self._walk(start, added, None if W is None else (K, W), steps, members)

    def run_back(self, leaving: Tensor, source: Tensor | None, members: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """(gradient of the state that leaves each chunk, gradient of the state that enters each piece): ``run`` transposed."""
        erase = None if self.W is None else (self.W.transpose(-1, -2), self.Kt)
        return self._walk(leaving, source, erase, range(int(self.counts.max()) - 1, -1, -1), members)

    def _walk(
        self,
        state: Tensor,
        added: Tensor | None,
        erase: tuple[Tensor, Tensor] | None,
        steps: range,
        members: np.ndarray | None,
    ) -> tuple[Tensor, Tensor]:
        """state ← e^{G_C} ⊙ state + added − L (R state), chunk by chunk, all pieces at once; before[m] is the state at m."""
        runs = np.ones(len(self.counts), bool)
        if members is not None:
            runs[:] = False
            runs[members] = True
        shape = (self.batch, int(self.first[-1]), self.heads, *state.shape[3:])
        before, state = state.new_zeros(shape), state.clone()
        decay = self.eC.expand(*shape[:3], *self.eC.shape[3:])
        for n in steps:
            pieces = np.flatnonzero(runs & (self.counts > n))
            i, m = self.index(pieces), self.index(self.first[pieces] + n)
            now = state[:, i]
            before[:, m] = now
            after = decay[:, m] * now
            if added is not None:
                after = after + added[:, m]
            if erase is not None:
                after = after - erase[0][:, m] @ (erase[1][:, m] @ now)
            state[:, i] = after
        return before, state

    def transition(self) -> Tensor | None:
        """Of the pieces in ``maps``: see ``ForwardPass``."""
        maps = self.pieces.maps
        if self.W is None:
            if self.x.g is None:
                return None
            ends = self.G[..., -1, :]
            sums = (
                torch.stack([ends[:, self.first[i] : self.first[i + 1]].sum(1) for i in maps], 1) if len(maps) else ends[:, :0]
            )
            return sums if self.x.gate == VECTOR else sums.squeeze(-1)
        width = self.q.shape[-1]
        if not len(maps):
            return self.q.new_zeros((self.batch, 0, self.heads, width, width))
        eye = torch.eye(width, dtype=self.dtype, device=self.device)
        start = eye.expand(self.batch, len(self.counts), self.heads, width, width)
        return self.run(start, None, maps)[1][:, self.index(maps)].contiguous()
