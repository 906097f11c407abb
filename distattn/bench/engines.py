"""Attention kernels behind one face, as the clock wants them: ours, the choice among them, and two peers.

Backends of ours are timed as one rank calls them: a forward that returns (out, lse), a backward that returns (dq, dk, dv).
FlexAttention and FlashAttention-4 with a mask function are timed as their users call them: a forward that returns (out, lse),
and autograd's backward; what they need to know of the mask is built before, and timed apart.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn import bands
from distattn.bench.masks import LONGCA_BLOCK_PATTERNS, LONGCA_MASKS, PLAN_SIZES, SPARSE_PLANS, BlockPattern
from distattn.bench.predicates import Predicate, block_predicate, predicate
from distattn.bench.timing import median_ms, synchronize
from distattn.errors import ConfigError, UnsupportedError
from distattn.kernels import BACKENDS, Backend, Case, choose_backend
from distattn.kernels.block_plan import BlockOperand, BlockPlan
from distattn.kernels.protocol import T_H0, T_H1, T_HI, TILE_COLUMNS, Extras
from distattn.kernels.whole import attend_backward_whole, attend_whole
from distattn.kernels.workload import work_of

SEED = 42
MASKS = (*LONGCA_MASKS, *LONGCA_BLOCK_PATTERNS)
PEERS = ("flex", "fa4_mask_mod")
PEER_BLOCK = 128
MAX_LAUNCHES = 2000
"""A backend that makes more of them a pass is not timed: each costs about as much as starting a kernel."""


class Cell(NamedTuple):
    """One shape: batch 1, bf16 on a GPU and fp32 on a CPU."""

    mask: str
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def key(self) -> str:
        length = f"{self.length // 1024}K" if self.length % 1024 == 0 else str(self.length)
        return f"{self.mask} {length} {self.heads}:{self.kv_heads} D{self.head_dim}"

    @staticmethod
    def read(key: str) -> Cell:
        """The cell that has this key. Raises ConfigError for other text."""
        found = re.fullmatch(r"(\w+) (\d+)(K?) (\d+):(\d+) D(\d+)", key)
        if found is None:
            raise ConfigError(f"{key!r} names no cell: it must be like causal 32K 64:8 D128")
        mask, length, thousands, *shape = found.groups()
        return Cell(mask, int(length) * (1024 if thousands else 1), *map(int, shape))

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True, eq=False)
class Problem:
    """A cell with its tensors.

    q, do [1, N, H, D]; k, v [1, N, Hk, D]. tiles int64 [n, 9]: the mask over all heads. area: pairs of all query heads.
    pattern: of a mask that differs by head.
    """

    cell: Cell
    device: str
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    tiles: np.ndarray
    area: int
    pattern: BlockPattern | None

    @property
    def case(self) -> Case:
        cell = self.cell
        return Case(self.device, self.q.dtype, cell.head_dim, cell.head_dim, cell.heads, cell.kv_heads)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of every call of a backend."""
        return {"group": self.cell.group, "scale": self.cell.scale, "softcap": None}

    @property
    def block_plan_size(self) -> int:
        """The block size that makes a block plan of the pattern; 0 where its blocks have other sizes."""
        return PLAN_SIZES.get(self.cell.mask, 0)

    def block_plan(self) -> BlockPlan:
        assert self.pattern is not None
        listed, n, size = torch.from_numpy(self.pattern.kept)[None].to(self.device), self.cell.length, self.block_plan_size
        plan = BlockPlan.from_blocks(listed, num_queries=n, num_keys=n, block_q=size, block_k=size)
        synchronize(self.device)
        return plan

    def predicate(self) -> Predicate | None:
        if self.pattern is not None:
            return block_predicate(self.pattern, self.cell.group, self.device)
        return predicate(self.cell.mask, self.cell.length, SEED, self.device)

    @staticmethod
    def make(cell: Cell, device: str) -> Problem:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def normal(heads: int) -> Tensor:
            return torch.randn(1, cell.length, heads, cell.head_dim, device=device, dtype=dtype)

        tiles, pattern = tiles_of(cell)
        area = int((bands.area(tiles[:, : T_HI + 1]) * (tiles[:, T_H1] - tiles[:, T_H0])).sum())
        tensors = (normal(cell.heads), normal(cell.kv_heads), normal(cell.kv_heads), normal(cell.heads))
        return Problem(cell, device, *tensors, tiles, area, pattern)


