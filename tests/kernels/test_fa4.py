"""What the FlashAttention-4 backend asks of the package, without a GPU and without the package.

Its two functions are replaced by plain fp64 ones that follow their documented rules (bottom-right windows, cumulative
lengths, LSE [B, H, n] or [H, total]). Whether the real ones follow them: tests/gpu.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distattn.kernels import BACKENDS, Case
from distattn.kernels.softmax import fa4
from distattn.kernels.tiles import UNBOUNDED
from tests.kernels.oracle import CASES, Sizes, oracle, problem, relative_error, run, table

U = UNBOUNDED
CALLS: list[dict[str, Any]] = []


def _scores(q: Tensor, k: Tensor, x: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Scores [H, n, m] and what is seen of them, for q [n, H, D] and k [m, Hk, D]."""
    n, m = len(q), len(k)
    diagonal = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
    left, right = x["window_size_left"], 0 if x["causal"] else x["window_size_right"]
    seen = torch.ones(n, m, dtype=torch.bool)
    seen &= (diagonal >= -left) if left is not None else seen
    seen &= (diagonal <= right) if right is not None else seen
    assert seen.any(1).all(), "a row that sees nothing was passed on"
    scores = torch.einsum("ihd,jhd->hij", q, k) * x["softmax_scale"]
    if x["softcap"]:
        scores = x["softcap"] * torch.tanh(scores / x["softcap"])
    return scores.masked_fill(~seen, float("-inf")), seen


