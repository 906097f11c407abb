"""One tensor of every rank put together on all of them, over a transport, so that a rank that waits hears why.

rank r ─ share p of its tensor ─▶ rank p puts the shares together, in the order of ranks ─ the result ─▶ every rank

Twice the tensor's bytes a rank and direction, as any all-reduce; the same bits on every rank, and in every run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.parallel.transport.base import Message
from distattn.parallel.transport.collective import Collective


def reduce_over_ranks(transport: Collective, x: Tensor, combine: Callable[[Tensor], Tensor], what: str) -> Tensor:
    """Collective. x: of one shape and dtype on all ranks; combine: from [P, n], the ranks' shares, to [n]; what: named where a
    transfer fails. Raises TransportError."""
    num_ranks = dist.get_world_size(transport.group)
    size = -(-x.numel() // num_ranks)
    send = x.new_zeros(num_ranks * size)
    send[: x.numel()] = x.reshape(-1)
    share = combine(_exchange(transport, send, num_ranks, what).view(num_ranks, size))
    every = _exchange(transport, share.expand(num_ranks, size).reshape(-1), num_ranks, what)
    return every[: x.numel()].view(x.shape)


def _exchange(transport: Collective, send: Tensor, num_ranks: int, what: str) -> Tensor:
    """An equal part to each rank, and one from each."""
    receive = torch.empty_like(send)
    splits = [send.numel() * send.element_size() // num_ranks] * num_ranks
    message = Message(0, 1, send.view(torch.uint8), receive.view(torch.uint8), splits, splits, lambda: f"for {what}")
    transport.post(message).wait()
    return receive
