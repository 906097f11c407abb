"""What a call of linear attention needs to know besides its tensors: pieces, chains, the exchange; made once and replayed."""

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
from distattn.kernels.linear import KINDS, LinearBackend, LinearCase, Pieces, choose_linear_backend
from distattn.kernels.linear.protocol import NONE, VECTOR
from distattn.kernels.linear.reference import state_dtype
from distattn.parallel.agreement import board_of
from distattn.parallel.exchanges import (
    OPERATORS,
    BoundaryOp,
    LinkRates,
    LoweredExchange,
    StateShape,
    Stream,
    Table,
    cut_stream,
    find_exchange,
    lower_exchange,
    pick_exchange,
)
from distattn.parallel.hardware import Hardware, find_hardware
from distattn.parallel.layout import Layout
from distattn.parallel.per_group import PerGroup
from distattn.parallel.plan_store import PlanStore
from distattn.parallel.transport.collective import Collective, group_device

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearRequest:
    """The arguments of one call but its tensors. Equal requests share a plan.

    rows: of this rank; heads, value_heads, key_dim, value_dim: of q and v; gate: form of the decay; initial, final: whether
    an initial state is given and a final one wanted; cu_seqlens: of the whole stream, int64 bytes, or None for one document.
    """

    kind: str
    gate: str
    batch: int
    rows: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    num_ranks: int
    exchange: str
    initial: bool
    final: bool
    owner_only: bool
    cu_seqlens: bytes | None
    layout: Layout | None
    options: Any
    kernel: str
    topology: Hardware | str | None
    timeout_s: float | None

    def summary(self, layout: Layout) -> str:
        """Alike on all ranks that make the same call: compared over ranks."""
        shown = {x.name: getattr(self, x.name) for x in fields(self) if x.name not in ("rows", "device", "cu_seqlens")}
        shown["layout"] = layout.digest
        shown["documents"] = None if self.cu_seqlens is None else _digest(self.cu_seqlens)
        return " ".join(f"{name}={value}" for name, value in shown.items() if value is not None)


@dataclass(frozen=True, eq=False)
class LinearPlan:
    """Linear attention of one shape over one packed stream and group, on this rank. Made by ``plan_linear``.

    stream: pieces of all ranks. pieces: this rank's, as kernels want them. forward, backward: the exchange and its mirror.
    table: of the forward, all ranks. reasons: why each automatic choice fell as it did.
    """

    request: LinearRequest
    layout: Layout
    rank: int
    stream: Stream
    pieces: Pieces
    op: BoundaryOp
    exchange: str
    table: Table
    forward: LoweredExchange
    backward: LoweredExchange
    backend: LinearBackend
    transport: Collective | None
    reasons: dict[str, str]
    handle: int

    @property
    def num_documents(self) -> int:
        return len(self.stream.documents) - 1

    @cached_property
    def numbers(self) -> np.ndarray:
        """Global number of each local piece."""
        return self.stream.of_rank(self.rank)

    @cached_property
    def owner(self) -> np.ndarray:
        """Rank that holds the last token of each document, int64 [D]; rank 0 for those without tokens."""
        owner = np.zeros(self.num_documents, np.int64)
        ends = self.stream.ends_document
        owner[self.stream.document[ends]] = self.stream.rank[ends]
        return owner

    @cached_property
    def own_documents(self) -> np.ndarray:
        """Documents whose final state this rank has."""
        return np.flatnonzero(self.owner == self.rank)

    @property
    def returned_documents(self) -> int:
        """Documents whose final state the call returns here."""
        if not self.request.final:
            return 0
        return len(self.own_documents) if self.request.owner_only else self.num_documents

    @cached_property
    def empty_documents(self) -> np.ndarray:
        """Own documents without tokens: their final state is the initial one."""
        lengths = np.diff(self.stream.documents)
        return self.own_documents[lengths[self.own_documents] == 0]

    @cached_property
    def state_shape(self) -> StateShape:
        r = self.request
        return StateShape(r.batch, r.value_heads, r.key_dim, r.value_dim, state_dtype(r.dtype), r.device)

    @cached_property
    def _indices(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    def index(self, name: str, values: np.ndarray) -> Tensor:
        """Host indices on the device, uploaded once; name: tells them apart."""
        key = (name, self.request.device)
        if key not in self._indices:
            self._indices[key] = torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self.request.device)
        return self._indices[key]

    def documents_of(self, members: np.ndarray) -> np.ndarray:
        """Documents of some local pieces."""
        return self.stream.document[self.numbers[members]]

    def describe(self) -> str:
        """What was planned and why, in lines: operator, documents, layout, exchange, kernel, and bytes of each rank."""
        r, shape = self.request, self.state_shape
        width = shape.dtype.itemsize
        transition = self.op.transition_size(shape._replace(batch=1), 1)
        sent = r.batch * self.table.bytes_sent(r.key_dim * width, float(np.prod(transition)) * width if transition else 0)
        chains = self.stream.chains
        lines = {
            "operator": f"{r.kind}, gate {r.gate}, boundary {self.op.name}",
            "documents": f"{self.num_documents} over {self.layout.num_rows} rows; {len(chains.ptr) - 1} cross a border, the "
            f"longest {chains.longest - 1 if chains.longest else 0} of them",
            "layout": f"{self.layout.name} over {self.layout.num_ranks} ranks",
            "exchange": f"{self.exchange} ({self.reasons['exchange']})",
            "kernel": f"{self.backend.name} ({self.reasons['kernel']})",
            "shape": f"batch {r.batch}, {r.heads}:{r.value_heads} heads of {r.key_dim} × {r.value_dim}, "
            f"{str(r.dtype).removeprefix('torch.')} on {r.device.type}",
            "sent": f"at most {sent.max(initial=0) / 1e6:.4g} MB a rank, forward",
        }
        return "\n".join(f"{word:10} {text}" for word, text in lines.items())


