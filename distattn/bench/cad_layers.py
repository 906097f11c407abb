"""The part of a decoder layer that is not core attention, timed on one device, for ``distattn bench cad-layers``.

    CI(x) = norm · QKV | · O · norm · gate, up · SwiGLU · down      one tensor-parallel rank's slice of the matrices

What core attention does not need stays at home: it is proportional to tokens, so seconds a token are all the simulation takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from distattn.bench.timing import median_ms, synchronize


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. ffn: width of the gated feed-forward."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int

    @property
    def linear_flops(self) -> int:
        """Forward FLOPs a token and layer outside core attention: 2h (2 H_q + 2 H_k + 3i)."""
        return 2 * self.hidden * (2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim + 3 * self.ffn)


MODELS = {
    # meta-llama/Meta-Llama-3-8B and codellama/CodeLlama-34b, as their configurations say.
    "8b": ModelShape("8b", 4096, 32, 8, 128, 14336, 32),
    "34b": ModelShape("34b", 8192, 64, 8, 128, 22016, 48),
}


@dataclass(frozen=True)
class LayerTime:
    """Seconds a token of one layer's linear part on one of ``tensor_parallel`` devices, communication apart."""

    forward_s: float
    backward_s: float

    @property
    def step_s(self) -> float:
        """Of a training step whose backward computes the layer again."""
        return 2 * self.forward_s + self.backward_s


def measure(shape: ModelShape, tensor_parallel: int, tokens: int, device: str, seconds: float = 1.0) -> LayerTime:
    """Time the slice of one layer's matrices that a tensor-parallel rank has, on ``tokens`` tokens in bf16.

    The backward includes the gradients of inputs and weights. Raises whatever torch raises where the memory does not do.
    """
    dtype = torch.bfloat16
    q, kv = shape.heads * shape.head_dim // tensor_parallel, shape.kv_heads * shape.head_dim // tensor_parallel
    ffn = shape.ffn // tensor_parallel
    sizes = {
        "qkv": (q + 2 * kv, shape.hidden),
        "o": (shape.hidden, q),
        "up": (2 * ffn, shape.hidden),
        "down": (shape.hidden, ffn),
    }
    weights = {
        name: (torch.randn(size, device=device, dtype=dtype) / size[1] ** 0.5).requires_grad_() for name, size in sizes.items()
    }
    norm = torch.ones(shape.hidden, device=device, dtype=dtype)
    x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)
    attended = torch.randn(tokens, q, device=device, dtype=dtype, requires_grad=True)

    def forward() -> tuple[Tensor, Tensor]:
        qkv = functional.linear(functional.rms_norm(x, norm.shape, norm), weights["qkv"])
        y = x + functional.linear(attended, weights["o"])
        gate, up = functional.linear(functional.rms_norm(y, norm.shape, norm), weights["up"]).chunk(2, -1)
        return qkv, y + functional.linear(functional.silu(gate) * up, weights["down"])

    def both() -> None:
        outputs = forward()
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for leaf in (x, attended, *weights.values()):
            leaf.grad = None

    both()
    synchronize(device)
    with torch.no_grad():
        alone = median_ms(forward, seconds, device) * 1e-3
    together = median_ms(both, seconds, device) * 1e-3
    return LayerTime(alone / tokens, (together - alone) / tokens)
