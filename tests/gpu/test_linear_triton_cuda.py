"""The Triton kernels of linear attention on a GPU against the token loop in fp64, within the errors that the dtypes cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distattn.kernels.linear import KINDS, LINEAR_BACKENDS, LinearCase, Operands, Pieces
from distattn.kernels.linear.chunked import TorchLinear
from distattn.kernels.linear.triton_backend import TritonLinear
from distattn.kernels.linear.triton_self_test import broken
from distattn.linear import linear_attention
from tests.kernels.linear_cases import CASES, make_operands, random_gradient, random_states, run_pieces, run_whole

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
LIMITS = {"o": 5e-3, "final": 5e-3, "dq": 8e-3, "dk": 8e-3, "dv": 8e-3, "dg": 2e-2, "dbeta": 2e-2, "dinitial": 8e-3}
FP32_LIMIT = 1e-5
every_case = pytest.mark.parametrize(("kind", "gate"), [pytest.param(*case, id=" ".join(case)) for case in CASES])


def excess(found: dict[str, Tensor | None], wanted: dict[str, Tensor], limits: dict[str, float] = LIMITS) -> dict[str, float]:
    """Relative errors (RMS) that exceed the limits; a result that vanishes may be off by 1e-6."""
    over = {}
    for name, want in wanted.items():
        got = found[name]
        assert got is not None, f"{name} is missing"
        off = got.double() - want.double()
        error = float(off.norm() / want.double().norm().clamp(min=1e-12))
        if not (error <= limits[name] or float(off.abs().max()) <= 1e-6):
            over[name] = error
    return over


def on_gpu(x: Operands, dtype: torch.dtype) -> Operands:
    """Rates stay fp32."""
    q, k, v = (t.to("cuda", dtype) for t in x[:3])
    g, beta = (None if t is None else t.to("cuda", torch.float32) for t in x[3:5])
    return Operands(q, k, v, g, beta, x.scale)


def check(
    kind: str, gate: str, lengths: list[int], dtype: torch.dtype, *, skip: tuple[str, ...] = (), with_dg: bool = True,
    **options: Any,
) -> None:  # fmt: skip
    """Documents with initial and final states, every gradient, or all but that of the gate."""
    limits = dict.fromkeys(LIMITS, FP32_LIMIT) if dtype == torch.float32 else LIMITS
    x = on_gpu(make_operands(kind, gate, 1, sum(lengths), **options), dtype)
    initial, dfinal = (random_states(1, len(lengths), x, seed).float().cuda() for seed in (1, 2))
    do = random_gradient(x)
    exact = Operands(*(None if t is None else t.double() for t in x[:5]), x.scale)  # pyright: ignore[reportCallIssue]
    wanted = run_whole(TorchLinear(), exact, lengths, initial.double(), do.double(), dfinal.double())
    found = run_whole(TritonLinear(), x._replace(with_dg=with_dg), lengths, initial, do, dfinal)
    skip = skip if with_dg else (*skip, "dg")
    over = excess(found, {n: t for n, t in wanted.items() if t is not None and n not in skip}, limits)
    assert not over, over


@every_case
@pytest.mark.parametrize("strength", [0.0, 0.05, 5.0])
def test_packed_documents(kind: str, gate: str, strength: float) -> None:
    """Under strong gates the gradient of a constant one is a small difference of large numbers."""
    skip = ("dg",) if strength == 5.0 and gate == "constant" else ()
    for lengths in ([15], [256, 244, 500], [1, 99, 200, 900, 848]):
        check(kind, gate, lengths, BF16, strength=strength, key_dim=128, value_dim=128, skip=skip)


@pytest.mark.parametrize(
    ("kind", "gate"), [("simple_gla", "scalar"), ("gla", "vector"), ("gated_delta", "scalar"), ("kda", "vector")]
)
@pytest.mark.parametrize(
    ("dims", "heads", "dtype"),
    [
        ((60, 100), (1, 2), BF16),
        ((128, 256), (1, 4), BF16),
        ((256, 64), (2, 2), BF16),
        ((64, 64), (2, 2), FP16),
    ],
)
def test_dims_groups_and_dtypes(
    kind: str, gate: str, dims: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    shape: dict[str, Any] = {"key_dim": dims[0], "value_dim": dims[1], "heads": heads[0], "value_heads": heads[1]}
    check(kind, gate, [65, 1, 300], dtype, strength=0.05, **shape)


@pytest.mark.parametrize(("kind", "gate"), [case for case in CASES if case[1] != "vector"])
def test_fp32(kind: str, gate: str) -> None:
    """Three products in tf32 for one. Strong gates too: under those, fp32 kernels have read shared memory not their own."""
    for dim, strength in ((64, 0.05), (64, 8.0), (128, 0.05)):
        skip = ("dg",) if strength == 8.0 else ()
        check(kind, gate, [129, 70], torch.float32, strength=strength, skip=skip, key_dim=dim, value_dim=dim)


WALKED = [("linear", "none"), ("lightning", "constant"), ("simple_gla", "scalar")]


@pytest.mark.parametrize(("kind", "gate"), WALKED)
def test_walks_by_spans(kind: str, gate: str) -> None:
    """Documents of several spans and of one, where nobody asks for the gradient of the gate."""
    for strength, dtype in ((0.05, BF16), (5.0, BF16), (0.05, FP16), (0.5, torch.float32)):
        check(kind, gate, [1600, 7, 650], dtype, strength=strength, with_dg=False, key_dim=128, value_dim=128)
    check(kind, gate, [65, 1, 1300], BF16, strength=0.05, with_dg=False, key_dim=60, value_dim=100, heads=1, value_heads=2)


@pytest.mark.parametrize(("kind", "gate"), WALKED)
def test_walks_in_one_launch(kind: str, gate: str) -> None:
    """As kernel by kernel, and with the same bits every time: on two streams, whose counters are left as they were found, and
    in a captured graph."""
    x = on_gpu(make_operands(kind, gate, 1, 8192, strength=0.05, key_dim=128, value_dim=128, heads=8, value_heads=8), BF16)
    x, pieces = x._replace(with_dg=False), Pieces.whole([5000, 3192], enter=True, final=True)
    initial, dfinal = (random_states(1, 2, x, seed).float().cuda() for seed in (1, 2))
    do, nothing = random_gradient(x), initial[:, :0]

    def run(*, fused: bool = True) -> list[Tensor]:
        backend = TritonLinear(fused=fused)
        forward = backend.forward_begin(x, pieces, initial)
        forward.intra()
        outputs = forward.finish(nothing)
        backward = backend.backward_begin(x, pieces, initial, nothing, do, dfinal, forward.kept)
        backward.intra()
        return [t for t in (*outputs, *backward.finish(nothing)) if t is not None]

    first, apart = run(), run(fused=False)
    for one, other in zip(first, apart, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 4e-3
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            results.append(run())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results.append(run())
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for again in results:
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


@pytest.mark.parametrize(("kind", "gate"), WALKED)
def test_walks_that_hand_states_on(kind: str, gate: str) -> None:
    for strength in (0.002, 1.0):
        x = on_gpu(make_operands(kind, gate, 2, 2839, strength=strength, key_dim=64, value_dim=64, value_heads=4), BF16)
        found, wanted = run_pieces(TritonLinear(), x._replace(with_dg=False), [1220, 5, 1614])
        over = excess(found, {name: value for name, value in wanted.items() if name != "dg"})
        assert not over, over


@pytest.mark.parametrize("kind", ["gla", "kda", "gated_delta"])
def test_gates_that_forget_at_once(kind: str) -> None:
    """−40 a token on average: dg is what rounding leaves of it."""
    check(kind, KINDS[kind].gates[0], [300], BF16, strength=20.0, key_dim=128, value_dim=128, skip=("dg",))


@every_case
def test_pieces_that_hand_states_on(kind: str, gate: str) -> None:
    x = on_gpu(make_operands(kind, gate, 2, 539, strength=0.05, key_dim=64, value_dim=64, value_heads=4), BF16)
    found, wanted = run_pieces(TritonLinear(), x, [270, 5, 264])
    assert not excess(found, wanted), excess(found, wanted)


@pytest.mark.parametrize(("kind", "gate"), [case for case in CASES if KINDS[case[0]].delta])
def test_pieces_cut_into_parts(kind: str, gate: str) -> None:
    x = on_gpu(make_operands(kind, gate, 2, 539, strength=0.05, key_dim=64, value_dim=64, value_heads=4), BF16)
    found, wanted = run_pieces(TritonLinear(num_parts=3), x, [270, 5, 264])
    assert not excess(found, wanted), excess(found, wanted)


@pytest.mark.parametrize("kind", ["simple_gla", "gla", "gated_delta", "kda"])
def test_chunks_that_no_state_reaches(kind: str) -> None:
    """A border's state has faded after a chunk or two: what is computed before it arrives is most of the piece."""
    x = on_gpu(make_operands(kind, KINDS[kind].gates[0], 2, 1039, strength=1.0, key_dim=64, value_dim=64), BF16)
    found, wanted = run_pieces(TritonLinear(), x, [520, 5, 514])
    assert not excess(found, wanted), excess(found, wanted)


