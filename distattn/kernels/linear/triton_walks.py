"""Passes of the decay family with a gate a head, or none, over walks by spans (``triton_walk.py``).

forward     begin: what enters each span                                        intra, finish: outputs
backward    begin: what enters each span, and its gradients from behind         intra: dq; intra, finish: dk, dv

A state that crosses a border fades under a gate: ``intra`` makes the spans that it does not reach.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distattn.kernels.linear.protocol import Gradients
from distattn.kernels.linear.triton_configs import ALL, FAR, NEAR
from distattn.kernels.linear.triton_decay import add_through, of_pieces
from distattn.kernels.linear.triton_passes import Beside

if TYPE_CHECKING:
    from distattn.kernels.linear.triton_launch import Call

FORWARDS = ("enter", "late", "emit", "final")
"""The sets of pieces that start from a given state or from another piece's, and that end with one for another piece or for the
caller."""

BACKWARDS = ("final", "emit", "late", "enter")


class WalkForward:
    """``ForwardPass``."""

    def __init__(self, call: Call, entering: Tensor) -> None:
        self.call = c = call
        self.emitted, self.final = c.states(len(c.pieces.emit)), c.states(len(c.pieces.final))
        self.has_late, self.fades = len(c.pieces.late) > 0, c.x.g is not None
        self.spans = c.span_states(None, entering, None, self.emitted, self.final, FORWARDS)
        self.transition: Tensor | None = of_pieces(c, self.spans.through, "maps") * math.log(2) if self.fades else None

    def intra(self) -> None:
        self.o = torch.empty_like(self.call.v)
        if not self.has_late:
            self._output(None, ALL)
        elif self.fades:
            self._output(None, FAR)

    def finish(self, late: Tensor) -> tuple[Tensor, Tensor]:
        if self.has_late:
            late = late.contiguous()
            add_through(self.call, self.final, "final", late, "late", self.spans.through)
            self._output(late, NEAR if self.fades else ALL)
        return self.o, self.final

    def _output(self, late: Tensor | None, reach: int) -> None:
        c = self.call
        c.run_walk(self.o, c.q, c.k, c.v, self.spans, late, reach=reach)


class WalkBackward:
    """``BackwardPass`` where nobody asks for the gradient of the gate."""

    def __init__(self, call: Call, entering: Tensor, late: Tensor, dfinal: Tensor, do: Tensor) -> None:
        self.call = c = call
        self.do = do
        self.emitted, self.dentering = c.states(len(c.pieces.late)), c.states(len(c.pieces.enter))
        self.emits, self.fades = len(c.pieces.emit) > 0, c.x.g is not None
        self.beside = Beside(c.device)
        with self.beside:
            left, kept = c.states(len(c.pieces.emit)), c.states(len(c.pieces.final))
            self.spans = c.span_states(None, entering, late if len(c.pieces.late) else None, left, kept, FORWARDS)
        self.dspans = c.span_states(do, dfinal, None, self.emitted, self.dentering, BACKWARDS)

    def intra(self) -> None:
        c = self.call
        self.beside.join()
        self.found = c.gradient_buffers()
        c.run_walk(self.found.dq, self.do, c.v, c.k, self.spans, transposed=True)
        if not self.emits:
            self._backwards(None, ALL)
        elif self.fades:
            self._backwards(None, FAR)

    def finish(self, late: Tensor) -> Gradients:
        c = self.call
        if self.emits:
            dleft = late.contiguous()
            add_through(c, self.dentering, "enter", dleft, "emit", self.dspans.through)
            self._backwards(dleft, NEAR if self.fades else ALL)
        return Gradients(*c.gradients(self.found), self.dentering)

    def _backwards(self, dleft: Tensor | None, reach: int) -> None:
        c = self.call
        c.run_walk(self.found.dv, c.k, c.q, self.do, self.dspans, dleft, "emit", reach=reach, reverse=True)
        c.run_walk(self.found.dk, c.v, self.do, c.q, self.dspans, dleft, "emit", reach=reach, transposed=True, reverse=True)
