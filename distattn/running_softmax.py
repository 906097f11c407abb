"""``running_softmax``: a softmax-weighted mean of all rows so far, over rows that are spread over ranks: Aaren's operator.

lse_t = log Σ_{i ≤ t} e^{s_i}        o_t = Σ_{i ≤ t} e^{s_i − lse_t} v_i        i in t's document

Attention whose query is the same for all tokens, so that a state of V + 2 numbers a head takes the place of all keys
(arXiv 2405.13956). Ranks exchange that state once, and gradients of V + 1 numbers once on the way back.
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
from distattn.kernels.linear.running_softmax import Level, cut_levels, finite, gather, merge, scan
from distattn.linear_planning import place_rows, transport_of
from distattn.parallel.agreement import board_of
from distattn.parallel.exchanges import (
    OPERATORS,
    ExchangeRun,
    LinkRates,
    LoweredExchange,
    Map,
    OwnPieces,
    StateShape,
    Stream,
    cut_stream,
    find_exchange,
    lower_exchange,
    pick_exchange,
)
from distattn.parallel.hardware import Hardware, find_hardware
from distattn.parallel.layout import Layout
from distattn.parallel.plan_store import PlanStore
from distattn.parallel.transport.collective import Collective, group_device

_log = logging.getLogger(__name__)


def running_softmax(
    scores: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: str = "auto",
    layout: Layout | None = None,
    cu_seqlens: np.ndarray | Sequence[int] | None = None,
    options: Any = None,
    topology: Hardware | str | None = None,
    timeout_s: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of v over each row and those before it in its document, on any rank, weighted by e^score. Collective.

    scores [B, T_local, H], in any floating dtype, computed with in fp32 (fp64); −∞ leaves a row out. v [B, T_local, H, V].
    group, exchange, layout, options, topology, timeout_s: as for ``linear_attention``; cu_seqlens too, on the host.

    Returns (o [B, T_local, H, V] in v's dtype, lse [B, T_local, H] in fp32 or fp64); where nothing is seen o is 0 and lse −∞.
    Both are differentiable with respect to scores and v. (lse, o) of a document's last row are its final state, and a row
    with that score and value before a document's first one is an initial state.

    Raises InputError naming the argument, PlanError for the exchange, AgreementError where ranks made different calls,
    TransportError if a transfer fails.
    """
    if v.ndim != 4 or scores.shape != v.shape[:3] or 0 in (v.shape[0], *v.shape[2:]):
        raise InputError(
            f"scores must be [B, T, H] and v [B, T, H, V], where only T may be 0; got {list(scores.shape)} and {list(v.shape)}"
        )
    if not (scores.is_floating_point() and v.is_floating_point()) or scores.device != v.device:
        raise InputError(
            f"scores and v must be floating and share a device; got {scores.dtype} on {scores.device} and {v.dtype} on "
            f"{v.device}"
        )
    plan = _prepare(scores, v, group, exchange, layout, cu_seqlens, options, topology, timeout_s)
    o, lse, _ = _running_softmax(scores, v, plan.handle)
    return o, lse


