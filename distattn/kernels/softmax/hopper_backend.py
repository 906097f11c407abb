"""Our kernels for Hopper as a backend: the tiles, carries and results of ``triton``, at the speed of wgmma and TMA.

Written in Triton's Gluon (``hopper_forward.py``, ``hopper_dq.py``, ``hopper_dkdv.py``), for compute capability 9.0 only.
Descriptors of the copy engine need addresses and strides of whole 16 bytes: what does not have them is copied first.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.protocol import Carry, Case, Extras, why_no_extras
from distattn.kernels.softmax.hopper_plan import pack_of, plan_work, takes_plan
from distattn.kernels.softmax.triton_backend import (
    Call,
    TritonBackend,
    check_tensors,
    row_strides,
)
from distattn.kernels.softmax.triton_configs import LaunchConfig
from distattn.kernels.softmax.triton_worklist import WorkList, key_work, query_work

HEAD_DIMS = (64, 128)
BLOCK_Q = 128
BLOCK_K = 128
FORWARD_STAGES = 3
DQ_BLOCK_K = 64
DQ_STAGES = 4
DKDV_BLOCK_Q = 64
DKDV_STAGES = 4
HALF = 64
"""Rows of a consumer: half a block of queries, or of the keys of dk and dv."""
UNIT_BYTES = 16
MAX_BUSIEST = 1.02
"""Persistent programs begin a block while the last one ends, but share blocks out beforehand: that may cost this much."""


class HopperBackend(TritonBackend):
    """Our Gluon kernels (bf16, fp16; head dimensions 64 and 128)."""

    name = "hopper"

    def why_not(self, case: Case) -> str | None:
        if case.device_type != "cuda":
            return f"runs on cuda, not on {case.device_type}"
        reason = super().why_not(case)
        if reason is not None:
            return reason
        if not _has_gluon():
            return "needs Triton 3.6 or newer"
        if torch.cuda.get_device_capability() != (9, 0):
            return "needs a GPU of compute capability 9.0"
        if case.dtype not in (torch.bfloat16, torch.float16):
            return f"computes bf16 and fp16, not {case.dtype}"
        if case.head_dim != case.value_dim or case.head_dim not in HEAD_DIMS:
            return f"takes head dimensions 64 and 128, keys and values alike, not {case.head_dim} and {case.value_dim}"
        return "takes no soft-cap" if case.softcap else why_no_extras(case, taken=("block_plan",))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, *, group: int, scale: float,
        softcap: float | None, extras: Extras | None = None,
    ) -> None:  # fmt: skip
        check_tensors(q=q, k=k, v=v, acc=carry.acc)
        if _is_portable(tiles, extras, group, q.shape[0]):
            super().attend(q, k, v, tiles, carry, group=group, scale=scale, softcap=softcap, extras=extras)
            return
        pack = _pack(extras)
        work = _query_work(tiles, extras, BLOCK_K // pack, q.device)
        if work is not None:
            _forward(q, k, v, *carry, work, group, scale, pack, whole=False)

    def attend_whole(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        check_tensors(q=q, k=k, v=v)
        if _is_portable(tiles, extras, group, q.shape[0]):
            return super().attend_whole(q, k, v, tiles, group=group, scale=scale, softcap=softcap, extras=extras)
        pack = _pack(extras)
        work = _query_work(tiles, extras, BLOCK_K // pack, q.device)
        batch, rows, heads, _ = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device).transpose(1, 2)
        if work is None or work.num_rows < rows * heads:
            out.zero_()
            lse.fill_(float("-inf"))
        if work is not None:
            _forward(q, k, v, out, lse, lse, work, group, scale, pack, whole=True)
        return out, lse

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, group: int, scale: float, softcap: float | None,
        extras: Extras | None, *, whole: bool,
    ) -> Call:  # fmt: skip
        call = super().call(q, k, v, tiles, group, scale, softcap, extras, whole=whole)
        return call if _is_portable(tiles, extras, group, q.shape[0]) else _Call(**vars(call))


class _Call(Call):
    """One call, with the Hopper kernels for its gradients."""

    def query_work(self, config: LaunchConfig) -> WorkList | None:
        return _query_work(self.tiles, self.extras, DQ_BLOCK_K, self.q.device)

    def key_work(self) -> WorkList | None:
        if self.extras.blocks is None:
            return key_work(self.tiles, BLOCK_K, DKDV_BLOCK_Q, self.group, self.q.device)
        if _pack(self.extras) > 1:
            return super().key_work()
        return plan_work(self.tiles, self.extras.blocks, DKDV_BLOCK_Q, self.group, self.q.device)

    def add_dq(self, work: WorkList, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
        kernel, pack = _kernel("dq"), _pack(self.extras)
        grid = (work.num_blocks * (self.group // pack) * -(-work.num_heads // self.group), self.q.shape[0])
        constants = {"BLOCK_K": DQ_BLOCK_K, "STAGES": DQ_STAGES, "PACK": pack}
        _launch_backward(self, kernel, grid, work, DQ_BLOCK_K, do, lse, delta, (dq,), constants)

    def add_dkdv(self, work: WorkList, do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
        if _pack(self.extras) > 1:
            super().add_dkdv(work, do, lse, delta, dk, dv)
            return
        kernel = _kernel("dkdv")
        grid = (work.num_blocks * work.num_heads, self.q.shape[0])
        _launch_backward(self, kernel, grid, work, HALF, do, lse, delta, (dk, dv), {"STAGES": DKDV_STAGES})


def _launch_backward(
    call: Call, kernel: Any, grid: tuple[int, int], work: WorkList, key_rows: int, do: Tensor, lse: Tensor, delta: Tensor,
    sums: tuple[Tensor, ...], constants: dict[str, int],
) -> None:  # fmt: skip
    """lse, delta [B, H, N], contiguous. key_rows: of k and v that are copied at once. sums: dq, or dk and dv."""
    q = call.q
    with torch.cuda.device_of(q):
        kernel[grid](
            _descriptor(q, HALF), _descriptor(call.k, key_rows), _descriptor(call.v, key_rows), _descriptor(do, HALF),
            lse, delta, *sums, work.blocks, work.ranges, work.num_blocks, work.num_long, *lse.stride()[:2], call.group,
            call.scale * math.log2(math.e), call.scale, *row_strides(*sums),
            D=q.shape[-1], WHOLE=call.whole, num_warps=4, **constants,
        )  # fmt: skip


def _kernel(name: str) -> Any:
    """Imported when first needed: this package must import where there is no Gluon."""
    return getattr(importlib.import_module(f"distattn.kernels.softmax.hopper_{name}"), f"{name}_kernel")


def _is_portable(tiles: np.ndarray, extras: Extras | None, group: int, batch: int) -> bool:
    """Whether a call is under a block plan that the portable kernels compute. Raises InputError for one that does not fit."""
    if extras is None or extras.blocks is None:
        return False
    extras.blocks.check(tiles, batch)
    return not takes_plan(extras.blocks, tiles, group)


def _pack(extras: Extras | None) -> int:
    """Query heads a program; of several it takes as many fewer rows each, and fewer keys a step."""
    return 1 if extras is None or extras.blocks is None else pack_of(extras.blocks)


def _query_work(tiles: np.ndarray, extras: Extras | None, block_k: int, device: torch.device) -> WorkList | None:
    if extras is None or extras.blocks is None:
        return query_work(tiles, BLOCK_Q, block_k, device)
    return plan_work(tiles, extras.blocks, block_k, 0, device)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, acc: Tensor, m: Tensor, l: Tensor, work: WorkList, group: int, scale: float, pack: int,
    *, whole: bool,
) -> None:  # fmt: skip
    """Launch a program for each block and head, or, where that is as balanced, as many as the device runs at once."""
    if scale < 0:
        # A maximum of scores is scaled after it is taken.
        q, scale = -q, -scale
    num_chunks, block_k = -(-work.num_heads // group), BLOCK_K // pack
    num_items = work.num_blocks * num_chunks * (group // pack) * q.shape[0]
    kernel = _kernel("forward")
    num_programs = min(num_items, _num_multiprocessors(q.device))
    if _busiest(work, num_chunks * q.shape[0], group // pack, num_programs) > MAX_BUSIEST:
        num_programs = num_items
    with torch.cuda.device_of(q):
        kernel[num_programs,](
            _descriptor(q, BLOCK_Q // 2), _descriptor(k, block_k), _descriptor(v, block_k), acc, m, l,
            work.blocks, work.ranges, num_items, work.num_blocks, work.num_long, num_chunks, group,
            scale * math.log2(math.e), *row_strides(acc, m, l),
            D=q.shape[-1], BLOCK_K=block_k, STAGES=FORWARD_STAGES * pack, WHOLE=whole, PACK=pack, num_warps=4,
        )  # fmt: skip


def _busiest(work: WorkList, num_groups: int, group: int, num_programs: int) -> float:
    """What the busiest of persistent programs does, over what they do on average; remembered with the work list."""
    key = (num_groups, group, num_programs)
    if key not in work.busiest:
        long, rest = np.split(work.costs, [work.num_long])
        costs = np.concatenate((long.repeat(num_groups), np.tile(rest, num_groups))).repeat(group)
        waves = np.pad(costs, (0, -len(costs) % num_programs)).reshape(-1, num_programs)
        waves[1::2] = waves[1::2, ::-1]
        loads = waves.sum(0)
        work.busiest[key] = float(loads.max() / loads.mean())
    return work.busiest[key]


def _descriptor(x: Tensor, num_rows: int) -> Any:
    """Of [B, H, N, D], in blocks of ``num_rows`` rows, for a tensor [B, N, H, D]."""
    hopper = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    language = importlib.import_module("triton.experimental.gluon.language")
    unit = UNIT_BYTES // x.element_size()
    if x.data_ptr() % UNIT_BYTES or any(s <= 0 or s % unit for n, s in zip(x.shape[:3], x.stride()) if n > 1):
        x = x.contiguous()
    x = x.transpose(1, 2)
    # The stride of a dimension of one is never used, but must look valid.
    strides = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:3], x.stride())]
    block = [1, 1, num_rows, x.shape[-1]]
    layout = language.NVMMASharedLayout.get_default_for(block, language.bfloat16)
    return hopper.TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


@lru_cache(maxsize=1)
def _has_gluon() -> bool:
    """Whether the parts of Gluon that the kernels are written in are there; they came with Triton 3.6."""
    triton = importlib.import_module("triton")
    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    return version >= (3, 6)


@lru_cache(maxsize=8)
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
