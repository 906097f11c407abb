"""FlashAttention-4 on a GPU against the dense fp64 oracle: at most twice the error of plain torch at the same dtype."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from distattn.kernels.merge import merge_finished, merge_outputs
from distattn.kernels.softmax.launched import LaunchedBackend
from distattn.kernels.tiles import UNBOUNDED
from tests.gpu.test_torch_cuda import ALL_CASES, assert_within_twice_plain_torch, backend_for
from tests.kernels.oracle import Result, Sizes, oracle, problem, relative_error, run, table

# The package's compiler warns of its own arguments while it compiles.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_error_is_at_most_twice_that_of_plain_torch(name: str, head_dim: int) -> None:
    tiles, sizes = ALL_CASES[name]
    p = problem(tiles, sizes, head_dim=head_dim, batch=2, dtype=torch.bfloat16, device="cuda", splits=(1,))
    assert_within_twice_plain_torch(run(backend_for("fa4", p), p), p)


@pytest.mark.parametrize("backend", ["fa4", "flash", "cudnn"])
@pytest.mark.parametrize("window", [UNBOUNDED, 100], ids=["causal", "window"])
def test_packed_documents_without_a_carry(backend: str, window: int) -> None:
    edges = [0, *itertools.accumulate([1, 300, 63, 129, 7])]
    tiles = table(*((a, b, a, b, -window, 0, 0, 8, 0) for a, b in itertools.pairwise(edges)))
    p = problem(tiles, Sizes(edges[-1], edges[-1], 8, 2, 4), head_dim=128, dtype=torch.bfloat16, device="cuda")
    kernel = backend_for(backend, p)
    settings = {"group": p.group, "scale": p.scale, "softcap": None}
    out, lse = kernel.attend_whole(p.q, p.k, p.v, tiles, **settings)  # pyright: ignore[reportAttributeAccessIssue]
    gradients = kernel.attend_backward_whole(  # pyright: ignore[reportAttributeAccessIssue]
        p.q, p.k, p.v, out, lse, p.do, None, tiles, **settings
    )
    assert_within_twice_plain_torch(Result(out, lse, *gradients), p)


@pytest.mark.parametrize("name", ["fa4", "cudnn"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_some_heads_are_written_to_their_places(name: str, packed: bool) -> None:
    """Two calls of some heads each fill what one call of all heads gives."""
    edges = [0, *itertools.accumulate([129, 300, 70] if packed else [499])]

    def tiles(first: int, last: int) -> np.ndarray:
        return table(*((a, b, a, b, -UNBOUNDED, 0, first, last, 0) for a, b in itertools.pairwise(edges)))

    p = problem(tiles(0, 8), Sizes(edges[-1], edges[-1], 8, 4, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    kernel = backend_for(name, p)
    assert isinstance(kernel, LaunchedBackend)
    settings = {"group": p.group, "scale": p.scale, "softcap": None}
    out, lse = kernel.attend_whole(p.q, p.k, p.v, tiles(0, 8), **settings)
    into = [torch.full_like(x, float("nan")) for x in (p.q, p.k, p.v)]
    for first, last in ((0, 2), (2, 8)):
        launches = kernel.launches(tiles(first, last), p.group)
        kernel.gradients_into(into, p.q, p.k, p.v, out, lse, p.do, launches, p.scale, None)
    assert_within_twice_plain_torch(Result(out, lse, *into), p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_kernel_merges_finished_results(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    out, other = (torch.randn(2, 300, 6, 128, device="cuda", generator=generator).to(dtype)[:, 7:, 1:5] for _ in range(2))
    lse, other_lse = (10 * torch.randn(2, 4, 293, device="cuda", generator=generator).transpose(1, 2) for _ in range(2))
    want, want_lse = merge_outputs(out.double(), lse.double(), other.double(), other_lse.double())
    merge_finished(out, lse, other, other_lse)
    assert relative_error(out, want.to(dtype)) <= (2e-3 if dtype == torch.bfloat16 else 1e-6)
    assert relative_error(lse, want_lse) <= 1e-6


def test_soft_cap() -> None:
    tiles, sizes = ALL_CASES["causal_aligned"]
    p = problem(tiles, sizes, head_dim=128, dtype=torch.bfloat16, device="cuda", softcap=2.0)
    got = run(backend_for("fa4", p), p)
    want = oracle(replace(p, **{name: getattr(p, name).cpu() for name in ("q", "k", "v", "do", "dlse")}))
    for field in ("out", "lse", "dq", "dk", "dv"):
        assert relative_error(getattr(got, field), getattr(want, field)) <= 1e-2, field
