"""What a linear-attention kernel computes: passes over pieces of documents, each in three stages around an exchange of states.

A rank's rows are cut into *pieces*: runs of rows that follow one another in one document. Inside a piece the state goes from
row to row; between pieces it goes through an exchange, which knows nothing of kernels. A pass therefore has three stages:

begin     all that the exchange needs: the states that pieces leave, as if nothing had entered the *late* ones
intra     the work that needs no state from elsewhere; the exchange is in flight meanwhile
finish    the states that entered the late pieces have arrived: add their part

Head h of q and k serves the value heads ``h·(HV/H) … (h+1)·(HV/H) − 1``. Per value head, in fp32 (fp64 for fp64 inputs):

decay family   S_t = e^{g_t} ⊙ S_{t−1} + k_tᵀ v_t                                   o_t = scale · q_t S_t
delta family   S_t = (I − β_t k_tᵀ k_t) (e^{g_t} ⊙ S_{t−1}) + β_t k_tᵀ v_t          o_t = scale · q_t S_t
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

NONE, CONSTANT, SCALAR, VECTOR = "none", "constant", "scalar", "vector"
"""Forms of the gate g: absent, [HV], [B, T, HV], [B, T, HV, K]."""


@dataclass(frozen=True)
class Kind:
    """One operator: the gate forms that it takes, and whether it erases before it writes (the delta rule)."""

    name: str
    gates: tuple[str, ...]
    delta: bool


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("linear", (NONE,), delta=False),
        Kind("lightning", (CONSTANT,), delta=False),
        Kind("retention", (CONSTANT,), delta=False),
        Kind("simple_gla", (SCALAR, CONSTANT), delta=False),
        Kind("gla", (VECTOR,), delta=False),
        Kind("delta", (NONE,), delta=True),
        Kind("gated_delta", (SCALAR, CONSTANT), delta=True),
        Kind("kda", (VECTOR,), delta=True),
    )
}


@dataclass(frozen=True)
class LinearCase:
    """What a backend must be able to compute; capability checks and the automatic choice look at nothing else."""

    device_type: str
    dtype: torch.dtype
    gate: str
    delta: bool
    key_dim: int
    value_dim: int
    heads: int
    value_heads: int


class Operands(NamedTuple):
    """Inputs of one call, this rank's rows. Any strides.

    q, k [B, T, H, K], v [B, T, HV, V]: one floating dtype; T ≥ 1 and HV a multiple of H. g: natural-log decay, ≤ 0, None or
    in one of the forms above, any floating dtype. beta [B, T, HV], any floating dtype; None in the decay family. with_dg:
    whether anybody asks for the gradient of g.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    scale: float
    with_dg: bool = True

    @property
    def gate(self) -> str:
        return NONE if self.g is None else {1: CONSTANT, 3: SCALAR, 4: VECTOR}[self.g.ndim]


