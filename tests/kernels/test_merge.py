"""Merging partial results: plan-only arithmetic, no backend."""

from __future__ import annotations

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distattn.kernels.merge import empty_carry, finish, merge_finished, merge_outputs, merge_partial
from distattn.kernels.protocol import Carry

INF, NAN = float("inf"), float("nan")


def dense(values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """values [n, Dv], scores [rows, n] with −inf where hidden: (out, lse), 0 and −inf for empty rows."""
    lse = torch.logsumexp(scores, -1)
    return torch.nan_to_num(torch.softmax(scores, -1)) @ values, lse


def row(value: float, lse: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.full((1, 1, 1, 2), value, dtype=dtype), torch.full((1, 1, 1), lse, dtype=dtype)


@pytest.mark.parametrize("garbage", [0.0, NAN, INF], ids=["zero", "nan", "inf"])
@pytest.mark.parametrize("mark", [-INF, INF], ids=["minus_inf", "plus_inf"])
def test_a_side_that_saw_nothing_has_no_weight(garbage: float, mark: float) -> None:
    for a, b in (((3.0, 1.5), (garbage, mark)), ((garbage, mark), (3.0, 1.5))):
        out, lse = merge_outputs(*row(*a), *row(*b))
        assert torch.equal(out, row(3.0, 0)[0])
        assert lse.item() == 1.5


@pytest.mark.parametrize("garbage", [0.0, NAN, INF], ids=["zero", "nan", "inf"])
def test_two_sides_that_saw_nothing_give_zero_and_minus_infinity(garbage: float) -> None:
    out, lse = merge_outputs(*row(garbage, -INF), *row(garbage, INF))
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.item() == -INF


@pytest.mark.parametrize("difference", [-1000.0, -100.0, 0.0, 100.0, 1000.0])
def test_far_apart_sides_do_not_overflow(difference: float) -> None:
    out, lse = merge_outputs(*row(1.0, 5.0), *row(2.0, 5.0 + difference))
    share = 1 / (1 + math.exp(-difference)) if difference > -700 else 0.0
    torch.testing.assert_close(out, row(1.0 + share, 0)[0])
    assert lse.item() == pytest.approx(5.0 + max(difference, 0) + math.log1p(math.exp(-abs(difference))))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    hidden=st.floats(0, 1),
    fresh=st.booleans(),
)
def test_any_split_of_the_keys_gives_the_whole(seed: int, cuts: list[int], hidden: float, fresh: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    scores = 30 * torch.randn(7, 12, generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(7, 12, generator=generator) < hidden, -INF)
    carry = empty_carry(1, 7, 1, 3, dtype=torch.float64, device="cpu")
    if fresh:
        carry = Carry(*(x.fill_(NAN) for x in carry))
    edges = [0, *sorted(cuts), 12]
    for number, (a, b) in enumerate(pairwise(edges)):
        out, lse = dense(values[a:b], scores[:, a:b])
        out = out.masked_fill(lse.isinf()[:, None], NAN)
        merge_partial(carry, out[None, :, None], lse[None, :, None], fresh=fresh and number == 0)
    out, lse = finish(carry, torch.float64)
    want_out, want_lse = dense(values, scores)
    torch.testing.assert_close(out[0, :, 0], want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse[0, :, 0], want_lse, rtol=1e-12, atol=1e-12)


def test_merging_into_a_view_leaves_the_other_rows_alone() -> None:
    carry = empty_carry(1, 4, 2, 3, dtype=torch.float32, device="cpu")
    part = Carry(*(x[:, 1:3, 1:] for x in carry))
    merge_partial(part, torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1), all_seen=True)
    assert carry.acc.sum() == 6
    assert torch.isneginf(carry.m).sum() == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_carries_are_fp32_or_fp64_and_results_in_the_asked_dtype(dtype: torch.dtype) -> None:
    carry = empty_carry(1, 2, 1, 3, dtype=dtype, device="cpu")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in carry} == {wide}
    for _ in range(2):
        merge_partial(carry, torch.ones(1, 2, 1, 3, dtype=dtype), torch.zeros(1, 2, 1, dtype=wide))
    out, lse = finish(carry, dtype)
    assert (out.dtype, lse.dtype) == (dtype, wide)
    assert torch.equal(out, torch.ones_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(2)))


def test_the_error_of_merged_bf16_partials_does_not_grow_with_their_number() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2048, 16, generator=generator, dtype=torch.float64)
    scores = torch.randn(64, 2048, generator=generator, dtype=torch.float64)
    want, _ = dense(values, scores)
    errors = []
    for parts in (2, 64):
        carry = empty_carry(1, 64, 1, 16, dtype=torch.bfloat16, device="cpu")
        for v, s in zip(values.chunk(parts), scores.chunk(parts, 1)):
            out, lse = dense(v, s)
            merge_partial(carry, out.bfloat16()[None, :, None], lse.float()[None, :, None], all_seen=True)
        out, _ = finish(carry, torch.bfloat16)
        errors.append(((out[0, :, 0].double() - want).norm() / want.norm()).item())
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_finished_results_are_merged_in_place_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    out, other = (torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    lse, other_lse = (10 * torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    lse, other_lse = (
        x.to(torch.float64 if dtype == torch.float64 else torch.float32).transpose(1, 2) for x in (lse, other_lse)
    )
    wanted = merge_outputs(out, lse, other, other_lse)
    merge_finished(out, lse, other, other_lse)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted[0].to(dtype), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-2)
    torch.testing.assert_close(lse, wanted[1], rtol=1e-6, atol=1e-6)


def merged_in_one_pass() -> list[tuple[str, float]]:
    """In the interpreter's process: largest errors of out and lse, of views with gaps between their rows and heads."""
    errors = []
    for batch, rows, heads, width in ((2, 45, 3, 8), (1, 1, 1, 5), (1, 0, 2, 8)):
        generator = torch.Generator().manual_seed(rows)
        wide = [torch.randn(batch, rows + 7, heads + 2, width, generator=generator) for _ in range(2)]
        lse, other_lse = (10 * torch.randn(batch, heads, rows, generator=generator).transpose(1, 2) for _ in range(2))
        before = wide[0].clone()
        out, other = (x[:, 3 : 3 + rows, 1 : 1 + heads] for x in wide)
        wanted = merge_outputs(out.double(), lse.double(), other.double(), other_lse.double())
        merge_finished(out, lse, other, other_lse)
        for name, got, want in zip(("out", "lse"), (out, lse), wanted, strict=True):
            errors.append((f"{name} {rows}", float((got - want).abs().max()) if got.numel() else 0.0))
        before[:, 3 : 3 + rows, 1 : 1 + heads] = out
        errors.append((f"beside {rows}", float((wide[0] != before).sum())))
    return errors


def test_one_kernel_merges_finished_results() -> None:
    pytest.importorskip(
        "triton", minversion="3.7", reason="triton >= 3.7 is not installed (its interpreter runs with numpy 2.4)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as interpreter:
            found = interpreter.submit(merged_in_one_pass).result(timeout=60)
    assert {name: error for name, error in found if not error < 1e-5} == {}
    assert len(found) == 9
