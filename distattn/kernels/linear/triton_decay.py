"""Passes of the decay family over our Triton kernels: what crosses a border is added where outputs and gradients are made.

forward     begin: states from chunk to chunk                   intra, finish: outputs, late states decayed in
backward    begin: gradients of states, beside them states      intra, finish: all gradients, what comes back decayed in

Under a gate a state fades: ``intra`` makes all that is so far from a border that nothing of it is left there.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import VECTOR, Gradients
from distattn.kernels.linear.triton_configs import ALL, FAR, NEAR
from distattn.kernels.linear.triton_passes import Beside, index_on

if TYPE_CHECKING:
    from distattn.kernels.linear.triton_launch import Call, GradientBuffers


class DecayForward:
    """``ForwardPass``."""

    def __init__(self, call: Call, entering: Tensor) -> None:
        self.call, self.kept = call, call.kept
        c = call
        self.emitted, self.final = c.states(len(c.pieces.emit)), c.states(len(c.pieces.final))
        self.has_late, self.fades = len(c.pieces.late) > 0, c.x.g is not None
        self.total = self._begin(entering)
        self.transition: Tensor | None = of_pieces(c, self.total, "maps") * math.log(2) if self.fades else None

    def intra(self) -> None:
        self.o = torch.empty_like(self.call.v)
        if not self.has_late:
            self._output(None, ALL)
        elif self.fades:
            self._output(None, FAR)

    def finish(self, late: Tensor) -> tuple[Tensor, Tensor]:
        if self.has_late:
            late = late.contiguous()
            add_through(self.call, self.final, "final", late, "late", self.total)
            self._output(late, NEAR if self.fades else ALL)
        return self.o, self.final

    def _begin(self, entering: Tensor) -> Tensor:
        """Fills emitted and final; returns the gate's sums over each piece."""
        c = self.call
        self.h, self.scores = c.chunk_states(), c.scores()
        self.prefix, total = (c.sums(c.num_chunks), c.sums(c.num_pieces)) if self.has_late and self.fades else (c.q, c.q)
        c.run_states(
            self.scores, c.v, c.q, entering, None, h=self.h, values=c.v, emitted=self.emitted, final=self.final,
            sums=(self.prefix, total) if total is not c.q else None,
        )  # fmt: skip
        return total

    def _output(self, late: Tensor | None, reach: int) -> None:
        c = self.call
        c.run_output(self.o, self.scores, c.v, self.h, late, self.prefix, reach)


class DecayBackward:
    """``BackwardPass``."""

    found: GradientBuffers

    def __init__(self, call: Call, entering: Tensor, late: Tensor, dfinal: Tensor, do: Tensor) -> None:
        self.call = c = call
        self.do = do
        self.emitted, self.dentering = c.states(len(c.pieces.late)), c.states(len(c.pieces.enter))
        self.emits, self.fades = len(c.pieces.emit) > 0, c.x.g is not None
        # Either walk through the chunks leaves much of the device idle: they go side by side.
        self.beside = Beside(c.device)
        self.total = self._begin(entering, late if len(c.pieces.late) else None, dfinal)

    def intra(self) -> None:
        self._local()
        if not self.emits:
            self._gradients(None, ALL)
        elif self.fades:
            self._gradients(None, FAR)

    def finish(self, late: Tensor) -> Gradients:
        c = self.call
        if self.emits:
            dleft = late.contiguous()
            add_through(c, self.dentering, "enter", dleft, "emit", self.total)
            self._gradients(dleft, NEAR if self.fades else ALL)
        return Gradients(*c.gradients(self.found), self.dentering)

    def _begin(self, entering: Tensor, late: Tensor | None, dfinal: Tensor) -> Tensor:
        """Fills emitted and dentering; returns the gate's sums over each piece."""
        c = self.call
        self.dh, self.h, self.scores = c.chunk_states(), c.chunk_states(), c.scores()
        self.suffix, total = (c.sums(c.num_chunks), c.sums(c.num_pieces)) if self.emits and self.fades else (c.q, c.q)
        with self.beside:
            c.run_states(
                self.scores, c.v, c.q, entering, late, h=self.h, values=c.v,
                emitted=c.states(len(c.pieces.emit)), final=c.states(len(c.pieces.final)),
            )  # fmt: skip
        c.run_state_grads(
            self.scores, c.q, self.do, c.q, dfinal, None, dh=self.dh, dvalues=c.q, emitted=self.emitted,
            dentering=self.dentering, sums=(self.suffix, total) if total is not c.q else None,
        )  # fmt: skip
        return total

    def _local(self) -> None:
        """What needs nothing from other ranks, and the buffers of gradients."""
        self.beside.join()
        self.scores = self.scores._replace(Qr=self.call.q)  # read by nobody any more, and as large as q
        self.found = self.call.gradient_buffers()

    def _gradients(self, dleft: Tensor | None, reach: int) -> None:
        self._run(dleft, reach, True)
        if self.call.x.gate == VECTOR and reach != FAR:
            # Chunks that are not mild are rare: one launch for those that are reached and the others.
            self._run(dleft, ALL, False)

    def _run(self, dleft: Tensor | None, reach: int, mild: bool) -> None:
        """mild: of a vector of gates, which chunks; those of other gates count as mild."""
        c = self.call
        c.run_gradients(
            self.found, self.scores, c.q, c.v, self.do, c.q, self.h, self.dh, dleft, self.suffix, reach=reach, mild=mild
        )


def of_pieces(c: Call, sums: Tensor, name: str) -> Tensor:
    """[B, num, HV(, K)]: the sums over the pieces of a set."""
    members = getattr(c.pieces, name)
    if not len(members):
        return c.sums(0)
    return sums.index_select(1, index_on(c.device, c.pieces, name, members))


def add_through(c: Call, states: Tensor, into: str, entered: Tensor, by: str, total: Tensor) -> None:
    """Add to the states of one set of pieces what entered them as members of the other, decayed by the whole piece."""
    into_set, by_set = getattr(c.pieces, into), getattr(c.pieces, by)
    both = np.intersect1d(into_set, by_set)
    if not len(both):
        return
    target = index_on(c.device, c.pieces, f"{into} of {by}", np.searchsorted(into_set, both))
    source = index_on(c.device, c.pieces, f"{by} of {into}", np.searchsorted(by_set, both))
    passed = entered.index_select(1, source)
    if c.x.g is not None:
        decay = total.index_select(1, index_on(c.device, c.pieces, f"{into} and {by}", both)).exp2()
        passed = passed * (decay[..., None] if c.x.gate == VECTOR else decay[..., None, None])
    states.index_add_(1, target, passed)