class PieceTables(NamedTuple):
    """``Pieces`` on a device, int32, for one chunk length C. −1 means "not in this set".

    cu_seqlens [N+1]: first row of each piece. chunks [M, 2]: (piece, number of the chunk in its piece) of every chunk, in
    order; a chunk never crosses a piece's end. first_chunk [N+1]: number of each piece's first chunk among the M.
    enter, late, emit, final, maps [N]: each piece's row among the states of that set.
    """

    cu_seqlens: Tensor
    chunks: Tensor
    first_chunk: Tensor
    enter: Tensor
    late: Tensor
    emit: Tensor
    final: Tensor
    maps: Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of one rank's rows, in storage order; the same for all batch entries. Host data, made once and replayed.

    lengths: rows of each piece, int64 [N], all ≥ 1. The sets are numbers of pieces, int64, ascending; row i of a set's states
    ``[B, num, HV, K, V]`` belongs to piece set[i]. Others start from, and leave, nothing that anybody asks for.

    enter: start from a given initial state. late: start from the state that another piece left (arrives during the pass).
    emit: another piece goes on from the state they leave. final: the state they leave is returned to the caller.
    maps = late ∩ emit: their transition is needed, since what enters them goes through. enter ∩ late and emit ∩ final are
    empty.
    """

    lengths: np.ndarray
    enter: np.ndarray
    late: np.ndarray
    emit: np.ndarray
    final: np.ndarray
    _tables: dict[tuple[torch.device, int], PieceTables] = field(default_factory=dict, repr=False)

    @classmethod
    def whole(cls, lengths: Sequence[int] | np.ndarray, *, enter: bool = False, final: bool = False) -> Pieces:
        """Documents that lie whole on this rank: no piece is late or emits."""
        lengths = np.asarray(lengths, np.int64)
        every, none = np.arange(len(lengths)), np.zeros(0, np.int64)
        return cls(lengths, every if enter else none, none, none, every if final else none)

    @cached_property
    def maps(self) -> np.ndarray:
        return np.intersect1d(self.late, self.emit)

    @property
    def num_rows(self) -> int:
        return int(self.lengths.sum())

    @property
    def starts(self) -> np.ndarray:
        """First row of each piece, and one past the last: int64 [N+1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def tables(self, device: torch.device, chunk: int) -> PieceTables:
        """The tables on a device, uploaded at the first call."""
        key = (device, chunk)
        if key not in self._tables:
            self._tables[key] = PieceTables(*(torch.from_numpy(x.astype(np.int32)).to(device) for x in self._host(chunk)))
        return self._tables[key]

    def _host(self, chunk: int) -> list[np.ndarray]:
        counts = -(-self.lengths // chunk)
        first = np.concatenate([[0], np.cumsum(counts)])
        piece = np.repeat(np.arange(len(counts)), counts)
        chunks = np.stack([piece, np.arange(first[-1]) - first[piece]], 1)
        sets = []
        for members in (self.enter, self.late, self.emit, self.final, self.maps):
            row = np.full(len(self.lengths), -1)
            row[members] = np.arange(len(members))
            sets.append(row)
        return [self.starts, chunks, first, *sets]


class ForwardPass(Protocol):
    """One forward in progress.

    emitted [B, num_emit, HV, K, V]: the states that the emitting pieces leave, where a late piece starts from zero.
    transition: of the pieces in ``maps``, None in the decay family without a gate; log-decay summed over the piece,
    [B, num_maps, HV] or [B, num_maps, HV, K] (natural log) in the gated decay family; the matrix M [B, num_maps, HV, K, K]
    with S_out = M S_in + emitted in the delta family. Both fp32 (fp64) and contiguous, complete (in stream order) when
    ``forward_begin`` returns, and not written afterwards: another stream reads them while ``intra`` runs.

    kept: what the backward need not make again, fp32 [``num_kept``], in a layout of the backend's own.
    """

    emitted: Tensor
    transition: Tensor | None
    kept: Tensor

    def intra(self) -> None:
        """All work that needs no late state."""
        ...

    def finish(self, late: Tensor) -> tuple[Tensor, Tensor]:
        """From the states that entered the late pieces, [B, num_late, HV, K, V]: (o [B, T, HV, V] in v's dtype, final states
        [B, num_final, HV, K, V] in fp32/fp64)."""
        ...


class Gradients(NamedTuple):
    """dq, dk, dv in the shapes and dtypes of q, k, v; dg in the shape of g, dbeta in that of beta, fp32 (fp64), or None where
    there is none or nobody asks; dentering [B, num_enter, HV, K, V], fp32 (fp64)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor | None
    dbeta: Tensor | None
    dentering: Tensor


class BackwardPass(Protocol):
    """One backward in progress: the mirror image.

    emitted [B, num_late, HV, K, V]: gradient of the states that entered the late pieces, where what comes back to an emitting
    piece is taken as zero. Its transition is that of the forward, transposed.
    """

    emitted: Tensor

    def intra(self) -> None: ...

    def finish(self, late: Tensor) -> Gradients:
        """From the gradients of the states that the emitting pieces left, [B, num_emit, HV, K, V]."""
        ...


class LinearBackend(Protocol):
    """One way to compute linear attention. Never reads what it has not been given."""

    name: str

    def why_not(self, case: LinearCase) -> str | None:
        """Why this backend cannot compute the case here, as half a sentence, or None if it can."""
        ...

    def forward_begin(self, x: Operands, pieces: Pieces, entering: Tensor) -> ForwardPass:
        """entering [B, num_enter, HV, K, V] fp32 (fp64): initial states of the pieces in ``enter``."""
        ...

    def num_kept(self, x: Operands, pieces: Pieces) -> int:
        """How many numbers the forward keeps. Reads shapes, dtypes and devices alone."""
        ...

    def backward_begin(
        self,
        x: Operands,
        pieces: Pieces,
        entering: Tensor,
        late: Tensor,
        do: Tensor,
        dfinal: Tensor,
        kept: Tensor | None = None,
    ) -> BackwardPass:
        """late [B, num_late, HV, K, V]: the states that entered the late pieces in the forward. do [B, T, HV, V];
        dfinal [B, num_final, HV, K, V] fp32 (fp64). kept: what the forward kept; what it did not, all of it where None is
        given, is made again."""
        ...


def nothing_kept(device: torch.device) -> Tensor:
    """``kept`` of passes that keep nothing."""
    return torch.empty(0, dtype=torch.float32, device=device)
