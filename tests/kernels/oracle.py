"""Dense fp64 attention over a table of tiles, written from the definition and shared by the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.merge import accumulation_dtype, empty_carry, finish
from distattn.kernels.protocol import Backend, Extras
from distattn.kernels.tiles import UNBOUNDED


class Sizes(NamedTuple):
    """Rows and heads of the two arenas, and query heads per KV head of the model."""

    queries: int
    keys: int
    heads: int
    kv_heads: int
    group: int


@dataclass
class Problem:
    """Inputs of one case. ``splits`` cuts the table where a new call of the backend begins.

    extras: what the backend is given; removed: the pairs that they remove, bool [b, H, Nq, Nk]; key_bias [B, Nk, Hk].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor
    tiles: np.ndarray
    group: int
    scale: float
    softcap: float | None = None
    splits: tuple[int, ...] = ()
    extras: Extras | None = None
    removed: Tensor | None = None
    key_bias: Tensor | None = None


@dataclass
class Result:
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor = field(default_factory=lambda: torch.zeros(0))


def table(*rows: tuple[int, ...]) -> np.ndarray:
    """Tiles from (q0, q1, k0, k1, lo, hi, h0, h1, shift); None is spelled UNBOUNDED."""
    return np.array(rows, dtype=np.int64).reshape(-1, 9)


def visible(tiles: np.ndarray, num_queries: int, num_keys: int, heads: int) -> np.ndarray:
    """[heads, queries, keys]: how often the table computes each pair."""
    i, j = np.arange(num_queries)[:, None], np.arange(num_keys)[None, :]
    counts = np.zeros((heads, num_queries, num_keys), dtype=np.int64)
    for q0, q1, k0, k1, lo, hi, h0, h1, _ in tiles.tolist():
        inside = (i >= q0) & (i < q1) & (j >= k0) & (j < k1) & (j - i >= lo) & (j - i <= hi)
        counts[h0:h1] += inside
    return counts


def oracle(p: Problem) -> Result:
    """Out, LSE and gradients by autograd through one dense softmax in fp64."""
    return dense(p, torch.float64)


def dense(p: Problem, dtype: torch.dtype) -> Result:
    """Attention as one writes it in torch, in one dtype, gradients by autograd."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (p.q, p.k, p.v))
    device = q.device
    bias = torch.zeros(k.shape[:-1], device=device) if p.key_bias is None else p.key_bias.detach()
    bias = bias.to(dtype).requires_grad_()
    seen = torch.from_numpy(visible(p.tiles, q.shape[1], k.shape[1], q.shape[2]))
    assert int(seen.max()) <= 1, "the tiles of a table must be disjoint"
    seen = seen.bool().unsqueeze(0).to(device)  # [b, H, Nq, Nk]
    if p.removed is not None:
        seen = seen & ~p.removed.to(device)
    kv_head = torch.zeros(q.shape[2], dtype=torch.int64, device=device)
    for *_, h0, h1, shift in p.tiles.tolist():
        kv_head[h0:h1] = (torch.arange(h0, h1, device=device) + shift) // p.group
    scores = torch.einsum("bihd,bjhd->bhij", q, k[:, :, kv_head]) * p.scale
    if p.key_bias is not None:
        scores = scores + bias[:, :, kv_head].transpose(1, 2).unsqueeze(2)
    if p.softcap is not None:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    empty = ~seen.any(-1)  # [b, H, Nq]
    # A finite stand-in keeps autograd free of NaN in empty rows; their results are overwritten below.
    scores = scores.masked_fill(~(seen | empty[..., None]), float("-inf"))
    lse = torch.logsumexp(scores, -1).to(accumulation_dtype(dtype)).masked_fill(empty, 0)
    weights = torch.softmax(scores, -1).masked_fill(empty[..., None], 0)
    out = torch.einsum("bhij,bjhd->bihd", weights, v[:, :, kv_head])
    loss = (out * p.do.to(dtype)).sum() + (lse.transpose(1, 2) * p.dlse.to(lse.dtype)).sum()
    dq, dk, dv, dbias = torch.autograd.grad(loss, (q, k, v, bias), allow_unused=True)
    final = lse.masked_fill(empty, float("-inf")).transpose(1, 2)
    found = Result(out.detach(), final.detach(), dq, dk, dv)
    if p.key_bias is not None:
        found.dbias = dbias
    return found


def run(backend: Backend, p: Problem) -> Result:
    """The backend's answer, in as many calls as ``splits`` asks for, as a ring would make them."""
    batch, rows, heads, _ = p.q.shape
    carry = empty_carry(batch, rows, heads, p.v.shape[-1], dtype=p.q.dtype, device=p.q.device)
    parts = np.split(p.tiles, list(p.splits))
    settings = {"group": p.group, "scale": p.scale, "softcap": p.softcap}
    if p.extras is not None:
        settings["extras"] = p.extras
    for part in parts:
        backend.attend(p.q, p.k, p.v, part, carry, **settings)
    out, lse = finish(carry, p.q.dtype)
    dtype = accumulation_dtype(p.q.dtype)
    delta = (p.do.to(dtype) * out.to(dtype)).sum(-1) - p.dlse.to(dtype)
    gradients = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (p.q, p.k, p.v)]
    for part in parts:
        backend.attend_backward(
            p.q, p.k, p.v, out if backend.needs_out else None, lse, p.do, delta, part, *gradients, **settings
        )
    found = Result(out, lse, *gradients)
    if p.extras is not None and p.extras.dkey_bias is not None:
        found.dbias = p.extras.dkey_bias
    return found


