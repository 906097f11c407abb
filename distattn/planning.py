"""``plan``: from a mask, a shape and a group of ranks to a schedule that layers replay."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import InputError, PlanError, UnsupportedError
from distattn.kernels import BACKENDS, Backend, Case, choose_backend
from distattn.kernels.block_plan import BlockOperand, BlockPlan
from distattn.kernels.protocol import Extras
from distattn.kernels.selection import rates_here
from distattn.mask import Mask
from distattn.parallel.agreement import board_of
from distattn.parallel.backward import derive_backward
from distattn.parallel.cost import attend_areas
from distattn.parallel.hardware import Hardware, find_hardware, hardware_here
from distattn.parallel.keep import check_mode, choose_mode
from distattn.parallel.layout import Layout
from distattn.parallel.lowering import HOME_KV, HOME_Q, Lowered, lower
from distattn.parallel.per_group import PerGroup
from distattn.parallel.program import ATTEND_H0, ATTEND_H1, ATTEND_Q, SLOT_RANK, Program, check_heads
from distattn.parallel.schedulers import find_scheduler
from distattn.parallel.schedulers.auto import choose_layout, choose_strategy, default_options, describe_degrees
from distattn.parallel.transport.choice import choose_transport, make_transport
from distattn.parallel.transport.collective import Collective, group_device
from distattn.plan_description import describe
from distattn.row_gather import GatherRows

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CACHE_SIZE = 64


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule for one mask, shape and group, on this rank. Made by ``plan``; compares by identity.

    dtype: of the inputs, or None for any. reasons: why each automatic choice fell as it did. options: of the strategy, as
    planned. reduce_dtype: in which sums of gradients travel, None for fp32 (fp64). keep: what a rank receives in the forward
    stays until the backward.
    """

    mask: Mask
    layout: Layout
    program: Program
    strategy: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype | None
    kernel: str
    deterministic: bool
    rank: int
    group: dist.ProcessGroup | None
    transport: Collective | None
    hardware: Hardware
    reasons: dict[str, str]
    handle: int
    reduce_dtype: torch.dtype | None = None
    sparse: BlockPlan | None = None
    options: Any = None
    keep: bool = False

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    @cached_property
    def num_local_rows(self) -> int:
        """Rows of this rank."""
        return int(self.layout.counts[self.rank])

    @property
    def key_layout(self) -> Layout:
        """Which rows of k and v each rank holds: ``layout``, but for cross attention."""
        return self.program.key_layout

    @cached_property
    def num_local_keys(self) -> int:
        """Rows of k and v on this rank."""
        return int(self.key_layout.counts[self.rank])

    @cached_property
    def backward_program(self) -> Program:
        """Derived from ``program``."""
        return derive_backward(self.program, keep=self.keep, ranks_per_node=self.hardware.ranks_per_node)

    @cached_property
    def positions(self) -> Tensor:
        """Global row of each local row, int64 [S_local]: for RoPE, labels and losses."""
        return torch.from_numpy(self.layout.rows(self.rank))

    @cached_property
    def key_positions(self) -> Tensor:
        """Global row of each local row of k and v, int64 [Sk_local]."""
        return torch.from_numpy(self.key_layout.rows(self.rank))

    @cached_property
    def lowered(self) -> Lowered:
        return lower(self.program, self.mask, self.rank, keep=self.keep)

    @cached_property
    def lowered_backward(self) -> Lowered:
        return lower(self.backward_program, self.mask, self.rank)

    @cached_property
    def only_tiles(self) -> np.ndarray | None:
        """The tiles of a pass that is one kernel call over this rank's own q, k and v, forward and backward, as on one rank or
        where documents stay whole; None where there is more to it."""
        if self.num_ranks > 1 and (len(self.program.moves) or len(self.backward_program.moves)):
            return None
        groups = [group for step in self.lowered.steps for group in step.groups]
        if len(groups) != 1 or (groups[0].q_arena, groups[0].kv_arena) != (HOME_Q, HOME_KV):
            return None
        return groups[0].tiles

    @cached_property
    def extras(self) -> Extras | None:
        """What kernel calls are given besides their tiles: the block plan, whose rows are those of the only rank."""
        if self.sparse is None:
            return None
        return Extras(blocks=BlockOperand(self.sparse, self.heads, digest=self.sparse.digest))

    @cached_property
    def _backends(self) -> dict[Case, Backend]:
        return {}

    def backend(self, case: Case) -> Backend:
        """The kernel that computes a case; raises UnsupportedError where none does."""
        if case not in self._backends:
            self._backends[case] = choose_backend(case, self.kernel, self.tables(case))[0]
        return self._backends[case]

    def tables(self, case: Case) -> list[np.ndarray]:
        """Tiles of each kernel call of one forward pass, by which the kernel is chosen.

        They are those of the rank that computes most, on every rank: what one's backward needs travels on the wire, so that
        all must choose alike.
        """
        if self.kernel != "auto" or case.device_type != "cuda":
            return []
        attends, slots = self.program.attends, self.program.slots
        work = attend_areas(self.program, self.mask) * (attends[:, ATTEND_H1] - attends[:, ATTEND_H0])
        areas = np.bincount(slots[attends[:, ATTEND_Q], SLOT_RANK], weights=work, minlength=self.num_ranks)
        busiest = int(areas.argmax())
        lowered = self.lowered if busiest == self.rank else lower(self.program, self.mask, busiest)
        return [group.tiles for step in lowered.steps for group in step.groups]

    def shard(self, x: Tensor, dim: int = 1, *, keys: bool = False) -> Tensor:
        """This rank's rows, in layout order, of a global tensor whose ``dim`` has all rows. Differentiable.

        keys: x is k, v or a bias of keys, whose rows have their own layout in cross attention.
        """
        dim = _checked_dim(x, dim)
        layout = self.key_layout if keys else self.layout
        if x.shape[dim] != layout.num_rows:
            raise InputError(
                f"shard takes the global tensor: x has {x.shape[dim]} rows in dim {dim}, the plan has {layout.num_rows}"
            )
        return x.index_select(dim, self._positions_on(x.device, keys=keys))

    def gather(self, x_local: Tensor, dim: int = 1) -> Tensor:
        """The global tensor, on every rank, of which each passes its rows: the inverse of ``shard``. Collective.

        Differentiable: the gradients of all ranks' uses are summed, so a loss that every rank computes alike from the
        gathered tensor counts ``num_ranks`` times.
        """
        dim = _checked_dim(x_local, dim)
        if x_local.shape[dim] != self.num_local_rows:
            raise InputError(
                f"gather takes this rank's rows: x_local has {x_local.shape[dim]} in dim {dim}, rank {self.rank} has "
                f"{self.num_local_rows}"
            )
        return GatherRows.apply(x_local, dim, self)

    @cached_property
    def _positions_by_device(self) -> dict[tuple[torch.device, bool], Tensor]:
        return {}

    def _positions_on(self, device: torch.device, *, keys: bool = False) -> Tensor:
        if (device, keys) not in self._positions_by_device:
            self._positions_by_device[device, keys] = (self.key_positions if keys else self.positions).to(device)
        return self._positions_by_device[device, keys]

    @cached_property
    def _order(self) -> Tensor:
        """Where each global row lies in the ranks' rows, padded to the longest and put one after another: int64 [S]."""
        width = int(self.layout.counts.max(initial=0))
        order = np.zeros(self.layout.num_rows, np.int64)
        for rank in range(self.num_ranks):
            rows = self.layout.rows(rank)
            order[rows] = rank * width + np.arange(len(rows))
        return torch.from_numpy(order)

    def describe(self) -> str:
        """What was planned and why, in lines: mask, layout, strategy, kernel, and each rank's work and bytes."""
        return describe(self)


