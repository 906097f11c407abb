"""Launches of the linear Triton kernels for one call: sizes, tables, scratch memory, constants.

A method is one kernel; ``triton_backend.py`` says in which order they run.
"""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.errors import UnsupportedError
from distattn.kernels.linear import (
    triton_chunks,
    triton_fused,
    triton_gradient,
    triton_output,
    triton_states,
    triton_transitions,
    triton_walk,
)
from distattn.kernels.linear.protocol import CONSTANT, NONE, SCALAR, VECTOR, Operands, Pieces
from distattn.kernels.linear.triton_configs import ALL, Launch, LinearConfigs, linear_configs, padded
from distattn.kernels.linear.triton_parts import Parts, count_parts, parts_of
from distattn.kernels.linear.triton_passes import counters
from distattn.kernels.linear.triton_spans import (
    CHUNK,
    MAX_PROGRAMS,
    Spans,
    count_kept,
    fits_at_once,
    num_multiprocessors,
    spans_for,
    walk_blocks,
)

# Triton types kernels as plain functions, whose launches are no subscripts.
_chunks: Any = triton_chunks
_states: Any = triton_states
_transitions: Any = triton_transitions
_output: Any = triton_output
_gradient: Any = triton_gradient
_walk: Any = triton_walk
_fused: Any = triton_fused

_GATES = {NONE: 0, CONSTANT: 1, SCALAR: 2, VECTOR: 3}


class Scores(NamedTuple):
    """P [B, T, HV, CHUNK] in the compute dtype, Γ likewise in fp32; Qr, Kt [B, T, HV, K]; last [B, M, HV, K]: G of each chunk's
    last row.

    Of other gates than a vector: q and k for Qr and Kt, and for last what kernels read of the gate.
    """

    P: Tensor
    overlap: Tensor
    Qr: Tensor
    Kt: Tensor
    last: Tensor


