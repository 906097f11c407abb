"""Titans with a linear memory (arXiv 2501.00663): attention over what is near, and a memory that learns the whole document.

memory: k, v, q = silu(conv(x W)), k and q of length 1; rates by head from x; P persistent tokens are attended by all
titans_mac   h = memory before the segment, read by x          y = attention over [P, h, x] inside the segment
             out = W_o (n(y) · σ(n(memory at the row, read by y)))
titans_mag   y = attention over [P, x] in the window           out = W_o (n(y) · σ(n(memory at the row, read by x)))
titans_mal   m = memory at the row, read by x                  out = m + attention over [P, n(x + m)] in the window

A segment is a chunk of the memory, counted from the start of the document. The memory is written from the layer's input, in mac
too: the paper writes what attention made of it, so that a segment's write depends on what was read before it, and ranks could
only take turns. In mag and mal the persistent tokens are written before each document; in mac the memory begins empty.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distattn.attention import attention
from distattn.mask import Mask
from distattn.models.attention import Attention
from distattn.models.config import TITANS_MAC, TITANS_MAG, TITANS_MAL, ModelConfig
from distattn.models.layers import RMSNorm, StreamInfo, bare_linear, widen
from distattn.models.linear_mixer import ShortConvolution
from distattn.momentum_memory import WrittenMemory, write_memory
from distattn.planning import Plan, plan

_DECAY_TEMPERATURE = 16.0
"""Log decay = log σ(x) / 16, as the gates of other layers here: memories start out long."""


class _Learned(NamedTuple):
    """memory: what was written; q [B, T, H, K]: the reading queries of the same rows."""

    memory: WrittenMemory
    q: Tensor


class LinearMemory(nn.Module):
    """The memory's own weights. Heads and sizes are those of ``config.linear``'s values and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = config.linear
        self.heads, self.key_dim, self.value_dim = shape.num_value_heads, shape.head_dim, shape.value_head_dim
        self.chunk = config.memory.chunk
        channels = shape.memory_channels
        self.qkv = bare_linear(config.dim, channels)
        self.convolution = ShortConvolution(channels, shape.conv_width) if shape.conv_width > 1 else None
        self.rates = bare_linear(config.dim, 3 * self.heads)
        self.norm = RMSNorm(self.value_dim, config.norm_eps)

    def learn(self, x: Tensor, stream: StreamInfo, before: Tensor | None = None) -> _Learned:
        """Write this rank's rows, x [B, T_local, dim]; before: the state that each document begins with. Collective."""
        made = stream.plan
        q, k, v = self._heads(x, stream)
        decay, momentum, rate = self._rates(x)
        memory = write_memory(
            k, v, decay=decay, momentum=momentum, rate=rate, chunk=self.chunk, group=made.group, layout=made.layout,
            cu_seqlens=stream.documents, initial_state=before, topology=made.hardware,
            timeout_s=None if made.transport is None else made.transport.timeout_s,
        )  # fmt: skip
        return _Learned(memory, q)

    def learn_locally(self, x: Tensor) -> _Learned:
        """The same of one document that every rank has, with its final state: x [1, T, dim]."""
        q, k, v = self._heads(x, None)
        decay, momentum, rate = self._rates(x)
        memory = write_memory(k, v, decay=decay, momentum=momentum, rate=rate, chunk=self.chunk, output_final_state=True)
        return _Learned(memory, q)

    def normal(self, read: Tensor) -> Tensor:
        """What was read, [B, T, H, V], each head normalised: [B, T, H · V]."""
        return self.norm(read).flatten(2)

    def _heads(self, x: Tensor, stream: StreamInfo | None) -> tuple[Tensor, Tensor, Tensor]:
        mixed = self.qkv(x) if self.convolution is None else self.convolution(self.qkv(x), stream)
        keys = self.heads * self.key_dim
        q, k, v = F.silu(mixed).split([keys, keys, self.heads * self.value_dim], -1)
        return self.query(q), self.query(k), v.unflatten(-1, (self.heads, -1))

    def query(self, flat: Tensor) -> Tensor:
        """[B, T, H · K] as keys of length 1, [B, T, H, K]."""
        return F.normalize(widen(flat.unflatten(-1, (self.heads, -1))), dim=-1).to(flat.dtype)

    def _rates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(decay, momentum, rate), fp32 (fp64).

        rate = σ(c) (1 − η) / C: a chunk of equal keys then moves the memory by at most twice what is missing.
        """
        a, b, c = widen(self.rates(x)).chunk(3, -1)
        return F.logsigmoid(a) / _DECAY_TEMPERATURE, F.logsigmoid(b), c.sigmoid() * (-b).sigmoid() / self.chunk


class Titans(nn.Module):
    """One layer of a Titans kind: hidden [B, T_local, dim] to the same."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        width, values = config.num_heads * config.head_dim, config.linear.num_value_heads * config.linear.value_head_dim
        self.near = Attention(config)
        self.memory = LinearMemory(config)
        tokens = config.memory.persistent
        self.persistent = nn.Parameter(torch.empty(tokens, config.dim)) if tokens else None
        self.recalled = bare_linear(values, width if kind == TITANS_MAG else config.dim)
        if kind == TITANS_MAC:
            self.ask = bare_linear(width, config.linear.num_value_heads * config.linear.head_dim)
            self.answer = bare_linear(values, width)
        if kind == TITANS_MAL:
            self.norm = RMSNorm(config.dim, config.norm_eps)
        else:
            self.norm, self.gate_norm = RMSNorm(width, config.norm_eps), RMSNorm(width, config.norm_eps)

    def forward(self, x: Tensor, stream: StreamInfo) -> Tensor:
        compute = {TITANS_MAC: self._as_context, TITANS_MAG: self._as_gate, TITANS_MAL: self._as_layer}
        return compute[self.kind](x, stream)

    def _as_context(self, x: Tensor, stream: StreamInfo) -> Tensor:
        assert stream.segments is not None
        learned = self.memory.learn(x, stream)
        h = self.recalled(self.memory.normal(learned.memory.read_before(learned.q)))
        q, k, v, *gate = self.near.project(x, stream)
        tokens = None if self.persistent is None else self.persistent[None].to(x.dtype)
        y = self._attend(q, [(k, v), self.near.keys(h, stream.rotation)], tokens, stream.segments)
        asked = self.memory.query(self.ask(y.flatten(2)))
        return self._gated(y, self.answer(self.memory.normal(learned.memory.read(asked))), gate)

    def _as_gate(self, x: Tensor, stream: StreamInfo) -> Tensor:
        tokens, before = self._persistent(x)
        learned = self.memory.learn(x, stream, None if before is None else before.memory.final_state)
        q, k, v, *gate = self.near.project(x, stream)
        y = self._attend(q, [(k, v)], tokens, stream.plan)
        return self._gated(y, self.recalled(self.memory.normal(learned.memory.read(learned.q))), gate)

    def _as_layer(self, x: Tensor, stream: StreamInfo) -> Tensor:
        tokens, before = self._persistent(x)
        learned = self.memory.learn(x, stream, None if before is None else before.memory.final_state)
        m = self.recalled(self.memory.normal(learned.memory.read(learned.q)))
        if tokens is not None and before is not None:
            found = self.recalled(self.memory.normal(before.memory.read(before.q)))
            tokens = self.norm(tokens + found)
        q, k, v, *gate = self.near.project(self.norm(x + m), stream)
        return m + self.near.combine(self._attend(q, [(k, v)], tokens, stream.plan), *gate)

    def _persistent(self, x: Tensor) -> tuple[Tensor | None, _Learned | None]:
        """The persistent tokens [1, P, dim], and the memory that has learned them."""
        if self.persistent is None:
            return None, None
        tokens = self.persistent[None].to(x.dtype)
        return tokens, self.memory.learn_locally(tokens)

    def _gated(self, y: Tensor, recalled: Tensor, gate: list[Tensor]) -> Tensor:
        out = self.norm(y.flatten(2)) * self.gate_norm(recalled).sigmoid()
        return self.near.combine(out.view(y.shape), *gate)

    def _attend(self, q: Tensor, near: list[tuple[Tensor, Tensor]], tokens: Tensor | None, made: Plan) -> Tensor:
        """Attention over several keys and values for each row that the plan's mask allows, and over tokens for every row."""
        outs, weights = [], []
        for k, v in near:
            out, lse = attention(q, k, v, made, return_lse=True)
            outs.append(widen(out))
            weights.append(lse)
        if tokens is not None:
            k, v = (part[0].repeat_interleave(q.shape[2] // part.shape[2], 1) for part in self.near.keys(tokens, None))
            scores = torch.einsum("bthd,phd->bthp", widen(q), widen(k)) * q.shape[-1] ** -0.5
            outs.append(torch.einsum("bthp,phd->bthd", scores.softmax(-1), widen(v)))
            weights.append(scores.logsumexp(-1))
        share = torch.stack(weights, -1).softmax(-1)  # every row sees itself: no weight is −∞ for all
        return sum((out * part[..., None] for out, part in zip(outs, share.unbind(-1), strict=True)), torch.zeros(())).to(
            q.dtype
        )


def plan_segments(made: Plan, documents: np.ndarray, chunk: int) -> Plan:
    """Causal attention inside segments of chunk rows of each document, over the rows and ranks of another plan. Collective."""
    lengths = [min(chunk, end - at) for begin, end in zip(documents[:-1].tolist(), documents[1:].tolist(), strict=True)
               for at in range(begin, end, chunk)]  # fmt: skip
    return plan(
        Mask.documents(lengths),
        heads=made.heads,
        kv_heads=made.kv_heads,
        head_dim=made.head_dim,
        group=made.group,
        strategy="all_gather",  # sends only what segments that a border cuts need
        layout=made.layout,
        kernel=made.kernel,
        dtype=made.dtype,
        topology=made.hardware,
        deterministic=made.deterministic,
        timeout_s=None if made.transport is None else made.transport.timeout_s,
    )