@dataclass(frozen=True)
class _Request:
    """The arguments of one ``plan`` call with defaults filled in."""

    mask: Mask
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    num_ranks: int
    strategy: str
    layout: Layout | None
    key_layout: Layout | None
    kernel: str
    dtype: torch.dtype | None
    topology: Hardware | str | None
    deterministic: bool
    sparse: BlockPlan | None
    options: Any
    timeout_s: float | None
    reduce_dtype: torch.dtype | None
    transport: str
    backward: str
    keep_bytes: int | None

    def summary(self) -> str:
        """Equal exactly if the requests are: compared over ranks, key of the cache, and shown where ranks disagree."""
        shown = {x.name: getattr(self, x.name) for x in fields(self)}
        shown["mask"] = self.mask.digest
        for name in ("layout", "key_layout", "sparse"):
            if isinstance(shown[name], (Layout, BlockPlan)):
                shown[name] = shown[name].digest
        if "auto" in (self.kernel, self.strategy) and self.num_ranks > 1 and (rates := rates_here()) is not None:
            shown["kernel_rates"] = f"{rates.calibration.digest} ({rates.origin})"
        return " ".join(f"{name}={value}" for name, value in shown.items() if value is not None)


def plan(
    mask: Mask,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    group: dist.ProcessGroup | None = None,
    strategy: str = "auto",
    layout: Layout | None = None,
    key_layout: Layout | None = None,
    kernel: str = "auto",
    value_dim: int | None = None,
    dtype: torch.dtype | None = None,
    topology: Hardware | str | None = None,
    deterministic: bool = False,
    sparse: BlockPlan | None = None,
    options: Any = None,
    timeout_s: float | None = None,
    reduce_dtype: torch.dtype | None = None,
    transport: str = "auto",
    backward: str = "resend",
    keep_bytes: int | None = None,
    ahead: bool = False,
) -> Plan:
    """Plan attention under ``mask`` over the ranks of ``group``. Collective, but waits for no rank; cached by value.

    mask: over the global rows, alike on every rank. heads, kv_heads (default: heads), head_dim, value_dim (default:
    head_dim): of q, k and v. group: None is one rank, without torch.distributed. strategy: "auto" takes the least predicted
    time. layout: None takes the one with the best balance. key_layout: for cross attention, of the rows of k and v; None: those
    of q, or contiguous where the mask is not square. kernel: "auto" or a backend's name. dtype: of the inputs; None
    allows any. topology: hardware (or its name) that predictions and routes are for. deterministic: bitwise equal reruns.
    sparse: a plan of blocks that attend, on one rank alone: pairs of other blocks are left out, of those of the mask.
    options: the strategy's own dataclass. timeout_s: longest wait for a transfer, default the group's timeout. reduce_dtype:
    torch.bfloat16 halves the bytes of gradient sums on the wire at a loss of accuracy; None: fp32 (fp64 for fp64 inputs).
    transport: "collective" (NCCL, gloo), "symmetric" (copies between the memories of one node's GPUs), or "auto", which takes
    the latter where ``distattn bench calibrate`` found it faster here. backward: "resend" sends q, k and v again, "keep" has
    ranks keep what they received, "auto" keeps where that is at most keep_bytes on every rank, for one call of batch 1. ahead:
    not collective, for another thread: leave the plan, lowered, for a later call without it, which the ranks compare.

    Raises PlanError, LayoutError or UnsupportedError naming the argument, and AgreementError where ranks of the group
    passed different arguments.
    """
    if not isinstance(mask, Mask):
        raise PlanError(
            f"mask must be a distattn.Mask, got {type(mask).__name__}; make one with Mask.causal(n) or its siblings"
        )
    chosen, why = ("", "") if group is None else choose_transport(group, transport)
    request = _Request(
        mask=mask,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        num_ranks=1 if group is None else dist.get_world_size(group),
        strategy=strategy,
        layout=layout,
        key_layout=key_layout,
        kernel=kernel,
        dtype=dtype,
        topology=topology,
        deterministic=deterministic,
        sparse=sparse,
        options=options,
        timeout_s=timeout_s,
        reduce_dtype=reduce_dtype,
        transport=chosen,
        backward=backward,
        keep_bytes=keep_bytes,
    )
    inputs = request.summary()
    if group is not None and not ahead:
        board_of(group).agree(inputs)
    _check(request)
    cache = _cache_of(group)
    with _lock:
        if inputs in cache:
            cache.move_to_end(inputs)
            return cache[inputs]
    made = _make(request, group, why)
    if ahead:
        _ = made.lowered, made.lowered_backward
    with _lock:
        _plans[made.handle] = made
        cache[inputs] = made
        if len(cache) > _CACHE_SIZE:
            cache.popitem(last=False)
    return made