@dataclass(frozen=True)
class Engine:
    """What is offered to the clock, and its results (out, lse, dq, dk, dv), each [1, N, ...], for the check.

    about: what else the record says of it, such as the time that it took to build the mask.
    """

    forward: Callable[[], object]
    backward: Callable[[], object]
    results: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    about: dict[str, Any] = field(default_factory=dict)


def engine_names() -> tuple[str, ...]:
    """Backends of this installation, the choice among them, and peers."""
    return (*(name for name in BACKENDS if name not in ("reference", "flash_cpu")), "auto", *PEERS)


def tiles_of(cell: Cell) -> tuple[np.ndarray, BlockPattern | None]:
    """The mask as tiles, int64 [n, 9]; and the block pattern that it is made from, if it is."""
    patterns = {**LONGCA_BLOCK_PATTERNS, **SPARSE_PLANS}
    if cell.mask in patterns:
        pattern = patterns[cell.mask](cell.length, cell.kv_heads, SEED)
        return pattern_tiles(pattern, cell.group), pattern
    mask_bands = bands.coalesce(LONGCA_MASKS[cell.mask](cell.length, SEED).bands)
    tiles = np.zeros((len(mask_bands), len(TILE_COLUMNS)), np.int64)
    tiles[:, : T_HI + 1] = mask_bands
    tiles[:, T_H1] = cell.heads
    return tiles, None


def whole_table(cell: Cell) -> np.ndarray:
    """One tile that hides nothing: int64 [1, 9]."""
    n = cell.length
    return np.array([[0, n, 0, n, -bands.UNBOUNDED, bands.UNBOUNDED, 0, cell.heads, 0]])


def pattern_tiles(pattern: BlockPattern, group: int) -> np.ndarray:
    """A tile for each run of kept key blocks in a row of blocks: int64 [n, 9]."""
    edge = np.zeros((*pattern.kept.shape[:2], 1), bool)
    begins = np.nonzero(pattern.kept & ~np.concatenate([edge, pattern.kept[..., :-1]], 2))
    ends = np.nonzero(pattern.kept & ~np.concatenate([pattern.kept[..., 1:], edge], 2))
    head, row, first = begins
    tiles = np.zeros((len(head), len(TILE_COLUMNS)), np.int64)
    tiles[:, 0], tiles[:, 1] = pattern.edges_q[row], pattern.edges_q[row + 1]
    tiles[:, 2], tiles[:, 3] = pattern.edges_k[first], pattern.edges_k[ends[2] + 1]
    tiles[:, 4], tiles[:, 5] = -bands.UNBOUNDED, bands.UNBOUNDED
    tiles[:, T_H0], tiles[:, T_H1] = head * group, (head + 1) * group
    return tiles


def prepare(name: str, x: Problem) -> Engine:
    """Everything up to the first call; raises UnsupportedError or ImportError where the engine cannot do it."""
    if name == "flex":
        return _flex(x)
    if name == "fa4_mask_mod":
        from distattn.bench.fa4_mask_mod import prepare_fa4

        return prepare_fa4(x)
    case, tiles, settings, about = x.case, x.tiles, x.settings, {}
    planned = bool(x.block_plan_size) and (name == "auto" or BACKENDS[name].why_not(replace(case, block_plan=True)) is None)
    if planned:
        settings["extras"] = Extras(blocks=BlockOperand(x.block_plan(), x.cell.heads))
        case, tiles = replace(case, block_plan=True), whole_table(x.cell)
    elif name in BACKENDS and (launches := _launches(name, x)) > MAX_LAUNCHES:
        raise UnsupportedError(f"would make {launches} launches a pass, one after another")
    begin = time.perf_counter()
    backend, reason = choose_backend(case, name, [tiles])
    if name == "auto":
        about |= {"choice": backend.name, "reason": reason, "choice_ms": (time.perf_counter() - begin) * 1e3}
    made = _ours(backend, x, tiles, settings, about)
    if planned:
        about["mask_build_ms"] = _plan_ms(backend, x, tiles, made)
    return made


