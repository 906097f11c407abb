"""Launch configurations of the linear Triton kernels: a fixed table, so that a process compiles one variant of each kernel.

Those of bf16 were measured for a vector of gates on an H100; others follow them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MIN_BLOCK = 16


@dataclass(frozen=True)
class Launch:
    """Columns of K and of V a block, warps a program, and how many steps of a loop are in flight."""

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LinearConfigs:
    """One for each kernel. Kernels that need all of K at once take it padded, whatever ``block_k`` says."""

    gate_sums: Launch
    scores: Launch
    solve: Launch
    state: Launch
    state_grad: Launch
    output: Launch
    values_grad: Launch
    gradient: Launch


def padded(dim: int) -> int:
    """The power of two that a head dimension is computed as."""
    return max(MIN_BLOCK, 1 << (dim - 1).bit_length())


def linear_configs(dtype: torch.dtype, gate: str, delta: bool, key_dim: int, value_dim: int) -> LinearConfigs:
    """The table's entry for a case; blocks no wider than the padded head dimensions."""
    half = dtype == torch.bfloat16
    wide = padded(key_dim) > 128
    vector = gate == "vector"
    # A walk through the chunks has few programs, so the decay family cuts K, which the delta family cannot.
    walk = Launch(32, 64, 4, 3) if half and not delta else Launch(64, 32, 4, 3 if half else 1)
    return LinearConfigs(
        gate_sums=Launch(64, 64, 4, 1),
        scores=Launch(128, 64, 8 if wide or vector else 4, 1),
        solve=Launch(64, 64, 4, 2),
        state=walk,
        state_grad=replace(walk, num_stages=2) if half and delta else walk,
        output=Launch(64, 128, 8, 2) if half else Launch(32, 32, 4, 1),
        values_grad=Launch(64, 64, 4, 2) if half else Launch(32, 32, 4, 1),
        gradient=Launch(128, 32, 8, 3) if half and not wide else Launch(128, 16, 8, 1),
    )
