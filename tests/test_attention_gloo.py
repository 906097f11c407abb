"""gloo on CPU, 1 to 4 ranks: every scheduler, mask and awkward shape against the dense fp64 oracle, to 1e-10."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from distattn.attention import (
    attention,
    attention_begin,
    attention_compute,
    attention_finish,
    checkpoint_contexts,
)
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.schedulers.all_gather import AllGatherOptions
from distattn.parallel.schedulers.double_ring import DoubleRingOptions
from distattn.parallel.schedulers.ring import RingOptions
from distattn.parallel.schedulers.ulysses import UlyssesOptions
from distattn.parallel.schedulers.usp import UspOptions
from distattn.planning import plan
from distattn.testing import run_ranks
from tests.parallel.cases import inputs, oracle, random_layout

TOLERANCE = 1e-10
N = 37  # divides by nothing
HEADS = [(12, 3), (12, 1)]  # 12 query heads divide by 1 to 4 ranks; KV heads: four queries each, and fewer than ranks


def masks() -> dict[str, Mask]:
    """Every constructor, at a length that divides by nothing; "sparse" leaves whole rows without a key."""
    causal = Mask.causal(N)
    return {
        "full": Mask.full(N, N),
        "causal": causal,
        "sliding_window": Mask.sliding_window(N, 5, 2),
        "documents": Mask.documents([5, 1, 19, 12]),
        "documents_full": Mask.documents([9, 28], causal=False),
        "prefix_lm": Mask.prefix_lm(N, 11),
        "share_question": Mask.share_question(13, [7, 11, 6]),
        "global_window": Mask.global_window(N, 3, 4, 1),
        "block_causal": Mask.block_causal([20, 17], 6),
        "from_cu_seqlens": Mask.from_cu_seqlens([0, 8, 21, N], [0, 8, 21, N], causal=True),
        "sparse": Mask.from_bands([(3, 9, 0, 30, -4, 2), (20, 31, 18, 25, -99, 99)], N, N),
        "from_flex": Mask.from_flex(causal.to_flex(block_size=8)),
        "combined": (Mask.sliding_window(N, 9) | Mask.prefix_lm(N, 4)) - Mask.full(N, N)[:, :].cut(30, 33, 0, N),
        "nothing": Mask.from_bands(np.zeros((0, 6), np.int64), N, N),
    }


def cases(world: int) -> Iterator[tuple[str, Mask, Layout | None, tuple[int, int]]]:
    """(name, mask, layout or None, heads) of the whole grid."""
    for i, (name, mask) in enumerate(masks().items()):
        for heads in HEADS[: 1 + i % 2]:
            yield f"{name} {heads}", mask, None, heads
        yield f"{name} on a random layout", mask, random_layout_of(N, world, seed=i), HEADS[0]
    yield "one token a rank", Mask.causal(world), None, HEADS[1]
    yield "fewer tokens than ranks", Mask.causal(1), None, HEADS[0]
    empty_first = Layout.given([[]] * (world - 1) + [[(0, N)]])
    yield "empty shards", Mask.causal(N), empty_first, HEADS[0]
    yield "striped", Mask.causal(N), Layout.striped(N, world, block=3), HEADS[0]


def random_layout_of(n: int, world: int, seed: int) -> Layout:
    """A random layout of exactly n rows."""
    rng = np.random.default_rng(seed)
    while (layout := random_layout(rng, n, world)).num_rows != n:
        pass
    return layout


def other_options(world: int) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    """(strategy, options that are not the default, heads): every option of every scheduler, and heads that do not divide."""
    yield "ring", RingOptions(two_way=True), (12, 3)
    yield "ring", RingOptions(moves="q"), (12, 12)
    yield "ring", RingOptions(moves="q", two_way=True), (5, 1)
    yield "all_gather", AllGatherOptions(2), (12, 3)
    yield "ulysses", UlyssesOptions(2), (12, 3)
    yield "ulysses", UlyssesOptions(3), (6, 1)  # 4 ranks: 2 by heads × 2 along the sequence
    yield "ulysses", UlyssesOptions(), (7, 7)  # a ring
    yield "double_ring", DoubleRingOptions(1), (12, 3)
    if world == 4:
        yield "double_ring", DoubleRingOptions(2), (12, 3)
        for placement in ("head_first", "context_first"):
            yield "usp", UspOptions(2, placement, 3), (12, 3)
        yield "usp", UspOptions(2, groups_per_window=2), (6, 1)


def run_grid(rank: int, world: int) -> list[tuple[str, float]]:
    """Worst error of each case on this rank."""
    errors = []
    for name, mask, layout, heads in cases(world):
        want = oracle(*inputs(mask.num_queries, *heads, 4, 6, batch=2), mask)
        for strategy in SCHEDULERS:
            errors.append((f"{strategy} {name}", worst_error(want, mask, strategy, layout, heads)))
    chosen = masks()
    for i, (strategy, options, heads) in enumerate(other_options(world)):
        for name in ("causal", "documents", "global_window", "sparse"):
            mask = chosen[name]
            layout = None if i % 2 else random_layout_of(N, world, seed=i)
            want = oracle(*inputs(N, *heads, 4, 6, batch=2), mask)
            errors.append((f"{options} {name}", worst_error(want, mask, strategy, layout, heads, options)))
    return errors


def worst_error(
    want: tuple[torch.Tensor, ...],
    mask: Mask,
    strategy: str,
    layout: Layout | None,
    heads: tuple[int, int],
    options: Any = None,
    key_layout: Layout | None = None,
) -> float:
    """Largest difference of out, lse, dq, dk, dv from the oracle's on this rank."""
    made = plan(
        mask, heads=heads[0], kv_heads=heads[1], head_dim=4, value_dim=6, group=dist.group.WORLD, strategy=strategy,
        layout=layout, key_layout=key_layout, kernel="reference", options=options,
    )  # fmt: skip
    q, k, v, do = inputs(mask.num_queries, *heads, 4, 6, batch=2, num_keys=mask.num_keys)
    # Strides of a [B, H, S, D] tensor: shards need not be contiguous.
    ql, kl, vl = (
        made.shard(x, keys=keys).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x, keys in ((q, False), (k, True), (v, True))
    )
    out, lse = attention(ql, kl, vl, made, return_lse=True)
    out.backward(made.shard(do))
    worst = 0.0
    for x, y, rows in zip(
        (out.detach(), lse.detach(), ql.grad, kl.grad, vl.grad),
        want,
        (made.positions,) * 3 + (made.key_positions,) * 2,
        strict=True,
    ):
        assert x is not None
        y = y[:, rows]
        assert torch.equal(x.isinf(), y.isinf()), (strategy, options)
        difference = torch.where(y.isinf(), 0.0, x - y)
        assert not difference.isnan().any(), (strategy, options)
        worst = max(worst, difference.abs().max().item() if difference.numel() else 0.0)
    return worst