def plan_of(handle: int) -> Plan:
    """The living plan with this handle: custom operators take integers, not objects."""
    return _plans[handle]


_lock = threading.Lock()
_handles = itertools.count(1)
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()
_local_cache: OrderedDict[str, Plan] = OrderedDict()
_group_caches: PerGroup[OrderedDict[str, Plan]] = PerGroup()


def _cache_of(group: dist.ProcessGroup | None) -> OrderedDict[str, Plan]:
    if group is None:
        return _local_cache
    return _group_caches.setdefault(group, OrderedDict())


def _hardware(topology: Hardware | str | None, group: dist.ProcessGroup | None) -> Hardware:
    if isinstance(topology, Hardware):
        return topology
    if topology is not None:
        return find_hardware(topology)
    on_gpu = torch.cuda.is_available() if group is None else group_device(group).type == "cuda"
    return hardware_here(on_gpu=on_gpu)


def _make(request: _Request, group: dist.ProcessGroup | None, why_transport: str) -> Plan:
    """Plan what was checked and is not in the cache."""
    hardware = _hardware(request.topology, group)
    strategy, options, layout, program, reasons = _schedule(request, hardware)
    keep, why_keep = choose_mode(
        program, request.backward, request.keep_bytes, head_dim=request.head_dim, value_dim=request.value_dim,
        element_bytes=(request.dtype or torch.bfloat16).itemsize,
    )  # fmt: skip
    reasons |= {"backward": why_keep}
    return Plan(
        mask=request.mask,
        layout=layout,
        program=program,
        strategy=strategy,
        heads=request.heads,
        kv_heads=request.kv_heads,
        head_dim=request.head_dim,
        value_dim=request.value_dim,
        dtype=request.dtype,
        kernel=request.kernel,
        deterministic=request.deterministic,
        rank=0 if group is None else dist.get_rank(group),
        group=group,
        transport=None if group is None else make_transport(group, request.transport, request.timeout_s),
        hardware=hardware,
        reasons=reasons if group is None else reasons | {"transport": f"{request.transport} ({why_transport})"},
        handle=next(_handles),
        reduce_dtype=request.reduce_dtype,
        sparse=request.sparse,
        options=options,
        keep=keep,
    )