def boundary_operator(kind: str, gate: str) -> BoundaryOp:
    """How the operator's state crosses a border."""
    if KINDS[kind].delta:
        return OPERATORS["dense"]
    return OPERATORS["identity" if gate == NONE else "diagonal" if gate == VECTOR else "scalar"]


_plans: PlanStore[LinearRequest, LinearPlan] = PlanStore()
_transports: PerGroup[dict[float | None, Collective]] = PerGroup()


def linear_plan_of(handle: int) -> LinearPlan:
    """The living plan with this handle: custom operators take integers, not objects."""
    return _plans[handle]


def plan_linear(request: LinearRequest, group: dist.ProcessGroup | None) -> LinearPlan:
    """The plan of a request, cached by value. At its first sight the ranks of the group compare what they plan.

    Raises InputError where rows, documents and layout do not fit, PlanError for the exchange, UnsupportedError where no kernel
    computes the case, and AgreementError where ranks made different calls.
    """
    return _plans.find_or_make(request, group, partial(_agree_and_make, request, group))


def _agree_and_make(request: LinearRequest, group: dist.ProcessGroup | None, handle: int) -> LinearPlan:
    rank = 0 if group is None else dist.get_rank(group)
    layout, documents = place_rows(request.rows, request.num_ranks, rank, request.layout, request.cu_seqlens)
    if group is not None:
        board_of(group).agree(f"linear_attention {request.summary(layout)}")
    made = _make(request, group, rank, layout, documents, handle)
    if rank == 0:
        _log.info("linear attention:\n%s", made.describe())
    return made


