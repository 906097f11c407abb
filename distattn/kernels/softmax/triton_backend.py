"""Our Triton kernels as a backend: any tile table, forward and backward, deterministic, any head dimension up to 256.

Compiled on CUDA; on CPU only under Triton's interpreter (``TRITON_INTERPRET=1``), which is slow and there for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.errors import InputError
from distattn.kernels.protocol import Carry, Case
from distattn.kernels.softmax.triton_worklist import WorkList, key_work, query_work

MAX_HEAD_DIM = 256
MIN_BLOCK_DIM = 16
MAX_TILE_STRIDE = (1 << 31) // 256
"""Offsets inside a block of at most 256 rows are 32-bit."""


@dataclass(frozen=True)
class LaunchConfig:
    """Rows a block (queries, keys), warps a program, and how many column blocks are in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LaunchConfigs:
    """One for each of the three kernels."""

    forward: LaunchConfig
    dq: LaunchConfig
    dkdv: LaunchConfig


# (Hopper or newer, widest padded head dimension) → bf16 and fp16. A stage fewer is taken where shared memory does not suffice.
HALF_CONFIGS: Mapping[tuple[bool, int], LaunchConfigs] = {
    (True, 64): LaunchConfigs(LaunchConfig(128, 64, 4, 3), LaunchConfig(128, 64, 4, 3), LaunchConfig(64, 64, 4, 3)),
    (True, 128): LaunchConfigs(LaunchConfig(128, 64, 8, 3), LaunchConfig(128, 64, 8, 3), LaunchConfig(64, 128, 8, 3)),
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
INTERPRETER_CONFIG = LaunchConfig(32, 32, 1, 1)


def launch_configs(head_dim: int, value_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> LaunchConfigs:
    """The table's entry for a shape, on a device of a compute capability."""
    width = max(64, _padded(max(head_dim, value_dim)))
    if dtype == torch.float32:
        return SINGLE_CONFIGS[width]
    return HALF_CONFIGS[capability >= (9, 0), width]


class TritonBackend:
    """Our portable Triton kernels (bf16, fp16, fp32).

    configs: launch configurations to use in place of the table's, for measurements.
    """

    name = "triton"
    needs_out = False

    def __init__(self, configs: LaunchConfigs | None = None) -> None:
        self._configs = configs

    def why_not(self, case: Case) -> str | None:
        if not _is_installed():
            return "needs the package triton"
        if case.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"computes bf16, fp16 and fp32, not {case.dtype}"
        if max(case.head_dim, case.value_dim) > MAX_HEAD_DIM:
            return f"takes head dimensions up to {MAX_HEAD_DIM}, not {max(case.head_dim, case.value_dim)}"
        if case.device_type == "cpu":
            if not _is_interpreted():
                return "runs on cpu only in Triton's interpreter (TRITON_INTERPRET=1)"
            return "computes no bf16 in Triton's interpreter" if case.dtype == torch.bfloat16 else None
        if case.device_type != "cuda":
            return f"runs on cuda, not on {case.device_type}"
        if not torch.cuda.is_available():
            return "finds no CUDA device"
        if torch.cuda.get_device_capability() < (8, 0):
            return "needs a GPU of compute capability 8.0 or newer"
        if case.head_dim % 8 or case.value_dim % 8:
            return f"takes head dimensions that are multiples of 8 on cuda, not {case.head_dim} and {case.value_dim}"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, *, group: int, scale: float,
        softcap: float | None,
    ) -> None:  # fmt: skip
        _check(q=q, k=k, v=v, acc=carry.acc)
        config = self._config(q, v).forward
        work = query_work(tiles, config.block_q, config.block_k, q.device)
        if work is None:
            return
        kind, score_scale, cap_scale = _score_numbers(scale, softcap)
        _launch(
            _kernels("forward").forward_kernel, _query_grid(work, group, q), config, q, v, kind,
            q, k, v, *carry, work.blocks, work.ranges, work.num_blocks, group, score_scale, cap_scale,
            *_strides(q, k, v, *carry),
        )  # fmt: skip

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, delta: Tensor,
        tiles: np.ndarray, dq: Tensor, dk: Tensor, dv: Tensor, *, group: int, scale: float, softcap: float | None,
    ) -> None:  # fmt: skip
        # Unlike q, k and v, nobody chooses the strides of a gradient: that of a sum has stride 0.
        do = do.to(q.dtype) if do.stride(-1) == 1 else do.to(q.dtype).contiguous()
        _check(q=q, k=k, v=v, do=do, dq=dq, dk=dk, dv=dv)
        configs = self._config(q, v)
        by_query = query_work(tiles, configs.dq.block_q, configs.dq.block_k, q.device)
        by_key = key_work(tiles, configs.dkdv.block_k, configs.dkdv.block_q, group, q.device)
        if by_query is None or by_key is None:
            return
        # Rows next to each other: the dk/dv kernel reads a row of LSE and delta for every block of scores.
        lse, delta = (x.transpose(1, 2).contiguous() for x in (lse, delta))
        kind, *scales = _score_numbers(scale, softcap)
        scales.append(float(scale))
        kernels, inputs = _kernels("backward"), (q, k, v, do, lse, delta)
        strides = [*_strides(q, k, v, do), *lse.stride()[:2], *delta.stride()[:2]]
        _launch(
            kernels.dq_kernel, _query_grid(by_query, group, q), configs.dq, q, v, kind,
            *inputs, dq, by_query.blocks, by_query.ranges, by_query.num_blocks, group, *scales,
            *strides, *_strides(dq),
        )  # fmt: skip
        _launch(
            kernels.dkdv_kernel, (by_key.num_blocks * by_key.num_heads, q.shape[0]), configs.dkdv, q, v, kind,
            *inputs, dk, dv, by_key.blocks, by_key.ranges, by_key.num_blocks, group, *scales,
            *strides, *_strides(dk, dv),
        )  # fmt: skip

    def _config(self, q: Tensor, v: Tensor) -> LaunchConfigs:
        if self._configs is not None:
            return self._configs
        if q.device.type == "cpu":
            return LaunchConfigs(INTERPRETER_CONFIG, INTERPRETER_CONFIG, INTERPRETER_CONFIG)
        return launch_configs(q.shape[-1], v.shape[-1], q.dtype, torch.cuda.get_device_capability(q.device))