def problem(
    tiles: np.ndarray, sizes: Sizes, *, head_dim: int = 8,
    value_dim: int | None = None, batch: int = 1, dtype: torch.dtype = torch.float64, device: str = "cpu",
    softcap: float | None = None, lse_gradient: bool = False, splits: tuple[int, ...] = (), seed: int = 0,
) -> Problem:  # fmt: skip
    """Random inputs for a table."""
    value_dim = head_dim if value_dim is None else value_dim
    queries, keys, heads, kv_heads, group = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, v = (
        normal(batch, queries, heads, head_dim),
        normal(batch, keys, kv_heads, head_dim),
        normal(batch, keys, kv_heads, value_dim),
    )
    dlse = torch.randn(batch, queries, heads, generator=generator, dtype=torch.float64).to(device)
    dlse = dlse if lse_gradient else torch.zeros_like(dlse)
    do = normal(batch, queries, heads, value_dim)
    return Problem(q, k, v, do, dlse, tiles, group, head_dim**-0.5, softcap, splits)


U = UNBOUNDED

# name → (tiles, sizes). Odd sizes, and every way in which a mask and a schedule cut a plane.
CASES: dict[str, tuple[np.ndarray, Sizes]] = {
    "full": (table((0, 37, 0, 53, -U, U, 0, 3, 0)), Sizes(37, 53, 3, 3, 1)),
    "causal": (table((0, 61, 0, 61, -U, 0, 0, 2, 0)), Sizes(61, 61, 2, 2, 1)),
    "one_by_one": (table((0, 1, 0, 1, -U, 0, 0, 1, 0)), Sizes(1, 1, 1, 1, 1)),
    "tall_causal": (
        table((0, 301, 0, 20, -U, -3, 0, 2, 0)),
        Sizes(301, 20, 2, 2, 1),
    ),
    "tall_band": (
        table((0, 140, 0, 7, -100, 2, 0, 2, 0)),
        Sizes(150, 9, 2, 2, 1),
    ),
    "wide_causal": (
        table((0, 20, 0, 301, -U, 271, 0, 2, 0)),
        Sizes(20, 301, 2, 2, 1),
    ),
    "rows_without_keys": (
        table((0, 40, 5, 30, -U, -10, 0, 2, 0)),
        Sizes(45, 33, 2, 2, 1),
    ),
    "nothing_at_all": (
        table((0, 10, 0, 10, -U, -20, 0, 2, 0)),
        Sizes(10, 10, 2, 2, 1),
    ),
    "window": (
        table((0, 700, 0, 700, -45, 0, 0, 2, 0)),
        Sizes(700, 700, 2, 1, 2),
    ),
    "wide_window": (
        table((0, 600, 0, 590, -301, 150, 0, 2, 0)),
        Sizes(600, 590, 2, 1, 2),
    ),
    "lower_bound_only": (
        table((3, 333, 2, 411, 7, U, 0, 2, 0)),
        Sizes(340, 411, 2, 2, 1),
    ),
    "one_diagonal": (
        table((0, 50, 0, 50, 3, 3, 0, 2, 0)),
        Sizes(50, 50, 2, 2, 1),
    ),
    "documents": (
        table((0, 5, 0, 5, -U, 0, 0, 4, 0), (5, 6, 5, 6, -U, 0, 0, 4, 0), (6, 70, 6, 70, -U, 0, 0, 4, 0)),
        Sizes(75, 70, 4, 2, 2),
    ),
    "tiles_that_share_rows": (
        table(
            (0, 40, 0, 20, -U, U, 0, 4, 0), (10, 50, 20, 60, -U, 10, 0, 4, 0), (0, 10, 20, 60, 15, 33, 0, 4, 0),
            (45, 50, 60, 70, -U, U, 0, 4, 0),
        ),
        Sizes(50, 70, 4, 2, 2),
    ),
    "heads_of_a_slot": (
        # The arena holds query heads 6..13 of a model with groups of 4, and KV heads 1..3: h + 6 − 4 = h + 2.
        table((0, 30, 0, 30, -U, 0, 0, 5, 2), (0, 30, 0, 30, -U, 0, 5, 8, 2)),
        Sizes(30, 30, 8, 3, 4),
    ),
    "heads_apart": (
        table((0, 33, 0, 40, -U, U, 0, 3, 1), (5, 33, 0, 40, -U, 2, 3, 6, 1)),
        Sizes(33, 40, 6, 3, 3),
    ),
}  # fmt: skip

