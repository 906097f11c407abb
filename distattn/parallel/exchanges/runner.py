"""Run an exchange's table on one rank: wait, fold, post, stage by stage, on any transport and for any operator."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distattn.parallel.exchanges.operators import BoundaryOp, Map, StateShape
from distattn.parallel.exchanges.table import Table
from distattn.parallel.transport.base import Message, Pending, Transport

HEAD_START_CYCLES = 25_000
"""Some 15 µs that the first transfer has before what is computed next: a transfer that is placed after a kernel that fills the
device begins when that kernel ends, and another rank waits for it."""


@dataclass(frozen=True)
class Part:
    """Heads h0 … h1 and columns v0 … v1."""

    h0: int
    h1: int
    v0: int
    v1: int


@dataclass(frozen=True)
class Parcel:
    """One register on its way: ``whole`` maps take their transition along."""

    register: int
    part: Part
    whole: bool


@dataclass(frozen=True)
class Post:
    """This rank's side of one exchange of messages; by peer, in table order."""

    issue: int
    due: int
    sends: tuple[tuple[int, tuple[Parcel, ...]], ...]
    receives: tuple[tuple[int, tuple[Parcel, ...]], ...]


@dataclass(frozen=True)
class Fold:
    """target = map ∘ state, or with compose map ∘ map."""

    target: int
    right: int
    left: int
    part: Part
    compose: bool


@dataclass(frozen=True)
class LoweredExchange:
    """One rank's form of a table, made once and replayed. outputs: link → its parts, by heads, then columns."""

    name: str
    num_ranks: int
    num_stages: int
    posts: tuple[Post, ...]
    folds: tuple[tuple[Fold, ...], ...]
    outputs: dict[int, tuple[tuple[int, Part], ...]]


def lower_exchange(table: Table, rank: int) -> LoweredExchange:
    """The rows of one rank. Every rank has all posts, also those in which it has no part: transports want the same from all."""
    hops = table.hops[(table.hops[:, 2] == rank) | (table.hops[:, 3] == rank)].tolist()
    sends: dict[tuple[int, int], dict[int, list[Parcel]]] = {}
    receives: dict[tuple[int, int], dict[int, list[Parcel]]] = {}
    for issue, due, src, dst, source, target, h0, h1, v0, v1, whole in hops:
        side, peer, register = (sends, dst, source) if src == rank else (receives, src, target)
        parcel = Parcel(register, Part(h0, h1, v0, v1), bool(whole))
        side.setdefault((issue, due), {}).setdefault(peer, []).append(parcel)
    posts = tuple(
        Post(issue, due, _by_peer(sends.get((issue, due), {})), _by_peer(receives.get((issue, due), {})))
        for issue, due in table.posts.tolist()
    )
    folds: list[list[Fold]] = [[] for _ in range(table.num_stages + 1)]
    for stage, _, target, right, left, h0, h1, v0, v1, compose in table.folds[table.folds[:, 1] == rank].tolist():
        folds[stage].append(Fold(target, right, left, Part(h0, h1, v0, v1), bool(compose)))
    outputs: dict[int, list[tuple[int, Part]]] = {}
    for _, link, register, *part in table.outputs[table.outputs[:, 0] == rank].tolist():
        outputs.setdefault(link, []).append((register, Part(*part)))
    ordered = {link: tuple(sorted(parts, key=lambda entry: (entry[1].h0, entry[1].v0))) for link, parts in outputs.items()}
    num_ranks = table.chains.num_ranks
    return LoweredExchange(table.exchange, num_ranks, table.num_stages, posts, tuple(map(tuple, folds)), ordered)


def _by_peer(parcels: dict[int, list[Parcel]]) -> tuple[tuple[int, tuple[Parcel, ...]], ...]:
    return tuple((peer, tuple(parcels[peer])) for peer in sorted(parcels))


