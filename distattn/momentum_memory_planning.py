"""What a call of ``momentum_memory`` needs besides its tensors: chunks of documents, pieces, the exchange; made once."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import InputError
from distattn.linear_planning import place_rows, transport_of
from distattn.parallel.agreement import board_of
from distattn.parallel.exchanges import (
    LinkRates,
    LoweredExchange,
    StateShape,
    Stream,
    cut_stream,
    find_exchange,
    lower_exchange,
    pick_exchange,
)
from distattn.parallel.exchanges.operators import Block
from distattn.parallel.hardware import Hardware
from distattn.parallel.layout import Layout
from distattn.parallel.plan_store import PlanStore
from distattn.parallel.transport.collective import Collective

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryRequest:
    """A call but its tensors; equal ones share a plan.

    shape: (batch, heads, key_dim, value_dim). rows: of this rank. dtype: of states. chunk: rows that learn from one memory.
    final: whether final states are wanted. documents: cu_seqlens as int64 bytes; seen: likewise, how many rows each document's
    initial state has seen; None for one document, and for none.
    """

    shape: tuple[int, int, int, int]
    rows: int
    dtype: torch.dtype
    device: torch.device
    chunk: int
    exchange: str
    final: bool
    documents: bytes | None
    seen: bytes | None
    layout: Layout | None
    options: Any
    hardware: Hardware
    timeout_s: float | None

    def summary(self, layout: Layout, documents: np.ndarray) -> str:
        """Alike on all ranks that make the same call: compared over ranks."""
        apart = ("rows", "device", "documents", "seen", "layout", "hardware")
        shown = {x.name: getattr(self, x.name) for x in fields(self) if x.name not in apart}
        shown |= {"layout": layout.digest, "documents": _digest(documents.tobytes()), "topology": self.hardware.name}
        if self.seen is not None:
            shown["seen"] = _digest(self.seen)
        return " ".join(f"{name}={value}" for name, value in shown.items())


@dataclass(frozen=True, eq=False)
class Run:
    """Pieces whose chunks are worked on together, the longest first. chunks: where theirs lie; counts: see ``run_states``."""

    pieces: np.ndarray
    chunks: slice
    counts: list[int]


@dataclass(frozen=True, eq=False)
class MemoryPlan:
    """One shape over one packed stream on this rank. Pieces are numbered locally unless said otherwise.

    parts: states that cross borders, 2, or 3 where some border lies inside a chunk. seen: rows that each document's initial
    state has seen, int64 [D].
    """

    request: MemoryRequest
    stream: Stream
    rank: int
    parts: int
    seen: np.ndarray
    exchange: str
    reason: str
    forward: LoweredExchange
    backward: LoweredExchange
    transport: Collective | None
    handle: int

    @cached_property
    def op(self) -> Block:
        return Block(self.parts)

    @property
    def num_documents(self) -> int:
        return len(self.stream.documents) - 1

    @cached_property
    def state_shape(self) -> StateShape:
        return StateShape(*self.request.shape, self.request.dtype, self.request.device)

    @cached_property
    def numbers(self) -> np.ndarray:
        """Global number of each local piece."""
        return self.stream.of_rank(self.rank)

    @cached_property
    def documents(self) -> np.ndarray:
        """Document of each local piece."""
        return self.stream.document[self.numbers]

    @cached_property
    def emits(self) -> np.ndarray:
        """Whether a state leaves a local piece for another one, bool."""
        return ~self.stream.ends_document[self.numbers]

    @cached_property
    def runs(self) -> tuple[Run, Run, Run]:
        """Pieces that begin their document, that continue it and go on, and that end what they continue; in this order."""
        late = ~self.stream.starts_document[self.numbers]
        runs, at = [], 0
        for members in (np.flatnonzero(~late), np.flatnonzero(late & self.emits), np.flatnonzero(late & ~self.emits)):
            pieces = members[np.argsort(-self._chunk_counts[members], kind="stable")]
            lengths = self._chunk_counts[pieces]
            counts = [int((lengths > step).sum()) for step in range(int(lengths.max(initial=0)))]
            runs.append(Run(pieces, slice(at, at + sum(counts)), counts))
            at += sum(counts)
        return runs[0], runs[1], runs[2]

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Rows of each local piece, counted from the start of its document's first chunk: int64 [n, 2]."""
        first = self.stream.documents[self.documents] - self.seen[self.documents]
        return self.stream.bounds[self.numbers] - first[:, None]

    @cached_property
    def _chunk_counts(self) -> np.ndarray:
        size = self.request.chunk
        return -(-self._bounds[:, 1] // size) - self._bounds[:, 0] // size

    @cached_property
    def chunks(self) -> np.ndarray:
        """Local rows of each chunk, [first, one past the last], and whether it has its last row; in the order of runs."""
        size, counts = self.request.chunk, self._chunk_counts
        lengths = self._bounds[:, 1] - self._bounds[:, 0]
        local = np.cumsum(lengths) - lengths
        found = []
        for run in self.runs:
            for step in range(len(run.counts)):
                pieces = run.pieces[counts[run.pieces] > step]
                begin, end = self._bounds[pieces].T
                edge = (begin // size + step) * size
                low, high = np.maximum(edge, begin), np.minimum(edge + size, end)
                found.append(np.stack([low - begin + local[pieces], high - begin + local[pieces], high == edge + size], 1))
        return np.concatenate(found) if found else np.zeros((0, 3), np.int64)

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        size, rows = self.request.chunk, self.request.rows
        grid = self.chunks[:, :1] + np.arange(size)
        filled = grid < self.chunks[:, 1:2]
        back = np.zeros(rows, np.int64)
        back[grid[filled]] = np.flatnonzero(filled)
        host = {
            "grid": np.where(filled, grid, rows).reshape(-1),
            "rows": back,
            "filled": filled,
            "closes": self.chunks[:, 2] > 0,
            "aligned": self.seen % size == 0,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(x)).to(self.request.device) for name, x in host.items()}

    def table(self, name: str) -> Tensor:
        """On the device, made once. grid: int64 [N · C], local row of each place of the chunks, T where there is none; rows:
        int64 [T], the way back; filled: bool [N, C]; closes: bool [N], a chunk has its last row; aligned: bool [D]."""
        return self._tables[name]

    @cached_property
    def _indices(self) -> dict[str, Tensor]:
        return {}

    def index(self, name: str, values: np.ndarray) -> Tensor:
        """Host indices on the device, uploaded once; name: tells them apart."""
        if name not in self._indices:
            self._indices[name] = torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self.request.device)
        return self._indices[name]

    @cached_property
    def empty_documents(self) -> np.ndarray:
        """Documents without rows whose initial state is their final one: rank 0 passes it on."""
        return np.flatnonzero(np.diff(self.stream.documents) == 0) if self.rank == 0 else np.zeros(0, np.int64)

    def describe(self) -> str:
        """What was planned and why, in a line."""
        return (
            f"momentum memory over {self.stream.num_ranks} ranks: chunks of {self.request.chunk} rows, {self.parts} states a "
            f"border, exchange {self.exchange} ({self.reason})"
        )