@pytest.mark.timeout(700)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_scheduler_and_mask(world: int) -> None:
    for rank, errors in enumerate(run_ranks(run_grid, world, timeout_s=600)):
        assert len(errors) == len(SCHEDULERS) * (5 * len(masks()) // 2 + 4) + 4 * len(list(other_options(world)))
        assert {x: e for x, e in errors if not e < TOLERANCE} == {}, f"rank {rank}"


def run_features(rank: int, world: int) -> dict[str, Any]:
    """Phases, checkpointing, gather and sinks on one set of ranks."""
    return {
        "split": split_phase(),
        "transfers": transfers_under_checkpointing(),
        "gather": gather(rank),
        "sink": sink_gradient(),
        "cross": cross_attention(world),
        "rerun": rerun_difference(),
    }


def two_layers(world_plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, split: bool) -> torch.Tensor:
    """Two micro-batches through two layers, in phases that overlap or in whole calls."""
    xs = [q, q.flip(0)]
    for _ in range(2):
        if split:
            handles = [attention_begin(x, k, v, world_plan) for x in xs]
            for handle in handles:
                attention_compute(handle)
            outs = [out for out in map(attention_finish, handles) if isinstance(out, torch.Tensor)]
        else:
            outs = [attention(x, k, v, world_plan) for x in xs]
        xs = [x + out for x, out in zip(xs, outs, strict=True)]
    return xs[0].square().sum() + xs[1].sin().sum()


def split_phase() -> float:
    """Largest difference between phases and whole calls, over outputs and gradients."""
    mask = Mask.documents([14, 9])
    worst = 0.0
    for strategy in SCHEDULERS:
        made = plan(mask, heads=6, kv_heads=2, head_dim=4, group=dist.group.WORLD, strategy=strategy)
        q, k, v, _ = (made.shard(x) for x in inputs(23, 6, 2, batch=2))
        results = []
        for split in (False, True):
            local = [x.clone().requires_grad_() for x in (q, k, v)]
            loss = two_layers(made, *local, split=split)
            loss.backward()
            results.append([loss.detach(), *(x.grad for x in local)])
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results, strict=True)))
    return worst


