"""Plan only, and all ranks in this process: transfers in rounds keep their budget and change no result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import distattn
from distattn.errors import PlanError
from distattn.kernels import BACKENDS
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.cost import M_BYTES, M_DST, M_ISSUE, M_SRC, Shape, count
from distattn.parallel.in_process import run_in_process
from distattn.parallel.layout import Layout
from distattn.parallel.program import Program, RoundBudget
from distattn.parallel.rounds import in_rounds
from distattn.parallel.schedulers import all_gather, double_ring, ring
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, plan
from distattn.parallel.verify import verify
from distattn.testing import run_ranks
from tests.parallel.cases import random_layout, random_mask

HEAD_DIM = 4


def budget_for(kv_heads: int, group: int, rows: int) -> int:
    """Bytes of so many of the widest rows there are: q, dO, o, lse and delta of all heads in fp64."""
    return rows * kv_heads * group * (3 * HEAD_DIM * 8 + 16) * 2


def check_rounds(program: Program, mask: Mask, budget: int) -> None:
    verify(program, mask)
    messages = count(program, mask, Shape(HEAD_DIM, HEAD_DIM, "float64", True)).messages
    for end in (M_SRC, M_DST):
        at_once = np.zeros((program.num_stages + 1, program.num_ranks), np.int64)
        np.add.at(at_once, (messages[:, M_ISSUE], messages[:, end]), messages[:, M_BYTES])
        assert at_once.max(initial=0) <= budget


@pytest.mark.parametrize("seed", range(24))
def test_every_round_keeps_the_budget_forward_and_backward(seed: int) -> None:
    """Any mask and layout; kept and sent again; results are bitwise those of the program without rounds."""
    rng = np.random.default_rng(seed)
    n, kv_heads, group = int(rng.integers(2, 60)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
    ranks = int(rng.integers(1, 9))
    mask, layout = random_mask(rng, n), random_layout(rng, n, ranks)
    budget = budget_for(kv_heads, group, int(rng.integers(1, 5)))
    options = DisaggregatedOptions(align=1, head_dim=HEAD_DIM, element_bytes=8)
    at_once = plan(mask, layout, kv_heads * group, kv_heads, options)
    program = plan(mask, layout, kv_heads * group, kv_heads, replace(options, round_bytes=budget))
    assert program.num_stages >= at_once.num_stages
    check_rounds(program, mask, budget)
    for keep in (False, True):
        check_rounds(derive_backward(program, keep=keep), mask, budget)
    torch.manual_seed(seed)
    q, k, v, do = (
        torch.randn(1, n, h, HEAD_DIM, dtype=torch.float64) for h in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    )
    results = [run_in_process(x, mask, q, k, v, do, backend=BACKENDS["reference"], poison=True) for x in (at_once, program)]
    for name in ("out", "lse", "dq", "dk", "dv"):
        one, other = (getattr(result, name) for result in results)
        assert torch.allclose(one, other, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("scheduler", [ring, double_ring, all_gather], ids=["ring", "double_ring", "all_gather"])
def test_other_schedules_can_travel_in_rounds_too(scheduler) -> None:
    mask = Mask.documents([40, 3, 85])
    program = scheduler.plan(mask, Layout.zigzag(128, 4), 4, 2)
    budget = budget_for(2, 2, 2)
    found = in_rounds(program, RoundBudget(budget, HEAD_DIM, 8))
    assert found.num_stages > program.num_stages
    assert found.digest != program.digest
    check_rounds(found, mask, budget)
    check_rounds(derive_backward(found), mask, budget)


def test_all_ranks_find_the_same_rounds_and_too_small_a_budget_is_refused() -> None:
    mask, layout = Mask.documents([4000, 30, 66]), Layout.contiguous(4096, 4)
    options = DisaggregatedOptions(align=1, head_dim=HEAD_DIM, element_bytes=8, round_bytes=100_000)
    assert plan(mask, layout, 4, 2, options).digest == plan(mask, layout, 4, 2, options).digest
    assert plan(mask, layout, 4, 2, options).num_stages > 3
    with pytest.raises(PlanError, match=r"a round of 100 bytes is too small: one row .* give round_bytes of at least"):
        plan(mask, layout, 4, 2, replace(options, round_bytes=100))


def attend_in_rounds(rank: int, world: int) -> None:
    """Pools and rounds on real processes, forward and backward, against one rank that computes everything."""
    mask, heads, kv_heads = Mask.documents([61, 1, 20, 9]), 4, 2
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 91, h, HEAD_DIM, dtype=torch.float64) for h in (heads, kv_heads, kv_heads, heads))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out = distattn.attention(
        whole[0], whole[1], whole[2], distattn.plan(mask, heads=heads, kv_heads=kv_heads, head_dim=HEAD_DIM)
    )
    out.backward(do)
    for pool, servers in ((0, 0), (2, 0), (0, 1)):
        options = DisaggregatedOptions(
            align=1, tolerance=0.02, head_dim=HEAD_DIM, element_bytes=8, round_bytes=budget_for(2, 2, 3), pool=pool,
            ranks_per_node=1, servers=servers,
        )  # fmt: skip
        plan = distattn.plan(
            mask,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=HEAD_DIM,
            group=dist.group.WORLD,
            strategy="disaggregated",
            options=options,
        )
        assert plan.program.num_stages > 3
        local = [plan.shard(x.detach()).requires_grad_() for x in whole]
        found = distattn.attention(local[0], local[1], local[2], plan)
        assert torch.allclose(found, plan.shard(out.detach()), rtol=0, atol=1e-10)
        found.backward(plan.shard(do))
        for mine, theirs in zip(local, whole, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert torch.allclose(mine.grad, plan.shard(theirs.grad), rtol=0, atol=1e-10)


def test_rounds_and_pools_over_gloo() -> None:
    run_ranks(attend_in_rounds, 3)
