"""Runs a lowered program on one rank: a generator over times, the same for whole calls, split phase and lockstep.

    for t in 0 … S:   wait for what is due, add it in table order │ pack and post what is issued │ yield │ compute │ yield

Forward: every query slot carries a partial result (acc, m, l); a result leaves as (out, lse). Backward: every slot carries
the sums dq, or dk and dv, in fp32 (fp64 for fp64 inputs), which travel as they are.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.merge import accumulation_dtype, empty_carry, finish, merge_partial
from distattn.kernels.protocol import Backend, Carry
from distattn.parallel.lowering import ARRIVE, COMPUTE, HOME_KV, HOME_Q, POST, Exchange, Item, Lowered, Part, Rows
from distattn.parallel.program import KV, KV_IN, KV_OUT, Q_IN, Q_OUT, Q
from distattn.parallel.transport.base import Message, Pending, Transport

_ALIGNMENT = 16
_KIND_NAMES = {Q_IN: "query", KV_IN: "KV", Q_OUT: "result", KV_OUT: "KV gradient"}

POSTED, COMPUTED = "posted", "computed"


@dataclass(frozen=True)
class Kernel:
    """How tiles are computed: the backend and the numbers that it is given."""

    backend: Backend
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class Shape:
    """What decides the size of every message, besides the program."""

    batch: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    needs_out: bool

    @property
    def sums(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)


@dataclass(frozen=True, eq=False)
class _Field:
    """One tensor of a bundle inside a buffer: bytes [start, stop), viewed as dtype [B, n, h] or [B, n, h, width]."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class _Wire:
    """An exchange's buffers on one rank for one Shape. arrivals are in table order."""

    send_splits: list[int]
    receive_splits: list[int]
    departures: list[tuple[Item, list[_Field]]]
    arrivals: list[tuple[Item, list[_Field]]]
    send_bytes: int
    receive_bytes: int


