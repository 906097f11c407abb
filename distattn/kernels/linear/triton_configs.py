"""Launch configurations of the linear Triton kernels: a fixed table, so that a process compiles one variant of each kernel.

Those of bf16 were measured on an H100 and an H200, walks that run beside one another together; others follow them. fp32
keeps to four warps, one warp group for the 64 rows of a chunk: with eight, products of fp32 operands read shared memory that
no program has, as Triton 3.6 and 3.7 compile them for Hopper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

MIN_BLOCK = 16

ALL, FAR, NEAR = 0, 1, 2
"""Which chunks a launch computes (``REACH``): all, those where nothing is left of a state that crossed a border, the others."""


@dataclass(frozen=True)
class Launch:
    """Columns of K and of V a block, warps a program, and how many steps of a loop are in flight."""

    block_k: int
    block_v: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, eq=False)
class LinearConfigs:
    """One for each kernel. Kernels that need all of K at once take it padded, whatever ``block_k`` says. few_states: of the
    state kernel in the delta family, where it has fewer programs than the device has multiprocessors. added: of the kernel
    that makes what spans add. span_chunks: chunks of a span, 0: what fills the device."""

    gate_sums: Launch
    scores: Launch
    solve: Launch
    state: Launch
    few_states: Launch
    state_grad: Launch
    output: Launch
    values_grad: Launch
    gradient: Launch
    added: Launch
    walk: Launch
    span_chunks: int = 0


def padded(dim: int) -> int:
    """The power of two that a head dimension is computed as."""
    return max(MIN_BLOCK, 1 << (dim - 1).bit_length())


@lru_cache(maxsize=64)
def linear_configs(dtype: torch.dtype, gate: str, delta: bool, key_dim: int, value_dim: int) -> LinearConfigs:
    """The table's entry for a case; blocks no wider than the padded head dimensions."""
    half, single = dtype == torch.bfloat16, dtype == torch.float32
    wide = padded(key_dim) > 128
    vector = gate == "vector"
    # A walk through the chunks has few programs, so the decay family cuts K, which the delta family cannot.
    walk = Launch(64, 64, 4, 3) if half and vector and not delta else Launch(64, 32, 4, 3 if half else 1)
    return LinearConfigs(
        gate_sums=Launch(64, 64, 4, 1),
        scores=Launch(128, 64, 8 if not single and (wide or vector) else 4, 1),
        solve=Launch(64, 64, 4, 3 if half and not vector else 2),
        state=walk,
        few_states=Launch(64, 16, 4, 4) if half and not wide else walk,
        state_grad=replace(walk, num_stages=2) if half and delta and wide else walk,
        output=Launch(64, 128, 8, 2 if vector else 3) if half else Launch(32, 32, 4, 1),
        values_grad=Launch(64, 64, 4, 2) if half else Launch(32, 32, 4, 1),
        gradient=Launch(128, 32 if vector or delta else 64, 8, 3)
        if half and not wide
        else Launch(128, 16, 4 if single else 8, 1),
        added=Launch(64, 64, 4, 3 if half else 1),
        walk=Launch(128, 64 if half else 32, 4, 2 if half else 1),
    )
