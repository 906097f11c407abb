"""Shapes and inputs of ``distattn bench linear``, and linear attention of ours and of fla behind one face."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.errors import ConfigError, UnsupportedError
from distattn.kernels.linear import KINDS, LinearCase, Operands, Pieces, choose_linear_backend
from distattn.kernels.linear.chunked import TorchLinear
from distattn.kernels.linear.protocol import CONSTANT, NONE, SCALAR, VECTOR
from distattn.linear import linear_attention

SEED = 1
STRENGTH = 0.05
"""Mean −log decay of a token."""

CHECKED_TOKENS = 2048
NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(q, k, v, decay, beta) → o."""


@dataclass(frozen=True)
class LinearShape:
    """One cell: heads of q, k and v alike, head_dim of keys and values alike; tokens of one rank."""

    kind: str
    batch: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def key(self) -> str:
        return f"{self.kind} B{self.batch} T{self.tokens} H{self.heads} D{self.head_dim}"

    @property
    def gate(self) -> str:
        return KINDS[self.kind].gates[0]


def parse_shapes(text: str, kinds: list[str]) -> list[LinearShape]:
    """From text such as 1x65536x16x128 (batch, tokens, heads, dimension), comma-separated; ConfigError for anything else."""
    found = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 4 or not all(n.isdecimal() and int(n) for n in numbers):
            raise ConfigError(f"--shapes has {part!r}; it takes BATCHxTOKENSxHEADSxDIM such as 1x65536x16x128")
        found += [LinearShape(kind, *map(int, numbers)) for kind in kinds]
    return found


@dataclass(eq=False)
class LinearProblem:
    """Inputs of one shape, and the gradient of the output. Rates (decay, beta) are fp32; a constant decay needs no gradient."""

    shape: LinearShape
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    do: Tensor

    @classmethod
    def make(cls, shape: LinearShape, device: str, *, seed: int = SEED) -> LinearProblem:
        s, seeded = shape, torch.Generator(device).manual_seed(seed)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32

        def normal() -> Tensor:
            return torch.randn((s.batch, s.tokens, s.heads, s.head_dim), device=device, dtype=dtype, generator=seeded)

        def uniform(*size: int) -> Tensor:
            return torch.rand(size, device=device, generator=seeded)

        q, k, v, do = normal(), normal(), normal(), normal()
        rows = (s.batch, s.tokens, s.heads)
        decays = {NONE: None, CONSTANT: (s.heads,), SCALAR: rows, VECTOR: (*rows, s.head_dim)}
        size = decays[s.gate]
        decay = None if size is None else -2 * STRENGTH * uniform(*size)
        beta = None
        if KINDS[s.kind].delta:
            k = F.normalize(k.float(), dim=-1).to(dtype)
            beta = uniform(*rows)
        made = cls(s, q, k, v, decay, beta, do)
        for x in made.leaves:
            x.requires_grad_()
        return made

    @property
    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        rates = [x for x in (self.decay, self.beta) if x is not None and x.ndim > 1]
        return [self.q, self.k, self.v, *rates]

    def forward(self, attend: Attend) -> Tensor:
        with torch.no_grad():
            return attend(self.q, self.k, self.v, self.decay, self.beta)

    def train(self, attend: Attend) -> tuple[Tensor, ...]:
        """(o, gradients of the leaves)."""
        o = attend(self.q, self.k, self.v, self.decay, self.beta)
        return (o.detach(), *torch.autograd.grad(o, self.leaves, self.do))


def ours(shape: LinearShape, **options: Any) -> Attend:
    """``linear_attention`` with those options."""

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> Tensor:
        return linear_attention(q, k, v, kind=shape.kind, decay=decay, beta=beta, **options)[0]

    return attend


def our_kernel(shape: LinearShape, device: str, dtype: torch.dtype, kernel: str = "auto") -> str:
    """The name of the backend that computes the shape."""
    d, h = shape.head_dim, shape.heads
    case = LinearCase(device.split(":")[0], dtype, shape.gate, KINDS[shape.kind].delta, d, d, h, h)
    return choose_linear_backend(case, kernel)[0].name


def fla(shape: LinearShape, **options: Any) -> Attend:
    """The same operator of flash-linear-attention; options go to its function.

    Raises UnsupportedError where the package is not installed. Its linear, lightning and retention are its simple GLA with no
    gate, or with one constant a head, which is what its own functions of those names call.
    """
    family = {"linear": "simple_gla", "lightning": "simple_gla", "retention": "simple_gla", "delta": "delta_rule",
              "gated_delta": "gated_delta_rule"}.get(shape.kind, shape.kind)  # fmt: skip
    try:
        chunk = getattr(importlib.import_module(f"fla.ops.{family}"), f"chunk_{family}")
    except ImportError as error:
        raise UnsupportedError(f"fla cannot be imported here ({error}): pip install flash-linear-attention") from error

    def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> Tensor:
        rates = {"g_gamma" if shape.gate == CONSTANT else "g": decay, "beta": beta}
        given = {name: x for name, x in rates.items() if x is not None}
        return chunk(q, k, v, **given, **options)[0]

    return attend


def errors(shape: LinearShape, attend: Attend, device: str) -> dict[str, float]:
    """Relative error (RMS) of o and of every gradient against fp64, at the shape's heads and at most CHECKED_TOKENS tokens."""
    few = LinearShape(shape.kind, 1, min(shape.tokens, CHECKED_TOKENS), shape.heads, shape.head_dim)
    x = LinearProblem.make(few, device)
    got = x.train(attend)
    inputs = [None if t is None else t.detach().double() for t in (x.q, x.k, x.v, x.decay, x.beta)]
    want = _exact(few, *inputs, x.do.double())  # pyright: ignore[reportCallIssue]
    names = ["o", "dq", "dk", "dv", *(n for n, t in (("dg", x.decay), ("dbeta", x.beta)) if t is not None and t.ndim > 1)]
    return {name: _relative(found, want[name]) for name, found in zip(names, got, strict=True)}


def _exact(
    shape: LinearShape, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, do: Tensor
) -> dict[str, Tensor]:
    x = Operands(q, k, v, g, beta, shape.head_dim**-0.5)
    pieces, backend = Pieces.whole([shape.tokens]), TorchLinear()
    none = q.new_empty((1, 0, shape.heads, shape.head_dim, shape.head_dim))
    forward = backend.forward_begin(x, pieces, none)
    forward.intra()
    o, _ = forward.finish(none)
    backward = backend.backward_begin(x, pieces, none, none, do, none)
    backward.intra()
    gradients = backward.finish(none)._asdict()
    return {"o": o, **{name: value for name, value in gradients.items() if value is not None}}


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-12))
