"""CUDA and NCCL: the memory with momentum and agent attention in fp64 against their loops, and Titans layers in bf16."""

from __future__ import annotations

import pytest
import torch

from distattn.mask import Mask
from distattn.models import Decoder, LinearConfig, ModelConfig
from distattn.models.config import TITANS, MemoryConfig
from distattn.planning import plan
from distattn.testing import run_ranks
from tests import test_agent_attention as agents
from tests import test_momentum_memory as memory


def run_grids(rank: int, world: int) -> dict[str, float]:
    return memory.run_grid(rank, world, "cuda") | agents.run_grid(rank, world, "cuda")


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.gpu(1)), pytest.param(2, marks=pytest.mark.gpu(2))])
def test_equals_the_loops(world: int) -> None:
    for worst in run_ranks(run_grids, world, backend="nccl", timeout_s=240):
        assert len(worst) > 40
        assert {name: error for name, error in worst.items() if not error < 1e-10} == {}


@pytest.mark.gpu(1)
@pytest.mark.parametrize("kind", TITANS)
def test_layers_in_bf16(kind: str) -> None:
    """Loss and gradients of two layers against the same in fp64 on the CPU."""
    config = ModelConfig(
        vocab_size=64, dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=128, layers=kind,
        sliding_window=100, linear=LinearConfig(num_heads=2, num_value_heads=2, head_dim=64, value_head_dim=64),
        memory=MemoryConfig(chunk=32), init_std=0.05,
    )  # fmt: skip
    lengths = [300, 17, 195]
    mask = Mask.documents(lengths) & Mask.sliding_window(sum(lengths), config.sliding_window - 1)
    made = plan(mask, heads=4, kv_heads=2, head_dim=64, kernel="reference")  # nothing to compile: attention is tested elsewhere
    tokens, labels = torch.randint(0, 64, (2, 1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        model = Decoder(config, seed=3).to(dtype).to(device)
        loss, count = model.loss(tokens.to(device), positions.to(device), labels.to(device), made)
        (loss / count).backward()
        gradients = [p.grad.double().cpu() for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        results.append((float(loss.detach()), gradients))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-2)
    for exact, found in zip(results[0][1], results[1][1], strict=True):
        assert float((found - exact).norm()) < 0.1 * float(exact.norm()) + 1e-6
