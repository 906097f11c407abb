"""FlashAttention-4 on a GPU against the dense fp64 oracle: at most twice the error of plain torch at the same dtype."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

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


def test_soft_cap() -> None:
    tiles, sizes = ALL_CASES["causal_aligned"]
    p = problem(tiles, sizes, head_dim=128, dtype=torch.bfloat16, device="cuda", softcap=2.0)
    got = run(backend_for("fa4", p), p)
    want = oracle(replace(p, **{name: getattr(p, name).cpu() for name in ("q", "k", "v", "do", "dlse")}))
    for field in ("out", "lse", "dq", "dk", "dv"):
        assert relative_error(getattr(got, field), getattr(want, field)) <= 1e-2, field