class Execution:
    """One pass, forward or backward, of one rank. ``steps()`` runs it; then read ``result()``."""

    def __init__(
        self,
        lowered: Lowered,
        transport: Transport | None,
        kernel: Kernel,
        home: dict[str, Tensor],
        *,
        label: str = "",
        kept: dict[str, list[Tensor | None]] | None = None,
        poison: bool = False,
    ) -> None:
        """home: the rank's own tensors q, k, v [B, S_local, heads, D]; in the backward also do, lse, delta, and out where
        the backend needs it. label: the schedule's name, for error messages. kept: the fields of a forward that kept what
        it received. poison: fresh memory holds NaN."""
        q, v = home["q"], home["v"]
        self.lowered, self.transport, self.kernel, self.poison = lowered, transport, kernel, poison
        self.label = label
        self.shape = Shape(q.shape[0], q.shape[-1], v.shape[-1], q.dtype, lowered.backward and "out" in home)
        self.device = q.device
        self.fields: dict[str, list[Tensor | None]] = {}
        self.in_flight: dict[int, tuple[Message, Pending]] = {}
        self._allocate(home, kept or {})
        key = self.shape
        if key not in lowered.wire:
            lowered.wire[key] = [_wire(lowered, exchange, key) for exchange in lowered.exchanges]
        self.wires: list[_Wire] = lowered.wire[key]

    def steps(self) -> Generator[tuple[str, int], None, None]:
        """Yields (POSTED, t) before and (COMPUTED, t) after computing stage t."""
        for time, step in enumerate(self.lowered.steps):
            self._begin_sums(step.born[ARRIVE])
            if step.waits:
                self._arrive(step.waits)
            for i in step.posts:
                self._post(i)
            self._begin_sums(step.born[POST])
            for move in step.local:
                self._absorb(move.kind, move.dst, self._bundle(move.kind, move.src, move.alone), move.alone)
            yield POSTED, time
            self._begin_sums(step.born[COMPUTE])
            for group in step.groups:
                self._attend(group.q_arena, group.kv_arena, group.tiles)
            yield COMPUTED, time

    def run(self) -> None:
        """All steps at once."""
        for _ in self.steps():
            pass

    def result(self) -> tuple[Tensor, ...]:
        """Forward: out in the inputs' dtype, lse. Backward: dq, dk, dv in fp32 (fp64)."""
        if self.lowered.backward:
            return self._field("dq", HOME_Q), self._field("dk", HOME_KV), self._field("dv", HOME_KV)
        if self.lowered.out_alone:
            return self._field("out", HOME_Q), self._field("lse", HOME_Q)
        return finish(self._carry(HOME_Q), self.shape.dtype)

    def _allocate(self, home: dict[str, Tensor], kept: dict[str, list[Tensor | None]]) -> None:
        """One tensor per field and arena. Home arenas are the given tensors; sums at home start now."""
        lowered, s = self.lowered, self.shape
        for i, arena in enumerate(lowered.arenas):
            for name, dtype, width in self._stored(arena.kind):
                column = self.fields.setdefault(name, [None] * len(lowered.arenas))
                if i in (HOME_Q, HOME_KV) and name in home:
                    column[i] = home[name]
                elif name in ("q", "k", "v") and name in kept:
                    column[i] = kept[name][i]
                elif not (i == HOME_Q and lowered.out_alone and name in ("acc", "m", "l")):
                    size = (s.batch, arena.num_rows, arena.num_heads, *width)
                    fresh = torch.empty(size, dtype=dtype, device=self.device)
                    column[i] = fresh.fill_(float("nan")) if self.poison else fresh
        if lowered.out_alone:
            rows, heads = lowered.arenas[HOME_Q].num_rows, lowered.arenas[HOME_Q].num_heads
            empty = empty_carry(s.batch, rows, heads, s.value_dim, dtype=s.dtype, device=self.device)
            self.fields["out"], self.fields["lse"] = [empty.acc.to(s.dtype)], [empty.m]
        whole = Rows(np.array([[0, lowered.arenas[HOME_Q].num_rows]]))
        self._begin_sums([(HOME_Q, whole), (HOME_KV, whole)])

    def _stored(self, kind: int) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(field, dtype, trailing shape) of the slots of one kind."""
        s = self.shape
        if kind == KV:
            stored = [("k", s.dtype, (s.head_dim,)), ("v", s.dtype, (s.value_dim,))]
            if self.lowered.backward:
                stored += [("dk", s.sums, (s.head_dim,)), ("dv", s.sums, (s.value_dim,))]
            return stored
        stored = [("q", s.dtype, (s.head_dim,))]
        if not self.lowered.backward:
            return [*stored, ("acc", s.sums, (s.value_dim,)), ("m", s.sums, ()), ("l", s.sums, ())]
        stored += [("do", s.dtype, (s.value_dim,)), ("lse", s.sums, ()), ("delta", s.sums, ())]
        if s.needs_out:
            stored.append(("out", s.dtype, (s.value_dim,)))
        return [*stored, ("dq", s.sums, (s.head_dim,))]

    def _field(self, name: str, arena: int) -> Tensor:
        tensor = self.fields[name][arena]
        assert tensor is not None, f"arena {arena} has no {name}"
        return tensor

    def _carry(self, arena: int) -> Carry:
        return Carry(self._field("acc", arena), self._field("m", arena), self._field("l", arena))

    def _begin_sums(self, born: list[tuple[int, Rows]]) -> None:
        """Slots that begin to exist: empty carries, zero gradients."""
        for arena, rows in born:
            kind, where = self.lowered.arenas[arena].kind, rows.slice
            if self.lowered.backward:
                starts = {"dq": 0.0} if kind == Q else {"dk": 0.0, "dv": 0.0}
            elif kind == Q and not (arena == HOME_Q and self.lowered.out_alone):
                starts = {"acc": 0.0, "m": float("-inf"), "l": 0.0}
            else:
                starts = {}
            for name, value in starts.items():
                self._field(name, arena)[:, where].fill_(value)
            if self.poison and arena not in (HOME_Q, HOME_KV) and not self.lowered.keep:
                for name, _, _ in self._stored(kind):
                    if name not in starts:
                        self._field(name, arena)[:, where].fill_(float("nan"))

    def _post(self, number: int) -> None:
        """Pack and send the messages of one exchange."""
        assert self.transport is not None, "a program with messages needs a transport"
        wire, exchange = self.wires[number], self.lowered.exchanges[number]
        send = torch.empty(wire.send_bytes, dtype=torch.uint8, device=self.device)
        receive = torch.empty(wire.receive_bytes, dtype=torch.uint8, device=self.device)
        if self.poison:
            receive.fill_(255)  # an all-ones pattern is NaN in every floating dtype
        for item, fields in wire.departures:
            for packed, tensor in zip(fields, self._bundle(item.kind, item.part, item.alone)):
                packed.view(send).copy_(tensor)
        message = Message(
            exchange.issue, exchange.due, send, receive, wire.send_splits, wire.receive_splits,
            lambda: self._describe(exchange),
        )  # fmt: skip
        self.in_flight[number] = (message, self.transport.post(message))

    def _arrive(self, numbers: list[int]) -> None:
        """Wait for exchanges and take their items in table order, which fixes the order of sums."""
        arrived = []
        for number in numbers:
            message, pending = self.in_flight.pop(number)
            pending.wait()
            arrived += [(item.move, item, fields, message.receive) for item, fields in self.wires[number].arrivals]
        if len(numbers) > 1:
            arrived.sort(key=lambda entry: entry[0])
        for _, item, fields, buffer in arrived:
            self._absorb(item.kind, item.part, [packed.view(buffer) for packed in fields], item.alone)

    def _bundle(self, kind: int, part: Part, alone: bool) -> list[Tensor]:
        """The tensors of one Move at its source, [B, n, h, …]; views or copies."""
        if kind == Q_OUT and not self.lowered.backward:
            carry = Carry(*(_take(self._field(name, part.arena), part) for name in ("acc", "m", "l")))
            return list(finish(carry, self.shape.dtype if alone else self.shape.sums))
        return [_take(self._field(name, part.arena), part) for name, _, _ in _bundle(kind, self.lowered, self.shape, alone)]

    def _absorb(self, kind: int, part: Part, tensors: list[Tensor], alone: bool) -> None:
        """Take one Move's tensors at its destination: copy, add, or merge by LSE."""
        if kind == Q_OUT and not self.lowered.backward:
            if part.arena == HOME_Q and self.lowered.out_alone:
                for name, tensor in zip(("out", "lse"), tensors):
                    _copy(self._field(name, HOME_Q), part, tensor)
                return
            views = [self._field(name, part.arena) for name in ("acc", "m", "l")]
            carry = Carry(*(_take(view, part) for view in views))
            merge_partial(carry, tensors[0], tensors[1])
            if part.rows.slice is None:
                for view, merged in zip(views, carry):
                    _copy(view, part, merged)
            return
        put = _copy if kind in (Q_IN, KV_IN) else _add
        for (name, _, _), tensor in zip(_bundle(kind, self.lowered, self.shape, alone), tensors):
            put(self._field(name, part.arena), part, tensor)

    def _attend(self, q_arena: int, kv_arena: int, tiles: np.ndarray) -> None:
        """One backend call over two arenas."""
        kernel, at = self.kernel, self._field
        q, k, v = at("q", q_arena), at("k", kv_arena), at("v", kv_arena)
        numbers = {"group": self.lowered.group, "scale": kernel.scale, "softcap": kernel.softcap}
        if not self.lowered.backward:
            kernel.backend.attend(q, k, v, tiles, self._carry(q_arena), **numbers)
            return
        out = at("out", q_arena) if self.shape.needs_out else None
        kernel.backend.attend_backward(
            q, k, v, out, at("lse", q_arena), at("do", q_arena), at("delta", q_arena), tiles,
            at("dq", q_arena), at("dk", kv_arena), at("dv", kv_arena), **numbers,
        )  # fmt: skip

    def _describe(self, exchange: Exchange) -> str:
        """Such as "at stage 2 of the ring forward for KV rows from rank 0"."""
        name = f"{self.label} backward" if self.lowered.backward else f"{self.label} forward"
        wanted = [
            f"{' and '.join(sorted({_KIND_NAMES[item.kind] for item in items}))} rows from rank {peer}"
            for peer, items in exchange.receives
        ]
        return f"at stage {exchange.due} of the {name.strip()} for {', '.join(wanted or ['its rows to be taken'])}"


