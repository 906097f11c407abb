"""The autograd node of ``Plan.gather``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from distattn.planning import Plan


class GatherRows(torch.autograd.Function):
    """Local rows to global rows; the gradient is summed over ranks and sharded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, made: Plan) -> Tensor:
        ctx.dim, ctx.plan = dim, made
        rows = x.movedim(dim, 0)
        width = int(made.layout.counts.max(initial=0))
        padded = x.new_zeros((width, *rows.shape[1:]))
        padded[: len(rows)] = rows
        every = padded
        if made.group is not None:
            every = x.new_empty((made.num_ranks * width, *rows.shape[1:]))
            dist.all_gather(list(every.chunk(made.num_ranks)), padded, group=made.group)
        return every.index_select(0, made._order.to(x.device)).movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        made: Plan = ctx.plan
        grad = grad.contiguous()
        if made.group is not None:
            grad = grad.clone()
            dist.all_reduce(grad, group=made.group)
        return grad.index_select(ctx.dim, made._positions_on(grad.device)), None, None