def _schedule(r: _Request, hardware: Hardware) -> tuple[str, Any, Layout, Program, dict[str, str]]:
    """(strategy, its options, layout, program, why each was chosen)."""
    given = "given by the caller"
    key_layout = r.key_layout
    if key_layout is None and r.mask.num_queries != r.mask.num_keys:
        key_layout = Layout.contiguous(r.mask.num_keys, r.num_ranks)
    if r.strategy == "auto":
        choice = choose_strategy(
            r.mask,
            r.num_ranks,
            r.heads,
            r.kv_heads,
            head_dim=r.head_dim,
            value_dim=r.value_dim,
            dtype=_dtype_name(r.dtype or torch.bfloat16),
            hardware=hardware,
            layout=r.layout,
            key_layout=key_layout,
            kernel=r.kernel,
        )
        reasons = {"layout": choice.layout_reason, "strategy": choice.reason, "candidates": choice.table}
        return choice.strategy, choice.options, choice.layout, choice.program, reasons
    options = r.options or default_options(r.strategy, r.heads, r.kv_heads, r.num_ranks, hardware)
    layout, why = r.layout, given
    if layout is None:
        placed = choose_layout(r.mask, r.num_ranks, r.strategy, heads=r.heads, kv_heads=r.kv_heads, options=options)
        layout, why = placed.layout, placed.reason
    program = find_scheduler(r.strategy).plan(r.mask, layout, r.heads, r.kv_heads, options, key_layout)
    degrees = describe_degrees(r.strategy, options, r.heads, r.num_ranks)
    return r.strategy, options, layout, program, {"layout": why, "strategy": f"{given}; {degrees}"}


