"""gloo on CPU, 1 to 4 ranks: agent attention over sharded documents against two dense softmaxes in fp64, to 1e-10."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distattn
from distattn.agent_attention import agent_attention
from distattn.errors import AgreementError, InputError
from distattn.linear_planning import transport_of
from distattn.models.agent import AgentAttention
from distattn.parallel.layout import Layout
from distattn.testing import run_ranks

AGENTS = 3
TOLERANCE = 1e-10


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """Document by document, the agents pooled by torch: [B, T, H, V]."""
    outs = []
    for parts in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True):
        if not parts[0].shape[1]:
            continue
        asking, keys, values = (x.transpose(1, 2) for x in parts)  # [B, H, L, ·]
        pooled = F.adaptive_avg_pool1d(asking.mT.flatten(0, 1), AGENTS)
        agents = pooled.unflatten(0, asking.shape[:2]).mT
        held = (scale * agents @ keys.mT).softmax(-1) @ values
        outs.append(((scale * asking @ agents.mT).softmax(-1) @ held).transpose(1, 2))
    return torch.cat(outs, 1)


def random_case(rows: int) -> list[Tensor]:
    """q, k, v, and a gradient of the output; scores far apart."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, rows, 2, n, generator=generator, dtype=torch.float64) * 2 for n in (3, 3, 4, 4)]


def streams(world: int) -> dict[str, tuple[Layout | None, list[int]]]:
    rows = 41
    shares = [0, *np.sort(np.random.default_rng(world).integers(1, rows, world - 1)).tolist(), rows]
    if world > 2:
        shares[2] = shares[1]  # rank 1 has nothing
    return {
        "one document": (None, [10 * world]),
        "packed": (Layout.contiguous(61, world), [1, 9, 34, 13, 4]),
        "uneven, an empty shard": (Layout.given([[(shares[r], shares[r + 1])] for r in range(world)]), [3, 0, 34, 4]),
        "zigzag": (Layout.zigzag(43, world), [5, 37, 1]),
        "striped": (Layout.striped(33, world, block=3), [33]),
        "fewer rows than agents": (Layout.contiguous(2, world), [0, 2]),
        "no document crosses": (Layout.contiguous(8 * world, world), [8] * world),
    }


def differentiate(run: Any, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    out.backward(do)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def run_grid(rank: int, world: int, device: str = "cpu") -> dict[str, float]:
    worst = {}
    for name, (layout, lengths) in streams(world).items():
        case = random_case(sum(lengths))
        wanted = differentiate(lambda q, k, v, n=lengths: dense(q, k, v, n, 0.7), *case)
        mine = torch.from_numpy((layout or Layout.contiguous(sum(lengths), world)).rows(rank))
        shared: dict[str, Any] = {
            "num_agents": AGENTS,
            "group": dist.group.WORLD,
            "layout": layout,
            "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]),
            "scale": 0.7,
        }
        parts = [x[:, mine].to(device) for x in case]
        found = [t.cpu() for t in differentiate(lambda q, k, v, kw=shared: agent_attention(q, k, v, **kw), *parts)]
        assert len(found) == 4
        errors = [(a - b[:, mine]).abs().max() for a, b in zip(found, wanted, strict=True) if a.numel()]
        worst[name] = float(torch.stack(errors).max()) if errors else 0.0
    return worst


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_dense(world: int) -> None:
    for worst in run_ranks(run_grid, world, timeout_s=120):
        assert len(worst) == 7
        assert {name: error for name, error in worst.items() if not error < TOLERANCE} == {}


def run_layer(rank: int, world: int) -> tuple[int, float, str]:
    """Transfers of a checkpointed layer's step; its gradients against the whole layer's; what differing ranks are told."""
    torch.manual_seed(0)
    layer = AgentAttention(6, num_heads=2, head_dim=3, num_agents=AGENTS).double()
    x = torch.randn(1, 14, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    wanted = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    group = dist.group.WORLD
    assert group is not None
    part = x[:, 7 * rank : 7 * rank + 7]
    out = checkpoint(layer, part, group=group, use_reentrant=False, context_fn=distattn.checkpoint_contexts)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    transfers = transport_of(group).num_transfers
    worst = 0.0
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        dist.all_reduce(parameter.grad)
        worst = max(worst, float((parameter.grad - gradient).abs().max()))
    said = ""
    q = torch.zeros(1, 4, 1, 2)
    try:
        agent_attention(q, q, q, num_agents=2 + rank, group=group)
    except AgreementError as error:
        said = str(error)
    return transfers, worst, said


def test_layer_checkpoint_and_agreement() -> None:
    """Three reductions of two transfers forward, two backward, and nothing is repeated."""
    for transfers, worst, said in run_ranks(run_layer, 2, timeout_s=60):
        assert transfers == 2 * (3 + 2)
        assert worst < TOLERANCE
        assert "num_agents=2" in said
        assert "num_agents=3" in said


def test_half_precision_works_in_fp32() -> None:
    q, k, v, do = (x.bfloat16() for x in random_case(50))
    wanted = differentiate(lambda q, k, v: dense(q, k, v, [50], 3**-0.5), *(x.double() for x in (q, k, v, do)))
    found = differentiate(lambda q, k, v: agent_attention(q, k, v, num_agents=AGENTS), q, k, v, do)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))


# Dynamo looks at .grad of non-leaves where the graph breaks (torch 2.11 to 2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    case = random_case(20)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return agent_attention(q * 2, k, v, num_agents=AGENTS).sin()

    wanted = differentiate(layer, *case)
    for a, b in zip(differentiate(torch.compile(layer, backend="aot_eager"), *case), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_refusals() -> None:
    q, k, v, _ = random_case(4)
    with pytest.raises(InputError, match=r"q and k must be \[B, T, H, K\].*got \[2, 4, 2, 3\], \[2, 4, 1, 3\] and"):
        agent_attention(q, k[:, :, :1], v, num_agents=2)
    with pytest.raises(InputError, match=r"v is torch\.float32 on cpu; q, k and v must be floating and share dtype and device"):
        agent_attention(q, k, v.float(), num_agents=2)
    with pytest.raises(InputError, match="num_agents must be at least 1, got 0"):
        agent_attention(q, k, v, num_agents=0)
    with pytest.raises(InputError, match="cu_seqlens ends at 5, but the layout has 4 rows"):
        agent_attention(q, k, v, num_agents=2, layout=Layout.contiguous(4, 1), cu_seqlens=[0, 5])
