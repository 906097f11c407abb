"""FlashAttention-4 for any mask, as its users call it: a mask function over look-up tables, and lists of blocks.

The function compares a key with the ranges of keys that the query's row sees; full blocks skip it and empty ones are never
visited. The lists come from our mask, exactly, since the package has no exact way of its own that is as fast.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from distattn.bench.engines import PEER_BLOCK, Engine, Problem, by_autograd
from distattn.errors import UnsupportedError
from distattn.kernels import BACKENDS
from distattn.kernels.protocol import T_HI
from distattn.mask import Mask
from distattn.mask_flex import key_ranges


def prepare_fa4(x: Problem) -> Engine:
    """Raises UnsupportedError where FlashAttention-4 or its block sparsity cannot do it."""
    reason = BACKENDS["fa4"].why_not(x.case)
    if reason is not None:
        raise UnsupportedError(f"fa4 {reason}")
    if x.pattern is not None:
        raise UnsupportedError("its look-up tables would hold a row for each head")
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    begin = time.perf_counter()
    tables, lists, lists_of_backward = _lists(x)
    torch.cuda.synchronize()
    about = {"mask_build_ms": (time.perf_counter() - begin) * 1e3}
    mask_mod = _mask_mod(len(tables) // 2)
    q, k, v = (y.detach().requires_grad_() for y in (x.q, x.k, x.v))

    def forward() -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(
            q, k, v, softmax_scale=x.cell.scale, mask_mod=mask_mod, aux_tensors=tables, block_sparse_tensors=lists,
            block_sparse_tensors_bwd=lists_of_backward, return_lse=True,
        )[:2]  # fmt: skip
        return out, lse

    return by_autograd(forward, (q, k, v), x.do, transposed=False, about=about)


def _lists(x: Problem) -> tuple[list[Tensor], Any, Any]:
    """Look-up tables [2 · ranges] of int32 [N], and the blocks of each row and of each column."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch  # pyright: ignore[reportMissingImports]

    n = x.cell.length
    mask = Mask(n, n, x.tiles[:, : T_HI + 1])
    tables = [torch.from_numpy(y).to(x.device) for pair in key_ranges(n, mask.bands) for y in pair]
    blocks = mask.to_flex(x.device, PEER_BLOCK)
    rows = (blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices)
    columns = (blocks.q_num_blocks, blocks.q_indices, blocks.full_q_num_blocks, blocks.full_q_indices)
    size = (PEER_BLOCK, PEER_BLOCK)
    return (
        tables,
        BlockSparseTensorsTorch(*rows, block_size=size),
        BlockSparseTensorsTorch(*columns, block_size=size),
    )


def _mask_mod(num_ranges: int) -> Any:
    from distattn.bench import fa4_mask_functions

    functions = {1: fa4_mask_functions.in_one_range, 2: fa4_mask_functions.in_two_ranges}
    if num_ranges not in functions:
        raise UnsupportedError(f"rows see {num_ranges} separate ranges of keys, and its mask function looks at one or two")
    return functions[num_ranges]