def _plan_ms(backend: Backend, x: Problem, tiles: np.ndarray, known: Engine) -> float:
    """Milliseconds to make a plan, and what a forward and a backward make of it first: more than those of a known one take."""

    def step() -> None:
        known.forward()
        known.backward()

    def first_step() -> None:
        extras = Extras(blocks=BlockOperand(x.block_plan(), x.cell.heads))
        _ours(backend, x, tiles, x.settings | {"extras": extras}, {}).backward()

    new, old = (median_ms(call, 0, x.device) for call in (first_step, step))
    return max(0.0, new - old)


def _launches(name: str, x: Problem) -> int:
    return int(sum(work.launches for work in work_of(name, [x.tiles]).values()))


def _ours(backend: Backend, x: Problem, tiles: np.ndarray, settings: dict[str, Any], about: dict[str, Any]) -> Engine:
    """As one rank calls a backend."""

    def forward() -> tuple[Tensor, Tensor]:
        return attend_whole(backend, x.q, x.k, x.v, tiles, **settings)

    out, lse = forward()

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return attend_backward_whole(backend, x.q, x.k, x.v, out, lse, x.do, None, tiles, **settings)

    return Engine(forward, backward, lambda: (out, lse, *backward()), about)


def delta_of(do: Tensor, out: Tensor) -> Tensor:
    """Σ do∘out in fp32, head by head: the product of all heads at once is as large as a carry."""
    return torch.stack([(do[:, :, h].float() * out[:, :, h]).sum(-1) for h in range(do.shape[2])], -1)


def _flex(x: Problem) -> Engine:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    if x.device != "cuda":
        raise UnsupportedError("flex is timed on CUDA alone")
    torch._dynamo.reset()
    cell, mask_mod, about = x.cell, x.predicate(), {}
    block_mask = None
    if mask_mod is not None:
        heads = None if x.pattern is None else cell.heads
        build = torch.compile(create_block_mask)

        def make_mask() -> Any:
            return build(mask_mod, None, heads, cell.length, cell.length, device=x.device)

        block_mask = make_mask()
        about["mask_build_ms"] = median_ms(make_mask, 0, x.device)
    q, k, v = (y.transpose(1, 2).contiguous().requires_grad_() for y in (x.q, x.k, x.v))
    do = x.do.transpose(1, 2).contiguous()
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> tuple[Tensor, Tensor]:
        out, aux = compiled(
            q, k, v, block_mask=block_mask, scale=cell.scale, enable_gqa=cell.group > 1, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        return out, aux.lse

    return by_autograd(forward, (q, k, v), do, transposed=True, about=about)


def by_autograd(
    forward: Callable[[], tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], do: Tensor, *, transposed: bool,
    about: dict[str, Any],
) -> Engine:  # fmt: skip
    """An engine whose forward gives (out, lse [B, H, N]); transposed: heads before rows in the other tensors too."""
    out, lse = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, do, retain_graph=True)

    def results() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, b, c, d = (y.transpose(1, 2) if transposed else y for y in (out, *backward()))
        return a, lse.transpose(1, 2), b, c, d

    return Engine(forward, backward, results, about)


def first_call(engine: str, x: Problem) -> tuple[Engine, float]:
    """(the engine after one forward and backward, seconds until then)."""
    begin = time.perf_counter()
    made = prepare(engine, x)
    made.backward()
    synchronize(x.device)
    return made, time.perf_counter() - begin
