"""Runs a lowered program on one rank: a generator over times, the same for whole calls, split phase and lockstep.

    for t in 0 … S:   wait for what is due, add it in table order │ pack and post what is issued │ yield │ compute │ yield

Forward: every query slot carries a partial result (acc, m, l); a result leaves as (out, lse). Backward: every slot carries
the sums dq, or dk and dv, in fp32 (fp64 for fp64 inputs), which travel as they are, or rounded to ``reduce_dtype``.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.fresh import (
    attend_backward_fresh,
    attend_fresh,
    clear_carry,
    gives_input_dtype,
    gradients_of_launches,
    launches_of_heads,
    results_of_launches,
    whole_gradients,
)
from distattn.kernels.merge import empty_carry, finish, merge_finished, merge_partial
from distattn.kernels.protocol import Backend, Carry, Extras
from distattn.kernels.softmax.launched import Launch
from distattn.parallel.lowering import ARRIVE, COMPUTE, HOME_KV, HOME_Q, POST, Exchange, Lowered, Part, Rows
from distattn.parallel.program import KV, KV_IN, KV_OUT, Q_IN, Q_OUT, Q
from distattn.parallel.transport.base import Message, Parts, Pending, StagingTransport, Transport
from distattn.parallel.wire import MAX_PARTS, Shape, Wire, bundle_of, num_fields, part_of, wire_of

_SUMS = ("acc", "m", "l", "dq", "dk", "dv")
_HOME_SUMS = {"dq": HOME_Q, "dk": HOME_KV, "dv": HOME_KV}
_LATE_MEMORY = {**_HOME_SUMS, "acc": HOME_Q, "m": HOME_Q, "l": HOME_Q}
_KIND_NAMES = {Q_IN: "query", KV_IN: "KV", Q_OUT: "result", KV_OUT: "KV gradient"}

POSTED, COMPUTED = "posted", "computed"


@dataclass(frozen=True)
class Kernel:
    """How tiles are computed: the backend, and what it is given besides tensors and tiles.

    extras: in the coordinates of the home arenas, so that no others may take part.
    """

    backend: Backend
    scale: float
    softcap: float | None = None
    extras: Extras | None = None


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
        reduce_dtype: torch.dtype | None = None,
        poison: bool = False,
    ) -> None:
        """home: the rank's own tensors q, k, v [B, S_local, heads, D]; in the backward also do, lse, delta, and out where
        the backend needs it. label: the schedule's name, for error messages. kept: the fields of a forward that kept what
        it received. reduce_dtype: in which gradient sums travel, default fp32 (fp64). poison: fresh memory holds NaN."""
        q, v = home["q"], home["v"]
        self.lowered, self.transport, self.kernel, self.poison = lowered, transport, kernel, poison
        self.label = label
        needs_out = lowered.backward and "out" in home
        narrow = gives_input_dtype(kernel.backend)
        self.shape = Shape(q.shape[0], q.shape[-1], v.shape[-1], q.dtype, needs_out, reduce_dtype, narrow)
        self.device = q.device
        self.fields: dict[str, list[Tensor | None]] = {}
        self.unbegun: set[int] = set()  # arenas whose sums hold anything, and count as empty
        self.finished: tuple[Tensor, Tensor] | None = None  # out and lse of all of home, in place of a carry
        self.results_left = lowered.home_results
        self.late: dict[str, tuple[Tensor, list[slice]]] = {}  # gradients of home, of all rows of these heads, not added yet
        self.pending: dict[str, list[tuple[slice, Tensor]]] = {}  # those of some rows of all heads; none meets another
        self.in_flight: dict[int, tuple[Message, Pending]] = {}
        self._allocate(home, kept or {})
        key = self.shape
        if key not in lowered.wire:
            lowered.wire[key] = [wire_of(lowered, exchange, key) for exchange in lowered.exchanges]
        self.wires: list[Wire] = lowered.wire[key]
        self.routes: Sequence[object] = [None] * len(self.wires)
        self.staging = transport if isinstance(transport, StagingTransport) else None
        if self.wires and self.staging is not None:
            self.routes = self.staging.routes((lowered, key), [wire.send_splits for wire in self.wires])

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
                tensors = self._bundle(move.kind, move.src, move.alone)
                self._absorb(move.kind, move.dst, tensors, move.alone, lasts=self._lasts(move.src))
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
        """Forward: out in the inputs' dtype, lse. Backward: dq, dk, dv in fp32 (fp64), or rounded to the inputs' dtype."""
        if self.lowered.backward:
            return tuple(self._gradient(name, home) for name, home in _HOME_SUMS.items())
        if self.lowered.out_alone:
            return self._field("out", HOME_Q), self._field("lse", HOME_Q)
        if self.finished is not None:
            return self.finished[0].to(self.shape.dtype).contiguous(), self.finished[1].contiguous()
        return finish(self._carry(HOME_Q), self.shape.dtype)

    def _gradient(self, name: str, home: int) -> Tensor:
        """A sum at home with what was not added to it yet; both are added and rounded in one pass."""
        late, heads = self.late.get(name, (None, ()))
        if late is None or sum(x.stop - x.start for x in heads) < self.lowered.arenas[home].num_heads:
            return self._field(name, home)
        del self.late[name]
        if home in self.unbegun:
            for rows, part in self.pending.pop(name, ()):
                late[:, rows].add_(part)
            return late
        return torch.add(self._field(name, home), late, out=torch.empty_like(late))

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
                elif not arena.turns and _LATE_MEMORY.get(name) != i:
                    column[i] = self._fresh(i, dtype, width)
        if lowered.out_alone:
            rows, heads = lowered.arenas[HOME_Q].num_rows, lowered.arenas[HOME_Q].num_heads
            empty = empty_carry(s.batch, rows, heads, s.value_dim, dtype=s.dtype, device=self.device)
            self.fields["out"], self.fields["lse"] = [empty.acc.to(s.dtype)], [empty.m]
        self.unbegun = {HOME_Q, HOME_KV} if lowered.backward else set() if lowered.out_alone else {HOME_Q}

    def _fresh(self, arena: int, dtype: torch.dtype, width: tuple[int, ...]) -> Tensor:
        """Memory for a field of all rows of an arena."""
        rows, heads = self.lowered.arenas[arena].num_rows, self.lowered.arenas[arena].num_heads
        fresh = torch.empty((self.shape.batch, rows, heads, *width), dtype=dtype, device=self.device)
        return fresh.fill_(float("nan")) if self.poison else fresh

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
        if arena in self.unbegun and name in _SUMS:
            self._clear(arena)
        tensor = self._memory(name, arena)
        if _HOME_SUMS.get(name) == arena and (name in self.late or name in self.pending):
            tensor = self._widened(name, arena)
            late, some = self.late.pop(name, (tensor, ()))
            for heads in some:
                tensor[:, :, heads].add_(late[:, :, heads])
            for rows, part in self.pending.pop(name, ()):
                tensor[:, rows].add_(part)
        return tensor

    def _sum(self, name: str, arena: int) -> Tensor:
        """A gradient that is added to."""
        self._field(name, arena)
        return self._widened(name, arena)

    def _widened(self, name: str, arena: int) -> Tensor:
        """A gradient that may have come in the input dtype, in that of sums."""
        tensor = self.fields[name][arena] = self._memory(name, arena).to(self.shape.sums)
        return tensor

    def _memory(self, name: str, arena: int) -> Tensor:
        """A field's tensor, which sums and carries at home, and of slots that take turns, get when they are begun."""
        tensor = self.fields[name][arena]
        if tensor is None:
            assert _LATE_MEMORY.get(name) == arena or self.lowered.arenas[arena].turns, f"arena {arena} has no {name}"
            widths = {field: width for field, _, width in self._stored(self.lowered.arenas[arena].kind)}
            tensor = self.fields[name][arena] = self._fresh(arena, self.shape.sums, widths[name])
        return tensor

    def _carry(self, arena: int) -> Carry:
        if arena == HOME_Q and self.finished is not None:
            self.unbegun.discard(HOME_Q)
            (out, lse), self.finished = self.finished, None
            carry = Carry(*(self._memory(name, HOME_Q) for name in ("acc", "m", "l")))
            merge_partial(carry, out, lse.to(carry.m.dtype), fresh=True, all_seen=True)
        return Carry(self._field("acc", arena), self._field("m", arena), self._field("l", arena))

    def _begin_sums(self, born: list[tuple[int, Rows]]) -> None:
        """Slots that begin to exist: empty carries, zero gradients."""
        for arena, rows in born:
            kind, where = self.lowered.arenas[arena].kind, rows.slice
            if self.lowered.backward:
                starts = {"dq": 0.0} if kind == Q else {"dk": 0.0, "dv": 0.0}
            elif kind == Q:
                starts = {"acc": 0.0, "m": float("-inf"), "l": 0.0}
            else:
                starts = {}
            if self.lowered.arenas[arena].turns:
                for name, _, _ in self._stored(kind):
                    self.fields[name][arena] = None
                # Cleared when somebody adds to them, if at all: transfers that start here do so before.
                self.unbegun |= {arena} if starts else set()
                continue
            if self.poison and not self.lowered.keep:
                for name, _, _ in self._stored(kind):
                    self._field(name, arena)[:, where].fill_(float("nan"))
            for name, value in starts.items():
                self._field(name, arena)[:, where].fill_(value)

    def _clear(self, arena: int) -> None:
        """Make the sums of an arena empty that so far only counted as such."""
        self.unbegun.discard(arena)
        if not self.lowered.backward:
            clear_carry(self._carry(arena))
            return
        for name in ("dq",) if self.lowered.arenas[arena].kind == Q else ("dk", "dv"):
            self._memory(name, arena).zero_()

    def _post(self, number: int) -> None:
        """Send the messages of one exchange, packed or in parts."""
        assert self.transport is not None, "a program with messages needs a transport"
        wire, exchange = self.wires[number], self.lowered.exchanges[number]
        receive = torch.empty(wire.receive_bytes, dtype=torch.uint8, device=self.device)
        if self.poison:
            receive.fill_(255)  # an all-ones pattern is NaN in every floating dtype
        sends: list[tuple[int, Tensor]] = []
        send = torch.empty(0, dtype=torch.uint8, device=self.device)
        if self.staging is not None:
            send = self.staging.staging(self.routes[number])
        for peer, placed in wire.departures:
            in_parts = self.transport.takes_parts and num_fields(placed) <= MAX_PARTS
            for item, fields in placed:
                for field, tensor in zip(fields, self._bundle(item.kind, item.part, item.alone)):
                    if in_parts and tensor.dtype == field.dtype and tensor.is_contiguous() and self._lasts(item.part):
                        sends.append((peer, tensor.view(-1).view(torch.uint8)))
                        continue
                    if not len(send):
                        send = torch.empty(wire.send_bytes, dtype=torch.uint8, device=self.device)
                    field.view(send).copy_(tensor)
                    if in_parts:
                        sends.append((peer, send[field.start : field.stop]))
            if not in_parts and self.transport.takes_parts:
                sends.append((peer, part_of(send, wire.send_splits, peer)))
        parts = Parts(sends, wire.receive_parts(receive)) if self.transport.takes_parts else None
        message = Message(
            exchange.issue, exchange.due, send, receive, wire.send_splits, wire.receive_splits,
            partial(_describe, self.label, self.lowered.backward, exchange), parts, self.routes[number],
        )  # fmt: skip
        self.in_flight[number] = (message, self.transport.post(message))

    def _lasts(self, part: Part) -> bool:
        """Whether nobody writes where a Move reads before it is done: inputs, and slots with tensors of their own."""
        given = part.arena in (HOME_Q, HOME_KV)
        return given or self.lowered.arenas[part.arena].turns

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
            self._absorb(item.kind, item.part, [packed.view(buffer) for packed in fields], item.alone, lasts=True)

    def _bundle(self, kind: int, part: Part, alone: bool) -> list[Tensor]:
        """The tensors of one Move at its source, [B, n, h, …]; views or copies."""
        if kind == Q_OUT and not self.lowered.backward:
            carry = Carry(*(_take(self._field(name, part.arena), part) for name in ("acc", "m", "l")))
            return list(finish(carry, self.shape.dtype if alone else self.shape.sums))
        return [_take(self._field(name, part.arena), part) for name, _, _ in bundle_of(kind, self.lowered, self.shape, alone)]

    def _absorb(self, kind: int, part: Part, tensors: list[Tensor], alone: bool, *, lasts: bool) -> None:
        """Take one Move's tensors at its destination: copy, add, or merge by LSE. lasts: they keep their values, so that a
        slot which they fill may have them as its own."""
        if kind == Q_OUT and not self.lowered.backward:
            if part.arena == HOME_Q and self.lowered.out_alone:
                for name, tensor in zip(("out", "lse"), tensors):
                    _copy(self._field(name, HOME_Q), part, tensor)
                return
            self.results_left -= part.arena == HOME_Q
            views = self._carry(part.arena)
            carry = Carry(*(_take(view, part) for view in views))
            merge_partial(carry, tensors[0], tensors[1])
            if part.rows.slice is None:
                for view, merged in zip(views, carry):
                    _copy(view, part, merged)
            return
        arena = self.lowered.arenas[part.arena]
        copies = kind in (Q_IN, KV_IN)
        fills = part.rows.count == arena.num_rows and part.h1 - part.h0 == arena.num_heads and part.rows.slice is not None
        taken = fills and lasts and (arena.turns if copies else part.arena in self.unbegun)
        if taken and not copies:
            self.unbegun.discard(part.arena)
        for (name, dtype, width), tensor in zip(bundle_of(kind, self.lowered, self.shape, alone), tensors):
            if taken:
                self.fields[name][part.arena] = tensor
                continue
            where, heads = part.rows.slice, slice(part.h0, part.h1)
            if not copies and lasts and where is not None and self._postpone(name, part.arena, where, heads, tensor):
                continue
            if copies:
                if self.fields[name][part.arena] is None:
                    self.fields[name][part.arena] = self._fresh(part.arena, dtype, width)
                _copy(self._field(name, part.arena), part, tensor)
            else:
                _add(self._sum(name, part.arena), part, tensor)

    def _postpone(self, name: str, arena: int, rows: slice, heads: slice, part: Tensor) -> bool:
        """Leave a part of a gradient at home for the end, where no sum in fp32 was begun and no other part has its rows: the
        result is then rounded once, as from such a sum, without its passes over memory."""
        all_heads = (heads.start, heads.stop) == (0, self.lowered.arenas[arena].num_heads)
        if _HOME_SUMS[name] != arena or arena not in self.unbegun or not all_heads:
            return False
        others = self.pending.setdefault(name, [])
        if any(rows.start < other.stop and other.start < rows.stop for other, _ in others):
            return False
        others.append((rows, part))
        return True

    def _attend(self, q_arena: int, kv_arena: int, tiles: np.ndarray) -> None:
        """One backend call over two arenas."""
        kernel, at = self.kernel, self._field
        q, k, v = at("q", q_arena), at("k", kv_arena), at("v", kv_arena)
        numbers: dict[str, Any] = {"group": self.lowered.group, "scale": kernel.scale, "softcap": kernel.softcap}
        if kernel.extras is not None:
            assert (q_arena, kv_arena) == (HOME_Q, HOME_KV), "extras know only the rows of the home arenas"
            numbers["extras"] = kernel.extras
        if not self.lowered.backward:
            if q_arena == HOME_Q and self._attend_finished(q, k, v, tiles, numbers):
                return
            if q_arena == HOME_Q and self.finished is not None:
                self._carry(HOME_Q)
            attend = partial(attend_fresh, kernel.backend) if q_arena in self.unbegun else kernel.backend.attend
            self.unbegun.discard(q_arena)
            attend(q, k, v, tiles, self._carry(q_arena), **numbers)
            return
        out = at("out", q_arena) if self.shape.needs_out else None
        given = (q, k, v, out, at("lse", q_arena), at("do", q_arena))
        if (q_arena, kv_arena) == (HOME_Q, HOME_KV):
            gradients = None if self.late else whole_gradients(kernel.backend, *given, tiles, **numbers)
            if gradients is not None:
                self.late = {name: (x, [slice(0, x.shape[2])]) for name, x in zip(_HOME_SUMS, gradients)}
            if gradients is not None or self._attend_some_heads(*given, tiles, numbers):
                return
        if (q_arena, kv_arena) != (HOME_Q, HOME_KV) and {q_arena, kv_arena} & self.unbegun:
            pieces = gradients_of_launches(kernel.backend, *given, tiles, **numbers)
            if pieces is not None:
                self._take_gradients(pieces, q_arena, kv_arena)
                return
        for name, home in _HOME_SUMS.items():
            if home in (q_arena, kv_arena) and (name in self.late or name in self.pending):
                at(name, home)  # adds what was not added yet
        new = (q_arena in self.unbegun, kv_arena in self.unbegun)
        self.unbegun -= {q_arena, kv_arena}
        inputs = (*given, at("delta", q_arena), tiles)
        sums = (self._sum("dq", q_arena), self._sum("dk", kv_arena), self._sum("dv", kv_arena))
        if any(new):
            attend_backward_fresh(kernel.backend, *inputs, sums, (new[0], new[1], new[1]), **numbers)
        else:
            kernel.backend.attend_backward(*inputs, *sums, **numbers)

    def _attend_finished(self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, numbers: dict[str, Any]) -> bool:
        """Results at home as kernels leave them, the next ones merged into the first, with no carry nor its passes over memory.
        It stays in the input dtype where there are no more than two, and else in fp32, so that it is rounded once. Whether that
        was done."""
        left, self.results_left = self.results_left, self.results_left - 1
        first = self.finished is None
        if "extras" in numbers or (first and HOME_Q not in self.unbegun):
            return False
        results = results_of_launches(self.kernel.backend, q, k, v, tiles, whole=first, **numbers)
        if results is None:
            return False
        for launch, out, lse in results:
            if first:
                self.finished = out.to(self.shape.sums) if left > 2 else out, lse
            elif self.finished is not None:
                merge_finished(self.finished[0][launch.rows], self.finished[1][launch.rows], out, lse)
        return True

    def _attend_some_heads(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, tiles: np.ndarray,
        numbers: dict[str, Any],
    ) -> bool:  # fmt: skip
        """The backward at home of heads that get no other gradients of all rows, written to where all heads have their place.
        Whether that was done."""
        _, taken = self.late.get("dk", (None, ()))
        found = launches_of_heads(self.kernel.backend, q, k, tiles, group=numbers["group"], taken=taken)
        if found is None or out is None:
            return False
        backend, launches = found
        for name, x in zip(_HOME_SUMS, (q, k, v)):
            self.late.setdefault(name, (x.new_empty(x.shape), []))
        into = [self.late[name][0] for name in _HOME_SUMS]
        backend.gradients_into(into, q, k, v, out, lse, do, launches, numbers["scale"], numbers["softcap"])
        for launch in launches:
            for name, (_, _, heads) in zip(_HOME_SUMS, (launch.rows, launch.keys, launch.keys)):
                self.late[name][1].append(heads)
        return True

    def _take_gradients(self, pieces: Iterator[tuple[Launch, tuple[Tensor, ...]]], q_arena: int, kv_arena: int) -> None:
        """Add what launches give to the sums of their arenas; the only launch on all keys of a new slot is written there."""
        first = list(itertools.islice(pieces, 2))
        fresh = []
        for arena, where in zip((q_arena, kv_arena), (first[0][0].rows, first[0][0].keys) if len(first) == 1 else ()):
            all_of_it = (slice(0, self.lowered.arenas[arena].num_rows), slice(0, self.lowered.arenas[arena].num_heads))
            if where[1:] == all_of_it and arena in self.unbegun and self.lowered.arenas[arena].turns:
                fresh.append(arena)
        self.unbegun -= set(fresh)
        for launch, gradients in itertools.chain(first, pieces):
            for name, gradient in zip(_HOME_SUMS, gradients):
                arena, where = (q_arena, launch.rows) if name == "dq" else (kv_arena, launch.keys)
                if arena in fresh:
                    self.fields[name][arena] = gradient  # in the input dtype, until somebody adds to it
                elif not self._postpone(name, arena, where[1], where[2], gradient):
                    self._sum(name, arena)[where].add_(gradient)


def _describe(label: str, backward: bool, exchange: Exchange) -> str:
    """Such as "at stage 2 of the ring forward for KV rows from rank 0".

    A function, not a method: who waits for an exchange must not keep a whole execution's memory.
    """
    name = f"{label} backward" if backward else f"{label} forward"
    wanted = [
        f"{' and '.join(sorted({_KIND_NAMES[item.kind] for item in items}))} rows from rank {peer}"
        for peer, items in exchange.receives
    ]
    return f"at stage {exchange.due} of the {name.strip()} for {', '.join(wanted or ['its rows to be taken'])}"


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
        heads.index_add_(1, part.rows.index(tensor.device), value.to(tensor.dtype))