def _check(r: _Request) -> None:
    """Refuse what no schedule can be made for, naming the argument."""
    check_heads(r.heads, r.kv_heads)
    for name, size in (("head_dim", r.head_dim), ("value_dim", r.value_dim)):
        if size < 1:
            raise PlanError(f"{name} must be at least 1, got {size}")
    _check_sparse(r)
    for name, layout, rows in (("layout", r.layout, r.mask.num_queries), ("key_layout", r.key_layout, r.mask.num_keys)):
        if layout is None:
            continue
        if layout.num_rows != rows:
            raise PlanError(f"{name} holds {layout.num_rows} rows, but the mask has {rows} of them; both must be equal")
        if layout.num_ranks != r.num_ranks:
            raise PlanError(
                f"{name} is for {layout.num_ranks} ranks, the group has {r.num_ranks}; make it for the group's size"
            )
    if r.kernel != "auto" and r.kernel not in BACKENDS:
        raise UnsupportedError(f"kernel={r.kernel!r} is unknown; it may be auto, {', '.join(BACKENDS)}")
    if r.dtype is not None and r.dtype not in DTYPES:
        raise UnsupportedError(f"dtype={r.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")
    if r.reduce_dtype not in (None, torch.bfloat16, torch.float32):
        raise UnsupportedError(f"reduce_dtype={r.reduce_dtype} is not supported; use None, torch.float32 or torch.bfloat16")
    check_mode(r.backward, r.keep_bytes)
    if r.timeout_s is not None and r.timeout_s <= 0:
        raise PlanError(f"timeout_s must be positive, got {r.timeout_s}")
    _check_strategy(r)


def _check_sparse(r: _Request) -> None:
    plan = r.sparse
    if plan is None:
        return
    if not isinstance(plan, BlockPlan):
        raise PlanError(f"sparse must be a distattn.kernels.block_plan.BlockPlan or None, got {type(plan).__name__}")
    if r.num_ranks > 1:
        raise UnsupportedError(f"sparse is supported on one rank, the group has {r.num_ranks}; use a mask made of bands there")
    if (plan.num_queries, plan.num_keys) != (r.mask.num_queries, r.mask.num_keys):
        raise PlanError(
            f"sparse is over {plan.num_queries} queries and {plan.num_keys} keys, the mask over {r.mask.num_queries} and "
            f"{r.mask.num_keys}; both must be equal"
        )
    if r.heads % plan.heads:
        raise PlanError(f"sparse has {plan.heads} plan heads, which must divide the {r.heads} query heads")


def _check_strategy(r: _Request) -> None:
    if r.strategy == "auto":
        if r.options is not None:
            raise PlanError('options belong to one strategy: name it instead of strategy="auto"')
        return
    scheduler = find_scheduler(r.strategy)
    if r.options is not None and not isinstance(r.options, scheduler.options):
        raise PlanError(f"options of {r.strategy} must be {scheduler.options.__name__}, got {type(r.options).__name__}")
    reason = scheduler.why_not(r.heads, r.num_ranks)
    if reason:
        raise PlanError(reason)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked_dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise InputError(f"dim={dim} is out of range for a tensor of {x.ndim} dimensions")
    return dim % x.ndim