def transfers_under_checkpointing() -> dict[str, int]:
    """Exchanges of one forward and backward, without and with both kinds of checkpointing."""
    mask = Mask.causal(23)
    made = plan(mask, heads=6, kv_heads=2, head_dim=4, group=dist.group.WORLD, strategy="ring")
    local = [made.shard(x).requires_grad_() for x in inputs(23, 6, 2)[:3]]
    assert made.transport is not None

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(q.sin(), k, v, made)
        assert isinstance(out, torch.Tensor)
        return out.tanh()

    counts = {}
    for name, options in {"none": None, "plain": {}, "selective": {"context_fn": checkpoint_contexts}}.items():
        before = made.transport.num_transfers
        out = block(*local) if options is None else checkpoint(block, *local, use_reentrant=False, **options)
        forward = made.transport.num_transfers - before
        out.square().sum().backward()
        counts[name] = made.transport.num_transfers - before
        counts["forward"] = forward
    return counts


def gather(rank: int) -> bool:
    """``gather`` inverts ``shard`` for uneven shards, and its gradient sums over ranks."""
    layout = Layout.given([[(5, 11), (0, 2)], [(2, 5)], []])
    made = plan(Mask.causal(11), heads=2, head_dim=4, group=dist.group.WORLD, strategy="ring", layout=layout)
    x = torch.arange(33.0).view(3, 11)
    local = made.shard(x, dim=1).requires_grad_()
    whole = made.gather(local, dim=1)
    (whole * (rank + 1)).sum().backward()
    assert local.grad is not None
    return torch.equal(whole.detach(), x) and bool((local.grad == 6).all())


def sink_gradient() -> float:
    """Under every scheduler, a sink's gradient is the sum over ranks of each rank's rows."""
    mask = Mask.causal(23)
    q, k, v, do = inputs(23, 6, 2)
    bias = torch.linspace(-2, 2, 23, dtype=torch.double)
    grads = []
    for strategy in ("alone", *SCHEDULERS):
        group = None if strategy == "alone" else dist.group.WORLD
        made = plan(mask, heads=6, kv_heads=2, head_dim=4, group=group, strategy="auto" if group is None else strategy)
        sink = torch.linspace(-1, 1, 6, dtype=torch.double, requires_grad=True)
        out = attention(made.shard(q), made.shard(k), made.shard(v), made, sink=sink, key_bias=made.shard(bias, 0), softcap=2.0)
        (out * made.shard(do)).sum().backward()  # type: ignore[operator]
        assert sink.grad is not None
        if group is not None:
            dist.all_reduce(sink.grad)
        grads.append(sink.grad)
    return max((grad - grads[0]).abs().max().item() for grad in grads[1:])


def cross_attention(world: int) -> float:
    """Queries and keys of different rows and layouts, under every scheduler that takes them, and auto."""
    worst = 0.0
    keys = 29
    for mask in (Mask.full(N, keys), Mask.from_cu_seqlens([0, 20, N], [0, 6, keys], causal=True)):
        want = oracle(*inputs(N, 6, 2, 4, 6, batch=2, num_keys=keys), mask)
        for strategy in ("auto", *(x for x in SCHEDULERS if x != "disaggregated")):
            for key_layout in (None, random_layout_of(keys, world, seed=3)):
                worst = max(worst, worst_error(want, mask, strategy, None, (6, 2), key_layout=key_layout))
    return worst


def rerun_difference() -> float:
    """Sums happen in table order, so a rerun in fp32 is bitwise equal under every scheduler."""
    mask = Mask.documents([14, 1, 8])
    worst = 0.0
    for strategy in SCHEDULERS:
        made = plan(
            mask, heads=6, kv_heads=2, head_dim=4, group=dist.group.WORLD, strategy=strategy, kernel="reference",
            deterministic=True,
        )  # fmt: skip
        runs = []
        for _ in range(2):
            q, k, v = (made.shard(x).float().requires_grad_() for x in inputs(23, 6, 2)[:3])
            out = attention(q, k, v, made)
            assert isinstance(out, torch.Tensor)
            out.square().sum().backward()
            runs.append([out.detach(), q.grad, k.grad, v.grad])
        worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(*runs, strict=True) if a.numel()))
    return worst


@pytest.mark.timeout(700)
def test_phases_checkpoints_gather_and_sinks() -> None:
    for result in run_ranks(run_features, 3, timeout_s=400):
        assert result["split"] < TOLERANCE
        assert result["gather"]
        assert result["sink"] < TOLERANCE
        assert result["cross"] < TOLERANCE
        assert result["rerun"] == 0
        counts = result["transfers"]
        assert counts["forward"] > 0
        assert counts["none"] == counts["selective"]
        assert counts["plain"] == counts["none"] + counts["forward"]
