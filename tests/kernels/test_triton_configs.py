"""Launch configurations: blocks under a plan are no larger than the plan's, and divide them; heads fill what they leave."""

from __future__ import annotations

import itertools

import pytest
import torch

from distattn.kernels.softmax.triton_configs import launch_configs, padded, plan_configs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128, 192, 256])
def test_blocks_divide_those_of_a_plan(head_dim: int, capability: tuple[int, int], dtype: torch.dtype) -> None:
    configs = launch_configs(head_dim, head_dim, dtype, capability)
    for block_q, block_k in itertools.product((64, 128), repeat=2):
        for config in vars(plan_configs(configs, block_q, block_k)).values():
            assert block_q % config.block_q == 0
            assert block_k % config.block_k == 0
            assert config.block_q >= 16
            assert config.block_k >= 16


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_heads_fill_the_rows_that_a_plan_leaves(head_dim: int, capability: tuple[int, int]) -> None:
    configs = launch_configs(head_dim, head_dim, torch.bfloat16, capability)
    for block_q, heads_alike in itertools.product((64, 128), (1, 2, 3, 8)):
        found = plan_configs(configs, block_q, 64, heads_alike)
        assert found.forward.pack == found.dkdv.pack == 1
        assert heads_alike % found.dq.pack == 0
        assert found.dq.block_q * found.dq.pack <= configs.dq.block_q
        if heads_alike % 2 == 0:
            assert found.dq.block_q * found.dq.pack == configs.dq.block_q
        if found.dq.pack > 1:
            assert (found.dq.num_warps, found.dq.num_stages) == (configs.dq.num_warps, configs.dq.num_stages)


def test_head_dims_are_padded_to_powers_of_two() -> None:
    assert [padded(x) for x in (1, 16, 17, 96, 128, 192)] == [16, 16, 32, 128, 128, 256]
