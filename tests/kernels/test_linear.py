"""One process: every operator in chunks against the token loop, whole documents and pieces that continue one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distattn.errors import UnsupportedError
from distattn.kernels.linear import (
    KINDS,
    LINEAR_BACKENDS,
    LinearCase,
    Operands,
    Pieces,
    choose_linear_backend,
    linear_backend_report,
    recurrent,
    step,
)
from distattn.kernels.linear.chunked import TorchLinear
from tests.kernels.linear_cases import CASES, make_operands, oracle, random_states

TOLERANCE = 1e-11
every_case = pytest.mark.parametrize(("kind", "gate"), [pytest.param(*case, id=" ".join(case)) for case in CASES])


def worst(found: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result, relative to its largest entry."""
    errors = {}
    for name, want in wanted.items():
        got = found[name]
        assert got is not None, f"{name} is missing"
        assert got.shape == want.shape, f"{name} is {tuple(got.shape)}, not {tuple(want.shape)}"
        errors[name] = float((got.double() - want).abs().max() / max(float(want.abs().max()), 1.0)) if want.numel() else 0.0
    return errors


def run_whole(x: Operands, lengths: list[int], initial: Tensor, do: Tensor, dfinal: Tensor) -> dict[str, Tensor | None]:
    """Documents that lie whole on one rank."""
    pieces = Pieces.whole(lengths, enter=True, final=True)
    backend, nothing = TorchLinear(), initial[:, :0]
    forward = backend.forward_begin(x, pieces, initial)
    forward.intra()
    o, final = forward.finish(nothing)
    backward = backend.backward_begin(x, pieces, initial, nothing, do, dfinal)
    backward.intra()
    grads = backward.finish(nothing)
    names = ("dq", "dk", "dv", "dg", "dbeta", "dinitial")
    return {"o": o, "final": final, **dict(zip(names, grads, strict=True))}


@every_case
@pytest.mark.parametrize("strength", [0.0, 0.1, 20.0])
def test_whole_documents(kind: str, gate: str, strength: float) -> None:
    lengths = [65, 1, 64, 17, 130]
    x = make_operands(kind, gate, 2, sum(lengths), heads=2, value_heads=4, strength=strength)
    initial, dfinal = random_states(2, len(lengths), x, 1), random_states(2, len(lengths), x, 2)
    do = torch.randn(x.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = run_whole(x, lengths, initial, do, dfinal)
    errors = worst(found, oracle(x, lengths, initial, do, dfinal))
    assert max(errors.values()) < TOLERANCE, errors


@every_case
def test_pieces(kind: str, gate: str) -> None:
    """One document cut into three, the states handed over by hand through the affine maps: as if it were whole."""
    lengths = [70, 5, 64]
    x = make_operands(kind, gate, 2, sum(lengths), strength=0.05)
    initial, dfinal = random_states(2, 1, x, 1), random_states(2, 1, x, 2)
    do = torch.randn(x.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = oracle(x, [sum(lengths)], initial, do, dfinal)
    none, only = torch.zeros(0, dtype=torch.int64).numpy(), torch.zeros(1, dtype=torch.int64).numpy()
    backend, empty = TorchLinear(), initial[:, :0]
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
        backend.backward_begin(local[i], pieces[i], entering[i], late[i], do_part, dfinal if i == 2 else empty)
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
    errors = worst(found, wanted)
    assert max(errors.values()) < TOLERANCE, errors


def cut(x: Operands, lengths: list[int]) -> list[Operands]:
    """Each piece's rows of the operands; a constant gate is everybody's."""
    parts = [[t] * len(lengths) if t is None or t.ndim == 1 else t.split(lengths, 1) for t in x[:5]]
    return [Operands(q, k, v, g, beta, x.scale) for q, k, v, g, beta in zip(*parts, strict=True)]  # pyright: ignore


def follow(transition: Tensor | None, state: Tensor, *, adjoint: bool = False) -> Tensor:
    """The map of one piece without its offset, as the protocol defines ``transition``."""
    if transition is None:
        return state
    if transition.ndim == 5:
        return (transition.transpose(-1, -2) if adjoint else transition) @ state
    factor = transition.exp()
    return factor[..., None, None] * state if transition.ndim == 3 else factor[..., None] * state


@pytest.mark.parametrize(("key_dim", "value_dim"), [(60, 64), (128, 16)])
@pytest.mark.parametrize("kind", ["gla", "kda", "gated_delta"])
def test_fp32_under_strong_and_weak_gates(kind: str, key_dim: int, value_dim: int) -> None:
    """fp32 stays near the fp64 loop where running sums reach −1300 in a chunk, and nothing overflows."""
    gate = KINDS[kind].gates[0]
    lengths = [100, 31]
    for strength in (0.01, 20.0):
        x = make_operands(kind, gate, 1, 131, key_dim=key_dim, value_dim=value_dim, strength=strength, dtype=torch.float32)
        initial, dfinal = random_states(1, 2, x, 1).float(), random_states(1, 2, x, 2).float()
        do = torch.randn(x.v.shape, generator=torch.Generator().manual_seed(3))
        errors = worst(run_whole(x, lengths, initial, do, dfinal), oracle(x, lengths, initial, do, dfinal))
        assert max(errors.values()) < 2e-5, (strength, errors)


@every_case
def test_step_repeats_the_loop(kind: str, gate: str) -> None:
    x = make_operands(kind, gate, 2, 5, value_heads=4, strength=0.1)
    initial = random_states(2, 1, x, 1)
    want, final = recurrent(x, [5], initial)
    state: Tensor | None = initial[:, 0]
    for t in range(5):
        q, k, v, g, beta = (None if p is None else p if p.ndim == 1 else p[:, t : t + 1] for p in x[:5])
        o, state = step(Operands(q, k, v, g, beta, x.scale), state)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(o[:, 0], want[:, t], atol=1e-12, rtol=0)
    assert state is not None
    torch.testing.assert_close(state, final[:, 0], atol=1e-12, rtol=0)


def test_choice_and_refusal() -> None:
    case = LinearCase("cpu", torch.float64, "scalar", False, 4, 4, 2, 2)
    backend, why = choose_linear_backend(case)
    assert backend.name == "torch"
    assert "that can" in why
    assert set(linear_backend_report(case)) == set(LINEAR_BACKENDS)
    with pytest.raises(UnsupportedError, match="kernel='nothing' is unknown; it may be auto, "):
        choose_linear_backend(case, "nothing")
