"""Attention under Megatron's activation checkpoints: kept once, so that the recomputation repeats neither it nor its
communication.

    first pass (no gradients)     attend ──▶ queue (out, LSE)          the queue is the layer's own
    second pass (in backward)     queue ──▶ autograd node of the results that are there already

A micro-batch that comes first into a layer also leaves it first, under every pipeline schedule of Megatron's, so the queue
is first in, first out. What comes out is compared with the queries that it is for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distattn.errors import InputError
from distattn.planning import Plan

_SAMPLE = 64
"""Numbers of q by which a second pass is told from another micro-batch's."""
_TOLERANCE = 0.05
"""Of the largest of them: recomputed queries may differ in rounding, those of other tokens differ by far more."""


@dataclass(frozen=True)
class _Kept:
    plan: Plan
    out: Tensor
    lse: Tensor
    sample: Tensor


class KeptResults:
    """The results of a layer's first passes that no second pass has taken yet."""

    def __init__(self) -> None:
        self._queue: deque[_Kept] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, q: Tensor, plan: Plan, out: Tensor, lse: Tensor) -> None:
        self._queue.append(_Kept(plan, out, lse, _sample(q)))

    def pop(self, q: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """(out, lse) of the oldest first pass. Raises InputError unless it was of this plan and these queries.

        On a GPU the queries are compared there, without waiting: a mismatch ends the process with a device assertion.
        """
        if not self._queue:
            raise InputError("attention is recomputed for a forward pass that kept no results: each pass has one backward")
        kept = self._queue.popleft()
        if kept.plan is not plan or kept.out.shape[:-1] != q.shape[:-1]:
            raise InputError(
                "attention is recomputed with another group, other documents or another shape than in its forward pass: "
                "packed_seq_params must stay as they are until the backward pass, and each forward pass needs one"
            )
        sample = _sample(q)
        # Not "at most": numbers that are not finite are for the loss to report.
        same = ~((sample - kept.sample).abs().amax() > _TOLERANCE * kept.sample.abs().amax())
        message = "attention is recomputed for other tokens than it was kept for: a forward pass without a backward pass?"
        if q.is_cuda:
            torch._assert_async(same, message)
        elif not bool(same):
            raise InputError(message)
        return kept.out, kept.lse


def _sample(q: Tensor) -> Tensor:
    """Some numbers spread over q [B, S, H, D], in fp32; zeros where it has none."""
    if not q.numel():
        return q.new_zeros(1, dtype=torch.float32)
    rows = q[0, :, 0, :]
    step = max(1, rows.shape[0] // _SAMPLE)
    return rows[::step].float().mean(-1)[:_SAMPLE].detach().clone()


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, sink: Tensor | None, kept: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention as ``distattn.attention`` has it, from results that may be there already.

    q [B, S_local, H, D], k, v, sink [H]: as there. kept: (out, lse) of the same call without the sink, or None to attend.
    Returns (out with the sink, out and lse without it); the last two are what to keep. Collective unless kept is given; the
    backward is collective always.
    """
    out, lse = _Attend.apply(q, k, v, plan, scale, sink is not None, kept)
    if sink is None:
        return out, out, lse
    # A key of logit ``sink`` and value 0 leaves this share to the others.
    share = torch.sigmoid(lse - sink.to(lse.dtype)).unsqueeze(-1)
    return (out * share).to(out.dtype), out, lse


class _Attend(torch.autograd.Function):
    """The node holds the plan: with new documents in every micro-batch, nothing else does so until the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, has_sink: bool, kept: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if kept is None:
            out, lse = torch.ops.distattn.attention(q, k, v, plan.handle, scale, 0.0, has_sink)
        else:
            # Views: autograd marks what a node returns as its own.
            out, lse = kept[0].view_as(kept[0]), kept[1].view_as(kept[1])
        ctx.plan, ctx.scale, ctx.has_sink = plan, scale, has_sink
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        if not has_sink:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else do
        dlse = torch.zeros_like(lse) if dlse is None else dlse
        gradients = torch.ops.distattn.attention_backward(
            do, dlse, q, k, v, out, lse, [], ctx.plan.handle, ctx.scale, 0.0, ctx.has_sink
        )
        return *gradients, None, None, None, None
