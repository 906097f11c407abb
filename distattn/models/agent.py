"""Agent attention as a layer (arXiv 2312.08874), for models that see whole documents: encoders and denoisers, no decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distattn.agent_attention import agent_attention


class AgentAttention(nn.Module):
    """Hidden [B, T_local, dim] to the same: heads of head_dim, num_agents for each document. Not causal.

    ``Decoder`` refuses it as a kind of layer, with the reason.
    """

    def __init__(self, dim: int, *, num_heads: int, head_dim: int, num_agents: int) -> None:
        super().__init__()
        self.heads, self.num_agents = num_heads, num_agents
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False)
        self.o = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, **where: Any) -> Tensor:
        """where: group, layout, cu_seqlens and timeout_s of ``agent_attention``, whose errors it raises. Collective."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.o(agent_attention(q, k, v, num_agents=self.num_agents, **where).flatten(2))
