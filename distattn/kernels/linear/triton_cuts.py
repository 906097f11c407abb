"""Walks of the decay family through pieces cut into parts: where whole pieces would leave most of the device idle.

    totals      what each part adds to a state, side by side; nothing else is stored
    fold        x ← e^G x + total, from part to part
    walk        all parts side by side, each from the state that enters it

Backward likewise, from the last part to the first. A walk from chunk to chunk has few programs and waits for memory at each
step; parts read k and v (q and do) once more, and have as many times more programs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import NONE, VECTOR, Pieces
from distattn.kernels.linear.triton_passes import index_on

if TYPE_CHECKING:
    from distattn.kernels.linear.triton_launch import Call, Scores

Sums = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Cuts:
    """Pieces cut into parts at chunks. first: int64 [N+1], number of each piece's first part.

    totals, walk: the parts as pieces, of either launch; back_totals, back_walk: of the gradients. of_chunk: int64 [M].
    """

    first: np.ndarray
    totals: Pieces
    walk: Pieces
    back_totals: Pieces
    back_walk: Pieces
    of_chunk: np.ndarray

    @classmethod
    def of(cls, whole: Pieces, number: int, chunk: int, *, late: bool) -> Cuts:
        """number: parts of a piece, at most one a chunk. late: states enter the late pieces, else they start from zero."""
        chunks = -(-whole.lengths // chunk)
        counts = np.minimum(number, chunks)
        first = np.concatenate([[0], np.cumsum(counts)])
        begins, ends = first[:-1], first[1:] - 1
        piece = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(first[-1]) - begins[piece]
        stops = chunks[piece] * (nth + 1) // counts[piece]
        sizes = stops - np.where(nth > 0, np.concatenate([[0], stops[:-1]]), 0)
        rows = np.minimum(stops * chunk, whole.lengths[piece])
        lengths = rows - np.where(nth > 0, np.concatenate([[0], rows[:-1]]), 0)
        none, later, earlier = np.zeros(0, np.int64), np.flatnonzero(nth > 0), np.setdiff1d(np.arange(first[-1]), ends)
        enter, entered, emit, final = begins[whole.enter], begins[whole.late], ends[whole.emit], ends[whole.final]
        given = entered if late else none
        return cls(
            first,
            Pieces(lengths, enter, given, earlier, none),
            Pieces(lengths, enter, np.union1d(later, given), emit, final),
            Pieces(lengths, none, later, none, final),
            Pieces(lengths, enter, entered, earlier, final),
            np.repeat(np.arange(first[-1]), sizes),
        )

    @property
    def several(self) -> Iterator[range]:
        """The parts of each piece that has more than one."""
        for begin, end in zip(self.first[:-1].tolist(), self.first[1:].tolist(), strict=True):
            if end - begin > 1:
                yield range(begin, end)


_known: weakref.WeakKeyDictionary[Pieces, dict[tuple[int, int, bool], Cuts]] = weakref.WeakKeyDictionary()


def cuts_of(pieces: Pieces, number: int, chunk: int, *, late: bool = False) -> Cuts:
    """The cuts of pieces, made once."""
    known = _known.setdefault(pieces, {})
    key = (number, chunk, late)
    if key not in known:
        known[key] = Cuts.of(pieces, number, chunk, late=late)
    return known[key]


def walk_states(
    c: Call, scores: Scores, entering: Tensor, late: Tensor | None, *, h: Tensor, emitted: Tensor, final: Tensor,
    sums: Sums | None = None,
) -> None:  # fmt: skip
    """``Call.run_states`` of the decay family, cut if that pays."""
    cuts = c.cuts(late=late is not None)
    if cuts is None:
        c.run_states(scores, c.v, c.q, entering, late, h=h, values=c.v, emitted=emitted, final=final, sums=sums)
        return
    part = c.over(cuts.totals)
    added, decays = part.states(len(cuts.totals.emit)), _scratch_sums(part)
    part.run_states(
        scores, c.v, c.q, entering, late, h=None, values=c.v, emitted=added, final=part.states(0), only=part.tables.emit,
        sums=decays,
    )  # fmt: skip
    factors = _factors(c, decays)
    states = {} if late is None else {int(cuts.first[p]): late[:, row] for row, p in enumerate(c.pieces.late.tolist())}
    for parts in cuts.several:
        x = None
        for i in parts[:-1]:
            total = added[:, int(np.searchsorted(cuts.totals.emit, i))]
            x = total if x is None else _decayed(x, factors, i, total)
            states[i + 1] = x
    walk = c.over(cuts.walk)
    starts = torch.stack([states[i] for i in cuts.walk.late.tolist()], 1)
    own = None if sums is None else (sums[0], walk.sums(walk.num_pieces))
    walk.run_states(scores, c.v, c.q, entering, starts, h=h, values=c.v, emitted=emitted, final=final, sums=own)
    if sums is not None and own is not None:
        _join_sums(c, cuts, sums, own[1], back=False)


def walk_state_grads(
    c: Call, scores: Scores, do: Tensor, dfinal: Tensor, *, dh: Tensor, emitted: Tensor, dentering: Tensor,
    sums: Sums | None = None,
) -> None:  # fmt: skip
    """``Call.run_state_grads`` of the decay family with nothing coming back, cut if that pays."""
    cuts = c.cuts(late=False)
    if cuts is None:
        c.run_state_grads(
            scores, c.q, do, c.q, dfinal, None, dh=dh, dvalues=c.q, emitted=emitted, dentering=dentering, sums=sums
        )
        return
    part = c.over(cuts.back_totals)
    added, decays = part.states(len(cuts.back_totals.late)), _scratch_sums(part)
    part.run_state_grads(
        scores, c.q, do, c.q, dfinal, None, dh=dh, dvalues=c.q, emitted=added, dentering=part.states(0),
        only=part.tables.late, sums=decays, store=False,
    )  # fmt: skip
    factors, states = _factors(c, decays), {}
    for parts in cuts.several:
        y = None
        for i in reversed(parts[1:]):
            total = added[:, int(np.searchsorted(cuts.back_totals.late, i))]
            y = total if y is None else _decayed(y, factors, i, total)
            states[i - 1] = y
    walk = c.over(cuts.back_walk)
    ends = torch.stack([states[i] for i in cuts.back_walk.emit.tolist()], 1)
    own = None if sums is None else (sums[0], walk.sums(walk.num_pieces))
    walk.run_state_grads(scores, c.q, do, c.q, dfinal, ends, dh=dh, dvalues=c.q, emitted=emitted, dentering=dentering, sums=own)
    if sums is not None and own is not None:
        _join_sums(c, cuts, sums, own[1], back=True)


def _scratch_sums(part: Call) -> Sums | None:
    return None if part.x.gate == NONE else (part.sums(part.num_chunks), part.sums(part.num_pieces))


def _factors(c: Call, decays: Sums | None) -> Tensor | None:
    """By what each part multiplies a state: [B, parts, HV, K or 1, 1]."""
    if decays is None:
        return None
    factors = decays[1].exp2()
    return factors[..., None] if c.x.gate == VECTOR else factors[..., None, None]


def _decayed(x: Tensor, factors: Tensor | None, part: int, total: Tensor) -> Tensor:
    return x + total if factors is None else torch.addcmul(total, factors[:, part], x)


def _join_sums(c: Call, cuts: Cuts, sums: Sums, own: Tensor, *, back: bool) -> None:
    """The gate's sums over whole pieces, from those inside their parts."""
    across, totals = sums
    before: list[Tensor] = []
    joined: list[Tensor] = []
    for begin, end in zip(cuts.first[:-1].tolist(), cuts.first[1:].tolist(), strict=True):
        so_far, found = torch.zeros_like(own[:, begin]), []
        for i in range(end - 1, begin - 1, -1) if back else range(begin, end):
            found.append(so_far)
            so_far = so_far + own[:, i]
        before += reversed(found) if back else found
        joined.append(so_far)
    across += torch.stack(before, 1).index_select(
        1, index_on(c.device, c.pieces, f"part of chunk {len(before)}", cuts.of_chunk)
    )
    totals.copy_(torch.stack(joined, 1))
