"""Aaren: attention as a recurrent network (arXiv 2405.13956). A learned query, the same for all tokens, asks each prefix.

s_t = ⟨query_h, k_t⟩ / √K        o = running_softmax(s, v)        y = W_o o
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distattn.models.config import ModelConfig
from distattn.models.layers import StreamInfo, bare_linear, widen
from distattn.running_softmax import running_softmax


class Aaren(nn.Module):
    """One layer: hidden [B, T_local, dim] to the same. Heads and sizes are those of ``config.linear``'s values and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.linear
        self.heads, self.head_dim = shape.num_value_heads, shape.head_dim
        self.query = nn.Parameter(torch.empty(self.heads, self.head_dim))
        self.k = bare_linear(config.dim, self.heads * self.head_dim)
        self.v = bare_linear(config.dim, self.heads * shape.value_head_dim)
        self.o = bare_linear(self.heads * shape.value_head_dim, config.dim)

    def forward(self, x: Tensor, stream: StreamInfo) -> Tensor:
        plan = stream.plan
        k = widen(self.k(x)).unflatten(-1, (self.heads, -1))
        scores = (k * widen(self.query)).sum(-1) * self.head_dim**-0.5
        out, _ = running_softmax(
            scores,
            self.v(x).unflatten(-1, (self.heads, -1)),
            group=plan.group,
            layout=plan.layout,
            cu_seqlens=stream.documents,
            topology=plan.hardware,
            timeout_s=None if plan.transport is None else plan.transport.timeout_s,
        )
        return self.o(out.flatten(2))
