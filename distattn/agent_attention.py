"""``agent_attention``: every row asks a few agents, who have asked every row of the document, over rows spread over ranks.

A = pool(Q)        V_A = softmax(s A Kᵀ) V        O = softmax(s Q Aᵀ) V_A        s: scale, a agents a document

Linear in the rows and not causal (arXiv 2312.08874; without its biases by place in the image and its convolution over it).

forward     sum of the agents' partial queries ─▶ maximum, then sum of their partial softmax (u, w) ─▶ the rest is local
backward    sum of dV_A ─▶ sum of dA

Only documents that lie on several ranks take part, with a (K + V + 2) numbers a head forward and a (K + V) on the way back,
whatever their length.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import InputError
from distattn.kernels.linear.reference import state_dtype
from distattn.linear_planning import place_rows, transport_of
from distattn.parallel.agreement import board_of
from distattn.parallel.exchanges import Stream, cut_stream
from distattn.parallel.layout import Layout
from distattn.parallel.plan_store import PlanStore
from distattn.parallel.reduction import reduce_over_ranks
from distattn.parallel.transport.collective import Collective

_log = logging.getLogger(__name__)


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_agents: int,
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    cu_seqlens: np.ndarray | Sequence[int] | None = None,
    scale: float | None = None,
    timeout_s: float | None = None,
) -> Tensor:
    """Attention of this rank's rows to all rows of their documents, on any rank, by way of agents. Collective.

    q, k [B, T_local, H, K], v [B, T_local, H, V] of one floating dtype; computed with in fp32 (fp64). num_agents: a, of each
    document; agent j's query is the mean of q over rows ⌊jL/a⌋ … ⌈(j+1)L/a⌉ − 1 of the L of the document. group: None is one
    rank. layout, cu_seqlens, timeout_s: as for ``linear_attention``, cu_seqlens on the host. scale: None is 1/√K.

    Returns [B, T_local, H, V] in v's dtype, differentiable with respect to q, k and v. Later rows have a part in earlier ones:
    not for decoders. If one rank runs the backward, all must, those without rows too.

    Raises InputError naming the argument, AgreementError where ranks made different calls, TransportError if a transfer fails.
    """
    if (
        q.ndim != 4
        or q.shape != k.shape
        or v.ndim != 4
        or v.shape[:3] != q.shape[:3]
        or 0 in (q.shape[0], *q.shape[2:], v.shape[-1])
    ):
        raise InputError(
            f"q and k must be [B, T, H, K] and v [B, T, H, V], where only T may be 0; got {list(q.shape)}, {list(k.shape)} and "
            f"{list(v.shape)}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise InputError(f"{name} is {x.dtype} on {x.device}; q, k and v must be floating and share dtype and device")
    if num_agents < 1:
        raise InputError(f"num_agents must be at least 1, got {num_agents}")
    plan = _prepare(q, v, num_agents, group, layout, cu_seqlens, timeout_s)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _agent_attention(q, k, v, plan.handle, factor)[0]


# Plans.


@dataclass(frozen=True)
class _Wanted:
    """A call but its tensors. shape: of q, [B, T, H, K]; documents: cu_seqlens as int64 bytes."""

    shape: tuple[int, ...]
    columns: int
    dtype: torch.dtype
    device: torch.device
    agents: int
    layout: Layout | None
    documents: bytes | None
    timeout_s: float | None


@dataclass(frozen=True, eq=False)
class _Plan:
    """Documents over ranks. here: those with rows on this rank; crossing: those on several ranks, alike on all of them."""

    wanted: _Wanted
    stream: Stream
    rank: int
    transport: Collective | None
    handle: int

    @cached_property
    def here(self) -> np.ndarray:
        return np.unique(self.stream.document[self.stream.rank == self.rank])

    @cached_property
    def crossing(self) -> np.ndarray:
        pairs = np.unique(np.stack([self.stream.document, self.stream.rank], 1), axis=0)
        documents, counts = np.unique(pairs[:, 0], return_counts=True)
        return documents[counts > 1]

    @cached_property
    def members(self) -> list[tuple[Tensor, Tensor]]:
        """Of each document here: its local rows, int64 [n], and their weights in its agents' queries, [a, n]."""
        w = self.wanted
        pieces = self.stream.of_rank(self.rank)
        bounds = self.stream.bounds[pieces]
        lengths = bounds[:, 1] - bounds[:, 0]
        local = np.cumsum(lengths) - lengths
        found = []
        for document in self.here.tolist():
            mine = np.flatnonzero(self.stream.document[pieces] == document)
            begin, end = self.stream.documents[document : document + 2]
            rows = np.concatenate([np.arange(local[i], local[i] + lengths[i]) for i in mine])
            place = np.concatenate([np.arange(*bounds[i]) for i in mine]) - begin
            agent = np.arange(w.agents)[:, None]
            low, high = agent * (end - begin) // w.agents, -(-(agent + 1) * (end - begin) // w.agents)
            weight = ((place >= low) & (place < high)) / (high - low)
            found.append((torch.from_numpy(rows).to(w.device), torch.from_numpy(weight).to(w.device, w.dtype)))
        return found

    @cached_property
    def shared(self) -> list[tuple[int, int]]:
        """(place in ``crossing``, place in ``here``) of the documents that are in both."""
        here = {int(document): i for i, document in enumerate(self.here)}
        return [(at, here[int(document)]) for at, document in enumerate(self.crossing) if int(document) in here]


