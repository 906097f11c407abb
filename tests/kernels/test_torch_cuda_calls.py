"""What the CUDA backends ask of torch's operators, without a GPU.

The operators are replaced by plain fp64 ones that follow their documented rules (FlashAttention 2's bottom-right windows,
where ``right ≥ keys`` means unbounded; cuDNN's top-left causal flag; LSE [B, H, n] read as contiguous), so a wrong
window, head range or layout gives a wrong number here. Whether the real operators follow the rules: tests/gpu.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from distattn.kernels.protocol import WholeBackend
from distattn.kernels.softmax import launched, torch_cuda
from distattn.kernels.tiles import UNBOUNDED
from tests.kernels.oracle import CASES, Problem, Result, Sizes, oracle, problem, relative_error, run, table

CALLS: Counter[str] = Counter()


def dense_forward(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, n, H, D], k and v [B, m, Hk, D], seen [n, m] → out [B, n, H, D], lse [B, H, n] contiguous."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).mul(scale).masked_fill(~seen, float("-inf"))
    out = torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v)
    return out, torch.logsumexp(scores, -1).contiguous()


def dense_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    repeat = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeat, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).mul(scale)
    p = torch.exp(scores - lse[..., None]).masked_fill(~seen, 0)
    delta = (do * out).sum(-1).transpose(1, 2)
    ds = p * (torch.einsum("bihd,bjhd->bhij", do, v) - delta[..., None]) * scale
    dq = torch.einsum("bhij,bjhd->bihd", ds, k)
    dk, dv = torch.einsum("bhij,bihd->bjhd", ds, q), torch.einsum("bhij,bihd->bjhd", p, do)
    dk, dv = (x.unflatten(2, (-1, repeat)).sum(3) for x in (dk, dv))
    return dq, dk, dv


def flash_window(n: int, m: int, left: int, right: int) -> Tensor:
    """What FlashAttention 2 makes of the two numbers: as many as the keys is unbounded, and unbounded as many as the keys."""
    assert n > 0
    assert m > 0
    left, right = (-1 if x >= m else x for x in (left, right))
    right = m if left >= 0 and right < 0 else right
    diagonal = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
    return ((left < 0) | (diagonal >= -left)) & ((right < 0) | (diagonal <= right))


def check_strides(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0


def fake_flash_forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, **window):
    CALLS["flash"] += 1
    check_strides(q, k, v)
    assert (cum_q, cum_k, max_q, max_k, dropout, causal, debug) == (
        None, None, q.shape[1], k.shape[1], 0.0, False, False,
    )  # fmt: skip
    seen = flash_window(max_q, max_k, window["window_size_left"], window["window_size_right"])
    return *dense_forward(q, k, v, seen, scale), None, None, None


def fake_flash_backward(
    do, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, *, scale, **window
):  # fmt: skip
    check_strides(do, q, k, v, out)
    assert (cum_q, cum_k, max_q, max_k, dropout, causal) == (None, None, q.shape[1], k.shape[1], 0.0, False)
    seen = flash_window(max_q, max_k, window["window_size_left"], window["window_size_right"])
    return dense_backward(do, q, k, v, out, lse, seen, scale)


def top_left(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return seen.tril() if causal else seen


def fake_cudnn_forward(q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
    CALLS["cudnn"] += 1
    assert (bias, with_lse, dropout, debug) == (None, True, 0.0, False)
    seen = top_left(q, k, causal)
    out, lse = dense_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, scale)
    return out.transpose(1, 2), lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None


def fake_cudnn_backward(
    do, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
):  # fmt: skip
    assert do.stride() == out.stride()
    assert lse.shape == (*q.shape[:3], 1), "cuDNN wants its statistics with a last dimension of one"
    lse = lse.squeeze(-1)
    assert (bias, cum_q, cum_k, max_q, max_k, dropout) == (None, None, None, q.shape[2], k.shape[2], 0.0)
    seen = top_left(q, k, causal)
    do, q, k, v, out = (x.transpose(1, 2) for x in (do, q, k, v, out))
    gradients = dense_backward(do, q, k, v, out, lse, seen, scale)
    return tuple(x.transpose(1, 2) for x in gradients)


@pytest.fixture(autouse=True)
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fake_flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", fake_flash_backward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", fake_cudnn_forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", fake_cudnn_backward)


def assert_exact(got: Result, want: Result) -> None:
    for field in fields(Result):
        error = relative_error(getattr(got, field.name), getattr(want, field.name))
        assert error <= 1e-12, f"{field.name} is off by {error:.3g}"


@pytest.mark.parametrize("alignment", [1, 16, 128])
@pytest.mark.parametrize("name", CASES)
def test_flash_and_cudnn_compute_every_tile(name: str, alignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cuda, "CUDNN_ALIGNMENT", alignment)
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, batch=2, splits=(1,))
    want = oracle(p)
    if alignment == 128:
        assert_exact(run(torch_cuda.FlashBackend(), p), want)
    assert_exact(run(torch_cuda.CudnnBackend(), p), want)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(5, 5), (16, 8), (8, 24)])
def test_flash_pads_head_dims(head_dim: int, value_dim: int) -> None:
    tiles, sizes = CASES["documents"]
    p = problem(tiles, sizes, head_dim=head_dim, value_dim=value_dim)
    assert_exact(run(torch_cuda.FlashBackend(), p), oracle(p))


def test_a_ring_step_is_one_launch_and_cudnn_gets_what_is_aligned() -> None:
    n = 256
    causal, full = (0, n, 0, n, -UNBOUNDED, 0, 0, 2, 0), (0, n, n, 2 * n, -UNBOUNDED, UNBOUNDED, 0, 2, 0)
    sizes = Sizes(n + 3, 2 * n + 3, 2, 1, 2)
    for backend, rows, calls in (
        (torch_cuda.FlashBackend(), (causal, full), {"flash": 2}),
        (torch_cuda.CudnnBackend(), (causal, full), {"cudnn": 2}),
        (torch_cuda.CudnnBackend(), ((0, n, 0, n, -100, 0, 0, 2, 0), (0, n, n, 2 * n, n, UNBOUNDED, 0, 2, 0)), {"flash": 2}),
        (torch_cuda.CudnnBackend(), ((0, n + 1, 0, n + 1, -UNBOUNDED, 0, 0, 2, 0),), {"flash": 1}),
    ):
        CALLS.clear()
        run(backend, problem(table(*rows), sizes))
        assert calls == CALLS


def run_whole(backend: WholeBackend, p: Problem) -> Result:
    """The answer in one call, without a carry."""
    settings = {"group": p.group, "scale": p.scale, "softcap": p.softcap}
    out, lse = backend.attend_whole(p.q, p.k, p.v, p.tiles, **settings)
    return Result(out, lse, *backend.attend_backward_whole(p.q, p.k, p.v, out, lse, p.do, None, p.tiles, **settings))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [torch_cuda.FlashBackend(), torch_cuda.CudnnBackend()], ids=lambda x: x.name)
def test_without_a_carry(name: str, backend: WholeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cuda, "CUDNN_ALIGNMENT", 1)
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, batch=2, head_dim=5, value_dim=5)
    got = run_whole(backend, p)
    assert_exact(got, oracle(p))
    assert [x.shape for x in (got.out, got.dq, got.dk, got.dv)] == [p.do.shape, p.q.shape, p.k.shape, p.v.shape]


@pytest.mark.parametrize(
    ("rows", "carried", "summed"),
    [
        ([(0, 40, 0, 40, -UNBOUNDED, 0, 0, 2, 0)], False, False),
        ([(0, 16, 0, 16, -UNBOUNDED, 0, 0, 2, 0), (16, 40, 16, 40, -UNBOUNDED, 0, 0, 2, 0)], False, False),
        ([(0, 16, 0, 40, -UNBOUNDED, UNBOUNDED, 0, 2, 0), (16, 40, 0, 40, -UNBOUNDED, 0, 0, 2, 0)], False, True),
        ([(0, 40, 0, 9, -UNBOUNDED, UNBOUNDED, 0, 2, 0), (0, 40, 9, 40, -UNBOUNDED, UNBOUNDED, 0, 2, 0)], True, True),
        ([(0, 40, 0, 40, -UNBOUNDED, 0, 0, 1, 0), (0, 40, 0, 40, -UNBOUNDED, 0, 1, 2, 0)], False, False),
        ([(0, 20, 0, 40, -UNBOUNDED, UNBOUNDED, 0, 2, 0), (0, 20, 0, 40, -UNBOUNDED, UNBOUNDED, 2, 3, 0)], False, False),
    ],
    ids=["one", "documents", "shared_keys", "shared_rows", "heads", "half"],
)
def test_wide_sums_only_where_something_is_added(
    rows: list[tuple[int, ...]], carried: bool, summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = max(row[7] for row in rows)
    p = problem(table(*rows), Sizes(40, 40, heads, heads, 1))
    made: list[str] = []
    empty_carry, zeros_like = launched.empty_carry, torch.zeros_like
    monkeypatch.setattr(launched, "empty_carry", lambda *a, **k: made.append("carry") or empty_carry(*a, **k))
    monkeypatch.setattr(torch, "zeros_like", lambda x, **k: made.append(str(k.get("dtype"))) or zeros_like(x, **k))
    got = run_whole(torch_cuda.FlashBackend(), p)
    assert ("carry" in made) == carried
    assert ("torch.float64" in made) == summed
    assert_exact(got, oracle(p))
