"""Titans layers in fp64 against loops over tokens that know nothing of chunks, masks or plans; what they and agents refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.errors import ConfigError
from distattn.mask import Mask
from distattn.models import Decoder, LinearConfig, ModelConfig
from distattn.models.config import TITANS, TITANS_MAC, TITANS_MAG, MemoryConfig
from distattn.models.layers import StreamInfo
from distattn.models.rope import Rotation, apply_rotation, make_rotation
from distattn.models.titans import LinearMemory, Titans, plan_segments
from distattn.planning import plan

LENGTHS = [1, 14, 6]
TINY = ModelConfig(
    vocab_size=11, dim=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, ffn_dim=6, qk_norm=True, sliding_window=5,
    linear=LinearConfig(num_heads=1, num_value_heads=2, head_dim=3, value_head_dim=5, conv_width=3),
    memory=MemoryConfig(chunk=4, persistent=6),
)  # fmt: skip
"""More persistent tokens than a chunk has rows, and a window that is no multiple of it."""


def make_layer(kind: str, config: ModelConfig = TINY) -> Titans:
    torch.manual_seed(0)
    layer = Titans(config, kind).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def make_stream(config: ModelConfig) -> StreamInfo:
    mask = Mask.documents(LENGTHS) & Mask.sliding_window(sum(LENGTHS), config.sliding_window - 1)
    made = plan(mask, heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in LENGTHS]))
    rotation = make_rotation(config.rope, config.head_dim, positions, torch.float64)
    documents = mask.segments()
    return StreamInfo(made, rotation, documents, plan_segments(made, documents, config.memory.chunk))


class Loop:
    """A memory, row by row. start: M₀, as ``before`` reads it."""

    def __init__(self, memory: LinearMemory, x: Tensor, initial: tuple[Tensor, Tensor] | None = None) -> None:
        heads, rows = memory.heads, len(x)
        mixed = memory.qkv(x)
        if memory.convolution is not None:
            taps = memory.convolution.weight
            padded = F.pad(mixed.T, (taps.shape[1] - 1, 0))
            mixed = F.conv1d(padded, taps[:, None], groups=len(taps)).T
        keys = heads * memory.key_dim
        q, k, v = F.silu(mixed).split([keys, keys, heads * memory.value_dim], -1)
        self.q = self.unit(q.view(rows, heads, -1))
        k, v = self.unit(k.view(rows, heads, -1)), v.view(rows, heads, -1)
        a, b, c = memory.rates(x).view(rows, 3, heads).unbind(1)
        alpha, eta = a.sigmoid() ** (1 / 16), b.sigmoid()
        theta = c.sigmoid() * (1 - eta) / memory.chunk
        zero = torch.zeros(heads, memory.key_dim, memory.value_dim, dtype=x.dtype)
        now, speed = initial or (zero, zero)
        start, self.start, self.at = now, [], []
        for t in range(rows):
            if t % memory.chunk == 0:
                start = now
            self.start.append(start)
            error = torch.einsum("hk,hkv->hv", k[t], start) - v[t]
            gradient = 2 * k[t][:, :, None] * error[:, None, :]
            speed = eta[t][:, None, None] * speed - theta[t][:, None, None] * gradient
            now = alpha[t][:, None, None] * now + speed
            self.at.append(now)
        self.norm, self.final = memory.norm, (now, speed)

    @staticmethod
    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def read(self, q: Tensor, states: list[Tensor]) -> Tensor:
        """[T, H · V], each head normalised."""
        return torch.stack([self.norm(torch.einsum("hk,hkv->hv", q[t], states[t])).flatten() for t in range(len(q))])


def attend(layer: Titans, x: Tensor, keys: list[tuple[Tensor, Rotation | None, list[set[int]]]], rotation: Rotation) -> Tensor:
    """Rows of x over rows of several others, as far as each row sees them: [T, heads, D]."""
    near, width = layer.near, layer.near.head_dim
    q = apply_rotation(near.q_norm(near.q(x[None]).unflatten(-1, (-1, width))), rotation)[0]
    parts = [near.keys(other[None], turned) for other, turned, _ in keys]
    outs = []
    for t in range(len(x)):
        k, v = (
            torch.cat([part[i][0, sorted(seen[t])] for part, (_, _, seen) in zip(parts, keys, strict=True)]) for i in (0, 1)
        )
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("hd,nhd->hn", q[t], k.repeat_interleave(group, 1)) / width**0.5
        outs.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), v.repeat_interleave(group, 1)))
    return torch.stack(outs)


def document(layer: Titans, config: ModelConfig, x: Tensor) -> Tensor:
    """One document, x [T, dim]."""
    rows, chunk, tokens = len(x), config.memory.chunk, layer.persistent
    rotation = make_rotation(config.rope, config.head_dim, torch.arange(rows), torch.float64)
    window = [set(range(max(0, t - config.sliding_window + 1), t + 1)) for t in range(rows)]
    segment = [set(range(t // chunk * chunk, t + 1)) for t in range(rows)]
    everything = [set(range(config.memory.persistent))] * rows
    always = [] if tokens is None else [(tokens, None, everything)]
    if layer.kind == TITANS_MAC:
        memory = Loop(layer.memory, x)
        h = layer.recalled(memory.read(memory.q, memory.start))
        y = attend(layer, x, [(x, rotation, segment), (h, rotation, segment), *always], rotation).flatten(1)
        asked = Loop.unit(layer.ask(y).view(rows, layer.memory.heads, -1))
        found = layer.answer(memory.read(asked, memory.at))
        return layer.near.o(layer.norm(y) * layer.gate_norm(found).sigmoid())
    learned = None if tokens is None else Loop(layer.memory, tokens)
    memory = Loop(layer.memory, x, None if learned is None else learned.final)
    found = layer.recalled(memory.read(memory.q, memory.at))
    if layer.kind == TITANS_MAG:
        y = attend(layer, x, [(x, rotation, window), *always], rotation).flatten(1)
        return layer.near.o(layer.norm(y) * layer.gate_norm(found).sigmoid())
    if learned is not None:
        assert tokens is not None
        told = layer.norm(tokens + layer.recalled(learned.read(learned.q, learned.at)))
        always = [(told, None, everything)]
    middle = layer.norm(x + found)
    return found + layer.near.o(attend(layer, middle, [(middle, rotation, window), *always], rotation).flatten(1))


@pytest.mark.parametrize("persistent", [6, 0])
@pytest.mark.parametrize("kind", TITANS)
def test_equals_loops_over_tokens(kind: str, persistent: int) -> None:
    config = replace(TINY, memory=replace(TINY.memory, persistent=persistent))
    layer = make_layer(kind, config)
    x = torch.randn(1, sum(LENGTHS), config.dim, dtype=torch.float64, requires_grad=True)
    out = layer(x, make_stream(config))
    wanted = torch.cat([document(layer, config, part) for part in x[0].split(LENGTHS)])[None]
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    leaves = [x, *layer.parameters()]
    direction = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad((out * direction).sum(), leaves),
        torch.autograd.grad((wanted * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", TITANS)
def test_no_row_sees_later_ones_or_other_documents(kind: str) -> None:
    layer, stream = make_layer(kind), make_stream(TINY)
    x = torch.randn(1, sum(LENGTHS), TINY.dim, dtype=torch.float64, requires_grad=True)
    row = 10  # of the second document, rows 1 to 14
    (gradient,) = torch.autograd.grad(layer(x, stream)[0, row].square().sum(), x)
    seen = gradient[0].abs().amax(-1) > 0
    assert seen.tolist() == [1 <= t <= row for t in range(sum(LENGTHS))]


def test_flops_of_segments_grow_with_tokens_alone() -> None:
    mac, mag = (replace(TINY, layers=kind) for kind in (TITANS_MAC, TITANS_MAG))
    assert mac.attention_flops(100) == 0
    assert mag.attention_flops(100) == 12 * 100 * TINY.num_heads * TINY.head_dim
    # Error, write and two reads of 2 heads of 3 × 5; 6 tokens and, in the mean, 2.5 of x and 2.5 of h.
    memory, attended = 6 * 4 * 2 * 3 * 5, 12 * 4 * 4 * (6 + 5)
    matmuls = mac.memory.matmul_parameters(TITANS_MAC, mac) + 8 * 4 * 2 * (4 + 2) + 3 * 8 * 6 + 11 * 8
    assert mac.flops_per_token(0, 1) == 6 * matmuls + memory + attended


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": MemoryConfig(chunk=0)}, r"model\.memory\.chunk is 0, but it must be at least 1 row\."),
        ({"memory": MemoryConfig(persistent=-1)}, r"model\.memory\.persistent is -1, but it must be at least 0 tokens\."),
        ({"memory": MemoryConfig(depth=2)}, r"model\.memory\.depth is 2, but it must be 1: a memory of several layers is no"),
        ({"layers": "softmax,agent"}, r"model\.layers is 'softmax,agent', but agent attention is not causal: .*AgentAttention"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    config = replace(TINY, layers=TITANS_MAC)
    config.validate()
    with pytest.raises(ConfigError, match=message):
        Decoder(replace(config, **changes))
