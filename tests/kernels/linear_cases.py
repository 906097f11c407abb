"""Inputs and the oracle of linear attention, shared by the tests of kernels and of exchanges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.kernels.linear import KINDS, Operands, recurrent
from distattn.kernels.linear.protocol import CONSTANT, NONE, SCALAR, VECTOR

CASES = [(name, gate) for name, kind in KINDS.items() for gate in kind.gates]
"""Every operator with every form of gate that it takes."""

NAMES = ("q", "k", "v", "g", "beta")


def make_operands(
    kind: str,
    gate: str,
    batch: int,
    rows: int,
    *,
    heads: int = 2,
    value_heads: int = 2,
    key_dim: int = 4,
    value_dim: int = 3,
    strength: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Operands:
    """Random inputs; strength: the gate's mean of −log decay a token."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, dtype=torch.float64)

    q, k = normal(batch, rows, heads, key_dim), normal(batch, rows, heads, key_dim)
    v = normal(batch, rows, value_heads, value_dim)
    shapes = {
        NONE: None,
        CONSTANT: (value_heads,),
        SCALAR: (batch, rows, value_heads),
        VECTOR: (batch, rows, value_heads, key_dim),
    }
    shape = shapes[gate]
    g = None if shape is None else -strength * torch.rand(shape, generator=r, dtype=torch.float64) * 2
    beta = None
    if KINDS[kind].delta:
        k = F.normalize(k, dim=-1)
        beta = torch.rand((batch, rows, value_heads), generator=r, dtype=torch.float64)
    q, k, v, g, beta = (None if x is None else x.to(dtype) for x in (q, k, v, g, beta))
    assert q is not None
    assert k is not None
    assert v is not None
    return Operands(q, k, v, g, beta, key_dim**-0.5)


def random_states(batch: int, number: int, x: Operands, seed: int) -> Tensor:
    r = torch.Generator().manual_seed(seed)
    shape = (batch, number, x.v.shape[2], x.k.shape[3], x.v.shape[3])
    return torch.randn(shape, generator=r, dtype=torch.float64)


def oracle(x: Operands, lengths: Sequence[int], initial: Tensor, do: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
    """o, final and every gradient, by autograd through the token loop in fp64. initial, dfinal [B, N, HV, K, V]."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in x[:5]]
    start = initial.detach().double().requires_grad_()
    q, k, v, g, beta = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    o, final = recurrent(Operands(q, k, v, g, beta, x.scale), lengths, start)
    torch.autograd.backward([o, final], [do.double(), dfinal.double()])
    found = {"o": o.detach(), "final": final.detach()}
    for name, leaf in zip((*NAMES, "initial"), (*leaves, start), strict=True):
        if leaf is not None:
            found[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found