_plans: PlanStore[_Wanted, _Plan] = PlanStore()


def _prepare_eagerly(
    q: Tensor, v: Tensor, agents: int, group: dist.ProcessGroup | None, layout: Layout | None,
    cu_seqlens: np.ndarray | Sequence[int] | None, timeout_s: float | None,
) -> _Plan:  # fmt: skip
    documents = None if cu_seqlens is None else np.asarray(cu_seqlens, np.int64).reshape(-1).tobytes()
    w = _Wanted(tuple(q.shape), v.shape[-1], state_dtype(q.dtype), q.device, agents, layout, documents, timeout_s)
    return _plans.find_or_make(w, group, partial(_make, w, group))


def _make(w: _Wanted, group: dist.ProcessGroup | None, handle: int) -> _Plan:
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    placed, starts = place_rows(w.shape[1], num_ranks, rank, w.layout, w.documents)
    if group is not None:
        digest = hashlib.blake2b(starts.tobytes(), digest_size=16).hexdigest()
        batch, _, heads, width = w.shape
        shown = f"batch={batch} heads={heads} head_dim={width} value_dim={w.columns} dtype={w.dtype} num_agents={w.agents}"
        board_of(group).agree(f"agent_attention {shown} layout={placed.digest} documents={digest}")
    transport = None if group is None else transport_of(group, w.timeout_s)
    made = _Plan(w, cut_stream(placed, starts), rank, transport, handle)
    if rank == 0:
        _log.info("agent attention over %d ranks: %d documents are on several", num_ranks, len(made.crossing))
    return made


def _prepare(*args: Any) -> _Plan:
    """Plans are host work: nothing to trace. Disabled only where something compiles, since that imports the compiler."""
    if torch.compiler.is_compiling():
        apart: Any = torch.compiler.disable(_prepare_eagerly)
        return apart(*args)
    return _prepare_eagerly(*args)


# The operator. Its other results are, of each document here, the agents' queries A [B, D, H, a, K], their LSEs [B, D, H, a] and
# values V_A [B, D, H, a, V].