@every_case
def test_the_self_test_passes(kind: str, gate: str) -> None:
    case = LinearCase("cuda", BF16, gate, KINDS[kind].delta, 128, 128, 4, 4)
    assert broken(TritonLinear(), case, torch.device("cuda", 0)) is None
    assert LINEAR_BACKENDS["triton"].why_not(case) is None
    reason = LINEAR_BACKENDS["triton"].why_not(replace(case, dtype=torch.float32))
    assert (reason is not None) == (gate == "vector"), reason


@pytest.mark.parametrize(("kind", "gate"), [("kda", "vector"), ("lightning", "constant")])
def test_every_launch_gives_the_same_bits(kind: str, gate: str) -> None:
    x = on_gpu(make_operands(kind, gate, 1, 1700, key_dim=64, value_dim=64), BF16)._replace(with_dg=kind == "kda")
    states, do = torch.zeros(1, 0, 2, 64, 64, device="cuda"), random_gradient(x)
    results = []
    for _ in range(2):
        backward = TritonLinear().backward_begin(x, Pieces.whole([1700]), states, states, do, states)
        backward.intra()
        results.append(backward.finish(states))
    for first, second in zip(*results, strict=True):
        assert first is second is None or torch.equal(first, second)


def test_the_call_takes_them() -> None:
    x = on_gpu(make_operands("gated_delta", "scalar", 2, 200, key_dim=64, value_dim=64), BF16)
    leaves = [t.requires_grad_() for t in x[:5] if t is not None]
    q, k, v, g, beta = leaves
    results = []
    for kernel in ("auto", "torch"):
        o, _ = linear_attention(q, k, v, kind="gated_delta", decay=g, beta=beta, kernel=kernel)
        results.append([o.detach(), *torch.autograd.grad(o.float().square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        got, want = got.detach().double(), want.detach().double()
        assert float((got - want).norm() / want.norm()) < 2e-2