def place_rows(
    rows: int, num_ranks: int, rank: int, layout: Layout | None, cu_seqlens: bytes | None
) -> tuple[Layout, np.ndarray]:
    """(layout, cu_seqlens) of the whole stream, checked against this rank's rows. Raises InputError."""
    documents = None if cu_seqlens is None else np.frombuffer(cu_seqlens, np.int64)
    if documents is not None and (len(documents) < 2 or documents[0] != 0 or (np.diff(documents) < 0).any()):
        raise InputError("cu_seqlens must be one-dimensional, begin with 0 and never decrease")
    if layout is None:
        layout = Layout.contiguous(rows * num_ranks if documents is None else int(documents[-1]), num_ranks)
    if layout.num_ranks != num_ranks:
        raise InputError(f"layout is for {layout.num_ranks} ranks, the group has {num_ranks}")
    if documents is None:
        documents = np.array([0, layout.num_rows], np.int64)
    if documents[-1] != layout.num_rows:
        raise InputError(
            f"cu_seqlens ends at {documents[-1]}, but the layout has {layout.num_rows} rows: it is that of the whole stream"
        )
    if layout.counts[rank] != rows:
        raise InputError(
            f"rank {rank} passed {rows} rows, the {layout.name} layout gives it {layout.counts[rank]} of {layout.num_rows}: "
            "pass the layout that the rows follow, such as distattn.Layout.given, where ranks hold unequal shares"
        )
    return layout, documents


def _make(
    r: LinearRequest, group: dist.ProcessGroup | None, rank: int, layout: Layout, documents: np.ndarray, handle: int
) -> LinearPlan:
    stream = cut_stream(layout, documents)
    op = boundary_operator(r.kind, r.gate)
    name, options, why = _pick_exchange(r, op, stream, group)
    exchange = find_exchange(name)
    table = exchange.plan(stream.chains, r.value_heads, r.value_dim, options)
    mirror = exchange.plan(stream.chains.reversed(), r.value_heads, r.value_dim, options)
    case = LinearCase(r.device.type, r.dtype, r.gate, KINDS[r.kind].delta, r.key_dim, r.value_dim, r.heads, r.value_heads)
    backend, why_kernel = choose_linear_backend(case, r.kernel)
    return LinearPlan(
        request=r,
        layout=layout,
        rank=rank,
        stream=stream,
        pieces=_pieces(stream, rank, r.initial, r.final),
        op=op,
        exchange=name,
        table=table,
        forward=lower_exchange(table, rank),
        backward=lower_exchange(mirror, rank),
        backend=backend,
        transport=None if group is None else transport_of(group, r.timeout_s),
        reasons={"exchange": why, "kernel": why_kernel},
        handle=handle,
    )


def _pieces(stream: Stream, rank: int, initial: bool, final: bool) -> Pieces:
    """This rank's pieces and which of them exchange states with whom."""
    mine = stream.of_rank(rank)
    starts, ends = stream.starts_document[mine], stream.ends_document[mine]
    lengths = stream.bounds[mine, 1] - stream.bounds[mine, 0]
    return Pieces(
        lengths=lengths,
        enter=np.flatnonzero(starts & initial),
        late=np.flatnonzero(~starts),
        emit=np.flatnonzero(~ends),
        final=np.flatnonzero(ends & final),
    )


def _pick_exchange(r: LinearRequest, op: BoundaryOp, stream: Stream, group: dist.ProcessGroup | None) -> tuple[str, Any, str]:
    """(name, options, why)."""
    hardware = r.topology
    if not isinstance(hardware, Hardware):
        on_gpu = r.device.type == "cuda" or (group is not None and group_device(group).type == "cuda")
        hardware = find_hardware(hardware or ("h100" if on_gpu else "cpu"))
    rates = LinkRates.of(hardware)
    width = state_dtype(r.dtype).itemsize
    shape = StateShape(r.batch, r.value_heads, r.key_dim, r.value_dim, state_dtype(r.dtype), r.device)
    state = float(np.prod(op.state_size(shape, r.value_heads, r.value_dim))) * width
    transition = float(np.prod(op.transition_size(shape, r.value_heads) or (0,))) * width
    links = stream.chains.longest
    return pick_exchange(r.exchange, r.options, rates, links, state, transition)


def transport_of(group: dist.ProcessGroup, timeout_s: float | None = None) -> Collective:
    """One transport a group: plans of all layers share its counters."""
    made = _transports.setdefault(group, {})
    if timeout_s not in made:
        made[timeout_s] = Collective(group, timeout_s=timeout_s)
    return made[timeout_s]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
