"""Grouped-query softmax attention as a layer's part: projections, norms and rotation of heads, gate."""

from __future__ import annotations

from torch import Tensor, nn

from distattn.attention import attention
from distattn.models.config import ModelConfig
from distattn.models.layers import RMSNorm, StreamInfo, bare_linear
from distattn.models.rope import Rotation, apply_rotation


class Attention(nn.Module):
    """Grouped-query attention over the sharded stream: query head h uses KV head h // (num_heads // num_kv_heads)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = bare_linear(config.dim, config.num_heads * config.head_dim)
        self.k = bare_linear(config.dim, config.num_kv_heads * config.head_dim)
        self.v = bare_linear(config.dim, config.num_kv_heads * config.head_dim)
        self.o = bare_linear(config.num_heads * config.head_dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.gate = bare_linear(config.dim, config.num_heads * config.head_dim) if config.attention_gate else None

    def forward(self, x: Tensor, stream: StreamInfo) -> Tensor:
        q, k, v, *gate = self.project(x, stream)
        out = attention(q, k, v, stream.plan)
        assert isinstance(out, Tensor)
        return self.combine(out, *gate)

    def project(self, x: Tensor, stream: StreamInfo) -> tuple[Tensor, ...]:
        """(q, k, v), and the gate's values where there is one."""
        q = apply_rotation(self.q_norm(self.q(x).unflatten(2, (-1, self.head_dim))), stream.rotation)
        return q, *self.keys(x, stream.rotation), *(() if self.gate is None else (self.gate(x),))

    def keys(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """(k, v), [B, T, num_kv_heads, head_dim] each; rotation: None where x has no positions."""
        k = self.k_norm(self.k(x).unflatten(2, (-1, self.head_dim)))
        return k if rotation is None else apply_rotation(k, rotation), self.v(x).unflatten(2, (-1, self.head_dim))

    def combine(self, out: Tensor, *gate: Tensor) -> Tensor:
        """From attention's output [B, T_local, num_heads, head_dim] to the layer's [B, T_local, dim]."""
        out = out.flatten(2)
        return self.o(out * gate[0].sigmoid() if gate else out)
