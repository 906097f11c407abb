"""Block plans: lists, their transposes and digests, what they refuse; and the reference backend under them, in fp64."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distattn
from distattn.errors import InputError, PlanError
from distattn.kernels import BACKENDS
from distattn.kernels.block_plan import BlockOperand, BlockPlan
from distattn.kernels.protocol import Extras
from distattn.mask import Mask
from tests.kernels.extras_cases import EXTRAS_CASES, run_whole, with_extras
from tests.kernels.oracle import CASES, ODD, Problem, Result, oracle, problem, relative_error, run

SIZES: dict[str, Any] = {"num_queries": 9 * 64 - 5, "num_keys": 7 * 64 - 1, "block_q": 64, "block_k": 64}
REFERENCE = BACKENDS["reference"]


def random_blocks(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    listed, full = (torch.rand(2, 3, 9, 7, generator=generator) < x for x in (0.4, 0.5))
    return listed, full


def lists_of(listed: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(counts, blocks) in a random order, with junk behind each list's end."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(listed.shape, generator=generator) + ~listed
    return listed.sum(-1), score.argsort(-1)


def test_lists_and_their_transposes_hold_what_was_given() -> None:
    listed, full = random_blocks()
    plan = BlockPlan.from_blocks(listed, full, **SIZES)
    for first, stop in ((0, 9), (3, 5), (8, 9)):
        got_full, got_partial = plan.seen(first, stop)
        assert torch.equal(got_full, (listed & full)[:, :, first:stop])
        assert torch.equal(got_partial, (listed & ~full)[:, :, first:stop])
    for (starts, counts, blocks), want in zip(plan.transposed, (listed & full, listed & ~full)):
        for place in np.ndindex(*counts.shape):
            got = blocks[int(starts[place]) :][: int(counts[place])]
            assert torch.equal(got.long(), want.mT[place].nonzero().ravel()), "ascending query blocks of a key block"


def test_the_order_of_lists_changes_nothing() -> None:
    listed, full = random_blocks()
    first, second = (
        BlockPlan.from_lists(*lists_of(listed & full, seed), *lists_of(listed & ~full, seed), **SIZES) for seed in (1, 2)
    )
    assert first.digest == second.digest == BlockPlan.from_blocks(listed, full, **SIZES).digest
    for a, b in zip((first.full, first.partial), (second.full, second.partial)):
        assert torch.equal(a.counts, b.counts)
        assert torch.equal(a.blocks, b.blocks)


def test_another_plan_has_another_digest() -> None:
    listed, full = random_blocks()
    plan = BlockPlan.from_blocks(listed, full, **SIZES)
    changed = listed.clone()
    changed[1, 2, 8, 6] ^= True
    others = [
        BlockPlan.from_blocks(changed, full, **SIZES),
        BlockPlan.from_blocks(listed, ~full, **SIZES),
        BlockPlan.from_blocks(listed, full, **{**SIZES, "num_keys": 7 * 64}),
        BlockPlan.from_blocks(listed[:1], full[:1], **SIZES),
    ]
    assert len({plan.digest, *(x.digest for x in others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 96}, "block_q is 96"),
        ({"num_queries": 700}, r"full_counts must have shape \[b, p, 11\]"),
        ({"full_blocks": torch.zeros(2, 3, 8, 7, dtype=torch.int64)}, "full_blocks must have shape"),
        ({"full_counts": torch.full((2, 3, 9), 8)}, "full_counts must lie between 0"),
        ({"full_blocks": torch.full((2, 3, 9, 7), 7)}, r"full_blocks must lie in 0 … 6"),
        ({"full_blocks": torch.zeros(2, 3, 9, 7, dtype=torch.int64)}, "lists a block twice"),
        ({"partial_blocks": torch.zeros(2, 3, 9, 1)}, "partial_blocks must hold integers"),
        (
            {"partial_counts": torch.ones(2, 3, 9).long(), "partial_blocks": torch.zeros(2, 3, 9, 1).long()},
            "partial_blocks lists a block that full_blocks lists",
        ),
    ],
)
def test_lists_that_cannot_be_are_refused(change: dict, message: str) -> None:
    given = {
        "full_counts": torch.full((2, 3, 9), 7),
        "full_blocks": torch.arange(7).expand(2, 3, 9, 7),
        "partial_counts": torch.zeros(2, 3, 9).long(),
        "partial_blocks": torch.zeros(2, 3, 9, 1).long(),
        **SIZES,
    }
    BlockPlan.from_lists(**given)
    with pytest.raises(InputError, match=message):
        BlockPlan.from_lists(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"listed": torch.ones(2, 3, 9, 8).bool()}, r"listed must have shape \[b, p, 9, 7\]"),
        ({"listed": torch.ones(3, 9, 7).bool()}, r"listed must have shape .* got \[3, 9, 7\]"),
        ({"full": torch.ones(1, 3, 9, 7).bool()}, r"full must have shape .* got \[1, 3, 9, 7\]"),
        ({"block_k": 32}, "block_k is 32"),
    ],
)
def test_booleans_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    listed, full = random_blocks()
    with pytest.raises(InputError, match=message):
        BlockPlan.from_blocks(**{"listed": listed, "full": full, **SIZES, **change})


def extras_problem(name: str, **options: object) -> Problem:
    table_name, sizes, extras = EXTRAS_CASES[name]
    tiles, shape = {**CASES, **ODD}[table_name]
    return with_extras(problem(tiles, shape, **{**sizes, **options}), **extras)


def assert_exact(got: Result, want: Result) -> None:
    for field in fields(Result):
        error = relative_error(getattr(got, field.name), getattr(want, field.name))
        assert error <= 1e-12, f"{field.name} is off by {error:.3g}"


@pytest.mark.parametrize("name", EXTRAS_CASES)
def test_the_reference_is_exact(name: str) -> None:
    p = extras_problem(name)
    want = oracle(p)
    assert_exact(run(REFERENCE, p), want)
    assert_exact(run_whole(REFERENCE, extras_problem(name)), want)


def test_a_plan_of_all_blocks_is_no_plan() -> None:
    p = problem(*ODD["causal_130"])
    everything = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    plan = BlockPlan.from_blocks(everything, num_queries=130, num_keys=130, block_q=64, block_k=64)
    assert_exact(run(REFERENCE, replace(p, extras=Extras(BlockOperand(plan, 2)))), oracle(p))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "0123456789abcdef"}, "blocks has the digest .* belongs to 0123456789abcdef"),
        ({"offsets": np.full((1, 3), 1)}, "blocks is over 130 queries, but the tiles hold rows 1 to 131"),
        ({"offsets": np.zeros((2, 3), np.int64)}, r"blocks has offsets \[2, 3\] for 1 tiles"),
        ({"heads": 3}, "blocks has 2 plan heads"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    p = problem(*ODD["causal_130"])
    listed = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    plan = BlockPlan.from_blocks(listed, num_queries=130, num_keys=130, block_q=64, block_k=64)
    operand = replace(BlockOperand(plan, 2, digest=plan.digest), **change)
    with pytest.raises(InputError, match=message):
        run(REFERENCE, replace(p, extras=Extras(operand)))


def test_lists_for_another_batch_are_refused() -> None:
    p = problem(*ODD["causal_130"], batch=3)
    plan = BlockPlan.from_blocks(torch.ones(2, 1, 3, 3).bool(), num_queries=130, num_keys=130, block_q=64, block_k=64)
    with pytest.raises(InputError, match="blocks has lists for a batch of 2, q has 3"):
        run(REFERENCE, replace(p, extras=Extras(BlockOperand(plan, 2))))


def test_attention_under_a_block_plan() -> None:
    """The public call, its split phase, and gradients, against the oracle."""
    p = extras_problem("plan_of_each_head")
    assert p.extras is not None
    assert p.extras.blocks is not None
    plan = distattn.plan(Mask.causal(130), heads=2, kv_heads=1, head_dim=8, sparse=p.extras.blocks.plan)
    want = oracle(p)
    q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
    out, lse = distattn.attention(q, k, v, plan, return_lse=True)
    gradients = torch.autograd.grad((out * p.do).sum(), (q, k, v))
    assert_exact(Result(out.detach(), lse.detach(), *gradients), want)
    handle = distattn.attention_begin(q, k, v, plan)
    out = distattn.attention_finish(handle)
    assert isinstance(out, Tensor)
    gradients = torch.autograd.grad((out * p.do).sum(), (q, k, v))
    assert_exact(Result(out.detach(), lse.detach(), *gradients), want)
    dense = distattn.plan(Mask.causal(130), heads=2, kv_heads=1, head_dim=8)
    assert dense.sparse is None, "a plan with blocks is not the one without"
    with pytest.raises(PlanError, match="sparse is over 130 queries and 130 keys, the mask over 131"):
        distattn.plan(Mask.causal(131), heads=2, kv_heads=1, head_dim=8, sparse=p.extras.blocks.plan)
    with pytest.raises(PlanError, match="sparse has 2 plan heads"):
        distattn.plan(Mask.causal(130), heads=3, head_dim=8, sparse=p.extras.blocks.plan)
