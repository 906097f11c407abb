"""NCCL on 2 GPUs: every scheduler against the dense fp64 oracle, bf16 against plain torch, and a rank that oversleeps."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from distattn.attention import attention, attention_begin, attention_compute, attention_finish
from distattn.errors import TransportError
from distattn.mask import Mask
from distattn.parallel.schedulers import SCHEDULERS
from distattn.planning import Plan, plan
from distattn.testing import run_ranks
from tests.parallel.cases import inputs, oracle

pytestmark = pytest.mark.gpu(2)

WORLD = 2
HEADS, KV_HEADS = 8, 2


def run_exact(rank: int, world: int) -> list[tuple[str, float]]:
    """fp64 through the reference kernel: what NCCL carries must be exactly what gloo carries."""
    errors = []
    for name, mask in {"causal": Mask.causal(37), "documents": Mask.documents([5, 1, 19, 12])}.items():
        tensors = inputs(37, HEADS, KV_HEADS, 8, 8, batch=2)
        want = oracle(*tensors, mask)
        q, k, v, do = (x.cuda() for x in tensors)
        for strategy in SCHEDULERS:
            made = plan(
                mask, heads=HEADS, kv_heads=KV_HEADS, head_dim=8, group=dist.group.WORLD, strategy=strategy,
                kernel="reference",
            )  # fmt: skip
            assert made.transport is not None
            # In parts messages travel where the communicator exists from the start; here both ranks take part in every one.
            for split, parts in ((False, False), (True, False), (False, True), (True, True)):
                made.transport.takes_parts = parts
                worst = error_of(made, (q, k, v, do), want, split=split)
                errors.append((f"{strategy} {name} split={split} parts={parts}", worst))
    return errors


def error_of(made: Plan, tensors: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], *, split: bool) -> float:
    """Largest absolute error of this rank's rows of out, lse, dq, dk, dv."""
    ql, kl, vl = (made.shard(x).requires_grad_() for x in tensors[:3])
    if split:
        handle = attention_begin(ql, kl, vl, made, return_lse=True)
        attention_compute(handle)
        out, lse = attention_finish(handle)
    else:
        out, lse = attention(ql, kl, vl, made, return_lse=True)
    out.backward(made.shard(tensors[3]))
    got = [x.cpu() for x in (out.detach(), lse.detach(), ql.grad, kl.grad, vl.grad) if x is not None]
    return max((x - y[:, made.positions]).abs().max().item() for x, y in zip(got, want, strict=True))


def test_fp64_is_exact() -> None:
    for errors in run_ranks(run_exact, WORLD, backend="nccl", timeout_s=240):
        assert {name: error for name, error in errors if not error < 1e-10} == {}


def run_symmetric(rank: int, world: int) -> tuple[list[tuple[str, float]], str]:
    """The same through symmetric memory: lengths that grow, so that slots do, and calls in a row, so that slots are reused."""
    errors = []
    made: Plan | None = None
    for n in (37, 301):
        for name, mask in {"causal": Mask.causal(n), "documents": Mask.documents([5, 1, 19, n - 25])}.items():
            tensors = inputs(n, HEADS, KV_HEADS, 8, 8, batch=2)
            want = oracle(*tensors, mask)
            on_gpu = tuple(x.cuda() for x in tensors)
            for strategy in SCHEDULERS:
                made = plan(
                    mask, heads=HEADS, kv_heads=KV_HEADS, head_dim=8, group=dist.group.WORLD, strategy=strategy,
                    kernel="reference", transport="symmetric",
                )  # fmt: skip
                for split in (False, True, False):
                    errors.append((f"{strategy} {name} {n} split={split}", error_of(made, on_gpu, want, split=split)))
    assert made is not None
    return errors, made.describe()


def test_symmetric_memory_is_exact() -> None:
    for errors, text in run_ranks(run_symmetric, WORLD, backend="nccl", timeout_s=240):
        assert {name: error for name, error in errors if not error < 1e-10} == {}
        assert "symmetric (given)" in text