def _sequences(q: Tensor, k: Tensor, x: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Indices of q and of k for each sequence: of the batch, or of the packed rows."""
    if "cu_seqlens_q" not in x:
        yield from ((b, b) for b in range(len(q)))
        return
    q_edges, k_edges = x["cu_seqlens_q"].tolist(), x["cu_seqlens_k"].tolist()
    assert (q_edges[0], q_edges[-1], k_edges[0], k_edges[-1]) == (0, len(q), 0, len(k))
    assert x["max_seqlen_q"] == max(b - a for a, b in itertools.pairwise(q_edges))
    for (a, b), (c, d) in zip(itertools.pairwise(q_edges), itertools.pairwise(k_edges)):
        yield slice(a, b), slice(c, d)


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **x: Any) -> tuple[Tensor | None, ...]:
    assert return_lse
    CALLS.append(x)
    repeat = q.shape[-2] // k.shape[-2]
    out = torch.full((*q.shape[:-1], v.shape[-1]), float("nan"), dtype=q.dtype)
    lse = torch.full(q.shape[:-1], float("nan"), dtype=q.dtype)
    for rows, keys in _sequences(q, k, x):
        ks, vs = (y[keys].repeat_interleave(repeat, 1) for y in (k, v))
        scores, _ = _scores(q[rows], ks, x)
        out[rows] = torch.einsum("hij,jhd->ihd", torch.softmax(scores, -1), vs)
        lse[rows] = torch.logsumexp(scores, -1).T
    return out, lse.transpose(-1, -2).contiguous(), None, None, None


def fake_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, **x: Any
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse.is_contiguous()
    CALLS.append(x)
    repeat = q.shape[-2] // k.shape[-2]
    dq, dk, dv = (torch.full_like(y, float("nan")) for y in (q, k, v))
    lse = lse.transpose(-1, -2)
    for rows, keys in _sequences(q, k, x):
        at = [q[rows].detach().requires_grad_(), *(y[keys].detach().requires_grad_() for y in (k, v))]
        ks, vs = (y.repeat_interleave(repeat, 1) for y in at[1:])
        scores, _ = _scores(at[0], ks, x)
        # The gradient of Σ p·(do·v − delta) with p and delta as given: what a kernel computes from the global LSE.
        p = torch.exp(scores - lse[rows].T[..., None])
        delta = (dout[rows] * out[rows]).sum(-1).T[..., None]
        pv = torch.einsum("ihd,jhd->hij", dout[rows], vs)
        loss = (p * pv).sum() - (p * delta).sum()
        dq[rows], dk[keys], dv[keys] = torch.autograd.grad(loss, at)
    return dq, dk, dv


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    module = types.SimpleNamespace(_flash_attn_fwd=fake_forward, _flash_attn_bwd=fake_backward)
    monkeypatch.setattr(fa4, "_interface", lambda: module)


@pytest.mark.parametrize("name", CASES)
def test_every_tile(name: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, batch=2, splits=(1,))
    got, want = run(fa4.Fa4Backend(), p), oracle(p)
    for field in ("out", "lse", "dq", "dk", "dv"):
        assert relative_error(getattr(got, field), getattr(want, field)) <= 1e-12, field


@pytest.mark.parametrize("name", ["causal", "documents", "tiles_that_share_rows", "heads_apart"])
def test_without_a_carry(name: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, batch=2)
    settings = {"group": p.group, "scale": p.scale, "softcap": None}
    out, lse = fa4.Fa4Backend().attend_whole(p.q, p.k, p.v, tiles, **settings)
    dq, dk, dv = fa4.Fa4Backend().attend_backward_whole(p.q, p.k, p.v, out, lse, p.do, None, tiles, **settings)
    want = oracle(p)
    for field, got in (("out", out), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv)):
        assert relative_error(got, getattr(want, field)) <= 1e-12, field


@pytest.mark.parametrize("name", ["causal", "documents", "heads_apart"])
def test_soft_cap(name: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, softcap=1.5)
    got, want = run(fa4.Fa4Backend(), p), oracle(p)
    for field in ("out", "lse", "dq", "dk", "dv"):
        assert relative_error(getattr(got, field), getattr(want, field)) <= 1e-12, field


def documents(lengths: list[int], window: int = U) -> list[tuple[int, ...]]:
    edges = [0, *itertools.accumulate(lengths)]
    return [(a, b, a, b, -window, 0, 0, 2, 0) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize(
    ("rows", "windows"),
    [
        (documents([5, 1, 30, 2]), [("causal", 5)]),
        (documents([5, 1, 30, 40, 2], window=10), [((10, 0), 6)]),
        ([(*x[:5], U, *x[6:]) for x in documents([5, 1, 30])], [((None, None), 4)]),
        ([(0, 9, 0, 9, -U, 0, 0, 2, 0), (9, 20, 0, 20, -U, 0, 0, 2, 0)], [("causal", 2), ("causal", 2)]),
        ([(0, 9, 0, 9, -U, 0, 0, 2, 0), (9, 20, 9, 20, -U, 0, 0, 1, 0)], [("causal", 2), ("causal", 2)]),
    ],
    ids=["documents", "windowed", "full", "shared_keys", "other_heads"],
)
def test_neighbours_of_one_window_are_one_launch(rows: list[tuple[int, ...]], windows: list[tuple[Any, int]]) -> None:
    n = max(row[1] for row in rows)
    p = problem(table(*rows), Sizes(n, n, 2, 2, 1))
    want = oracle(p)
    got = run(fa4.Fa4Backend(), p)
    assert relative_error(got.dk, want.dk) <= 1e-12
    kinds = [
        ("causal" if x["causal"] else (x["window_size_left"], x["window_size_right"]), len(x.get("cu_seqlens_q", (0, 0))))
        for x in CALLS
    ]
    assert sorted(kinds, key=str) == sorted(windows * 2, key=str)


CUDA = Case("cuda", torch.bfloat16, 128, 128, 8, 2)


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({"device_type": "cpu"}, (9, 0), "runs on cuda, not on cpu"),
        ({"dtype": torch.float32}, (9, 0), "computes bf16 and fp16"),
        ({"head_dim": 320}, (9, 0), "up to 256, not 320 and 128"),
        ({"head_dim": 36}, (9, 0), "multiples of 8"),
        ({"head_dim": 192}, (10, 0), "up to 128, not 192"),
        ({"lse_gradient": True}, (9, 0), "through the LSE"),
        ({"deterministic": True}, (9, 0), "no fixed order"),
        ({}, (8, 0), "compute capability 9.0"),
    ],
)
def test_why_not(change: dict[str, Any], capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert reason in str(BACKENDS["fa4"].why_not(replace(CUDA, **change)))


def test_a_package_that_is_missing_broken_or_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = fa4.why_not_usable.__wrapped__
    monkeypatch.setattr(fa4.importlib.util, "find_spec", lambda name: None)
    assert usable() == f"needs the package flash-attn-4: {fa4.INSTALL}"

    def raises() -> None:
        raise ImportError("no cutlass")

    monkeypatch.setattr(fa4.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fa4, "_interface", raises)
    assert "import fails (ImportError: no cutlass)" in str(usable())
    monkeypatch.setattr(fa4, "_interface", lambda: types.SimpleNamespace(_flash_attn_fwd=lambda q, k: None))
    assert "_flash_attn_fwd takes no causal, cu_seqlens_k" in str(usable())