def running_softmax_step(
    scores: Tensor, v: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One more row on one rank, for decoding: scores [B, 1, H], v [B, 1, H, V]; differentiable.

    state: (lse [B, H], o [B, H, V]) that the step before left, or those of the last row of ``running_softmax``; None before the
    first. Returns (o [B, 1, H, V] in v's dtype, the next state in fp32, or fp64). Raises InputError.
    """
    if v.ndim != 4 or v.shape[1] != 1 or scores.shape != v.shape[:3]:
        raise InputError(f"a step takes scores [B, 1, H] and v [B, 1, H, V]; got {list(scores.shape)} and {list(v.shape)}")
    dtype = _working_dtype(scores, v)
    lse, o = scores[:, 0].to(dtype), v[:, 0].to(dtype)
    if state is not None:
        if state[0].shape != lse.shape or state[1].shape != o.shape:
            raise InputError(
                f"state must be (lse {list(lse.shape)}, o {list(o.shape)}), got {list(state[0].shape)} and "
                f"{list(state[1].shape)}"
            )
        lse, o = merge(lse, o, state[0].to(dtype), state[1].to(dtype))
    return o.to(v.dtype)[:, None], (lse, o)


def _working_dtype(scores: Tensor, v: Tensor) -> torch.dtype:
    return state_dtype(torch.promote_types(scores.dtype, v.dtype))


def _hardware_name(v: Tensor, group: dist.ProcessGroup | None) -> str:
    on_gpu = v.device.type == "cuda" or (group is not None and group_device(group).type == "cuda")
    return "h100" if on_gpu else "cpu"


# Plans.


def _prepare_eagerly(
    scores: Tensor, v: Tensor, group: dist.ProcessGroup | None, exchange: str, layout: Layout | None,
    cu_seqlens: np.ndarray | Sequence[int] | None, options: Any, topology: Hardware | str | None, timeout_s: float | None,
) -> _Plan:  # fmt: skip
    documents = None if cu_seqlens is None else np.asarray(cu_seqlens, np.int64).reshape(-1).tobytes()
    hardware = topology if isinstance(topology, Hardware) else find_hardware(topology or _hardware_name(v, group))
    wanted = _Wanted(
        tuple(v.shape), _working_dtype(scores, v), v.device, exchange, layout, documents, options, hardware, timeout_s
    )
    return _plans.find_or_make(wanted, group, partial(_make, wanted, group))


def _prepare(*args: Any) -> _Plan:
    """Plans are host work: nothing to trace. Disabled only where something compiles, since that imports the compiler."""
    if torch.compiler.is_compiling():
        apart: Any = torch.compiler.disable(_prepare_eagerly)
        return apart(*args)
    return _prepare_eagerly(*args)


@dataclass(frozen=True)
class _Wanted:
    """A call but its tensors. shape: of v, [B, T, H, V]; documents: cu_seqlens as int64 bytes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    exchange: str
    layout: Layout | None
    documents: bytes | None
    options: Any
    hardware: Hardware
    timeout_s: float | None

    def state(self, columns: int) -> StateShape:
        return StateShape(self.shape[0], self.shape[2], 1, columns, self.dtype, self.device)


@dataclass(frozen=True, eq=False)
class _Plan:
    """One shape over one stream on this rank."""

    wanted: _Wanted
    pieces: OwnPieces
    forward: LoweredExchange
    backward: LoweredExchange
    transport: Collective | None
    handle: int

    @cached_property
    def levels(self) -> tuple[list[Level], list[Level]]:
        """Of the scan over all pieces and of its backward."""
        resets = np.zeros(self.wanted.shape[1], bool)
        resets[self.pieces.rows[:, 0]] = True
        device = self.wanted.device
        return cut_levels(resets, backward=False, device=device), cut_levels(resets, backward=True, device=device)


_plans: PlanStore[_Wanted, _Plan] = PlanStore()


def _make(w: _Wanted, group: dist.ProcessGroup | None, handle: int) -> _Plan:
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    layout, starts = place_rows(w.shape[1], num_ranks, rank, w.layout, w.documents)
    batch, _, heads, columns = w.shape
    if group is not None:
        digest = hashlib.blake2b(starts.tobytes(), digest_size=16).hexdigest()
        shown = f"batch={batch} heads={heads} columns={columns} dtype={w.dtype} exchange={w.exchange} options={w.options}"
        board_of(group).agree(f"running_softmax {shown} layout={layout.digest} documents={digest}")
    stream = cut_stream(layout, starts)
    name, options, reason = _pick(w, stream)
    exchange = find_exchange(name)
    made = _Plan(
        wanted=w,
        pieces=OwnPieces(stream, rank),
        forward=lower_exchange(exchange.plan(stream.chains, heads, columns, options), rank),
        backward=lower_exchange(exchange.plan(stream.chains.reversed(), heads, columns + 1, options), rank),
        transport=None if group is None else transport_of(group, w.timeout_s),
        handle=handle,
    )
    if rank == 0:
        _log.info("running softmax over %d ranks: exchange %s (%s)", num_ranks, name, reason)
    return made


def _pick(w: _Wanted, stream: Stream) -> tuple[str, Any, str]:
    """(exchange, its options, why)."""
    rates, links = LinkRates.of(w.hardware), stream.chains.longest
    state = float(w.shape[0] * w.shape[2] * (w.shape[3] + 2) * w.dtype.itemsize)
    return pick_exchange(w.exchange, w.options, rates, links, state, 0.0)


# The operator. Its last output is the LSE that entered late pieces, for the backward: [B, late pieces, H].


@torch.library.custom_op("distattn::running_softmax", mutates_args=())
def _running_softmax(scores: Tensor, v: Tensor, plan: int) -> tuple[Tensor, Tensor, Tensor]:
    made = _plans[plan]
    w = made.wanted
    batch, rows, heads, columns = w.shape
    entered = torch.empty((batch, len(made.pieces.late), heads), dtype=w.dtype, device=w.device)
    if not rows:
        _travel(made, {}, backward=False)
        return v.new_empty(v.shape), entered.new_empty(w.shape[:3]), entered
    lse, o = scan(scores.to(w.dtype), v.to(w.dtype), made.levels[0])
    maps = {}
    for piece in made.pieces.emit:
        last = made.pieces.rows[piece][1] - 1
        m = lse[:, last, :, None]
        maps[piece] = Map(None, torch.cat([m, torch.ones_like(m), o[:, last]], -1))
    states = _travel(made, maps, backward=False)
    for i, piece in enumerate(made.pieces.late):
        m, u, weighted = states[piece].split([1, 1, columns], -1)
        l_in = (m + u.log())[..., 0]
        o_in = torch.where(u > 0, weighted / u, 0.0)
        here = slice(*made.pieces.rows[piece])
        lse[:, here], o[:, here] = merge(lse[:, here], o[:, here], l_in[:, None], o_in[:, None])
        entered[:, i] = l_in
    return o.to(v.dtype), lse.contiguous(), entered


@_running_softmax.register_fake
def _(scores: Tensor, v: Tensor, plan: int) -> tuple[Tensor, Tensor, Tensor]:
    made = _plans[plan]
    batch, _, heads, _ = made.wanted.shape
    dtype = made.wanted.dtype
    entered = v.new_empty((batch, len(made.pieces.late), heads), dtype=dtype)
    return v.new_empty(v.shape), v.new_empty(scores.shape, dtype=dtype), entered


@torch.library.custom_op("distattn::running_softmax_backward", mutates_args=())
def _running_softmax_backward(
    do: Tensor, dlse: Tensor, scores: Tensor, v: Tensor, o: Tensor, lse: Tensor, entered: Tensor, plan: int
) -> tuple[Tensor, Tensor]:
    made = _plans[plan]
    dtype, columns = made.wanted.dtype, v.shape[-1]
    if not v.shape[1]:
        _travel(made, {}, backward=True)
        return torch.zeros_like(scores), torch.zeros_like(v)
    s, values, do = scores.to(dtype), v.to(dtype), do.to(dtype)
    given = torch.cat([do, (o.to(dtype) * do).sum(-1, keepdim=True) - dlse[..., None]], -1)
    y = gather(s, lse, given, made.levels[1])
    maps = {}
    for i, piece in enumerate(made.pieces.late):
        begin, end = made.pieces.rows[piece]
        factor = (entered[:, i, None] - finite(lse[:, begin:end])).exp()
        maps[piece] = Map(factor[:, -1], torch.einsum("bth,bthx->bhx", factor, given[:, begin:end])[:, :, None])
    gradients = _travel(made, maps, backward=True)
    for piece in made.pieces.emit:
        begin, end = made.pieces.rows[piece]
        factor = (s[:, begin:end] - finite(lse[:, end - 1 : end])).exp()
        y[:, begin:end] += factor[..., None] * gradients[piece][:, None, :, 0]
    dv, drest = y[..., :columns], y[..., columns]
    return ((values * dv).sum(-1) - drest).to(scores.dtype), dv.to(v.dtype).contiguous()


@_running_softmax_backward.register_fake
def _(
    do: Tensor, dlse: Tensor, scores: Tensor, v: Tensor, o: Tensor, lse: Tensor, entered: Tensor, plan: int
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, v, ctx.plan = inputs
    ctx.made = _plans[ctx.plan]  # keeps the plan alive until the backward has run
    ctx.save_for_backward(scores, v, *output)


def _differentiate(ctx: Any, do: Tensor, dlse: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    scores, v, o, lse, entered = ctx.saved_tensors
    return *_running_softmax_backward(do, dlse, scores, v, o, lse, entered, ctx.plan), None


_running_softmax.register_autograd(_differentiate, setup_context=_save)


def _travel(made: _Plan, maps: dict[int, Map], *, backward: bool) -> dict[int, Tensor]:
    """What enters each of this rank's pieces, by local number: states, or on the way back gradients of [o, lse]."""
    columns = made.wanted.shape[3] + (1 if backward else 0)
    op = OPERATORS["scalar" if backward else "softmax"]
    run = ExchangeRun(
        made.backward if backward else made.forward, op, made.wanted.state(columns),
        {int(made.pieces.numbers[piece]): held for piece, held in maps.items()}, made.transport, label="running softmax",
    )  # fmt: skip
    run.start()
    states = run.finish()
    return {piece: states[int(number)] for piece, number in enumerate(made.pieces.numbers) if int(number) in states}
