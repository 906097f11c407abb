"""Our Triton kernels as a backend: any tile table, forward and backward, deterministic, any head dimension up to 256.

Compiled on CUDA; on CPU only under Triton's interpreter (``TRITON_INTERPRET=1``), which is slow and there for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.errors import InputError
from distattn.kernels.block_plan import BlockLists, BlockOperand, BlockPlan
from distattn.kernels.protocol import T_H0, T_H1, T_SHIFT, Carry, Case, Extras
from distattn.kernels.softmax.triton_configs import (
    INTERPRETER_CONFIGS,
    LaunchConfig,
    LaunchConfigs,
    launch_configs,
    padded,
    plan_configs,
)
from distattn.kernels.softmax.triton_worklist import WorkList, key_work, plan_key_work, plan_query_work, query_work
from distattn.kernels.triton_here import why_no_triton

MAX_HEAD_DIM = 256
MAX_TILE_STRIDE = (1 << 31) // 256
"""Offsets inside a block of at most 256 rows are 32-bit."""
DELTA_ROWS = 64


class TritonBackend:
    """Our portable Triton kernels (bf16, fp16, fp32).

    configs: launch configurations to use in place of the table's, for measurements.
    """

    name = "triton"
    needs_out = False

    def __init__(self, configs: LaunchConfigs | None = None) -> None:
        self._configs = configs

    def why_not(self, case: Case) -> str | None:
        if reason := why_no_triton(case.device_type, case.dtype):
            return reason
        if max(case.head_dim, case.value_dim) > MAX_HEAD_DIM:
            return f"takes head dimensions up to {MAX_HEAD_DIM}, not {max(case.head_dim, case.value_dim)}"
        if case.device_type == "cuda" and (case.head_dim % 8 or case.value_dim % 8):
            return f"takes head dimensions that are multiples of 8 on cuda, not {case.head_dim} and {case.value_dim}"
        return None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, *, group: int, scale: float,
        softcap: float | None, extras: Extras | None = None,
    ) -> None:  # fmt: skip
        check_tensors(q=q, k=k, v=v, acc=carry.acc)
        call = self.call(q, k, v, tiles, group, scale, softcap, extras, whole=False)
        work = call.query_work(call.configs.forward)
        if work is not None:
            call.forward(work, carry.acc, carry.m, carry.l)

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, delta: Tensor,
        tiles: np.ndarray, dq: Tensor, dk: Tensor, dv: Tensor, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> None:  # fmt: skip
        do = with_unit_stride(do.to(q.dtype))
        check_tensors(q=q, k=k, v=v, do=do, dq=dq, dk=dk, dv=dv)
        call = self.call(q, k, v, tiles, group, scale, softcap, extras, whole=False)
        by_query, by_key = call.query_work(call.configs.dq), call.key_work()
        if by_query is not None and by_key is not None:
            # Rows next to each other: the dk/dv kernel reads a row of LSE and delta for every block of scores.
            lse, delta = powers(lse), delta.transpose(1, 2).contiguous()
            call.add_dq(by_query, do, lse, delta, dq)
            call.add_dkdv(by_key, do, lse, delta, dk, dv)

    def attend_whole(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        check_tensors(q=q, k=k, v=v)
        call = self.call(q, k, v, tiles, group, scale, softcap, extras, whole=True)
        work = call.query_work(call.configs.forward)
        batch, rows, heads, _ = q.shape
        out = q.new_empty((batch, rows, heads, v.shape[-1]))
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device).transpose(1, 2)
        if work is None or work.num_rows < rows * heads:
            out.zero_()
            lse.fill_(float("-inf"))
        if work is not None:
            call.forward(work, out, lse, lse)
        return out, lse

    def attend_backward_whole(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
        tiles: np.ndarray, *, group: int, scale: float, softcap: float | None, extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        do, out = with_unit_stride(do.to(q.dtype)), with_unit_stride(out)
        check_tensors(q=q, k=k, v=v, do=do)
        call = self.call(q, k, v, tiles, group, scale, softcap, extras, whole=True)
        by_query, by_key = call.query_work(call.configs.dq), call.key_work()
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for work, sums in ((by_query, (dq,)), (by_key, (dk, dv))):
            if work is None or work.num_rows < sums[0].shape[1] * sums[0].shape[2]:
                for x in sums:
                    x.zero_()
        if by_query is not None and by_key is not None:
            lse, delta = powers(lse), row_delta(out, do, dlse)
            call.add_dq(by_query, do, lse, delta, dq)
            call.add_dkdv(by_key, do, lse, delta, dk, dv)
        return dq, dk, dv

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, group: int, scale: float, softcap: float | None,
        extras: Extras | None, *, whole: bool,
    ) -> Call:  # fmt: skip
        configs = self._configs
        if configs is None and q.device.type == "cpu":
            configs = INTERPRETER_CONFIGS
        elif configs is None:
            configs = launch_configs(q.shape[-1], v.shape[-1], q.dtype, torch.cuda.get_device_capability(q.device))
        extras = extras or Extras()
        _check_extras(q, k, extras)
        if extras.blocks is not None:
            extras.blocks.check(tiles, q.shape[0])
            plan = extras.blocks.plan
            configs = plan_configs(configs, plan.block_q, plan.block_k, heads_alike(tiles, extras.blocks, group))
        return Call(q, k, v, tiles, group, scale, _score_numbers(scale, softcap), extras, configs, whole)


class _Scores(NamedTuple):
    """How the kernels get from q·k to what they exponentiate, and what multiplies a bias before it is added."""

    kind: int
    score_scale: float
    cap_scale: float
    bias_scale: float


@dataclass(frozen=True, eq=False)
class Call:
    """One call's inputs, and its launches."""

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: np.ndarray
    group: int
    scale: float
    scores: _Scores
    extras: Extras
    configs: LaunchConfigs
    whole: bool

    @property
    def _operand(self) -> BlockOperand | None:
        return self.extras.blocks

    def query_work(self, config: LaunchConfig) -> WorkList | None:
        if self._operand is not None:
            return plan_query_work(self.tiles, self._operand, config.block_q, self.q.device)
        return query_work(self.tiles, config.block_q, config.block_k, self.q.device)

    def key_work(self) -> WorkList | None:
        config = self.configs.dkdv
        if self._operand is not None:
            return plan_key_work(self.tiles, self._operand, config.block_k, self.group, self.q.device)
        return key_work(self.tiles, config.block_k, config.block_q, self.group, self.q.device)

    def forward(self, work: WorkList, acc: Tensor, m: Tensor, l: Tensor) -> None:
        bias, lines = self._lines()
        scores = self.scores
        self._launch(
            "forward", self._query_grid(work), self.configs.forward, self.q, self.k, self.v, acc, m, l, *lines,
            work.blocks, work.ranges, *self._lists(work, self.configs.forward.block_q, transposed=False),
            work.num_blocks, work.num_long, self.group, scores.score_scale, scores.cap_scale,
            *row_strides(self.q, self.k, self.v, acc, m, l), *bias.stride()[:2],
        )  # fmt: skip

    def add_dq(self, work: WorkList, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor) -> None:
        """lse [B, H, N] as from ``powers``, delta [B, H, N]."""
        _, inputs, numbers, strides = self._backward_arguments(do, lse, delta)
        config = self.configs.dq
        pack = 1 if self._operand is None else config.pack
        self._launch(
            "dq", self._query_grid(work, pack), config, *inputs, dq, work.blocks, work.ranges,
            *self._lists(work, config.block_q, transposed=False), work.num_blocks, work.num_long, *numbers, *strides,
            *row_strides(dq),
        )  # fmt: skip

    def add_dkdv(self, work: WorkList, do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
        """lse [B, H, N] as from ``powers``, delta [B, H, N]. The gradient of a key bias, too, goes to where the call has it."""
        bias, inputs, numbers, strides = self._backward_arguments(do, lse, delta)
        config, dbias = self.configs.dkdv, torch.zeros_like(bias)
        self._launch(
            "dkdv", (work.num_blocks * work.num_heads, self.q.shape[0]), config, *inputs, dk, dv, dbias,
            work.blocks, work.ranges, *self._lists(work, config.block_k, transposed=True),
            work.num_blocks, work.num_long, *numbers, *strides, *row_strides(dk, dv), *dbias.stride()[:2],
        )  # fmt: skip
        if self.extras.dkey_bias is not None:
            self.extras.dkey_bias.add_(dbias.transpose(1, 2))

    def _backward_arguments(
        self, do: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[float, ...], list[int]]:
        """(bias, inputs, numbers, strides) that the kernels of the backward have in common."""
        bias, lines = self._lines()
        inputs = (self.q, self.k, self.v, do, lse, delta, *lines)
        numbers = (self.group, self.scores.score_scale, self.scores.cap_scale, float(self.scale))
        strides = [*row_strides(self.q, self.k, self.v, do), *lse.stride()[:2], *delta.stride()[:2], *bias.stride()[:2]]
        return bias, inputs, numbers, strides

    def _lines(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """(bias [B, Hk, Nk] as the kernels add it; bias, pos_q, pos_k as arguments, where absent an address not read)."""
        bias, positions, absent = self.extras.key_bias, self.extras.positions, self.q.new_empty((1, 1, 1), dtype=torch.float32)
        if bias is None:
            scaled = absent
        else:
            scaled = (bias.transpose(1, 2).float() * self.scores.bias_scale).contiguous()
        nowhere = absent.view(torch.int32)
        pos_q, pos_k = (nowhere, nowhere) if positions is None else (x.int().contiguous() for x in positions)
        return scaled, (scaled, pos_q, pos_k)

    def _lists(self, work: WorkList, block_rows: int, *, transposed: bool) -> tuple[object, ...]:
        """Arguments that only kernels under a block plan have."""
        operand = self._operand
        if operand is None:
            return ()
        plan = operand.plan.to(self.q.device)
        full, partial = plan.transposed if transposed else (plan.full, plan.partial)
        num_lists, num_ranges = full.counts.shape[-1], len(work.ranges)
        table = (self.tiles.tobytes(), operand.offsets_of(self.tiles).tobytes(), block_rows, self.group if transposed else 0)
        if table not in plan.positions:
            plan.positions[table] = _positions(work, plan, full, partial, transposed=transposed)
        lists = (full.starts, full.blocks, partial.starts, partial.blocks)
        return (plan.positions[table], *lists, plan.heads, plan.batch, operand.heads, num_lists, num_ranges)

    def _query_grid(self, work: WorkList, pack: int = 1) -> tuple[int, int]:
        """pack: query heads a program."""
        return work.num_blocks * (self.group // pack) * -(-work.num_heads // self.group), self.q.shape[0]

    def _launch(self, name: str, grid: tuple[int, int], config: LaunchConfig, *arguments: object) -> None:
        """Launch a kernel, with fewer stages where the device's shared memory does not hold as many."""
        head_dim, value_dim = self.q.shape[-1], self.v.shape[-1]
        constants = {
            "D": head_dim, "DV": value_dim, "BLOCK_D": padded(head_dim), "BLOCK_DV": padded(value_dim),
            "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "SCORES": self.scores.kind,
            "BIAS": self.extras.key_bias is not None, "POSITIONS": self.extras.positions is not None, "WHOLE": self.whole,
        }  # fmt: skip
        direction, prefix = "forward" if name == "forward" else "backward", ""
        if self._operand is not None:
            constants |= {"PLAN_Q": self._operand.plan.block_q, "PLAN_K": self._operand.plan.block_k}
            constants |= {"PACK": config.pack} if name == "dq" else {}
            prefix = "plan_"
        kernel = getattr(_kernels(prefix + direction), f"{prefix}{name}_kernel")

        def launch(num_stages: int) -> None:
            with torch.cuda.device_of(self.q):
                kernel[grid](*arguments, **constants, num_warps=config.num_warps, num_stages=num_stages)

        key = (kernel, config, self.q.dtype, self.q.device, *constants.values())
        _with_fewer_stages(launch, key, config)


def heads_alike(tiles: np.ndarray, operand: BlockOperand, group: int) -> int:
    """Every so many query heads, from the first of a table int64 [N, 9] on, share tiles, a KV head and a plan head."""
    if not len(tiles):
        return 1
    first = tiles[0, T_H0]
    own = [group, operand.heads // operand.plan.heads]
    where = [tiles[:, T_H0] - first, tiles[:, T_H1] - first, tiles[:, T_SHIFT] + first, operand.offsets_of(tiles)[:, 2] + first]
    return int(np.gcd.reduce(np.concatenate([own, *where])))


def _positions(work: WorkList, plan: BlockPlan, full: BlockLists, partial: BlockLists, *, transposed: bool) -> Tensor:
    """Where the parts of a plan's lists that a range takes begin and end, int32 [b, p, ranges, 8]."""
    num_ranges = len(work.ranges)
    positions = torch.empty((plan.batch, plan.heads, num_ranges, 8), dtype=torch.int32, device=work.ranges.device)
    rows, columns = (plan.block_k, plan.block_q) if transposed else (plan.block_q, plan.block_k)
    with torch.cuda.device_of(positions):
        _kernels("plan_forward").positions_kernel[(work.num_blocks, plan.heads, plan.batch)](
            positions, work.blocks, work.ranges, *full, *partial, plan.heads, full.counts.shape[-1], num_ranges,
            PLAN_ROWS=rows, PLAN_COLUMNS=columns, num_warps=1,
        )  # fmt: skip
    return positions


def powers(lse: Tensor) -> Tensor:
    """The LSE in powers of two, +∞ where a row saw nothing, rows next to each other: [B, H, N] from [B, N, H]."""
    powers = lse.transpose(1, 2) * math.log2(math.e)
    return powers.masked_fill_(powers == float("-inf"), float("inf")).contiguous()


def row_delta(out: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    """Σ do∘out − dlse, fp32 [B, H, N], in one pass over both."""
    batch, rows, heads, value_dim = out.shape
    delta = torch.empty((batch, heads, rows), dtype=torch.float32, device=out.device)
    given = delta.transpose(1, 2) if dlse is None else dlse
    with torch.cuda.device_of(out):
        _kernels("backward").delta_kernel[(-(-rows // DELTA_ROWS), heads, batch)](
            out, do, given, delta, rows, *row_strides(out, do, given), *delta.stride()[:2],
            DV=value_dim, BLOCK_DV=padded(value_dim), BLOCK_Q=DELTA_ROWS, HAS_DLSE=dlse is not None,
        )  # fmt: skip
    return delta


def _kernels(name: str) -> ModuleType:
    """The module of kernels, imported when first needed: this package must import where Triton is not installed."""
    return importlib.import_module(f"distattn.kernels.softmax.triton_{name}")


def with_unit_stride(x: Tensor) -> Tensor:
    """Unlike q, k and v, nobody chooses the strides of a gradient: that of a sum has stride 0."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_tensors(**tensors: Tensor) -> None:
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


def _check_extras(q: Tensor, k: Tensor, extras: Extras) -> None:
    """Raise InputError for a bias or positions of the wrong shape or kind."""
    batch, keys, kv_heads, _ = k.shape
    for name in ("key_bias", "dkey_bias"):
        bias = getattr(extras, name)
        if bias is not None and (tuple(bias.shape) != (batch, keys, kv_heads) or not bias.dtype.is_floating_point):
            raise InputError(
                f"{name} must hold floats [{batch}, {keys}, {kv_heads}], one for each key, got {bias.dtype} {list(bias.shape)}."
            )
    if extras.positions is not None:
        for name, x, rows in (("pos_q", extras.positions[0], q.shape[1]), ("pos_k", extras.positions[1], keys)):
            if tuple(x.shape) != (rows,) or x.dtype not in (torch.int32, torch.int64):
                raise InputError(f"{name} must be int32 or int64 [{rows}], one for each row, got {x.dtype} {list(x.shape)}.")


def _score_numbers(scale: float, softcap: float | None) -> _Scores:
    """score_scale ≥ 0: a maximum of scores is scaled after it is taken."""
    kernels = _kernels("forward")
    log2e = math.log2(math.e)
    if softcap is not None:
        return _Scores(kernels.SCORES_CAPPED.value, softcap * log2e, scale / softcap, 1 / softcap)
    kind = kernels.SCORES_NEGATED if scale < 0 else kernels.SCORES_PLAIN
    return _Scores(kind.value, float(abs(scale)) * log2e, 0.0, log2e)


def row_strides(*tensors: Tensor) -> list[int]:
    """Batch, row and head strides of each."""
    return [stride for x in tensors for stride in x.stride()[:3]]


_stages_that_fit: dict[tuple[object, ...], int] = {}


def _with_fewer_stages(launch: Callable[[int], Any], key: tuple[object, ...], config: LaunchConfig) -> None:
    """Only the compiler knows how much shared memory a kernel needs; what fits is remembered."""
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
