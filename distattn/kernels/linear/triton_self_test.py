"""Does this GPU and this Triton compute what the kernels say? Asked once a case, before it is first used.

Triton 3.4 to 3.7 miscompiled kernels of this family on Hopper: gradients of gates and of beta came out wrong, and nothing else
did (fla-org/flash-linear-attention issues 640, 826, 983). The very kernels that a case will launch, with its head counts and
dimensions, are therefore run on a few chunks, with weak and with strong gates, against fp64 in plain torch.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.kernels.linear.chunked import TorchLinear
from distattn.kernels.linear.protocol import CONSTANT, NONE, SCALAR, VECTOR, LinearBackend, LinearCase, Operands, Pieces

LENGTHS = (577, 70)
"""Rows of two documents: whole chunks, chunks of 1 and of 6 rows; a document of two spans."""

GATES = (0.1, 8.0)
"""Mean −log decay a token: scores as one product of scaled rows, and by differences."""

LIMITS = {"o": 1e-2, "final": 1e-2, "dq": 1.6e-2, "dk": 1.6e-2, "dv": 1.6e-2, "dg": 4e-2, "dbeta": 4e-2, "dentering": 1.6e-2}
"""Relative errors (Frobenius) above which a kernel counts as broken: twice what bf16 may cost."""


def broken(backend: LinearBackend, case: LinearCase, device: torch.device) -> str | None:
    """Which result is wrong here and by how much, as half a sentence, or None. Cached per device and case."""
    return _broken(backend, case, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", device)


@lru_cache(maxsize=256)
def _broken(backend: LinearBackend, case: LinearCase, _: str, device: torch.device) -> str | None:
    with torch.no_grad():
        gated, walks = case.gate != NONE, not case.delta and case.gate in (CONSTANT, SCALAR)
        for strength, with_dg in product(GATES if gated else GATES[:1], (True, False) if walks else (True,)):
            for name, error in errors(backend, case, strength, device, with_dg).items():
                # Under strong gates dg is a small difference of large numbers, whatever computes it.
                if not error <= LIMITS[name] and (name != "dg" or strength == GATES[0]):
                    return f"computes {name} wrongly on this device (relative error {error:.2g} in its self-test)"
    return None


def errors(
    backend: LinearBackend, case: LinearCase, strength: float, device: torch.device, with_dg: bool = True
) -> dict[str, float]:
    """Relative error of each result of one case against fp64. with_dg: the gradient of the gate is asked for, too."""
    x = _operands(case, strength, device)._replace(with_dg=with_dg)
    shape = (1, len(LENGTHS), case.value_heads, case.key_dim, case.value_dim)
    seeded = torch.Generator(device).manual_seed(1)
    entering, dfinal = (torch.randn(shape, device=device, generator=seeded) for _ in range(2))
    do = torch.randn(x.v.shape, device=device, generator=seeded).to(case.dtype)
    got = _run(backend, x, entering, do, dfinal)
    exact = Operands(*(None if t is None else t.double() for t in x[:5]), x.scale, with_dg)  # pyright: ignore[reportCallIssue]
    want = _run(TorchLinear(), exact, entering.double(), do.double(), dfinal.double())
    return {name: _relative(got[name], value) for name, value in want.items()}


def _operands(case: LinearCase, strength: float, device: torch.device) -> Operands:
    rows, heads = sum(LENGTHS), case.value_heads
    seeded = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn((1, rows, case.heads, case.key_dim), device=device, generator=seeded) for _ in range(2))
    v = torch.randn((1, rows, heads, case.value_dim), device=device, generator=seeded)
    shapes = {CONSTANT: (heads,), SCALAR: (1, rows, heads), VECTOR: (1, rows, heads, case.key_dim)}
    g = None if case.gate == NONE else -2 * strength * torch.rand(shapes[case.gate], device=device, generator=seeded)
    beta = None
    if case.delta:
        k = F.normalize(k, dim=-1)
        beta = torch.rand((1, rows, heads), device=device, generator=seeded)
    return Operands(q.to(case.dtype), k.to(case.dtype), v.to(case.dtype), g, beta, case.key_dim**-0.5)


def _run(backend: LinearBackend, x: Operands, entering: Tensor, do: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
    pieces, nothing = Pieces.whole(LENGTHS, enter=True, final=True), entering[:, :0]
    forward = backend.forward_begin(x, pieces, entering)
    forward.intra()
    o, final = forward.finish(nothing)
    backward = backend.backward_begin(x, pieces, entering, nothing, do, dfinal, forward.kept)
    backward.intra()
    gradients = backward.finish(nothing)._asdict()
    return {"o": o, "final": final, **{name: value for name, value in gradients.items() if value is not None}}


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-9))
