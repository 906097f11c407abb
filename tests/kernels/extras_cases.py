"""Problems with block plans, positions and key biases, their effect written out pair by pair for the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distattn.kernels.block_plan import BlockOperand, BlockPlan
from distattn.kernels.protocol import Backend, Extras
from distattn.kernels.whole import attend_backward_whole, attend_whole
from tests.kernels.oracle import Problem, Result


def with_extras(
    p: Problem, *, blocks: tuple[int, int] | None = None, plan_heads: int = 1, plan_batch: int = 1, density: float = 0.6,
    offsets: tuple[int, int, int] = (0, 0, 0), model_heads: int | None = None, positions: bool = False,
    key_bias: bool = False, seed: int = 0,
) -> Problem:  # fmt: skip
    """The problem with a random plan in blocks of (queries, keys), random positions, and a random bias.

    offsets: of arena query rows, key rows and query heads to the plan's. model_heads: those that the plan's heads spread over.
    """
    generator = torch.Generator().manual_seed(seed)
    (batch, queries, heads, _), (_, keys, kv_heads, _) = p.q.shape, p.k.shape
    device = p.q.device
    removed = torch.zeros(1, heads, queries, keys, dtype=torch.bool)
    full = removed
    operand = None
    if blocks is not None:
        rows, columns, head = offsets
        sizes = {"num_queries": queries + rows, "num_keys": keys + columns, "block_q": blocks[0], "block_k": blocks[1]}
        shape = (plan_batch, plan_heads, -(-sizes["num_queries"] // blocks[0]), -(-sizes["num_keys"] // blocks[1]))
        listed = torch.rand(shape, generator=generator) < density
        vouched = torch.rand(shape, generator=generator) < 0.6
        model_heads = heads if model_heads is None else model_heads
        plan = BlockPlan.from_blocks(listed.to(device), vouched.to(device), **sizes)
        tile_offsets = np.tile(np.array(offsets, np.int64), (len(p.tiles), 1)) if any(offsets) else None
        operand = BlockOperand(plan, model_heads, tile_offsets, plan.digest)
        plan_head = (torch.arange(heads) + head) * plan_heads // model_heads
        row, column = (torch.arange(queries) + rows) // blocks[0], (torch.arange(keys) + columns) // blocks[1]
        removed, full = (x[:, plan_head][:, :, row][..., column] for x in (~listed, listed & vouched))
    given = None
    if positions:
        pos_q, pos_k = (torch.randint(0, 50, (n,), generator=generator, dtype=torch.int32) for n in (queries, keys))
        removed = removed | ((pos_q[:, None] < pos_k[None, :]) & ~full)
        given = (pos_q.to(device), pos_k.to(device))
    bias = torch.randn(batch, keys, kv_heads, generator=generator).to(device) if key_bias else None
    gradient = None
    if bias is not None:
        bias = bias.to(torch.float64 if p.q.dtype == torch.float64 else torch.float32)
        gradient = torch.zeros_like(bias)
    return replace(p, extras=Extras(operand, bias, gradient, given), removed=removed, key_bias=bias)


def run_whole(backend: Backend, p: Problem) -> Result:
    """The backend's answer where one call is the whole."""
    settings = {"group": p.group, "scale": p.scale, "softcap": p.softcap, "extras": p.extras}
    out, lse = attend_whole(backend, p.q, p.k, p.v, p.tiles, **settings)
    dlse = p.dlse if bool(p.dlse.any()) else None
    found = Result(out, lse, *attend_backward_whole(backend, p.q, p.k, p.v, out, lse, p.do, dlse, p.tiles, **settings))
    if p.extras is not None and p.extras.dkey_bias is not None:
        found.dbias = p.extras.dkey_bias
    return found


# name → (case of the oracle, sizes of the problem, arguments of ``with_extras``).
EXTRAS_CASES: dict[str, tuple[str, dict, dict]] = {
    "plan_64": ("causal_130", {}, {"blocks": (64, 64)}),
    "plan_128": ("window_260", {}, {"blocks": (128, 128), "plan_heads": 2}),
    "plan_of_tall_blocks": ("window_260", {}, {"blocks": (128, 64)}),
    "plan_of_each_head": ("causal_130", {"batch": 2}, {"blocks": (64, 64), "plan_heads": 2, "plan_batch": 2}),
    "plan_with_positions": ("shared_rows", {}, {"blocks": (64, 64), "positions": True, "density": 0.8}),
    "plan_of_a_slot": (
        "heads_of_a_slot", {}, {"blocks": (64, 64), "plan_heads": 16, "model_heads": 16, "offsets": (50, 101, 6)},
    ),
    "plan_of_documents": ("documents", {}, {"blocks": (64, 64), "plan_heads": 2}),
    "plan_that_leaves_little": ("window_260", {}, {"blocks": (64, 64), "density": 0.15}),
    "packs_of_a_group": ("group_of_8_63", {"batch": 2}, {"blocks": (64, 64), "plan_batch": 2, "density": 1.0}),
    "packs_of_kv_heads": (
        "groups_of_4_130", {"softcap": 5.0, "lse_gradient": True},
        {"blocks": (64, 64), "plan_heads": 2, "positions": True, "key_bias": True, "density": 0.8},
    ),
    "packs_of_two": ("groups_of_4_130", {}, {"blocks": (64, 64), "plan_heads": 4}),
    "packs_of_a_slot": (
        "a_group_of_4", {"lse_gradient": True},
        {"blocks": (64, 64), "plan_heads": 4, "model_heads": 16, "offsets": (50, 101, 6), "density": 0.7},
    ),
    "plan_of_query_heads": ("groups_of_4_130", {}, {"blocks": (128, 128), "plan_heads": 8}),
    "empty_plan": ("causal_130", {}, {"blocks": (64, 64), "density": 0.0}),
    "positions": ("shared_rows", {}, {"positions": True}),
    "key_bias": ("causal_130", {"batch": 2}, {"key_bias": True}),
    "key_bias_capped": ("shared_rows", {"softcap": 0.7, "lse_gradient": True}, {"key_bias": True}),
    "everything": (
        "shared_rows", {"softcap": 5.0, "lse_gradient": True},
        {"blocks": (64, 64), "positions": True, "key_bias": True, "density": 0.8},
    ),
}  # fmt: skip