class GradientBuffers(NamedTuple):
    """What the gradient kernel writes: dq, dk [B, T, HV, K], dv [B, T, HV, V], dg [B, T, HV(, K)], dbeta [B, T, HV]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor


class SpanStates(NamedTuple):
    """What enters each span, [B, P, HV, K, V] in fp32, and the gate's sums from its piece's beginning to each span, [B, P, HV],
    and over each piece, [B, N, HV], in the direction of a walk."""

    states: Tensor
    before: Tensor
    through: Tensor


_PHASES = ("ADD", "ENTER", "WALK")
"""Of the fused kernels."""

_FLAT_BLOCK = 256
"""Of a state, for a program of ``span_states_kernel``: small enough to find room beside the walks of another stream."""


class Call:
    """One call's operands, made contiguous, and what launches share. Scratch memory is in the compute dtype: bf16 for bf16
    inputs, else fp32, whose products run in tf32 for fp16 inputs and in three times tf32 for fp32 ones."""

    def __init__(
        self,
        x: Operands,
        pieces: Pieces,
        configs: LinearConfigs | None,
        num_parts: int = 0,
        fused: bool = True,
        kept: Tensor | None = None,
    ) -> None:
        """num_parts: of pieces that cross borders, in the delta family; 0: what fills the device. fused: one launch for walks
        by spans where that can be. kept: in the backward, what the forward kept; None or empty: made again."""
        self.q, self.k, self.v = (t.contiguous() for t in (x.q, x.k, x.v))
        self.x, self.pieces, self.scale = x, pieces, float(x.scale)
        self.batch, self.num_rows, self.heads, self.key_dim = x.q.shape
        self.value_heads, self.value_dim = x.v.shape[2:]
        self.device = x.v.device
        self.tables = pieces.tables(self.device, CHUNK)
        self.num_chunks, self.num_pieces = len(self.tables.chunks), len(pieces.lengths)
        self._check_walkers()
        self.delta = x.beta is not None
        self.beta = self.q if x.beta is None else x.beta.contiguous()
        self.compute = torch.bfloat16 if self.q.dtype == torch.bfloat16 else torch.float32
        self.configs = configs or linear_configs(self.q.dtype, x.gate, self.delta, self.key_dim, self.value_dim)
        self.num_parts, self._may_fuse = num_parts, fused
        self.knows = kept is not None and len(kept) > 0
        counts = count_kept(x, self.spans)
        self.kept = kept if kept is not None and self.knows else self.q.new_empty(sum(counts), dtype=torch.float32)
        self._kept_spans, self._kept_sums = self.kept.split(counts)
        self.g = self._gate()

    def over(self, pieces: Pieces) -> Call:
        """The same call over other pieces of the same chunks."""
        other = copy(self)
        other.pieces, other.tables, other.num_pieces = pieces, pieces.tables(self.device, CHUNK), len(pieces.lengths)
        other._check_walkers()
        return other

    def parts(self) -> Parts:
        """How the pieces that cross borders are cut."""
        crossing = np.union1d(self.pieces.late, self.pieces.emit)
        number = self.num_parts
        if not number:
            longest = int(-(-self.pieces.lengths[crossing].max(initial=0) // CHUNK))
            number = count_parts(self._num_walks(len(crossing)), 2 * num_multiprocessors(self.device), longest)
        return parts_of(self.pieces, number, CHUNK)

    @cached_property
    def spans(self) -> Spans | None:
        """How pieces are cut for walks side by side, or None where they are not."""
        return spans_for(self.x, self.pieces, self.configs)

    # Shapes and constants.

    def _num_walkers(self, number: int) -> int:
        """Pieces, or spans, of all batch entries and value heads."""
        return self.batch * number * self.value_heads

    def _check_walkers(self) -> None:
        number = self._num_walkers(self.num_pieces)
        if number > MAX_PROGRAMS:
            raise UnsupportedError(
                f"{self.num_pieces} pieces of documents, {self.batch} batch entries and {self.value_heads} value heads make "
                f"{number} walks, and the Triton kernels of linear attention take at most {MAX_PROGRAMS} a call: give them "
                'fewer documents at once, or pass kernel="torch"'
            )

    def scratch(self, *tail: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B, T, HV, …]"""
        return self.q.new_empty((self.batch, self.num_rows, self.value_heads, *tail), dtype=dtype or self.compute)

    def chunk_states(self) -> Tensor:
        """[B, M, HV, K, V]: one state a chunk."""
        shape = (self.batch, self.num_chunks, self.value_heads, self.key_dim, self.value_dim)
        return self.q.new_empty(shape, dtype=self.compute)

    def states(self, number: int, width: int | None = None) -> Tensor:
        """[B, number, HV, K, V] in fp32."""
        shape = (self.batch, number, self.value_heads, self.key_dim, width or self.value_dim)
        return self.q.new_empty(shape, dtype=torch.float32)

    def sums(self, number: int) -> Tensor:
        """[B, number, HV(, K)]: sums of the gate, zeros where there is none."""
        tail = (self.key_dim,) if self.x.gate == VECTOR else ()
        return self.q.new_empty((self.batch, number, self.value_heads, *tail), dtype=torch.float32)

    @cached_property
    def shape(self) -> dict[str, int]:
        return {"H": self.heads, "HV": self.value_heads, "K": self.key_dim, "V": self.value_dim}

    @property
    def gate(self) -> int:
        return _GATES[self.x.gate]

    @property
    def with_dg(self) -> bool:
        return self.x.g is not None and self.x.with_dg

    @property
    def precision(self) -> str:
        return "tf32x3" if self.q.dtype == torch.float32 else "tf32"

    @cached_property
    def _common(self) -> dict[str, Any]:
        compute = tl.bfloat16 if self.compute == torch.bfloat16 else tl.float32
        return {"GATE": self.gate, "COMPUTE": compute, "PRECISION": self.precision}

    @staticmethod
    def _options(config: Launch) -> dict[str, int]:
        return {"num_warps": config.num_warps, "num_stages": config.num_stages}

    @property
    def _programs(self) -> int:
        """One a chunk and head."""
        return self.batch * self.num_chunks * self.value_heads

    def _blocks(self, config: Launch) -> dict[str, int]:
        return {
            "BLOCK_K": min(config.block_k, padded(self.key_dim)),
            "BLOCK_V": min(config.block_v, padded(self.value_dim)),
        }

    # Before any state.

    def _gate(self) -> Tensor:
        """What kernels read of the gate: rates [HV], or running sums in powers of two, [B, HV, T] or [B, T, HV, K]."""
        g = self.x.g
        if g is None:
            return self.q
        if self.x.gate == CONSTANT:
            return g.contiguous()
        block = min(self.configs.gate_sums.block_k, padded(self.key_dim))
        vector = self.x.gate == VECTOR
        shape = (self.batch, self.value_heads, self.num_rows)
        sums = self.scratch(self.key_dim, dtype=torch.float32) if vector else self._kept_sums.view(shape)
        if self.knows and not vector:
            return sums
        _chunks.gate_sums_kernel[self._programs, triton.cdiv(self.key_dim, block) if vector else 1](
            g.contiguous(), sums, self.tables.cu_seqlens, self.tables.chunks, self.num_rows, self.num_chunks,
            HV=self.value_heads, K=self.key_dim, BLOCK_K=block, GATE=self.gate, **self._options(self.configs.gate_sums),
        )  # fmt: skip
        return sums

    def scores(self) -> Scores:
        """Of a vector gate; stand-ins for other gates, whose kernels make their own."""
        if self.x.gate != VECTOR:
            return Scores(self.q, self.q, self.q, self.k, self.g)
        P = self.scratch(CHUNK)
        overlap = self.scratch(CHUNK, dtype=torch.float32) if self.delta else self.q
        made = Scores(P, overlap, self.scratch(self.key_dim), self.scratch(self.key_dim), self.sums(self.num_chunks))
        for mild in (True, False):
            _chunks.vector_scores_kernel[(self._programs,)](
                self.q, self.k, self.g, *made, self.tables.cu_seqlens, self.tables.chunks, self.scale, self.num_rows,
                self.num_chunks, H=self.heads, HV=self.value_heads, K=self.key_dim, BLOCK_K=padded(self.key_dim),
                DELTA=self.delta, MILD=mild, PRECISION=self.precision, **self._options(self.configs.scores),
            )  # fmt: skip
        return made

    def solve(self, overlap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T [B, T, HV, CHUNK], U [B, T, HV, V], W [B, T, HV, K]) of the delta family."""
        T, U, W = self.scratch(CHUNK), self.scratch(self.value_dim), self.scratch(self.key_dim)
        _chunks.solve_kernel[(self._programs,)](
            self.k, self.v, self.g, self.beta, overlap, T, U, W, self.tables.cu_seqlens, self.tables.chunks, self.num_rows,
            self.num_chunks, **self.shape, **self._blocks(self.configs.solve), **self._common,
            SOLVE_PRECISION=self.precision, **self._options(self.configs.solve),
        )  # fmt: skip
        return T, U, W

    # States.

    def _num_walks(self, num_pieces: int) -> int:
        """Programs that walk through so many pieces, all of K each."""
        width = self._state_blocks(self.configs.state, self.value_dim)["BLOCK_V"]
        return self.batch * self.value_heads * num_pieces * -(-self.value_dim // width)

    def _state_grid(self, block_k: int, block_v: int, columns: int) -> tuple[int, int]:
        tiles = -(-self.key_dim // block_k) * -(-columns // block_v)
        return tiles, self.batch * self.num_pieces * self.value_heads

    def _state_blocks(self, config: Launch, columns: int) -> dict[str, int]:
        block_k = padded(self.key_dim) if self.delta else min(config.block_k, padded(self.key_dim))
        return {"BLOCK_K": block_k, "BLOCK_V": min(config.block_v, padded(columns))}

    @property
    def _state_shape(self) -> dict[str, int]:
        """With as many heads of Qr and Kt as those have."""
        return {**self.shape, "H": self.value_heads} if self.x.gate == VECTOR else self.shape

    def run_states(
        self, scores: Scores, written: Tensor, W: Tensor, entering: Tensor, late: Tensor | None, *, h: Tensor | None,
        values: Tensor, emitted: Tensor, final: Tensor, only: Tensor | None = None, sums: tuple[Tensor, Tensor] | None = None,
        beside: bool = False,
    ) -> None:  # fmt: skip
        """Forward through the pieces. written: U or V. late: None starts late pieces from zero. h: None stores no states.
        beside: another walk shares the device."""
        t, q = self.tables, self.q
        few = self.delta and not beside and self._num_walks(self.num_pieces) < num_multiprocessors(self.device)
        config = self.configs.few_states if few else self.configs.state
        blocks = self._state_blocks(config, self.value_dim)
        prefix, total = (q, q) if sums is None else sums
        _states.state_kernel[self._state_grid(blocks["BLOCK_K"], blocks["BLOCK_V"], self.value_dim)](
            scores.Kt, written, W, scores.last, entering, q if late is None else late, q if h is None else h, values, emitted,
            final, prefix, total, t.cu_seqlens, t.first_chunk, t.enter, t.late, t.emit, t.final,
            t.late if only is None else only, self.num_rows, self.num_chunks, self.num_pieces, entering.shape[1],
            0 if late is None else late.shape[1], emitted.shape[1], final.shape[1], **self._state_shape, **blocks,
            **self._common, DELTA=self.delta, LATE=late is not None, ONLY=only is not None, STORE=h is not None,
            PREFIX=sums is not None, **self._options(config),
        )  # fmt: skip

    def run_transitions(self, scores: Scores, W: Tensor, found: Tensor, only: Tensor) -> None:
        """The transitions M [B, num_maps, HV, K, K] of the delta family, in tf32."""
        t, config = self.tables, self.configs.state
        if not found.shape[1]:
            return
        blocks = self._state_blocks(config, self.key_dim)
        blocks["BLOCK_V"] = min(32, blocks["BLOCK_V"])
        shape = {name: size for name, size in self._state_shape.items() if name != "V"}
        _transitions.transition_kernel[self._state_grid(blocks["BLOCK_K"], blocks["BLOCK_V"], self.key_dim)](
            scores.Kt, W, scores.last, found, t.cu_seqlens, t.first_chunk, t.maps, only, self.num_rows, self.num_chunks,
            self.num_pieces, found.shape[1], **shape, **blocks, GATE=self.gate, PRECISION=self.precision,
            num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip

    def run_state_grads(
        self, scores: Scores, W: Tensor, do: Tensor, dv_inside: Tensor, dfinal: Tensor, dleft: Tensor | None, *,
        dh: Tensor, dvalues: Tensor, emitted: Tensor, dentering: Tensor,
        only: Tensor | None = None, sums: tuple[Tensor, Tensor] | None = None, store: bool = True,
    ) -> None:  # fmt: skip
        """Backward through the pieces. dleft: None takes what comes back to emitting pieces as zero. store: dh and dvalues."""
        t, q, config = self.tables, self.q, self.configs.state_grad
        blocks = self._state_blocks(config, self.value_dim)
        suffix, total = (q, q) if sums is None else sums
        _states.state_grad_kernel[self._state_grid(blocks["BLOCK_K"], blocks["BLOCK_V"], self.value_dim)](
            scores.Qr, scores.Kt, W, scores.last, do, dv_inside, dfinal, q if dleft is None else dleft, dh, dvalues, emitted,
            dentering, suffix, total, t.cu_seqlens, t.first_chunk, t.enter, t.late, t.emit, t.final,
            t.emit if only is None else only, self.scale, self.num_rows, self.num_chunks, self.num_pieces, dentering.shape[1],
            emitted.shape[1], 0 if dleft is None else dleft.shape[1], dfinal.shape[1], **self._state_shape, **blocks,
            **self._common, DELTA=self.delta, LATE=dleft is not None, ONLY=only is not None, STORE=store,
            PREFIX=sums is not None, **self._options(config),
        )  # fmt: skip

    # Walks by spans.

    @property
    def knows_spans(self) -> bool:
        """Whether what enters the spans lies where the forward kept it."""
        return self.knows and len(self._kept_spans) > 0

    def span_room(self, *, keep: bool) -> SpanStates:
        """Room for what enters the spans. keep: where the backward finds it, if it is kept; in the backward all but ``through``
        is there then."""
        assert self.spans is not None, "the call has spans"
        number = len(self.spans.piece)
        count, size = self._num_walkers(number), self.key_dim * self.value_dim
        room = self._kept_spans if keep else self._kept_spans[:0]
        if not len(room):
            room = self.q.new_empty(count * (size + 1), dtype=torch.float32)
        states, before = room.split([count * size, count])
        shape = (self.batch, number, self.value_heads)
        return SpanStates(
            states.view(*shape, self.key_dim, self.value_dim), before.view(shape), self.sums(self.num_pieces)
        )  # fmt: skip

    def fill_spans(
        self, room: SpanStates, do: Tensor | None, given: Tensor, late: Tensor | None, left: Tensor, last: Tensor,
        names: tuple[str, str, str, str],
    ) -> SpanStates:  # fmt: skip
        """``room`` with the states that enter the spans forwards, of k and v, or with ``do`` backwards, of q and do. given,
        late: states that pieces start from; left, last: those they end with. names: the sets of pieces that have them."""
        assert self.spans is not None, "the call has spans"
        t, number = self.tables, len(self.spans.piece)
        states, before, through = room
        totals, config = self.sums(number), self.configs.added
        blocks = {"BLOCK_D": min(config.block_k, padded(self.key_dim)), "BLOCK_E": min(config.block_v, padded(self.value_dim))}
        tiles = -(-self.key_dim // blocks["BLOCK_D"]) * -(-self.value_dim // blocks["BLOCK_E"])
        _walk.add_kernel[tiles, self._num_walkers(number)](
            *((self.k, self.v) if do is None else (self.q, do)), self.g, states, totals,
            self.spans.pieces.tables(self.device, CHUNK).cu_seqlens, self.scale, self.num_rows, number, HV=self.value_heads,
            HB=self.heads, HC=self.value_heads, D=self.key_dim, E=self.value_dim, **blocks, REVERSE=do is not None,
            **self._common, STAGES=config.num_stages, **self._options(config),
        )  # fmt: skip
        size = self.key_dim * self.value_dim
        block = min(_FLAT_BLOCK, triton.next_power_of_2(size))
        rows = [getattr(t, name) for name in names]
        _walk.span_states_kernel[triton.cdiv(size, block), self._num_walkers(self.num_pieces)](
            states, totals, given, states if late is None else late, left, last, before, through,
            self.spans.tables(self.device)[1], *rows, self.num_pieces, number, given.shape[1],
            0 if late is None else late.shape[1], left.shape[1], last.shape[1], HV=self.value_heads, SIZE=size, BLOCK=block,
            GATE=self.gate, LATE=late is not None, REVERSE=do is not None, num_warps=2,
        )  # fmt: skip
        return room

    def run_walk(
        self, y: Tensor, a: Tensor, b: Tensor, c: Tensor, entering: SpanStates, late: Tensor | None = None,
        crossing: str = "late", *, reach: int = ALL, transposed: bool = False, reverse: bool = False,
    ) -> None:  # fmt: skip
        """y [B, T, HV, E] of a, b and c. late: states that crossed the borders of the pieces in ``crossing`` and that
        ``entering`` lacks. transposed: the walk's state is the transpose of what ``entering`` holds."""
        assert self.spans is not None, "the call has spans"
        config, (piece, _) = self.configs.walk, self.spans.tables(self.device)
        D, E = a.shape[-1], c.shape[-1]
        block_e = min(config.block_v, padded(E))
        _walk.walk_kernel[triton.cdiv(E, block_e), self._num_walkers(len(self.spans.piece))](
            a, b, c, self.g, entering.states, entering.states if late is None else late, entering.before, y,
            self.spans.pieces.tables(self.device, CHUNK).cu_seqlens, piece, getattr(self.tables, crossing), self.scale,
            self.num_rows, len(self.spans.piece), 0 if late is None else late.shape[1], HV=self.value_heads, HA=a.shape[2],
            HC=c.shape[2], D=D, E=E, BLOCK_D=padded(D), BLOCK_E=block_e, STRIDE_D=1 if transposed else E,
            STRIDE_E=D if transposed else 1, REVERSE=reverse, LATE=late is not None, REACH=reach, **self._common,
            **self._options(config),
        )  # fmt: skip

    # Walks by spans in one launch.

    @cached_property
    def fused(self) -> bool:
        """Whether walks by spans are one launch a direction."""
        fits = self.spans is not None and fits_at_once(self.x, self.pieces, self.spans, self.configs)
        return self._may_fuse and fits

    def _run_fused(self, kernel: Any, **operands: Any) -> None:
        assert self.spans is not None, "the call has spans"
        config, (_, num_blocks) = self.configs.walk, walk_blocks(self.x, self.configs)
        block_k, block_v = padded(self.key_dim), padded(self.value_dim)
        (piece, first), number = self.spans.tables(self.device), len(self.spans.piece)
        num_walkers, totals = self._num_walkers(number), self.sums(number)
        arrived = counters(self.device, num_walkers)
        for phases in [(phase,) for phase in _PHASES] if self.device.type == "cpu" else [_PHASES]:
            kernel[(num_walkers * num_blocks,)](
                q=self.q, k=self.k, v=self.v, g=self.g, totals=totals, arrived=arrived,
                cu_spans=self.spans.pieces.tables(self.device, CHUNK).cu_seqlens, piece_of=piece, first_span=first,
                scale=self.scale, num_rows=self.num_rows, num_spans=number, **self.shape,
                BLOCK_K=block_k, BLOCK_V=block_v, WIDTH_K=min(config.block_v, block_k), WIDTH_V=min(config.block_v, block_v),
                NUM_BLOCKS=num_blocks, ADD_STAGES=self.configs.added.num_stages, **operands, **self._common,
                **{name: name in phases for name in _PHASES}, **self._options(config),
            )  # fmt: skip

    def run_fused_forward(self, o: Tensor, entering: SpanStates, given: Tensor, final: Tensor) -> None:
        """o [B, T, HV, V], final states from given ones, and what enters the spans."""
        t = self.tables
        self._run_fused(
            _fused.fused_forward_kernel, states=entering.states, before=entering.before, given=given, final=final, o=o,
            rows_given=t.enter, rows_final=t.final, num_given=given.shape[1], num_final=final.shape[1],
        )  # fmt: skip

    def run_fused_backward(
        self, found: GradientBuffers, do: Tensor, entering: SpanStates, dfinal: Tensor, dgiven: Tensor
    ) -> None:
        """dq, dk, dv and the gradients of given states."""
        t, room = self.tables, self.span_room(keep=False)
        self._run_fused(
            _fused.fused_backward_kernel, do=do, states=entering.states, dstates=room.states, before=room.before,
            dfinal=dfinal, dgiven=dgiven, dq=found.dq, dk=found.dk, dv=found.dv, rows_given=t.enter, rows_final=t.final,
            num_given=dgiven.shape[1], num_final=dfinal.shape[1],
        )  # fmt: skip

    # Outputs and gradients.

    def run_output(
        self, o: Tensor, scores: Scores, values: Tensor, h: Tensor, late: Tensor | None, prefix: Tensor, reach: int = ALL
    ) -> None:
        """o [B, T, HV, V]. late: states that crossed into late pieces and that h lacks, None if it has them."""
        t, config = self.tables, self.configs.output
        blocks = self._blocks(config)
        _output.output_kernel[self._programs, triton.cdiv(self.value_dim, blocks["BLOCK_V"])](
            scores.Qr, self.k, values, self.g, scores.P, h, h if late is None else late, prefix, o, t.cu_seqlens, t.chunks,
            t.late, self.scale, self.num_rows, self.num_chunks, 0 if late is None else late.shape[1], **self._state_shape,
            **blocks, **self._common, LATE=late is not None, REACH=reach, **self._options(config),
        )  # fmt: skip

    def values_grad(self, P: Tensor, do: Tensor) -> Tensor:
        """The part of dV' that stays inside the chunk, [B, T, HV, V]."""
        t, config = self.tables, self.configs.values_grad
        found = self.scratch(self.value_dim)
        _output.values_grad_kernel[(self._programs,)](
            self.q, self.k, self.g, P, do, found, t.cu_seqlens, t.chunks, self.scale, self.num_rows, self.num_chunks,
            **self.shape, **self._blocks(config), **self._common, **self._options(config),
        )  # fmt: skip
        return found

    def gradient_buffers(self) -> GradientBuffers:
        """dg of a vector of gates takes the place of G, which only the gradient kernel still reads; where nobody asks, none."""
        grouped = self.value_heads != self.heads
        dq, dk = (self.scratch(self.key_dim, dtype=torch.float32 if grouped else self.q.dtype) for _ in range(2))
        dg = self.q if not self.with_dg else self.g if self.x.gate == VECTOR else self.scratch(dtype=torch.float32)
        return GradientBuffers(
            dq, dk, torch.empty_like(self.v), dg, self.scratch(dtype=torch.float32) if self.delta else self.q
        )

    def run_gradients(
        self, found: GradientBuffers, scores: Scores, T: Tensor, values: Tensor, do: Tensor, dvalues: Tensor, h: Tensor,
        dh: Tensor, dleft: Tensor | None, suffix: Tensor, *, reach: int = ALL, mild: bool = True,
    ) -> None:  # fmt: skip
        """All gradients of some chunks. dleft: gradients of the states that emitting pieces left, where dh lacks them. mild: of
        a vector of gates, the chunks to compute."""
        t, config = self.tables, self.configs.gradient
        blocks = {"BLOCK_K": padded(self.key_dim), "BLOCK_V": min(config.block_v, padded(self.value_dim))}
        _gradient.gradient_kernel[(self._programs,)](
            self.q, self.k, self.v, self.g, self.beta, scores.P, scores.Kt, scores.last, T, values, do, dvalues, h, dh,
            h if dleft is None else dleft, suffix, *found, t.cu_seqlens, t.chunks, t.emit, self.scale, self.num_rows,
            self.num_chunks, 0 if dleft is None else dleft.shape[1], **self.shape, **blocks, **self._common, DELTA=self.delta,
            LATE=dleft is not None, REACH=reach, MILD=mild, WITH_DG=self.with_dg, VECTOR_PRECISION=self.precision,
            **self._options(config),
        )  # fmt: skip

    def gradients(self, found: GradientBuffers) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(dq, dk, dv, dg, dbeta) in the shapes and dtypes of the protocol, once every chunk is computed."""
        dq, dk, dv, dg, dbeta = found
        if self.value_heads != self.heads:
            dq, dk = (d.unflatten(2, (self.heads, -1)).sum(3).to(self.q.dtype) for d in (dq, dk))
        rate = None if not self.with_dg else dg.sum((0, 1)) if self.x.gate == CONSTANT else dg
        return dq, dk, dv, rate, dbeta if self.delta else None
