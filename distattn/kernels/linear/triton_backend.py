"""Our Triton kernels for linear attention as a backend: every operator, forward and backward, any pieces.

Compiled on CUDA; on CPU only under Triton's interpreter (``TRITON_INTERPRET=1``), which is slow and there for tests.

decay family   forward    begin: states from chunk to chunk                        finish: outputs, late states decayed in
               backward   begin: gradients of states, and beside them states       finish: all gradients
delta family   forward    begin: T, U, W, states, transitions                      finish: states of late pieces again, outputs
               backward   begin: T, U, W, gradients of states, beside them states  finish: those of emitting pieces again, rest
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import VECTOR, Gradients, LinearCase, Operands, Pieces
from distattn.kernels.linear.triton_configs import LinearConfigs
from distattn.kernels.linear.triton_self_test import broken
from distattn.kernels.triton_here import why_no_triton

if TYPE_CHECKING:
    from distattn.kernels.linear.triton_launch import Call

MAX_KEY_DIM = 256


class TritonLinear:
    """``LinearBackend`` by our Triton kernels (bf16, fp16, fp32).

    configs: launch configurations to use in place of the table's, for measurements.
    """

    name = "triton"

    def __init__(self, configs: LinearConfigs | None = None) -> None:
        self._configs = configs

    def why_not(self, case: LinearCase) -> str | None:
        if case.key_dim > MAX_KEY_DIM:
            return f"takes key dimensions up to {MAX_KEY_DIM}, not {case.key_dim}"
        if reason := why_no_triton(case.device_type, case.dtype):
            return reason
        if case.device_type == "cpu":
            return None
        if case.dtype == torch.float32:
            # Some of them read invalid addresses as compiled by Triton 3.6 for Hopper; all are right in the interpreter.
            return "computes bf16 and fp16 on cuda, not fp32"
        return broken(self, case, torch.device("cuda", torch.cuda.current_device()))

    def forward_begin(self, x: Operands, pieces: Pieces, entering: Tensor) -> _Forward:
        return _Forward(self._call(x, pieces), entering.contiguous())

    def backward_begin(
        self, x: Operands, pieces: Pieces, entering: Tensor, late: Tensor, do: Tensor, dfinal: Tensor
    ) -> _Backward:
        states = (entering.contiguous(), late.contiguous(), dfinal.contiguous())
        return _Backward(self._call(x, pieces), *states, do.contiguous())

    def _call(self, x: Operands, pieces: Pieces) -> Call:
        return importlib.import_module("distattn.kernels.linear.triton_launch").Call(x, pieces, self._configs)


class _Forward:
    """``ForwardPass``."""

    def __init__(self, call: Call, entering: Tensor) -> None:
        self.call = c = call
        self.entering = entering
        self.emitted, self.final = c.states(len(c.pieces.emit)), c.states(len(c.pieces.final))
        self.has_late = len(c.pieces.late) > 0
        self.h = c.chunk_states()
        self.transition: Tensor | None = None
        sums = None
        self.prefix = self.total = c.q
        self.scores = c.scores()
        if c.delta:
            _, self.U, self.W = c.solve(self.scores.overlap)
            self.values = torch.empty_like(self.U)
        else:
            self.U, self.W, self.values = c.v, c.q, c.v
            if self.has_late and c.x.g is not None:
                self.prefix, self.total = sums = c.sums(c.num_chunks), c.sums(c.num_pieces)
        skipped = np.setdiff1d(c.pieces.late, c.pieces.emit) if c.delta else c.pieces.late[:0]
        c.run_states(
            self.scores, self.U, self.W, entering, None, h=self.h, values=self.values, emitted=self.emitted, final=self.final,
            only=_without(c, "forward", skipped), sums=sums,
        )  # fmt: skip
        if c.delta:
            self.transition = c.run_identity(self.scores, self.W)
        elif c.x.g is not None:
            self.transition = _of_pieces(c, self.total, "maps") * math.log(2)

    def intra(self) -> None:
        """Nothing: outputs take one kernel, which reads the states of late pieces too."""

    def finish(self, late: Tensor) -> tuple[Tensor, Tensor]:
        c, late = self.call, late.contiguous()
        if not self.has_late:
            return c.output(self.scores, self.values, self.h, None, self.prefix), self.final
        if c.delta:
            emitted = torch.empty_like(self.emitted)  # the exchange may still read what began
            c.run_states(
                self.scores, self.U, self.W, self.entering, late, h=self.h, values=self.values, emitted=emitted,
                final=self.final, only=c.tables.late,
            )  # fmt: skip
            return c.output(self.scores, self.values, self.h, None, self.prefix), self.final
        _add_through(c, self.final, "final", late, "late", self.total)
        return c.output(self.scores, self.values, self.h, late, self.prefix), self.final


class _Backward:
    """``BackwardPass``."""

    def __init__(self, call: Call, entering: Tensor, late: Tensor, dfinal: Tensor, do: Tensor) -> None:
        self.call = c = call
        self.entering, self.late, self.dfinal, self.do = entering, late, dfinal, do
        self.emitted, self.dentering = c.states(len(c.pieces.late)), c.states(len(c.pieces.enter))
        self.emits = len(c.pieces.emit) > 0
        self.dh = c.chunk_states()
        self.h = c.chunk_states()
        self.suffix = self.total = self.T = self.U = self.W = self.dv_inside = self.dvalues = c.q
        self.values = c.v
        sums = None
        self.scores = c.scores()
        if c.delta:
            self.T, self.U, self.W = c.solve(self.scores.overlap)
            self.values = torch.empty_like(self.U)
        elif self.emits and c.x.g is not None:
            self.suffix, self.total = sums = c.sums(c.num_chunks), c.sums(c.num_pieces)
        # Either walk through the chunks leaves most of the device idle: they go side by side.
        self.beside = _Beside(c.device)
        with self.beside:
            self._run_states()
        if c.delta:
            self.dv_inside = c.values_grad(self.scores.P, do)
            self.dvalues = torch.empty_like(self.dv_inside)
        skipped = np.setdiff1d(c.pieces.emit, c.pieces.late) if c.delta else c.pieces.emit[:0]
        self._run(None, emitted=self.emitted, only=_without(c, "backward", skipped), sums=sums)

    def _run_states(self) -> None:
        """Again. What the pieces leave is known from the forward: it goes nowhere."""
        c = self.call
        c.run_states(
            self.scores, self.U if c.delta else c.v, self.W, self.entering, self.late if len(c.pieces.late) else None, h=self.h,
            values=self.values, emitted=c.states(len(c.pieces.emit)), final=c.states(len(c.pieces.final)),
        )  # fmt: skip

    def _run(
        self, dleft: Tensor | None, *, emitted: Tensor, only: Tensor | None = None, sums: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.call.run_state_grads(
            self.scores, self.W, self.do, self.dv_inside, self.dfinal, dleft, dh=self.dh, dvalues=self.dvalues,
            emitted=emitted, dentering=self.dentering, only=only, sums=sums,
        )  # fmt: skip

    def intra(self) -> None:
        """Nothing: the states run beside their gradients since the beginning."""

    def finish(self, late: Tensor) -> Gradients:
        c, dleft = self.call, late.contiguous()
        self.beside.join()
        outside = None
        if self.emits and c.delta:
            self._run(dleft, emitted=torch.empty_like(self.emitted), only=c.tables.emit)
        elif self.emits:
            outside = dleft
            _add_through(c, self.dentering, "enter", dleft, "emit", self.total)
        found = c.gradients(
            self.scores, self.T, self.values, self.do, self.dvalues, self.h, self.dh, outside, self.suffix
        )  # fmt: skip
        return Gradients(*found, self.dentering)


class _Beside:
    """A stream beside the current one, on devices that have streams: what is launched in the context follows what was launched
    before it, and what comes after ``join`` follows both."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device) if device.type == "cuda" else None
        self._device = device

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._context.__exit__(*error)

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@lru_cache(maxsize=64)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# Sets of pieces on the device.

