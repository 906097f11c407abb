"""``short_convolution``: a causal depthwise convolution over packed documents whose rows are spread over ranks.

y_t = Σ_j weight[:, W − 1 − j] ∘ x_{t − j}        j < W, inside t's document

The W − 1 rows before each piece of a document come from the rank that holds them, as a halo: one message, or as many hops as
there are pieces shorter than the halo. The exchange is a ``torch.library`` operator that ``distattn.checkpoint_contexts``
saves, so a checkpointed layer does not repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import InputError
from distattn.linear_planning import place_rows, transport_of
from distattn.parallel.exchanges import (
    EXCHANGES,
    OPERATORS,
    ExchangeRun,
    LoweredExchange,
    Map,
    OwnPieces,
    StateShape,
    cut_stream,
    lower_exchange,
)
from distattn.parallel.layout import Layout
from distattn.parallel.plan_store import PlanStore
from distattn.parallel.transport.collective import Collective


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    layout: Layout | None = None,
    cu_seqlens: np.ndarray | Sequence[int] | None = None,
    timeout_s: float | None = None,
) -> Tensor:
    """Convolve this rank's rows with those before them in their documents, on any rank. Collective; differentiable.

    x [B, T_local, C]; weight [C, W] in x's dtype, its last column for the row itself. group, layout, cu_seqlens, timeout_s: as
    for ``linear_attention``, cu_seqlens on the host. Returns [B, T_local, C]. Raises InputError, TransportError.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2]:
        raise InputError(f"x must be [B, T, C] and weight [C, W], got {list(x.shape)} and {list(weight.shape)}")
    width = weight.shape[1]
    if width == 1:
        return x * weight[:, 0]
    plan = _plan(x.shape[1], x.shape[2], width, group, layout, cu_seqlens, timeout_s)
    halo = _halo(x, plan.handle).flatten(1, 2)  # [B, late pieces · (W − 1), C]
    source = torch.cat([x, halo, x.new_zeros((x.shape[0], 1, x.shape[2]))], 1)
    taps = plan.taps_on(x.device)
    parts = [source.index_select(1, taps[j]) * weight[:, width - 1 - j] for j in range(width)]
    return torch.stack(parts).sum(0)


@dataclass(frozen=True, eq=False)
class _Plan:
    """The halos of one stream and width on this rank."""

    pieces: OwnPieces
    width: int
    forward: LoweredExchange
    backward: LoweredExchange
    transport: Collective | None
    handle: int

    @cached_property
    def taps(self) -> np.ndarray:
        """Where row t − j is for each j and local row t, among local rows, halos and a row of zeros: int64 [W, T]."""
        rows = int(self.pieces.rows[-1, 1]) if len(self.pieces.rows) else 0
        halo = self.width - 1
        zero = rows + len(self.pieces.late) * halo
        taps = np.full((self.width, rows), zero)
        place = {piece: i for i, piece in enumerate(self.pieces.late)}
        for piece, (begin, end) in enumerate(self.pieces.rows.tolist()):
            t = np.arange(begin, end)
            for j in range(self.width):
                inside = t - j >= begin
                before = rows + place[piece] * halo + halo + (t - j - begin) if piece in place else zero
                taps[j, begin:end] = np.where(inside, t - j, before)
        return taps

    @cached_property
    def _taps(self) -> dict[torch.device, Tensor]:
        return {}

    def taps_on(self, device: torch.device) -> Tensor:
        if device not in self._taps:
            self._taps[device] = torch.from_numpy(self.taps).to(device)
        return self._taps[device]


_plans: PlanStore[tuple, _Plan] = PlanStore()


def _plan(
    rows: int, channels: int, width: int, group: dist.ProcessGroup | None, layout: Layout | None,
    cu_seqlens: np.ndarray | Sequence[int] | None, timeout_s: float | None,
) -> _Plan:  # fmt: skip
    documents = None if cu_seqlens is None else np.asarray(cu_seqlens, np.int64).tobytes()
    key = (rows, channels, width, layout, documents, timeout_s)
    return _plans.find_or_make(key, group, partial(_make, *key, group))


