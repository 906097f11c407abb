"""Every backend that runs on this machine's CPU against the dense fp64 oracle: out, lse, dq, dk, dv."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distattn.kernels import BACKENDS, Case
from distattn.kernels.merge import empty_carry
from distattn.kernels.softmax import reference
from distattn.kernels.tiles import UNBOUNDED
from tests.kernels.oracle import CASES, Problem, Result, Sizes, oracle, problem, relative_error, run, table, visible

CPU_BACKENDS = ["reference", "flash_cpu"]
BATCH_OF = {"documents": 2, "heads_of_a_slot": 2, "window": 1}


def assert_close(got: Result, want: Result, tolerance: float) -> None:
    for field in fields(Result):
        error = relative_error(getattr(got, field.name), getattr(want, field.name))
        assert error <= tolerance, f"{field.name} is off by {error:.3g}"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_fp64_is_exact(name: str, backend: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, batch=BATCH_OF.get(name, 1), splits=(1,))
    assert_close(run(BACKENDS[backend], p), oracle(p), 1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["documents", "tiles_that_share_rows", "wide_window", "heads_of_a_slot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_as_good_as_plain_torch(name: str, backend: str, dtype: torch.dtype) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, head_dim=16, dtype=dtype)
    limit = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}[dtype]
    assert_close(run(BACKENDS[backend], p), oracle(p), limit)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 24), (24, 8), (5, 5), (1, 3)])
@pytest.mark.parametrize("name", ["documents", "wide_window"])
def test_value_dim_may_differ(name: str, head_dim: int, value_dim: int, backend: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, head_dim=head_dim, value_dim=value_dim)
    assert_close(run(BACKENDS[backend], p), oracle(p), 1e-12)


def strided(x: Tensor) -> Tensor:
    """The same values with neither heads nor features next to each other."""
    wide = torch.full((x.shape[0], x.shape[2], x.shape[1], 2 * x.shape[3]), float("nan"), dtype=x.dtype)
    view = wide.transpose(1, 2)[..., ::2]
    view.copy_(x)
    return view


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["documents", "wide_window", "full"])
def test_inputs_need_not_be_contiguous(name: str, backend: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, batch=2)
    p = replace(p, q=strided(p.q), k=strided(p.k), v=strided(p.v), do=strided(p.do))
    assert not p.q.is_contiguous()
    assert_close(run(BACKENDS[backend], p), oracle(p), 1e-12)


@pytest.mark.parametrize("softcap", [0.5, 20.0])
@pytest.mark.parametrize("name", ["documents", "tiles_that_share_rows", "window"])
def test_softcap(name: str, softcap: float) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, softcap=softcap, splits=(1,))
    assert_close(run(BACKENDS["reference"], p), oracle(p), 1e-12)


@pytest.mark.parametrize("name", ["documents", "rows_without_keys", "tiles_that_share_rows"])
def test_the_gradient_through_the_lse_comes_in_by_delta(name: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes, lse_gradient=True, softcap=3.0)
    result = run(BACKENDS["reference"], p)
    assert_close(result, oracle(p), 1e-12)
    without = run(BACKENDS["reference"], replace(p, dlse=torch.zeros_like(p.dlse)))
    assert relative_error(without.dq, result.dq) > 1e-2


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", ["documents", "heads_of_a_slot", "rows_without_keys", "window"])
def test_only_the_rows_of_tiles_are_read_and_written(name: str, backend: str) -> None:
    tiles, sizes = CASES[name]
    p = problem(tiles, sizes)
    want = oracle(p)
    seen = visible(tiles, sizes.queries, sizes.keys, sizes.heads).astype(bool)
    rows, keys = torch.from_numpy(seen.any(2).T), torch.from_numpy(seen.any((0, 1)))
    spoiled = Problem(**{field.name: getattr(p, field.name) for field in fields(Problem)})
    spoiled.q, spoiled.do = (x.clone().masked_fill_(~rows[None, :, :, None], float("nan")) for x in (p.q, p.do))
    spoiled.k, spoiled.v = (x.clone().masked_fill_(~keys[None, :, None, None], float("nan")) for x in (p.k, p.v))
    got = run(BACKENDS[backend], spoiled)
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_table_without_tiles_does_nothing(backend: str) -> None:
    p = problem(table(), Sizes(4, 4, 2, 1, 2))
    got = run(BACKENDS[backend], p)
    assert torch.equal(got.out, torch.zeros_like(got.out))
    assert torch.isneginf(got.lse).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_reruns_are_bitwise_equal(backend: str) -> None:
    tiles, sizes = CASES["tiles_that_share_rows"]
    p = problem(tiles, sizes, dtype=torch.float32)
    first, second = run(BACKENDS[backend], p), run(BACKENDS[backend], p)
    for field in fields(Result):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name)), field.name


def test_large_scores_do_not_overflow() -> None:
    tiles, sizes = CASES["documents"]
    for backend in CPU_BACKENDS:
        p = problem(tiles, sizes, splits=(1, 2))
        p.scale = 300.0
        assert_close(run(BACKENDS[backend], p), oracle(p), 1e-11)


def test_the_reference_cuts_queries_so_that_scores_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_SCORE_BYTES", 5 * 53 * 8 * 3)
    sizes_seen: list[int] = []
    original = reference._scores

    def recording(*args: object) -> Tensor:
        scores = original(*args)  # type: ignore[arg-type]
        sizes_seen.append(scores.numel() * scores.itemsize)
        return scores

    monkeypatch.setattr(reference, "_scores", recording)
    tiles, sizes = CASES["full"]
    p = problem(tiles, sizes)
    assert_close(run(BACKENDS["reference"], p), oracle(p), 1e-12)
    assert len(sizes_seen) == 2 * 8
    assert max(sizes_seen) <= 5 * 53 * 8 * 3


def test_sharding_moves_fp32_results_by_less_than_the_losses_allow() -> None:
    """The same causal document whole, and as the tiles of a zigzag over two ranks: 1e-5 is what losses may differ by."""
    n, c = 512, 128
    whole = table((0, n, 0, n, -UNBOUNDED, 0, 0, 4, 0))
    edges = range(0, n, c)
    cut = table(*((a, a + c, b, b + c, -UNBOUNDED, 0, 0, 4, 0) for b in edges for a in edges if b <= a))
    sizes = Sizes(n, n, 4, 2, 2)
    p = problem(whole, sizes, head_dim=16, dtype=torch.float32)
    got, want = run(BACKENDS["flash_cpu"], replace(p, tiles=cut, splits=(3, 7))), run(BACKENDS["flash_cpu"], p)
    assert_close(got, want, 1e-6)


def test_flash_cpu_says_what_it_cannot_do() -> None:
    case = Case("cpu", torch.float32, 64, 64, 8, 2)
    backend = BACKENDS["flash_cpu"]
    assert backend.why_not(case) is None
    assert backend.why_not(replace(case, deterministic=True)) is None
    for change, word in (
        ({"device_type": "cuda"}, "cuda"),
        ({"dtype": torch.float8_e4m3fn}, "float8"),
        ({"softcap": True}, "soft-cap"),
        ({"lse_gradient": True}, "LSE"),
    ):
        reason = backend.why_not(replace(case, **change))
        assert reason is not None
        assert word in reason


def test_a_carry_from_another_backend_is_continued() -> None:
    """Carries of the reference have l ≠ 1, those of flash_cpu begin as l = 1: both mean the same."""
    tiles, sizes = CASES["tiles_that_share_rows"]
    p = problem(tiles, sizes)
    carry = empty_carry(1, sizes.queries, sizes.heads, 8, dtype=torch.float64, device="cpu")
    for part, name in zip(np.split(tiles, [1, 2]), ("reference", "flash_cpu", "reference")):
        BACKENDS[name].attend(p.q, p.k, p.v, part, carry, group=p.group, scale=p.scale, softcap=None)
    lse = carry.m + carry.l.log()
    assert relative_error(lse, oracle(p).lse) < 1e-12
