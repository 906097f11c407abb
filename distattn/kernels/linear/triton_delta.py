"""Passes of the delta family over our Triton kernels: a late state changes all values after it, so that its pieces walk again.

forward     begin: T, U, W, walks of pieces that wait for nothing, summaries of the others
            intra: outputs, if all have walked                          finish: walks of late pieces, outputs
backward    begin: T, U, W, walks of gradients likewise, beside them states
            intra: gradients, if all have walked                        finish: walks of emitting pieces, gradients

Pieces that cross a border are cut into parts where that is faster (``triton_parts.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import VECTOR, Gradients
from distattn.kernels.linear.triton_passes import Beside, index_on

if TYPE_CHECKING:
    from distattn.kernels.linear.triton_launch import Call


class DeltaForward:
    """``ForwardPass``."""

    def __init__(self, call: Call, entering: Tensor) -> None:
        self.call = c = call
        pieces = c.pieces
        self.scores = c.scores()
        # Only one walk through a chunk stores anything: V' takes the place of U, and below dV' that of dV_in.
        _, self.values, self.W = c.solve(self.scores.overlap)
        self.h, self.kept = c.chunk_states(), c.kept
        self.emitted, self.final = c.states(len(pieces.emit)), c.states(len(pieces.final))
        self.parts = c.parts()
        direct = np.setdiff1d(np.arange(c.num_pieces), pieces.late)
        if len(direct):
            c.run_states(
                self.scores, self.values, self.W, entering, None, h=self.h, values=self.values, emitted=self.emitted,
                final=self.final, only=self.parts.mask("direct forward", direct, c.num_pieces, c.device),
            )  # fmt: skip
        self.transition: Tensor | None = c.states(len(pieces.maps), c.key_dim)
        if len(pieces.late):
            self._summarise()

    def _summarise(self) -> None:
        """B and M of the parts of late pieces, and of those that hand states on."""
        c, parts, pieces = self.call, self.parts, self.call.pieces
        self.over = c.over(parts.pieces)
        self.entering = self.over.states(len(parts.pieces.enter))  # of pieces that are not late: nobody reads them
        self.offsets, self.maps = _summary_buffers(self.over, "emit")
        late_parts = parts.of_pieces(pieces.late)
        mapped, chosen = (np.intersect1d(members, late_parts) for members in (parts.pieces.maps, parts.pieces.emit))
        beside = Beside(c.device)
        with beside:
            self.over.run_transitions(self.scores, self.W, self.maps, parts.mask("M", mapped, len(parts.piece), c.device))
        if len(chosen):
            self.over.run_states(
                self.scores, self.values, self.W, self.entering, None, h=None, values=self.values, emitted=self.offsets,
                final=self.over.states(len(parts.pieces.final)), only=parts.mask("B", chosen, len(parts.piece), c.device),
                beside=True,
            )  # fmt: skip
        beside.join()
        for piece in pieces.maps.tolist():
            _, left = parts.fold(piece, None, self.offsets, self.maps)
            assert left is not None, "an emitting piece is known to its end"
            self.emitted[:, int(np.searchsorted(pieces.emit, piece))] = left
        if len(pieces.maps):
            self.transition = torch.stack([parts.map_of(piece, self.maps) for piece in pieces.maps.tolist()], 1)

    def intra(self) -> None:
        c = self.call
        self.o = torch.empty_like(c.v)
        if not len(c.pieces.late):
            c.run_output(self.o, self.scores, self.values, self.h, None, c.q)

    def finish(self, late: Tensor) -> tuple[Tensor, Tensor]:
        c = self.call
        if len(c.pieces.late):
            self._walk(late)
            c.run_output(self.o, self.scores, self.values, self.h, None, c.q)
        return self.o, self.final

    def _walk(self, late: Tensor) -> None:
        """Through all parts of late pieces, from their states."""
        c, parts, pieces = self.call, self.parts, self.call.pieces
        starts: dict[int, Tensor] = {}
        for row, piece in enumerate(pieces.late.tolist()):
            starts |= parts.fold(piece, late[:, row], self.offsets, self.maps)[0]
        chosen = parts.of_pieces(pieces.late)
        final = self.over.states(len(parts.pieces.final))
        self.over.run_states(
            self.scores, self.values, self.W, self.entering, _stacked(self.over, parts.pieces.late, starts), h=self.h,
            values=self.values, emitted=torch.empty_like(self.offsets), final=final,
            only=parts.mask("late forward", chosen, len(parts.piece), c.device),
        )  # fmt: skip
        ends = np.intersect1d(parts.pieces.final, chosen)
        if len(ends):
            source = index_on(c.device, parts.pieces, "final from", np.searchsorted(parts.pieces.final, ends))
            target = index_on(c.device, parts.pieces, "final to", np.searchsorted(c.pieces.final, parts.piece[ends]))
            self.final.index_copy_(1, target, final.index_select(1, source))


class DeltaBackward:
    """``BackwardPass``."""

    def __init__(self, call: Call, entering: Tensor, late: Tensor, dfinal: Tensor, do: Tensor) -> None:
        self.call = c = call
        pieces = c.pieces
        self.do = do
        self.emitted, self.dentering = c.states(len(pieces.late)), c.states(len(pieces.enter))
        self.dh, self.h = c.chunk_states(), c.chunk_states()
        self.scores = c.scores()
        self.T, self.values, self.W = c.solve(self.scores.overlap)
        self.parts = c.parts()
        # Walks leave most of the device idle: they go side by side.
        self.states, self.mapping = Beside(c.device, 0), Beside(c.device, 1)
        with self.states:  # what the pieces leave is known from the forward: it goes nowhere
            c.run_states(
                self.scores, self.values, self.W, entering, late if len(pieces.late) else None, h=self.h, values=self.values,
                emitted=c.states(len(pieces.emit)), final=c.states(len(pieces.final)), beside=True,
            )  # fmt: skip
        if len(pieces.emit):
            self._begin_parts()
        self.dvalues = c.values_grad(self.scores.P, do)
        direct = np.setdiff1d(np.arange(c.num_pieces), pieces.emit)
        if len(direct):
            only = self.parts.mask("direct backward", direct, c.num_pieces, c.device)
            c.run_state_grads(
                self.scores, self.W, do, self.dvalues, dfinal, None, dh=self.dh, dvalues=self.dvalues, emitted=self.emitted,
                dentering=self.dentering, only=only,
            )  # fmt: skip
        if len(pieces.emit):
            self._summarise()

    def _begin_parts(self) -> None:
        c, parts = self.call, self.parts
        self.over = c.over(parts.pieces)
        self.offsets, self.maps = _summary_buffers(self.over, "late")
        mapped = np.intersect1d(parts.pieces.maps, parts.of_pieces(np.intersect1d(c.pieces.emit, parts.several)))
        if len(mapped):
            with self.mapping:
                only = parts.mask("M of several", mapped, len(parts.piece), c.device)
                self.over.run_transitions(self.scores, self.W, self.maps, only)
        self.dstart = self.over.states(len(parts.pieces.enter))
        self.dfinal_parts = self.over.states(len(parts.pieces.final))  # of pieces that do not emit: nobody reads them

    def _summarise(self) -> None:
        """D of the parts of emitting pieces, and of those that others wait for."""
        c, parts, pieces = self.call, self.parts, self.call.pieces
        chosen = np.intersect1d(parts.pieces.late, parts.of_pieces(pieces.emit))
        if len(chosen):
            self._run(None, self.offsets, parts.mask("D", chosen, len(parts.piece), c.device), store=False)
        self.mapping.join()
        for piece in pieces.maps.tolist():
            _, entered = parts.fold_back(piece, None, self.offsets, self.maps)
            assert entered is not None, "a late piece is known to its start"
            self.emitted[:, int(np.searchsorted(pieces.late, piece))] = entered

    def intra(self) -> None:
        if not len(self.call.pieces.emit):
            self._gradients()

    def finish(self, late: Tensor) -> Gradients:
        if len(self.call.pieces.emit):
            self._walk(late)
            self._gradients()
        return Gradients(*self.call.gradients(self.found), self.dentering)

    def _walk(self, dleft: Tensor) -> None:
        """Back through all parts of emitting pieces, from the gradients of the states that they left."""
        c, parts, pieces = self.call, self.parts, self.call.pieces
        ends: dict[int, Tensor] = {}
        for row, piece in enumerate(pieces.emit.tolist()):
            ends |= parts.fold_back(piece, dleft[:, row], self.offsets, self.maps)[0]
        chosen = parts.of_pieces(pieces.emit)
        only = parts.mask("emit backward", chosen, len(parts.piece), c.device)
        self._run(_stacked(self.over, parts.pieces.emit, ends), torch.empty_like(self.offsets), only, store=True)
        begins = np.intersect1d(parts.pieces.enter, np.intersect1d(chosen, parts.first[pieces.enter]))
        if len(begins):
            source = index_on(c.device, parts.pieces, "dentering from", np.searchsorted(parts.pieces.enter, begins))
            target = index_on(c.device, parts.pieces, "dentering to", np.searchsorted(pieces.enter, parts.piece[begins]))
            self.dentering.index_copy_(1, target, self.dstart.index_select(1, source))

    def _run(self, dleft: Tensor | None, emitted: Tensor, only: Tensor, *, store: bool) -> None:
        self.over.run_state_grads(
            self.scores, self.W, self.do, self.dvalues, self.dfinal_parts, dleft, dh=self.dh, dvalues=self.dvalues,
            emitted=emitted, dentering=self.dstart, only=only, store=store,
        )  # fmt: skip

    def _gradients(self) -> None:
        c = self.call
        self.states.join()
        # Read by nobody any more, and each as large as q.
        self.scores, self.W = self.scores._replace(Qr=c.q, Kt=c.q, P=c.q, overlap=c.q), c.q
        self.found = c.gradient_buffers()
        for mild in (True, False) if c.x.gate == VECTOR else (True,):
            c.run_gradients(
                self.found, self.scores, self.T, self.values, self.do, self.dvalues, self.h, self.dh, None, c.q, mild=mild
            )


def _summary_buffers(over: Call, offsets_of: str) -> tuple[Tensor, Tensor]:
    """(B or D of the parts in a set, M of those in ``maps``); allocated here, where the current stream reads them."""
    return over.states(len(getattr(over.pieces, offsets_of))), over.states(len(over.pieces.maps), over.key_dim)


def _stacked(over: Call, members: np.ndarray, states: dict[int, Tensor]) -> Tensor:
    """[B, num, HV, K, V]: one state each, any where there is none, since nobody reads it."""
    if not len(members):
        return over.states(0)
    filler = next(iter(states.values()), None)
    if filler is None:
        return over.states(len(members))
    return torch.stack([states.get(part, filler) for part in members.tolist()], 1)