_indices: weakref.WeakKeyDictionary[Pieces, dict[tuple[str, torch.device], Tensor]] = weakref.WeakKeyDictionary()


def _index(pieces: Pieces, name: str, values: np.ndarray, device: torch.device, dtype: type = np.int64) -> Tensor:
    """Host indices on the device, uploaded once; name: tells them apart."""
    known = _indices.setdefault(pieces, {})
    if (name, device) not in known:
        known[name, device] = torch.from_numpy(np.ascontiguousarray(values, dtype)).to(device)
    return known[name, device]


def _without(c: Call, name: str, skipped: np.ndarray) -> Tensor | None:
    """The pieces but those that are skipped, as ``only`` takes them: −1 for those; None for all."""
    if not len(skipped):
        return None
    rows = np.zeros(len(c.pieces.lengths), np.int64)
    rows[skipped] = -1
    return _index(c.pieces, name, rows, c.device, np.int32)


def _of_pieces(c: Call, sums: Tensor, name: str) -> Tensor:
    """[B, num, HV(, K)]: the sums over the pieces of a set."""
    members = getattr(c.pieces, name)
    if not len(members):
        return c.sums(0)
    return sums.index_select(1, _index(c.pieces, name, members, c.device))


def _add_through(c: Call, states: Tensor, into: str, entered: Tensor, by: str, total: Tensor) -> None:
    """Add to the states of one set of pieces what entered them as members of the other, decayed by the whole piece."""
    into_set, by_set = getattr(c.pieces, into), getattr(c.pieces, by)
    both = np.intersect1d(into_set, by_set)
    if not len(both):
        return
    target = _index(c.pieces, f"{into} of {by}", np.searchsorted(into_set, both), c.device)
    source = _index(c.pieces, f"{by} of {into}", np.searchsorted(by_set, both), c.device)
    passed = entered.index_select(1, source)
    if c.x.g is not None:
        decay = total.index_select(1, _index(c.pieces, f"{into} and {by}", both, c.device)).exp2()
        passed = passed * (decay[..., None] if c.x.gate == VECTOR else decay[..., None, None])
    states.index_add_(1, target, passed)