_plans: PlanStore[MemoryRequest, MemoryPlan] = PlanStore()


def memory_plan_of(handle: int) -> MemoryPlan:
    """The living plan with this handle: custom operators take integers, not objects."""
    return _plans[handle]


def plan_memory(request: MemoryRequest, group: dist.ProcessGroup | None) -> MemoryPlan:
    """The plan of a request, cached by value. At its first sight the ranks of the group compare what they plan.

    Raises InputError where rows, documents and layout do not fit, PlanError for the exchange, AgreementError where ranks made
    different calls.
    """
    return _plans.find_or_make(request, group, partial(_agree_and_make, request, group))


def _agree_and_make(request: MemoryRequest, group: dist.ProcessGroup | None, handle: int) -> MemoryPlan:
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    layout, documents = place_rows(request.rows, num_ranks, rank, request.layout, request.documents)
    seen = np.zeros(len(documents) - 1, np.int64) if request.seen is None else np.frombuffer(request.seen, np.int64)
    if len(seen) != len(documents) - 1 or (seen < 0).any():
        raise InputError(
            f"seen must have a count of at least 0 for each of {len(documents) - 1} documents, got {seen.tolist()}"
        )
    if group is not None:
        board_of(group).agree(f"momentum_memory {request.summary(layout, documents)}")
    made = _make(request, group, rank, cut_stream(layout, documents), seen, handle)
    if rank == 0:
        _log.info("%s", made.describe())
    return made


def _make(
    r: MemoryRequest, group: dist.ProcessGroup | None, rank: int, stream: Stream, seen: np.ndarray, handle: int
) -> MemoryPlan:
    parts = 3 if r.final or (seen % r.chunk).any() or _cuts_chunks(stream, seen, r.chunk) else 2
    batch, heads, rows, columns = r.shape
    state = float(batch * heads * parts * rows * columns * r.dtype.itemsize)
    transition = float(batch * heads * (parts * rows) ** 2 * r.dtype.itemsize)
    rates, links = LinkRates.of(r.hardware), stream.chains.longest
    name, options, reason = pick_exchange(r.exchange, r.options, rates, links, state, transition)
    exchange = find_exchange(name)
    return MemoryPlan(
        request=r,
        stream=stream,
        rank=rank,
        parts=parts,
        seen=seen,
        exchange=name,
        reason=reason,
        forward=lower_exchange(exchange.plan(stream.chains, heads, columns, options), rank),
        backward=lower_exchange(exchange.plan(stream.chains.reversed(), heads, columns, options), rank),
        transport=None if group is None else transport_of(group, r.timeout_s),
        handle=handle,
    )


def _cuts_chunks(stream: Stream, seen: np.ndarray, chunk: int) -> bool:
    """Whether some piece ends inside a chunk that goes on elsewhere."""
    inside = ~stream.ends_document
    document = stream.document[inside]
    return bool(((stream.bounds[inside, 1] - stream.documents[document] + seen[document]) % chunk).any())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