@lru_cache(maxsize=1)
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    """As Triton itself decides when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def _kernels(direction: str) -> ModuleType:
    """The module of kernels, imported when first needed: this package must import where Triton is not installed."""
    return importlib.import_module(f"distattn.kernels.softmax.triton_{direction}")


def _padded(dim: int) -> int:
    return max(MIN_BLOCK_DIM, 1 << (dim - 1).bit_length())


def _check(**tensors: Tensor) -> None:
    """Raise InputError for a tensor [B, N, H, D] that the kernels cannot address or multiply."""
    dtype = tensors["q"].dtype
    for name, x in tensors.items():
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            raise InputError(
                f"{name} has stride {x.stride(-1)} in its last dimension; the triton kernel needs stride 1: "
                f"pass {name}.contiguous()."
            )
        if x.stride(1) >= MAX_TILE_STRIDE:
            raise InputError(
                f"{name} has stride {x.stride(1)} between rows; the triton kernel takes less than {MAX_TILE_STRIDE}: "
                f"pass {name}.contiguous()."
            )
        wanted = dtype if name in ("q", "k", "v", "do") else torch.float32
        if x.dtype != wanted:
            raise InputError(f"{name} is {x.dtype}; with q of {dtype} the triton kernel needs {wanted}.")


def _score_numbers(scale: float, softcap: float | None) -> tuple[int, float, float]:
    """(SCORES, score_scale ≥ 0, cap_scale) of the kernels; a maximum of scores is scaled after it is taken."""
    kernels = _kernels("forward")
    log2e = math.log2(math.e)
    if softcap is not None:
        return kernels.SCORES_CAPPED.value, softcap * log2e, scale / softcap
    kind = kernels.SCORES_NEGATED if scale < 0 else kernels.SCORES_PLAIN
    return kind.value, float(abs(scale)) * log2e, 0.0


def _strides(*tensors: Tensor) -> list[int]:
    """Batch, row and head strides of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _query_grid(work: WorkList, group: int, q: Tensor) -> tuple[int, int]:
    return work.num_blocks * group * -(-work.num_heads // group), q.shape[0]


_stages_that_fit: dict[tuple[object, ...], int] = {}


def _launch(
    kernel: Any, grid: tuple[int, int], config: LaunchConfig, q: Tensor, v: Tensor, kind: int, *arguments: object
) -> None:
    """Launch with the configuration, or with fewer stages where the device's shared memory does not hold as many.

    Only the compiler knows how much a kernel needs; what fits is remembered.
    """
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    constants = {
        "D": head_dim, "DV": value_dim, "BLOCK_D": _padded(head_dim), "BLOCK_DV": _padded(value_dim),
        "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "SCORES": kind,
    }  # fmt: skip

    def launch(num_stages: int) -> None:
        with torch.cuda.device_of(q):
            kernel[grid](*arguments, **constants, num_warps=config.num_warps, num_stages=num_stages)

    key = (kernel, config, head_dim, value_dim, q.dtype, kind, q.device)
    _with_fewer_stages(launch, key, config)


def _with_fewer_stages(launch: Callable[[int], None], key: tuple[object, ...], config: LaunchConfig) -> None:
    from triton.runtime.errors import OutOfResources

    for num_stages in range(_stages_that_fit.get(key, config.num_stages), 0, -1):
        try:
            launch(num_stages)
        except OutOfResources:
            if num_stages == 1:
                raise
        else:
            _stages_that_fit[key] = num_stages
            return