N_BF16 = 2048
MASKS_BF16 = {
    "causal": Mask.causal(N_BF16),
    "documents": Mask.documents([700, 100, 1248]),
    "window": Mask.sliding_window(N_BF16, 300),
    "prefix": Mask.prefix_lm(N_BF16, 500),
    "question": Mask.share_question(512, [500, 36, 1000]),
}


def run_bf16(rank: int, world: int) -> dict[str, list[tuple[float, float]]]:
    """For each mask and strategy: (our error, plain torch's error at the same dtype) of out, dq, dk, dv."""
    width = 128
    results = {}
    for name, mask in MASKS_BF16.items():
        tensors = [x.cuda().bfloat16() for x in inputs(N_BF16, HEADS, KV_HEADS, width, width)]
        exact = plan(mask, heads=HEADS, kv_heads=KV_HEADS, head_dim=width, kernel="reference")
        want = gradients(lambda q, k, v, exact=exact: attention(q, k, v, exact), *(x.double() for x in tensors))
        peer = gradients(partial(plain, torch.from_numpy(mask.dense()).cuda()), *tensors)
        for strategy in SCHEDULERS:
            made = plan(mask, heads=HEADS, kv_heads=KV_HEADS, head_dim=width, group=dist.group.WORLD, strategy=strategy)
            got = gradients(lambda q, k, v, made=made: attention(q, k, v, made), *(made.shard(x) for x in tensors))
            results[f"{name} {strategy}"] = [
                (
                    (g.double() - made.shard(w)).abs().max().item(),
                    (p.double() - w).abs().max().item(),
                )
                for g, w, p in zip(got, want, peer, strict=True)
            ]
    return results


def gradients(fn: Any, *xs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in xs[:3]]
    out = fn(*leaves)
    out.backward(xs[3])
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def plain(allowed: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention with a dense mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True).transpose(1, 2)


def test_bf16_is_as_good_as_plain_torch() -> None:
    for results in run_ranks(run_bf16, WORLD, backend="nccl", timeout_s=240):
        assert len(results) == len(MASKS_BF16) * len(SCHEDULERS)
        for case, errors in results.items():
            for name, (ours, theirs) in zip(("out", "dq", "dk", "dv"), errors, strict=True):
                assert ours <= 2 * theirs, f"{case} {name}: {ours} against {theirs}"


def run_oversleep(rank: int, world: int, transport: str) -> tuple[str, float]:
    """Rank 0 stays out of a transfer: rank 1's host must not block for ever."""
    mask = Mask.causal(256)
    shape: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": 64, "strategy": "ring", "transport": transport}
    made = plan(mask, group=dist.group.WORLD, **shape)
    q, k, v = (x.cuda().bfloat16() for x in inputs(256, HEADS, KV_HEADS, 64, 64)[:3])
    attention(made.shard(q), made.shard(k), made.shard(v), made)
    late = plan(mask, group=dist.group.WORLD, timeout_s=3.0, **shape)
    attention(late.shard(q), late.shard(k), late.shard(v), late)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 0:
        time.sleep(15)
        return "", 0.0
    started = time.monotonic()
    with pytest.raises(TransportError) as caught:
        call_until(started + 30, late, late.shard(q), late.shard(k), late.shard(v))
    return str(caught.value), time.monotonic() - started


def call_until(deadline: float, made: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Calls return early on CUDA; the error comes up at the first one after the group was aborted."""
    while time.monotonic() < deadline:
        attention(q, k, v, made)
        torch.cuda.synchronize()


@pytest.mark.parametrize("transport", ["collective", "symmetric"])
def test_a_rank_that_oversleeps_is_named(transport: str) -> None:
    message, seconds = run_ranks(run_oversleep, WORLD, transport, backend="nccl", timeout_s=120)[1]
    assert "of the ring forward for KV rows from rank 0" in message
    assert "ranks not seen waiting: 0" in message
    assert seconds < 15
