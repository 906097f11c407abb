"""Inputs and the oracle of linear attention, shared by the tests of kernels and of exchanges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.kernels.linear import KINDS, LinearBackend, Operands, Pieces, recurrent
from distattn.kernels.linear.protocol import CONSTANT, NONE, SCALAR, VECTOR
from distattn.kernels.linear.reference import state_dtype

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


def random_gradient(x: Operands) -> Tensor:
    """Of o, in v's dtype and on its device."""
    return torch.randn(x.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(x.v)


def worst(found: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result, relative to its largest entry."""
    errors = {}
    for name, want in wanted.items():
        got = found[name]
        assert got is not None, f"{name} is missing"
        assert got.shape == want.shape, f"{name} is {tuple(got.shape)}, not {tuple(want.shape)}"
        errors[name] = float((got.double() - want).abs().max() / max(float(want.abs().max()), 1.0)) if want.numel() else 0.0
    return errors


def run_whole(
    backend: LinearBackend, x: Operands, lengths: list[int], initial: Tensor, do: Tensor, dfinal: Tensor, keep: bool = True
) -> dict[str, Tensor | None]:
    """Documents that lie whole on one rank. keep: the backward is given what the forward kept."""
    pieces = Pieces.whole(lengths, enter=True, final=True)
    nothing = initial[:, :0]
    forward = backend.forward_begin(x, pieces, initial)
    forward.intra()
    o, final = forward.finish(nothing)
    backward = backend.backward_begin(x, pieces, initial, nothing, do, dfinal, forward.kept if keep else None)
    backward.intra()
    grads = backward.finish(nothing)
    names = ("dq", "dk", "dv", "dg", "dbeta", "dinitial")
    return {"o": o, "final": final, **dict(zip(names, grads, strict=True))}


def run_pieces(backend: LinearBackend, x: Operands, lengths: list[int]) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """(found, wanted) of one document cut into three pieces that hand their states over by the protocol."""
    batch = x.v.shape[0]
    initial, dfinal = (random_states(batch, 1, x, seed).to(x.v.device, state_dtype(x.v.dtype)) for seed in (1, 2))
    do = random_gradient(x)
    wanted = oracle(x, [sum(lengths)], initial, do, dfinal)
    none, only = torch.zeros(0, dtype=torch.int64).numpy(), torch.zeros(1, dtype=torch.int64).numpy()
    empty = initial[:, :0]
    local = cut(x, lengths)
    pieces = [
        Pieces(only + lengths[0], only, none, only, none),
        Pieces(only + lengths[1], none, only, only, none),
        Pieces(only + lengths[2], none, only, none, only),
    ]
    entering = [initial, empty, empty]
    passes = [backend.forward_begin(*args) for args in zip(local, pieces, entering, strict=True)]
    through = follow(passes[1].transition, passes[0].emitted) + passes[1].emitted
    late = [empty, passes[0].emitted, through]
    for part in passes:
        part.intra()
    results = [part.finish(state) for part, state in zip(passes, late, strict=True)]
    back = [
        backend.backward_begin(local[i], pieces[i], entering[i], late[i], do_part, dfinal if i == 2 else empty, passes[i].kept)
        for i, do_part in enumerate(do.split(lengths, 1))
    ]
    through = follow(passes[1].transition, back[2].emitted, adjoint=True) + back[1].emitted
    for part in back:
        part.intra()
    grads = [part.finish(state) for part, state in zip(back, [through, back[2].emitted, empty], strict=True)]
    found: dict[str, Tensor | None] = {
        "o": torch.cat([o for o, _ in results], 1),
        "final": results[2][1],
        "dinitial": grads[0].dentering,
    }
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        parts = [getattr(grad, name) for grad in grads]
        if parts[0] is not None:
            found[name] = torch.stack(parts).sum(0) if parts[0].ndim == 1 else torch.cat(parts, 1)
    return found, wanted


def cut(x: Operands, lengths: list[int]) -> list[Operands]:
    """Each piece's rows of the operands; a constant gate is everybody's."""
    parts = [[t] * len(lengths) if t is None or t.ndim == 1 else t.split(lengths, 1) for t in x[:5]]
    return [x._replace(**dict(zip(NAMES, part, strict=True))) for part in zip(*parts, strict=True)]


def follow(transition: Tensor | None, state: Tensor, *, adjoint: bool = False) -> Tensor:
    """The map of one piece without its offset, as the protocol defines ``transition``."""
    if transition is None:
        return state
    if transition.ndim == 5:
        return (transition.transpose(-1, -2) if adjoint else transition) @ state
    factor = transition.exp()
    return factor[..., None, None] * state if transition.ndim == 3 else factor[..., None] * state
