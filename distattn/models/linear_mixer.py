"""A layer of linear attention over the sharded stream: projections, short convolution, gates, the operator, output gate.

[q, k, v] = silu(conv(x W_qkv))          conv over documents, its halo from other ranks
o = linear_attention(q, k, v, decay(x), β(x))
y = W_o (norm(o) · gate(x))              norm over each head
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distattn.linear import linear_attention
from distattn.models.config import GATE_RANK, ModelConfig
from distattn.models.layers import RMSNorm, StreamInfo, bare_linear, widen
from distattn.short_convolution import short_convolution

_DELTA = ("delta", "gated_delta", "kda")
_GATE_TEMPERATURE = 16.0
"""GLA's (arXiv 2312.06635): log decay = log σ(x) / 16, so that states start out with long memory."""
_STEP_SHIFT = 5.0
"""softplus(1 − 5) = 0.018: the first step size of the Mamba gates of gated_delta and kda, whose bias starts at 1."""


class ShortConvolution(nn.Module):
    """Depthwise causal convolution inside documents; weight [channels, width]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))

    def forward(self, x: Tensor, stream: StreamInfo | None) -> Tensor:
        """stream: None where x is one document that every rank has."""
        if stream is None:
            return short_convolution(x, self.weight.to(x.dtype))
        plan = stream.plan
        timeout_s = None if plan.transport is None else plan.transport.timeout_s
        return short_convolution(
            x, self.weight.to(x.dtype), group=plan.group, layout=plan.layout, cu_seqlens=stream.documents, timeout_s=timeout_s
        )


class LinearMixer(nn.Module):
    """One layer of a linear kind: hidden [B, T_local, dim] to the same. index: of the layer, for lightning's decay."""

    def __init__(self, config: ModelConfig, index: int, kind: str) -> None:
        super().__init__()
        shape = config.linear
        self.kind, self.shape = kind, shape
        self.depth = index / max(config.num_layers - 1, 1)
        values = shape.num_value_heads * shape.value_head_dim
        self.qkv = bare_linear(config.dim, shape.conv_channels)
        self.convolution = ShortConvolution(shape.conv_channels, shape.conv_width) if shape.conv_width > 1 else None
        self.norm = RMSNorm(shape.value_head_dim, config.norm_eps)
        self.gate = None if shape.output_gate == "none" else bare_linear(config.dim, values)
        self.o = bare_linear(values, config.dim)
        self.decay = self.decay_out = self.beta = self.rate = self.bias = None
        if kind in ("gla", "kda"):
            self.decay = bare_linear(config.dim, GATE_RANK)
            self.decay_out = bare_linear(GATE_RANK, shape.num_value_heads * shape.head_dim)
        if kind in ("simple_gla", "gated_delta"):
            self.decay = bare_linear(config.dim, shape.num_value_heads)
        if kind in ("gated_delta", "kda"):
            self.rate = nn.Parameter(torch.ones(shape.num_value_heads))
            self.bias = nn.Parameter(torch.ones(shape.num_value_heads))
        if kind in _DELTA:
            self.beta = bare_linear(config.dim, shape.num_value_heads)

    def forward(self, x: Tensor, stream: StreamInfo) -> Tensor:
        shape, plan = self.shape, stream.plan
        mixed = self.qkv(x)
        if self.convolution is not None:
            mixed = self.convolution(mixed, stream)
        keys, values = shape.num_heads * shape.head_dim, shape.num_value_heads * shape.value_head_dim
        q, k, v = F.silu(mixed).split([keys, keys, values], -1)
        q, k = q.unflatten(-1, (shape.num_heads, -1)), k.unflatten(-1, (shape.num_heads, -1))
        if self.kind in _DELTA:
            q, k = (F.normalize(widen(part), dim=-1).to(x.dtype) for part in (q, k))
        out, _ = linear_attention(
            q,
            k,
            v.unflatten(-1, (shape.num_value_heads, -1)),
            kind=self.kind,
            decay=self._log_decay(x),
            beta=None if self.beta is None else widen(self.beta(x)).sigmoid(),
            group=plan.group,
            layout=plan.layout,
            cu_seqlens=stream.documents,
            topology=plan.hardware,
            timeout_s=None if plan.transport is None else plan.transport.timeout_s,
        )
        out = self.norm(out).flatten(2)
        if self.gate is not None:
            gate = self.gate(x)
            out = out * (gate.sigmoid() if shape.output_gate == "sigmoid" else F.silu(gate))
        return self.o(out)

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """In the form that the kind takes; fp32 (fp64)."""
        heads = self.shape.num_value_heads
        if self.kind == "lightning":
            # MiniMax-01's: heads decay at 2^{−8(h+1)/H}, deeper layers less (arXiv 2501.08313).
            head = torch.arange(1, heads + 1, device=x.device, dtype=widen(x).dtype)
            return -torch.exp2(-8 * head / heads) * (1 - self.depth + 1e-5)
        if self.decay is None:
            return None  # retention has a default; linear and delta do not decay
        raw = self.decay(x)
        if self.decay_out is not None:
            raw = self.decay_out(raw).unflatten(-1, (heads, -1))
        raw = widen(raw)
        if self.rate is None or self.bias is None:
            return F.logsigmoid(raw) / _GATE_TEMPERATURE
        # Mamba's: −A_h · softplus(x W + bias), A_h spread over 1 … 16 by head.
        spread = torch.exp2(torch.linspace(0, math.log2(16), heads, device=x.device, dtype=raw.dtype)) * widen(self.rate)
        rate, bias = (t if raw.ndim == 3 else t.unsqueeze(-1) for t in (spread, widen(self.bias)))
        return -rate * F.softplus(raw + bias - _STEP_SHIFT)
