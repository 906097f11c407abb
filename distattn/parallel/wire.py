"""What messages between ranks hold: which tensors a Move carries, and where each lies in the bytes of an exchange.

Sender and receiver derive the same layout, each from the global tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distattn.kernels.merge import accumulation_dtype
from distattn.parallel.lowering import Exchange, Item, Lowered
from distattn.parallel.program import KV_IN, KV_OUT, Q_IN, Q_OUT

ALIGNMENT = 16
MAX_PARTS = 16
"""Tensors that one rank sends another in one exchange; more are packed into one buffer."""


@dataclass(frozen=True)
class Shape:
    """What decides the size of messages, besides the program. reduce_dtype: of travelling gradient sums, None: ``sums``.
    narrow: the backward kernel gives gradients in the input dtype."""

    batch: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    needs_out: bool
    reduce_dtype: torch.dtype | None = None
    narrow: bool = False

    @property
    def sums(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    @property
    def narrow_gradients(self) -> bool:
        """Whether what one kernel gave travels in the input dtype: it gives it so, and nobody asked for another."""
        return self.narrow and self.reduce_dtype is None and self.dtype.itemsize == 2

    @property
    def travelling_sums(self) -> torch.dtype:
        return self.reduce_dtype or self.sums


@dataclass(frozen=True, eq=False)
class Field:
    """One tensor of a bundle inside a buffer: bytes [start, stop), viewed as dtype [B, n, h] or [B, n, h, width]."""

    name: str
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class Wire:
    """An exchange's buffers on one rank for one Shape: per peer, and the items with their fields; arrivals in table order."""

    send_splits: list[int]
    receive_splits: list[int]
    departures: list[tuple[int, list[tuple[Item, list[Field]]]]]
    sources: list[tuple[int, list[tuple[Item, list[Field]]]]]
    arrivals: list[tuple[Item, list[Field]]]

    @property
    def send_bytes(self) -> int:
        return sum(self.send_splits)

    @property
    def receive_bytes(self) -> int:
        return sum(self.receive_splits)

    def receive_parts(self, buffer: Tensor) -> list[tuple[int, Tensor]]:
        """Where the parts of each peer go: one a field, or one in all."""
        found: list[tuple[int, Tensor]] = []
        for peer, placed in self.sources:
            if num_fields(placed) <= MAX_PARTS:
                found += [(peer, buffer[field.start : field.stop]) for _, fields in placed for field in fields]
            else:
                found.append((peer, part_of(buffer, self.receive_splits, peer)))
        return found


def bundle_of(kind: int, lowered: Lowered, s: Shape, alone: bool) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """What a Move of one kind carries: (field, dtype, trailing shape)."""
    if kind == KV_IN:
        return [("k", s.dtype, (s.head_dim,)), ("v", s.dtype, (s.value_dim,))]
    sums = s.dtype if alone and s.narrow_gradients else s.travelling_sums
    if kind == KV_OUT:
        return [("dk", sums, (s.head_dim,)), ("dv", sums, (s.value_dim,))]
    if not lowered.backward:
        if kind == Q_IN:
            return [("q", s.dtype, (s.head_dim,))]
        return [("out", s.dtype if alone else s.sums, (s.value_dim,)), ("lse", s.sums, ())]
    if kind == Q_OUT:
        return [("dq", sums, (s.head_dim,))]
    bundle = [] if lowered.keep else [("q", s.dtype, (s.head_dim,))]
    bundle += [("do", s.dtype, (s.value_dim,)), ("lse", s.sums, ()), ("delta", s.sums, ())]
    return [*bundle, ("out", s.dtype, (s.value_dim,))] if s.needs_out else bundle


def wire_of(lowered: Lowered, exchange: Exchange, shape: Shape) -> Wire:
    """Byte layout of one exchange on this rank; sender and receiver derive the same from the global tables."""

    def layout(
        messages: tuple[tuple[int, tuple[Item, ...]], ...],
    ) -> tuple[list[int], list[tuple[int, list[tuple[Item, list[Field]]]]]]:
        splits, by_peer, start = [0] * lowered.num_ranks, [], 0
        for peer, items in messages:
            first, placed = start, []
            for item in items:
                fields = []
                for name, dtype, width in bundle_of(item.kind, lowered, shape, item.alone):
                    size = (shape.batch, item.part.rows.count, item.part.h1 - item.part.h0, *width)
                    stop = start + torch.Size(size).numel() * dtype.itemsize
                    fields.append(Field(name, start, stop, dtype, size))
                    start = -(-stop // ALIGNMENT) * ALIGNMENT
                placed.append((item, fields))
            by_peer.append((peer, placed))
            splits[peer] = start - first
        return splits, by_peer

    send_splits, departures = layout(exchange.sends)
    receive_splits, sources = layout(exchange.receives)
    arrivals = sorted((entry for _, placed in sources for entry in placed), key=lambda entry: entry[0].move)
    return Wire(send_splits, receive_splits, departures, sources, arrivals)


def num_fields(placed: list[tuple[Item, list[Field]]]) -> int:
    return sum(len(fields) for _, fields in placed)


def part_of(buffer: Tensor, splits: list[int], peer: int) -> Tensor:
    start = sum(splits[:peer])
    return buffer[start : start + splits[peer]]