class ExchangeRun:
    """One exchange in progress: ``start``, other work, ``finish``.

    maps: of this rank's links, by number; a link that begins a chain needs no transition. On CUDA everything is queued on a
    stream of its own at ``start``, the host never waits, and what is queued afterwards leaves the first transfer a head start;
    on CPU ``start`` posts what waits for nobody.
    """

    def __init__(
        self, lowered: LoweredExchange, op: BoundaryOp, shape: StateShape, maps: dict[int, Map], transport: Transport | None,
        *, label: str = "",
    ) -> None:  # fmt: skip
        self.lowered, self.op, self.shape, self.transport = lowered, op, shape, transport
        self.label = label or lowered.name
        self._whole = Part(0, shape.heads, 0, shape.columns)
        self._registers: dict[int, tuple[Map, Part]] = {link: (held, self._whole) for link, held in maps.items()}
        self._in_flight: dict[int, tuple[Message, Pending]] = {}
        self._results: dict[int, Tensor] = {}
        self._steps = self._run()
        self._stream = _side_stream(shape.device) if shape.device.type == "cuda" and lowered.posts else None
        self._ready: torch.cuda.Event | None = None

    def start(self) -> None:
        """Post what can be posted."""
        if self._stream is None:
            next(self._steps, None)
            return
        current = torch.cuda.current_stream(self.shape.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in self._steps:
                pass
        if self._ready is not None:
            current.wait_event(self._ready)
            torch.cuda._sleep(HEAD_START_CYCLES)

    def finish(self) -> dict[int, Tensor]:
        """The state that enters each of this rank's links but those that begin a chain."""
        for _ in self._steps:
            pass
        if self._stream is not None:
            current = torch.cuda.current_stream(self.shape.device)
            current.wait_stream(self._stream)
            for state in self._results.values():
                state.record_stream(current)
        self._registers.clear()
        return self._results

    def steps(self) -> Generator[int, None, None]:
        """What is left to do; yields each time that messages have been posted, so that ranks of one process can take turns."""
        return self._steps

    def _run(self) -> Generator[int, None, None]:
        arriving: dict[int, list[int]] = {}
        issued: dict[int, list[int]] = {}
        for number, post in enumerate(self.lowered.posts):
            arriving.setdefault(post.due, []).append(number)
            issued.setdefault(post.issue, []).append(number)
        for stage in range(self.lowered.num_stages + 1):
            for number in arriving.get(stage, ()):
                self._receive(number)
            for fold in self.lowered.folds[stage]:
                self._fold(fold)
            for number in issued.get(stage, ()):
                self._post(number)
            if stage in issued:
                yield stage
        self._results = {link: self._assemble(parts) for link, parts in self.lowered.outputs.items()}

    # --- registers ---------------------------------------------------------------------------------------------------

    def _map(self, register: int, part: Part, *, transition: bool) -> Map:
        """Part of a register; a state is a map without a transition."""
        held, extent = self._registers[register]
        if part == extent:
            return held if transition else Map(None, held.offset)
        heads = slice(part.h0 - extent.h0, part.h1 - extent.h0)
        columns = slice(part.v0 - extent.v0, part.v1 - extent.v0)
        kept = held.transition[:, heads] if transition and held.transition is not None else None
        return Map(kept, self.op.cut(held.offset, heads, columns))

    def _fold(self, fold: Fold) -> None:
        right = self._map(fold.right, fold.part, transition=True)
        left = self._map(fold.left, fold.part, transition=fold.compose)
        made = self.op.compose(right, left) if fold.compose else Map(None, self.op.apply(right, left.offset))
        self._registers[fold.target] = made, fold.part

    def _assemble(self, parts: tuple[tuple[int, Part], ...]) -> Tensor:
        rows: dict[int, list[Tensor]] = {}
        for register, part in parts:
            rows.setdefault(part.h0, []).append(self._map(register, part, transition=False).offset)
        joined = [self.op.join(columns) for columns in rows.values()]
        return torch.cat(joined, 1) if len(joined) > 1 else joined[0]

    # --- messages ----------------------------------------------------------------------------------------------------

    def _sizes(self, parcel: Parcel) -> list[tuple[int, ...]]:
        """Shapes of a parcel's tensors: the state, and with a whole map its transition."""
        h, v = parcel.part.h1 - parcel.part.h0, parcel.part.v1 - parcel.part.v0
        sizes = [self.op.state_size(self.shape, h, v)]
        transition = self.op.transition_size(self.shape, h) if parcel.whole else None
        return sizes if transition is None else [*sizes, transition]

    def _splits(self, messages: tuple[tuple[int, tuple[Parcel, ...]], ...]) -> list[int]:
        splits = [0] * self.lowered.num_ranks
        for peer, parcels in messages:
            splits[peer] = sum(math.prod(size) for parcel in parcels for size in self._sizes(parcel))
        return splits

    def _post(self, number: int) -> None:
        post = self.lowered.posts[number]
        assert self.transport is not None, "an exchange with messages needs a transport"
        width, device = self.shape.dtype.itemsize, self.shape.device
        send_splits, receive_splits = self._splits(post.sends), self._splits(post.receives)
        parts = []
        for _, parcels in post.sends:
            for parcel in parcels:
                part = self._map(parcel.register, parcel.part, transition=parcel.whole)
                tensors = [part.offset, part.transition][: len(self._sizes(parcel))]
                parts += [x.reshape(-1) for x in tensors if x is not None]
        send = torch.cat(parts) if parts else torch.empty(0, dtype=self.shape.dtype, device=device)
        assert send.numel() == sum(send_splits), "a parcel's tensors have the sizes that its operator says"
        receive = torch.empty(sum(receive_splits), dtype=self.shape.dtype, device=device)
        message = Message(
            post.issue, post.due, send.view(torch.uint8), receive.view(torch.uint8),
            [n * width for n in send_splits], [n * width for n in receive_splits], lambda: self._describe(post),
        )  # fmt: skip
        if self._stream is not None and self._ready is None and (post.sends or post.receives):
            self._ready = torch.cuda.Event()
            self._ready.record(self._stream)
        self._in_flight[number] = message, self.transport.post(message)

    def _receive(self, number: int) -> None:
        message, pending = self._in_flight.pop(number)
        pending.wait()
        buffer, start = message.receive.view(self.shape.dtype), 0
        for _, parcels in self.lowered.posts[number].receives:
            for parcel in parcels:
                tensors: list[Tensor | None] = []
                for size in self._sizes(parcel):
                    stop = start + math.prod(size)
                    tensors.append(buffer[start:stop].view(size))
                    start = stop
                offset, transition = (*tensors, None)[:2]
                assert offset is not None
                self._registers[parcel.register] = Map(transition, offset), parcel.part

    def _describe(self, post: Post) -> str:
        peers = ", ".join(str(peer) for peer, _ in post.receives)
        wanted = f"states from rank {peers}" if peers else "its states to be taken"
        return f"at stage {post.due} of the {self.label} exchange for {wanted}"


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device for all exchanges: they run one after another, beside the kernels."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device, priority=-1)
    return _streams[device]


def stack_links(numbers: np.ndarray, states: dict[int, Tensor], empty: Tensor) -> Tensor:
    """States of these links along dimension 1, in order; ``empty`` where there are none."""
    return torch.stack([states[int(number)] for number in numbers], 1) if len(numbers) else empty
