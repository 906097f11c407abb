"""One rank, no torch.distributed: what ``plan`` accepts, refuses, caches and says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distattn.errors import ConfigError, DistattnError, InputError, PlanError, UnsupportedError
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.ring import RingOptions
from distattn.parallel.schedulers.ulysses import UlyssesOptions
from distattn.planning import plan

SHAPE: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": "causal"}, PlanError, "mask must be a distattn.Mask, got str"),
        ({"kv_heads": 3}, PlanError, "heads=4 and kv_heads=3"),
        ({"head_dim": 0}, PlanError, "head_dim must be at least 1, got 0"),
        ({"value_dim": -1}, PlanError, "value_dim must be at least 1"),
        ({"strategy": "rings"}, PlanError, "unknown strategy 'rings'; choose one of auto, ring"),
        ({"kernel": "fast"}, UnsupportedError, "kernel='fast' is unknown; it may be auto, reference"),
        ({"dtype": torch.int8}, UnsupportedError, "dtype=torch.int8 is not supported"),
        ({"sparse": object()}, PlanError, "sparse must be a .*BlockPlan or None, got object"),
        ({"layout": Layout.contiguous(10, 2)}, PlanError, "layout is for 2 ranks, the group has 1"),
        ({"layout": Layout.contiguous(9, 1), "strategy": "ring"}, PlanError, "layout holds 9 rows"),
        ({"mask": Mask.full(10, 12), "key_layout": Layout.contiguous(10, 1)}, PlanError, "key_layout holds 10 rows, .* has 12"),
        ({"mask": Mask.full(10, 12), "strategy": "disaggregated"}, PlanError, "queries and keys of the same rows"),
        ({"reduce_dtype": torch.float16}, UnsupportedError, "reduce_dtype=torch.float16 is not supported"),
        ({"options": RingOptions()}, PlanError, "options belong to one strategy"),
        ({"strategy": "ring", "options": UlyssesOptions()}, PlanError, "must be RingOptions, got UlyssesOptions"),
        ({"timeout_s": 0}, PlanError, "timeout_s must be positive, got 0"),
        ({"topology": "abacus"}, ConfigError, "unknown hardware 'abacus'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[DistattnError], message: str) -> None:
    arguments: dict[str, Any] = {"mask": Mask.causal(10)} | SHAPE | change
    mask = arguments.pop("mask")
    with pytest.raises(error, match=message):
        plan(mask, **arguments)


def test_plans_are_cached_by_value() -> None:
    first = plan(Mask.causal(10), **SHAPE)
    assert plan(Mask.from_bands([(0, 10, 0, 10, -(1 << 40), 0)], 10, 10), **SHAPE) is first
    wider: dict[str, Any] = SHAPE | {"head_dim": 16}
    assert plan(Mask.causal(10), **wider) is not first
    assert plan(Mask.causal(11), **SHAPE) is not first


def test_shard_and_gather_on_one_rank() -> None:
    made = plan(Mask.causal(10), layout=Layout.given([[(6, 10), (0, 6)]]), strategy="ring", **SHAPE)
    x = torch.randn(3, 2, 10)
    local = made.shard(x, dim=-1)
    assert torch.equal(local, x[..., made.positions])
    assert torch.equal(made.gather(local, dim=-1), x)
    with pytest.raises(InputError, match="x has 3 rows in dim 0, the plan has 10"):
        made.shard(x, dim=0)
    with pytest.raises(InputError, match="x_local has 3 in dim 0, rank 0 has 10"):
        made.gather(x, dim=0)
    with pytest.raises(InputError, match="dim=3 is out of range"):
        made.shard(x, dim=3)


def test_describe_says_what_and_why() -> None:
    text = plan(Mask.documents([6, 4]), **SHAPE).describe()
    for word in ("10 × 10, 31 pairs", "contiguous over 1 ranks", "one rank", "kernel ", "imbalance 1.000"):
        assert word in text
