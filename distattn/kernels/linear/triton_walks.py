"""Passes of the decay family with a gate a head, or none, over walks by spans: one launch a direction (``triton_fused.py``)
where no state crosses a border and the device has room, else kernel by kernel (``triton_walk.py``):

forward     begin: what enters each span                                        intra, finish: outputs
backward    begin: gradients of what enters each span, from behind              intra: dq; intra, finish: dk, dv

What enters each span is kept for the backward, or made again. Every kernel leaves much of the device idle where it begins and
ends: dq and dk go beside the rest. A state that crosses a border fades under a gate: ``intra`` makes the spans that it does not
reach.
"""

from __future__ import annotations

from torch import Tensor

from distattn.kernels.linear.triton_decay import DecayBackward, DecayForward

FORWARDS = ("enter", "late", "emit", "final")
"""The sets of pieces that start from a given state or from another piece's, and that end with one for another piece or for the
caller."""

BACKWARDS = ("final", "emit", "late", "enter")


class WalkForward(DecayForward):
    """``ForwardPass``."""

    def _begin(self, entering: Tensor) -> Tensor:
        c = self.call
        self.spans = c.fill_spans(c.span_room(keep=True), None, entering, None, self.emitted, self.final, FORWARDS)
        return self.spans.through

    def _output(self, late: Tensor | None, reach: int) -> None:
        c = self.call
        c.run_walk(self.o, c.q, c.k, c.v, self.spans, late, reach=reach)


class WalkBackward(DecayBackward):
    """``BackwardPass`` where nobody asks for the gradient of the gate."""

    def _begin(self, entering: Tensor, late: Tensor | None, dfinal: Tensor) -> Tensor:
        c = self.call
        # Buffers before the mark: what is written beside must not lie where something launched later still reads.
        self.found, self.spans, self._late = c.gradient_buffers(), c.span_room(keep=True), late
        self.beside.mark()
        if not c.knows_spans:
            # Memory that is taken in there comes back to that stream, which then follows everything launched before.
            with self.beside:
                left, last = c.states(len(c.pieces.emit)), c.states(len(c.pieces.final))
                c.fill_spans(self.spans, None, entering, late, left, last, FORWARDS)
            self._late = None  # the spans have it
            self.beside.mark()
        self.dspans = c.fill_spans(c.span_room(keep=False), self.do, dfinal, None, self.emitted, self.dentering, BACKWARDS)
        return self.dspans.through

    def _local(self) -> None:
        c = self.call
        with self.beside:
            c.run_walk(self.found.dq, self.do, c.v, c.k, self.spans, self._late, transposed=True)

    def _gradients(self, dleft: Tensor | None, reach: int) -> None:
        c = self.call
        with self.beside:
            c.run_walk(self.found.dk, c.v, self.do, c.q, self.dspans, dleft, "emit", reach=reach, transposed=True, reverse=True)
        c.run_walk(self.found.dv, c.k, c.q, self.do, self.dspans, dleft, "emit", reach=reach, reverse=True)
        self.beside.join()


class FusedForward(DecayForward):
    """``ForwardPass`` where no state crosses a border: one launch."""

    def _begin(self, entering: Tensor) -> Tensor:
        self._entering = entering
        self.spans = self.call.span_room(keep=True)
        return self.spans.through

    def _output(self, late: Tensor | None, reach: int) -> None:
        del late, reach
        self.call.run_fused_forward(self.o, self.spans, self._entering, self.final)


class FusedBackward(DecayBackward):
    """``BackwardPass`` where no state crosses a border and what enters the spans is known: one launch."""

    def _begin(self, entering: Tensor, late: Tensor | None, dfinal: Tensor) -> Tensor:
        del entering, late
        self._dfinal, self.found = dfinal, self.call.gradient_buffers()
        return self.found.dq

    def _local(self) -> None: ...

    def _gradients(self, dleft: Tensor | None, reach: int) -> None:
        del dleft, reach
        c = self.call
        c.run_fused_backward(self.found, self.do, c.span_room(keep=True), self._dfinal, self.dentering)
