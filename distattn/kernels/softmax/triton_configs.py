"""Launch configurations of the Triton kernels: a fixed table, so that a process compiles one variant of each kernel.

Measured on an H100; elsewhere plausible. Shared memory that does not suffice costs stages, not an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

MIN_BLOCK_DIM = 16


@dataclass(frozen=True)
class LaunchConfig:
    """Rows a block (queries, keys), warps a program, and how many column blocks are in flight.

    pack: query heads a program of dq under a block plan, a power of two. All other kernels take one.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    pack: int = 1


@dataclass(frozen=True)
class LaunchConfigs:
    """One for each of the three kernels."""

    forward: LaunchConfig
    dq: LaunchConfig
    dkdv: LaunchConfig


# (Hopper or newer, widest padded head dimension) → bf16 and fp16. A stage fewer is taken where shared memory does not suffice.
HALF_CONFIGS: Mapping[tuple[bool, int], LaunchConfigs] = {
    (True, 64): LaunchConfigs(LaunchConfig(128, 64, 4, 3), LaunchConfig(128, 64, 4, 3), LaunchConfig(64, 64, 4, 3)),
    (True, 128): LaunchConfigs(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(32, 64, 4, 3)),
    (True, 256): LaunchConfigs(LaunchConfig(128, 64, 8, 2), LaunchConfig(64, 64, 8, 1), LaunchConfig(64, 64, 8, 1)),
    (False, 64): LaunchConfigs(LaunchConfig(128, 64, 4, 3), LaunchConfig(64, 64, 4, 3), LaunchConfig(64, 64, 4, 3)),
    (False, 128): LaunchConfigs(LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 64, 4, 2), LaunchConfig(64, 64, 4, 2)),
    (False, 256): LaunchConfigs(LaunchConfig(64, 32, 4, 2), LaunchConfig(32, 32, 4, 1), LaunchConfig(32, 32, 4, 1)),
}
# fp32 products run outside the tensor cores, so that they keep 24 bits.
SINGLE_CONFIGS: Mapping[int, LaunchConfigs] = {
    64: LaunchConfigs(LaunchConfig(64, 32, 4, 2), LaunchConfig(32, 32, 4, 1), LaunchConfig(32, 32, 4, 1)),
    128: LaunchConfigs(LaunchConfig(16, 32, 4, 1), LaunchConfig(32, 32, 4, 1), LaunchConfig(32, 32, 4, 1)),
    256: LaunchConfigs(LaunchConfig(16, 16, 4, 1), LaunchConfig(16, 16, 4, 1), LaunchConfig(16, 16, 4, 1)),
}
INTERPRETER_CONFIG = LaunchConfig(32, 32, 1, 1, 4)
INTERPRETER_CONFIGS = LaunchConfigs(INTERPRETER_CONFIG, INTERPRETER_CONFIG, INTERPRETER_CONFIG)


def padded(dim: int) -> int:
    """The power of two that a head dimension is computed as."""
    return max(MIN_BLOCK_DIM, 1 << (dim - 1).bit_length())


def launch_configs(head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> LaunchConfigs:
    """The table's entry for a shape, on a device of a compute capability."""
    width = max(64, padded(max(head_dim, value_dim)))
    if dtype == torch.float32:
        return SINGLE_CONFIGS[width]
    return HALF_CONFIGS[capability >= (9, 0), width]


def plan_configs(configs: LaunchConfigs, block_q: int, block_k: int, heads_alike: int = 1) -> LaunchConfigs:
    """The configurations, with blocks no larger than those of a block plan, and packs of heads that follow the same lists.

    heads_alike: every so many query heads, from a table's first on, do.
    """

    def within(config: LaunchConfig, pack: int = 1) -> LaunchConfig:
        rows, keys = min(config.block_q, block_q), min(config.block_k, block_k)
        # Warps share the rows of a product, 16 a warp, and a block of 64 rows has work for four.
        warps = 4 if max(rows * pack, keys) == 64 else config.num_warps
        return replace(config, block_q=rows, block_k=keys, num_warps=min(warps, config.num_warps), pack=pack)

    # What the plan's blocks leave of the rows of dq, heads with the same keys take: its programs wait for keys from L2.
    pack = math.gcd(max(configs.dq.pack, configs.dq.block_q // block_q), heads_alike)
    forward, dq, dkdv = within(configs.forward), within(configs.dq, pack), within(configs.dkdv)
    if forward.num_warps == 8 and forward.num_stages == 3:
        # Two programs of 64 rows a processor hide each other's start: 454 TFLOP/s in place of 398 (H100, blocks of 128, 10 %).
        forward = replace(forward, block_q=64, num_warps=4)
    if dq.num_warps < configs.dq.num_warps and dq.num_stages == 3:
        # Likewise, if the memory of a third stage leaves room for them: 542 TFLOP/s in place of 391 (blocks of 64).
        dq = replace(dq, num_stages=2)
    if dkdv.num_warps < configs.dkdv.num_warps:
        # The addresses of as many query rows, spread over half the warps, would not fit the registers beside dk and dv.
        dkdv = replace(dkdv, block_q=dkdv.block_q // 2)
    elif dkdv == LaunchConfig(32, 64, 4, 3):
        # Blocks in no order come late: 435 TFLOP/s in place of 386 (blocks of 64).
        dkdv = replace(dkdv, num_stages=4)
    return LaunchConfigs(forward, dq, dkdv)