def _make(
    rows: int, channels: int, width: int, layout: Layout | None, documents: bytes | None, timeout_s: float | None,
    group: dist.ProcessGroup | None, handle: int,
) -> _Plan:  # fmt: skip
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    placed, starts = place_rows(rows, num_ranks, rank, layout, documents)
    stream = cut_stream(placed, starts)
    chains = stream.halo_chains(width - 1)
    serial = EXCHANGES["serial"]
    return _Plan(
        pieces=OwnPieces(stream, rank),
        width=width,
        forward=lower_exchange(serial.plan(chains, 1, channels), rank),
        backward=lower_exchange(serial.plan(chains.reversed(), 1, channels), rank),
        transport=None if group is None else transport_of(group, timeout_s),
        handle=handle,
    )


# Halos [B, pieces, W − 1, C] of the late pieces, and the way back of their gradients.


@torch.library.custom_op("distattn::halo", mutates_args=())
def _halo(x: Tensor, plan: int) -> Tensor:
    made = _plans[plan]
    tails = {}
    for piece in made.pieces.emit:
        begin, end = made.pieces.rows[piece].tolist()
        tail = x[:, max(begin, end - made.width + 1) : end]
        missing = made.width - 1 - tail.shape[1]
        tails[piece] = torch.cat([tail.new_zeros((x.shape[0], missing, x.shape[2])), tail], 1) if missing else tail
    return _travel(made, made.forward, tails, made.pieces.late, x)


@_halo.register_fake
def _(x: Tensor, plan: int) -> Tensor:
    made = _plans[plan]
    return x.new_empty((x.shape[0], len(made.pieces.late), made.width - 1, x.shape[2]))


@torch.library.custom_op("distattn::halo_backward", mutates_args=())
def _halo_backward(dhalo: Tensor, rows: int, plan: int) -> Tensor:
    made = _plans[plan]
    given = {piece: dhalo[:, i] for i, piece in enumerate(made.pieces.late)}
    dtails = _travel(made, made.backward, given, made.pieces.emit, dhalo)
    dx = dhalo.new_zeros((dhalo.shape[0], rows, dhalo.shape[-1]))
    for i, piece in enumerate(made.pieces.emit):
        begin, end = made.pieces.rows[piece].tolist()
        kept = min(made.width - 1, end - begin)
        dx[:, end - kept : end] += dtails[:, i, made.width - 1 - kept :]
    return dx


@_halo_backward.register_fake
def _(dhalo: Tensor, rows: int, plan: int) -> Tensor:
    return dhalo.new_empty((dhalo.shape[0], rows, dhalo.shape[-1]))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.plan = inputs
    ctx.rows, ctx.made = x.shape[1], _plans[ctx.plan]  # the plan lives until the backward has run


def _differentiate(ctx: Any, dhalo: Tensor) -> tuple[Tensor, None]:
    return _halo_backward(dhalo, ctx.rows, ctx.plan), None


_halo.register_autograd(_differentiate, setup_context=_save)


def _travel(made: _Plan, lowered: LoweredExchange, given: dict[int, Tensor], wanted: list[int], like: Tensor) -> Tensor:
    """One exchange: [B, W − 1, C] of some local pieces, to [B, wanted pieces, W − 1, C]."""
    batch, channels, rows = like.shape[0], like.shape[-1], made.width - 1
    shape = StateShape(batch, 1, rows, channels, like.dtype, like.device)
    sign = 1 if lowered is made.forward else -1
    maps = {}
    for piece, tail in given.items():
        begin, end = made.pieces.rows[piece].tolist()
        through = end - begin < rows
        shift = torch.full((batch, 1), float(sign * (end - begin)), device=like.device) if through else None
        maps[int(made.pieces.numbers[piece])] = Map(shift, tail.unsqueeze(1))
    run = ExchangeRun(lowered, OPERATORS["halo"], shape, maps, made.transport, label="halo")
    run.start()
    states = run.finish()
    empty = like.new_empty((batch, 0, rows, channels))
    parts = [states[int(number)].squeeze(1) for number in made.pieces.numbers[wanted]]
    return torch.stack(parts, 1) if parts else empty
