"""NCCL on 2 GPUs: states of linear attention on a stream of their own, every exchange, in fp64 against the token loop."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from distattn.bench.linear_problem import LinearProblem, LinearShape, ours
from distattn.linear import linear_attention
from distattn.parallel.exchanges import EXCHANGES
from distattn.parallel.layout import Layout
from distattn.short_convolution import short_convolution
from distattn.testing import run_ranks
from tests.kernels.linear_cases import make_operands
from tests.test_linear_gloo import OPTIONS, Case, streams
from tests.test_short_convolution import plain

pytestmark = pytest.mark.gpu(2)


def run_grid(rank: int, world: int) -> list[tuple[str, float]]:
    errors = []
    for kind, gate in (("linear", "none"), ("gla", "vector"), ("gated_delta", "scalar")):
        for name, stream in streams(world).items():
            case = Case(kind, gate, stream, rank, world, "cuda")
            for exchange in EXCHANGES:
                errors.append((f"{kind}, {name}, {exchange}", case.run(exchange, world, rank, OPTIONS[exchange])))
    return errors


def test_matches_the_recurrence() -> None:
    for errors in run_ranks(run_grid, 2, backend="nccl", timeout_s=240):
        assert {name: error for name, error in errors if not error < 1e-10} == {}


def run_repeated(rank: int, world: int) -> None:
    """Many calls in a row, with memory coming and going: streams that did not wait for each other would differ now and then;
    and a convolution."""
    x = make_operands("gla", "vector", 1, 512, heads=4, value_heads=4, key_dim=32, value_dim=32, dtype=torch.float32)
    q, k, v, g = (t.cuda() for t in (x.q, x.k, x.v, x.g) if t is not None)
    first = None
    for _ in range(30):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, g)]
        o, _ = linear_attention(
            *leaves[:3], kind="gla", decay=leaves[3], group=dist.group.WORLD, exchange="all_scan", kernel="torch"
        )
        o.square().sum().backward()
        found = [o.detach(), *(t.grad for t in leaves)]
        first = first or [t.clone() for t in found if t is not None]
        for now, before in zip(found, first, strict=True):
            assert now is not None
            torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-5)
    whole, weight = torch.randn(1, 20, 6, device="cuda"), torch.randn(6, 4, device="cuda")
    dist.broadcast(whole, 0)
    dist.broadcast(weight, 0)
    rows = torch.from_numpy(Layout.contiguous(20, world).rows(rank)).cuda()
    y = short_convolution(whole[:, rows], weight, group=dist.group.WORLD, cu_seqlens=[0, 7, 20])
    torch.testing.assert_close(y, plain(whole, weight, [7, 13])[:, rows], rtol=1e-4, atol=1e-4)


def test_streams_wait_for_each_other() -> None:
    run_ranks(run_repeated, 2, backend="nccl", timeout_s=200)


def run_without_synchronisation(rank: int, world: int) -> None:
    """Once plans are made, kernels tested and indices uploaded, the host waits for the device nowhere: packed, zigzag."""
    layout = Layout.zigzag(2048 * world, world)
    for kind in ("gla", "gated_delta"):
        x = LinearProblem.make(LinearShape(kind, 1, 2048, 16, 128), "cuda", seed=rank)
        for exchange in EXCHANGES:
            attend = ours(x.shape, group=dist.group.WORLD, exchange=exchange, layout=layout, cu_seqlens=[0, 700, 2048 * world])
            x.train(attend)
            torch.cuda.synchronize()
            with warnings.catch_warnings():  # that the mode is a prototype
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("error")
            try:
                x.train(attend)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_the_host_waits_for_nothing() -> None:
    run_ranks(run_without_synchronisation, 2, backend="nccl", timeout_s=200)