ODD: dict[str, tuple[np.ndarray, Sizes]] = {
    "causal_63": (table((0, 63, 0, 63, -U, 0, 0, 2, 0)), Sizes(63, 63, 2, 1, 2)),
    "causal_130": (table((0, 130, 0, 130, -U, 0, 0, 2, 0)), Sizes(130, 130, 2, 1, 2)),
    "window_130": (table((0, 130, 0, 130, -70, 3, 0, 2, 0)), Sizes(130, 130, 2, 1, 2)),
    "window_260": (table((0, 260, 0, 260, -170, 40, 0, 2, 0)), Sizes(260, 260, 2, 1, 2)),
    # Rows 100 to 129 see nothing, rows 0 to 62 through two tiles, heads 1 and 2 through a slot's shift.
    "shared_rows": (
        table((0, 100, 0, 40, -U, U, 0, 3, 1), (0, 63, 40, 130, 11, 90, 0, 3, 1)),
        Sizes(130, 130, 3, 2, 2),
    ),
    "group_of_8_63": (table((0, 63, 0, 63, -U, 0, 0, 8, 0)), Sizes(63, 63, 8, 1, 8)),
    # Rows 100 to 129 see nothing.
    "groups_of_4_130": (table((0, 100, 0, 130, -70, 3, 0, 8, 0)), Sizes(130, 130, 8, 2, 4)),
    # The arena's heads 2 to 5 are the query heads of its KV head 1.
    "a_group_of_4": (table((0, 70, 0, 40, -U, U, 2, 6, 2), (10, 70, 40, 90, 11, 60, 2, 6, 2)), Sizes(75, 90, 8, 2, 4)),
}


@contextmanager
def nan_filled() -> Iterator[None]:
    """What torch.empty gives holds NaN, as torch fills it in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ over finite entries; NaN and a difference in where −inf stands count as infinite."""
    got, want = got.double().cpu(), want.double().cpu()
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)) or not torch.equal(got[~finite], want[~finite]):
        return float("inf")
    difference = (got[finite] - want[finite]).norm().item()
    return difference / max(want[finite].norm().item(), 1e-2)
