"""Four gloo ranks, one start: traps of loss scaling and of parallelisms that compose, each with the bug that it guards against.

The others are in test_traps.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from distattn import Mask, attention, plan
from distattn.errors import AgreementError
from distattn.parallel.agreement import Board
from distattn.testing import run_ranks
from tests.parallel.cases import inputs, oracle

N, HEADS = 22, 4
MASK = Mask.documents([9, 13])
TOLERANCE = 1e-10


def context_loss(world: int, scale: float) -> tuple[float, float]:
    """Mean square over all rows, each rank summing its own: (error of the summed loss, error of a weight's summed gradient)."""
    made = plan(MASK, heads=HEADS, head_dim=4, group=dist.group.WORLD, strategy="ring", kernel="reference")
    q, k, v, _ = inputs(N, HEADS, HEADS)
    weight = torch.full((), 1.5, dtype=torch.double, requires_grad=True)
    out = attention(made.shard(q) * weight, made.shard(k), made.shard(v), made)
    assert isinstance(out, torch.Tensor)
    loss = out.square().sum() / (N * HEADS * 4) * scale
    loss.backward()
    alone = torch.full((), 1.5, dtype=torch.double, requires_grad=True)
    whole = attention(q * alone, k, v, plan(MASK, heads=HEADS, head_dim=4, kernel="reference"))
    assert isinstance(whole, torch.Tensor)
    want = whole.square().mean()
    want.backward()
    assert weight.grad is not None
    assert alone.grad is not None
    sums = torch.stack([loss.detach(), weight.grad])
    dist.all_reduce(sums)
    return abs(float(sums[0] - want.detach())), abs(float(sums[1] - alone.grad))


def tensor_and_context_loss(rank: int, *, over: str) -> float:
    """2 × 2 ranks: heads over tensor ranks, rows over context ranks. Relative error of the loss, summed over these ranks."""
    pairs = {"context": [[0, 1], [2, 3]], "tensor": [[0, 2], [1, 3]]}
    groups = {name: [dist.new_group(ranks) for ranks in lists] for name, lists in pairs.items()}
    context: Any = groups["context"][rank // 2]
    part = slice(2 * (rank // 2), 2 * (rank // 2) + 2)
    q, k, v, do = (x[:, :, part] for x in inputs(N, HEADS, HEADS))
    made = plan(MASK, heads=2, head_dim=4, group=context, strategy="usp", kernel="reference")
    out = attention(made.shard(q), made.shard(k), made.shard(v), made)
    assert isinstance(out, torch.Tensor)
    loss = (out * made.shard(do)).sum()
    dist.all_reduce(loss, group=context if over == "context" else dist.group.WORLD)
    q, k, v, do = inputs(N, HEADS, HEADS)
    want = (oracle(q, k, v, do, MASK)[0] * do).sum()
    return abs(float((loss - want) / want))


def mismatched_plans(rank: int) -> str:
    """What a rank hears that planned another mask than its peers, in a group of its own."""
    group: Any = dist.new_group([0, 1, 2, 3])
    heard = ""
    for mask in (Mask.causal(N) if rank == 3 else MASK, MASK):  # who came first hears of it at the second plan
        try:
            plan(mask, heads=HEADS, head_dim=4, group=group, strategy="ring")
        except AgreementError as error:
            heard = heard or str(error)
        dist.barrier()
    return heard


def run_traps(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        "loss": context_loss(world, 1.0),
        "loss with the bug": context_loss(world, 1.0 / world),
        "composed": tensor_and_context_loss(rank, over="all"),
        "composed with the bug": tensor_and_context_loss(rank, over="context"),
        "mismatch": mismatched_plans(rank),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, "agree", lambda self, inputs: None)
        results["mismatch with the bug"] = mismatched_plans(rank)
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(run_traps, 4, timeout_s=200)


def test_loss_and_gradient_scale_megatron_lm_673_906(results: list[dict[str, Any]]) -> None:
    """Megatron-LM#673, #906: the loss of context ranks is averaged once too often, or never."""
    for result in results:
        assert max(result["loss"]) < TOLERANCE
        assert min(result["loss with the bug"]) > 1e-3


def test_loss_over_tensor_and_context_ranks_torchtitan_3280_3329(results: list[dict[str, Any]]) -> None:
    """torchtitan#3280, #3329: with tensor × context parallelism a reduction is left out."""
    for result in results:
        assert result["composed"] < TOLERANCE
        assert result["composed with the bug"] > 1e-2


def test_ranks_that_disagree_are_told_megatron_lm_7452(results: list[dict[str, Any]]) -> None:
    """Megatron-LM#7452: silent errors when parallelisms compose, here: ranks of one group that plan different things."""
    for rank, result in enumerate(results):
        assert "planned different things" in result["mismatch"], rank
        assert result["mismatch with the bug"] == ""