def output_gradient_sums(out: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    """delta = Σ do∘out − dlse in fp32 (fp64): [B, S, H] from out, do [B, S, H, Dv] and dlse [B, S, H]."""
    dtype = accumulation_dtype(out.dtype)
    delta = (do.to(dtype) * out.to(dtype)).sum(-1)
    return delta if dlse is None else delta - dlse.to(dtype)


def _bundle(kind: int, lowered: Lowered, s: Shape, alone: bool) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """What a Move of one kind carries: (field, dtype, trailing shape)."""
    if kind == KV_IN:
        return [("k", s.dtype, (s.head_dim,)), ("v", s.dtype, (s.value_dim,))]
    if kind == KV_OUT:
        return [("dk", s.sums, (s.head_dim,)), ("dv", s.sums, (s.value_dim,))]
    if not lowered.backward:
        if kind == Q_IN:
            return [("q", s.dtype, (s.head_dim,))]
        return [("out", s.dtype if alone else s.sums, (s.value_dim,)), ("lse", s.sums, ())]
    if kind == Q_OUT:
        return [("dq", s.sums, (s.head_dim,))]
    bundle = [] if lowered.keep else [("q", s.dtype, (s.head_dim,))]
    bundle += [("do", s.dtype, (s.value_dim,)), ("lse", s.sums, ()), ("delta", s.sums, ())]
    return [*bundle, ("out", s.dtype, (s.value_dim,))] if s.needs_out else bundle


def _wire(lowered: Lowered, exchange: Exchange, shape: Shape) -> _Wire:
    """Byte layout of one exchange on this rank; sender and receiver derive the same from the global tables."""

    def layout(messages: tuple[tuple[int, tuple[Item, ...]], ...]) -> tuple[list[int], list[tuple[Item, list[_Field]]]]:
        splits, placed, start = [0] * lowered.num_ranks, [], 0
        for peer, items in messages:
            first = start
            for item in items:
                fields = []
                for name, dtype, width in _bundle(item.kind, lowered, shape, item.alone):
                    size = (shape.batch, item.part.rows.count, item.part.h1 - item.part.h0, *width)
                    stop = start + torch.Size(size).numel() * dtype.itemsize
                    fields.append(_Field(name, start, stop, dtype, size))
                    start = -(-stop // _ALIGNMENT) * _ALIGNMENT
                placed.append((item, fields))
            splits[peer] = start - first
        return splits, placed

    send_splits, departures = layout(exchange.sends)
    receive_splits, arrivals = layout(exchange.receives)
    arrivals.sort(key=lambda entry: entry[0].move)
    return _Wire(send_splits, receive_splits, departures, arrivals, sum(send_splits), sum(receive_splits))


def _take(tensor: Tensor, part: Part) -> Tensor:
    """Rows and heads of an arena tensor: a view where the rows are consecutive, else a copy."""
    heads = tensor[:, :, part.h0 : part.h1]
    if part.rows.slice is not None:
        return heads[:, part.rows.slice]
    return heads.index_select(1, part.rows.index(tensor.device))


def _copy(tensor: Tensor, part: Part, value: Tensor) -> None:
    heads = tensor[:, :, part.h0 : part.h1]
    if part.rows.slice is not None:
        heads[:, part.rows.slice].copy_(value)
    else:
        heads.index_copy_(1, part.rows.index(tensor.device), value)


def _add(tensor: Tensor, part: Part, value: Tensor) -> None:
    heads = tensor[:, :, part.h0 : part.h1]
    if part.rows.slice is not None:
        heads[:, part.rows.slice].add_(value)
    else:
        heads.index_add_(1, part.rows.index(tensor.device), value)
