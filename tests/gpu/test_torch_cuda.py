"""flash and cudnn on a GPU against the dense fp64 oracle: at most twice the error of plain torch at the same dtype."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from distattn.kernels import BACKENDS, Case
from distattn.kernels.protocol import Backend
from distattn.kernels.softmax import torch_cuda
from distattn.kernels.tiles import UNBOUNDED
from tests.kernels.oracle import CASES, Problem, Result, Sizes, oracle, problem, relative_error, run, table, visible

# Autograd's thread has no CUDA context before its first kernel, which may be a product of matrices in plain torch.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")]

U = UNBOUNDED
ALIGNED = {
    "causal_aligned": (
        table((0, 512, 0, 512, -U, 0, 0, 8, 0)),
        Sizes(512, 512, 8, 2, 4),
    ),
    "ring_aligned": (
        table((0, 512, 0, 512, -U, 0, 0, 8, 0), (256, 512, 512, 1024, -U, U, 0, 8, 0)),
        Sizes(512, 1024, 8, 2, 4),
    ),
    "oblique": (
        table((0, 512, 0, 1024, -U, 384, 0, 8, 0)),
        Sizes(512, 1024, 8, 8, 1),
    ),
}
ALL_CASES = {**CASES, **ALIGNED}


def backend_for(name: str, p: Problem) -> Backend:
    heads, kv_heads = p.q.shape[2], p.k.shape[2]
    case = Case("cuda", p.q.dtype, p.q.shape[-1], p.v.shape[-1], heads, kv_heads)
    reason = BACKENDS[name].why_not(case)
    if reason is not None:
        pytest.skip(f"gpu: {name} {reason}")
    return BACKENDS[name]


def plain_torch(p: Problem) -> Result:
    """Attention as one writes it in torch at the inputs' dtype, gradients by autograd."""
    q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    seen = torch.from_numpy(visible(p.tiles, q.shape[1], k.shape[1], q.shape[2])).bool().to(q.device)
    kv_head = torch.zeros(q.shape[2], dtype=torch.int64, device=q.device)
    for *_, h0, h1, shift in p.tiles.tolist():
        kv_head[h0:h1] = (torch.arange(h0, h1, device=q.device) + shift) // p.group
    scores = torch.einsum("bihd,bjhd->bhij", q, k[:, :, kv_head]) * p.scale
    empty = ~seen.any(-1)
    scores = scores.masked_fill(~(seen | empty[..., None]), float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(empty[..., None], 0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v[:, :, kv_head])
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), p.do)
    lse = torch.logsumexp(scores, -1).float().masked_fill(empty, float("-inf")).transpose(1, 2)
    return Result(out.detach(), lse.detach(), dq, dk, dv)


def on_cpu(p: Problem) -> Problem:
    return replace(p, **{name: getattr(p, name).cpu() for name in ("q", "k", "v", "do", "dlse")})


def assert_within_twice_plain_torch(got: Result, p: Problem) -> None:
    want, plain = oracle(on_cpu(p)), plain_torch(p)
    for field in fields(Result):
        got_part, want_part = getattr(got, field.name).double().cpu(), getattr(want, field.name)
        if not want_part.numel():  # the gradient of a bias, where there is none
            continue
        if want_part.abs().max() < 1e-12:  # one key a row: the weights are 1, and dq and dk vanish
            assert got_part.abs().max() <= torch.finfo(p.q.dtype).eps, f"{field.name} does not vanish"
            continue
        error = relative_error(getattr(got, field.name), getattr(want, field.name))
        floor = torch.finfo(p.q.dtype).eps / 4
        limit = 2 * max(floor, relative_error(getattr(plain, field.name), getattr(want, field.name)))
        assert error <= limit, f"{field.name} is off by {error:.3g}, more than {limit:.3g}"


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(name: str, backend: str, dtype: torch.dtype) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=64, batch=2, dtype=dtype, device="cuda", splits=(1,))
    assert_within_twice_plain_torch(run(backend_for(backend, p), p), p)


@pytest.mark.parametrize("name", ["full", "causal_aligned", "ring_aligned", "oblique"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_itself_at_any_size(name: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alignment rule only saves plans: without it cuDNN must be right too."""
    monkeypatch.setattr(torch_cuda, "CUDNN_ALIGNMENT", 1)
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    assert_within_twice_plain_torch(run(backend_for("cudnn", p), p), p)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(192, 128), (32, 64), (20, 20), (256, 256)])
@pytest.mark.parametrize("name", ["documents", "wide_window"])
def test_flash_pads_head_dims(name: str, head_dim: int, value_dim: int) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, head_dim=head_dim, value_dim=value_dim, dtype=torch.bfloat16, device="cuda")
    assert_within_twice_plain_torch(run(backend_for("flash", p), p), p)


@pytest.mark.parametrize("name", ["documents", "wide_window", "ring_aligned", "tall_band"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_reference_runs_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, dtype=dtype, device="cuda")
    got, want = run(BACKENDS["reference"], p), oracle(on_cpu(p))
    for field in fields(Result):
        got_part, want_part = getattr(got, field.name).double().cpu(), getattr(want, field.name)
        if not want_part.numel():  # the gradient of a bias, where there is none
            continue
        if want_part.abs().max() < 1e-12:  # one key a row: the weights are 1, and dq and dk vanish
            assert got_part.abs().max() <= torch.finfo(p.q.dtype).eps, f"{field.name} does not vanish"
            continue
        error = relative_error(getattr(got, field.name), getattr(want, field.name))
        assert error <= (1e-12 if dtype == torch.float64 else 1e-5), field.name


def test_flash_is_bitwise_repeatable_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, sizes = ALL_CASES["ring_aligned"]
    p = problem(tiles, sizes, head_dim=64, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        case = Case("cuda", p.q.dtype, 64, 64, 8, 2, deterministic=True)
        assert BACKENDS["flash"].why_not(case) is None
        first = run(BACKENDS["flash"], p)
        for _ in range(3):
            again = run(BACKENDS["flash"], p)
            assert all(torch.equal(getattr(first, f.name), getattr(again, f.name)) for f in fields(Result))
    finally:
        torch.use_deterministic_algorithms(False)
