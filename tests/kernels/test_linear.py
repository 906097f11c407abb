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
    choose_linear_backend,
    linear_backend_report,
    recurrent,
    step,
)
from distattn.kernels.linear.chunked import TorchLinear
from tests.kernels.linear_cases import CASES, make_operands, oracle, random_states, run_pieces, run_whole, worst

TOLERANCE = 1e-11
every_case = pytest.mark.parametrize(("kind", "gate"), [pytest.param(*case, id=" ".join(case)) for case in CASES])


@every_case
@pytest.mark.parametrize("strength", [0.0, 0.1, 20.0])
def test_whole_documents(kind: str, gate: str, strength: float) -> None:
    lengths = [65, 1, 64, 17, 130]
    x = make_operands(kind, gate, 2, sum(lengths), heads=2, value_heads=4, strength=strength)
    initial, dfinal = random_states(2, len(lengths), x, 1), random_states(2, len(lengths), x, 2)
    do = torch.randn(x.v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = run_whole(TorchLinear(), x, lengths, initial, do, dfinal)
    errors = worst(found, oracle(x, lengths, initial, do, dfinal))
    assert max(errors.values()) < TOLERANCE, errors


@every_case
def test_pieces(kind: str, gate: str) -> None:
    """One document cut into three, the states handed over by hand through the affine maps: as if it were whole."""
    x = make_operands(kind, gate, 2, 139, strength=0.05)
    errors = worst(*run_pieces(TorchLinear(), x, [70, 5, 64]))
    assert max(errors.values()) < TOLERANCE, errors


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
        errors = worst(run_whole(TorchLinear(), x, lengths, initial, do, dfinal), oracle(x, lengths, initial, do, dfinal))
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
    assert "computes bf16, fp16 and fp32" in str(linear_backend_report(case)["triton"])
    assert set(linear_backend_report(case)) == set(LINEAR_BACKENDS)
    with pytest.raises(UnsupportedError, match="kernel='nothing' is unknown; it may be auto, "):
        choose_linear_backend(case, "nothing")