@torch.library.custom_op("distattn::agent_attention", mutates_args=())
def _agent_attention(q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _plans[plan]
    batch, _, heads, width = made.wanted.shape
    agents, lse, sums = (_empty(made, tail) for tail in ((width,), (), (1 + made.wanted.columns,)))
    for i, (rows, weight) in enumerate(made.members):
        agents[:, i] = weight @ _heads_first(made, q, rows)
    _over_ranks(made, agents)
    for i, (rows, _) in enumerate(made.members):
        lse[:, i] = (scale * agents[:, i] @ _heads_first(made, k, rows).mT).amax(-1)
    _over_ranks(made, lse, largest=True)
    for i, (rows, _) in enumerate(made.members):
        share = (scale * agents[:, i] @ _heads_first(made, k, rows).mT - lse[:, i, ..., None]).exp()
        sums[:, i] = torch.cat([share.sum(-1, keepdim=True), share @ _heads_first(made, v, rows)], -1)
    _over_ranks(made, sums)
    values = sums[..., 1:] / sums[..., :1]
    lse += sums[..., 0].log()
    out = v.new_empty((batch, q.shape[1], heads, made.wanted.columns))
    for i, (rows, _) in enumerate(made.members):
        asked = (scale * _heads_first(made, q, rows) @ agents[:, i].mT).softmax(-1)
        out[:, rows] = (asked @ values[:, i]).transpose(1, 2).to(v.dtype)
    return out, agents, lse, values


@_agent_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _plans[plan]
    agents, lse, values = (_empty(made, tail, q) for tail in ((q.shape[-1],), (), (v.shape[-1],)))
    return v.new_empty((*q.shape[:-1], v.shape[-1])), agents, lse, values


@torch.library.custom_op("distattn::agent_attention_backward", mutates_args=())
def _agent_attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, lse: Tensor, values: Tensor, plan: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    made = _plans[plan]
    dq, dk, dv = (torch.zeros_like(x, dtype=made.wanted.dtype) for x in (q, k, v))
    dagents, dvalues = torch.zeros_like(agents), torch.zeros_like(values)
    for i, (rows, _) in enumerate(made.members):
        asking, given = _heads_first(made, q, rows), _heads_first(made, do, rows)
        share = (scale * asking @ agents[:, i].mT).softmax(-1)
        dvalues[:, i] = share.mT @ given
        dshare = given @ values[:, i].mT
        dscores = scale * share * (dshare - (share * dshare).sum(-1, keepdim=True))
        dq[:, rows] = (dscores @ agents[:, i]).transpose(1, 2)
        dagents[:, i] = dscores.mT @ asking
    _over_ranks(made, dvalues)
    mean = (values * dvalues).sum(-1, keepdim=True)
    for i, (rows, _) in enumerate(made.members):
        keys = _heads_first(made, k, rows)
        share = (scale * agents[:, i] @ keys.mT - lse[:, i, ..., None]).exp()
        dv[:, rows] = (share.mT @ dvalues[:, i]).transpose(1, 2)
        dscores = scale * share * (dvalues[:, i] @ _heads_first(made, v, rows).mT - mean[:, i])
        dk[:, rows] = (dscores.mT @ agents[:, i]).transpose(1, 2)
        dagents[:, i] += dscores @ keys
    _over_ranks(made, dagents)
    for i, (rows, weight) in enumerate(made.members):
        dq[:, rows] += (weight.mT @ dagents[:, i]).transpose(1, 2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_agent_attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, lse: Tensor, values: Tensor, plan: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, ctx.plan, ctx.scale = inputs
    ctx.made = _plans[ctx.plan]  # keeps the plan alive until the backward has run
    ctx.save_for_backward(q, k, v, *output[1:])


def _differentiate(ctx: Any, do: Tensor, *_: Tensor) -> tuple:
    return *_agent_attention_backward(do, *ctx.saved_tensors, ctx.plan, ctx.scale), None, None


_agent_attention.register_autograd(_differentiate, setup_context=_save)


def _empty(made: _Plan, tail: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    w = made.wanted
    shape = (w.shape[0], len(made.here), w.shape[2], w.agents, *tail)
    return torch.empty(shape, dtype=w.dtype, device=w.device) if like is None else like.new_empty(shape, dtype=w.dtype)


def _heads_first(made: _Plan, x: Tensor, rows: Tensor) -> Tensor:
    """[B, H, n, ·] of some rows, in the dtype that is computed with."""
    return x.index_select(1, rows).transpose(1, 2).to(made.wanted.dtype)


def _over_ranks(made: _Plan, x: Tensor, *, largest: bool = False) -> None:
    """In place: what the ranks of each document have of it, summed, or the largest. x [B, D, ...], documents here."""
    if not len(made.crossing):
        return
    assert made.transport is not None
    every = x.new_full((x.shape[0], len(made.crossing), *x.shape[2:]), -torch.inf if largest else 0.0)
    for at, place in made.shared:
        every[:, at] = x[:, place]
    combine = (lambda shares: shares.amax(0)) if largest else (lambda shares: shares.sum(0))
    every = reduce_over_ranks(made.transport, every, combine, "what ranks have of the agents")
    for at, place in made.shared:
        x[:, place] = every[:, at]
