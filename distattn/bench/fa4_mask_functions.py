"""Mask functions for FlashAttention-4's compiler, in its own operations; importable only where the package is installed.

aux_tensors: for each range of keys that a row sees, its first key and its end, int32 [N] each.
"""

# pyright: reportMissingImports=false

import cutlass
from cutlass import cute
from flash_attn.cute import utils


@cute.jit
def in_one_range(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
    first = utils.scalar_to_ssa(aux_tensors[0][m_idx[0]], cutlass.Int32)
    end = utils.scalar_to_ssa(aux_tensors[1][m_idx[0]], cutlass.Int32)
    return (n_idx >= first) & (n_idx < end)


@cute.jit
def in_two_ranges(batch, head, m_idx, n_idx, seqlen_info, aux_tensors):
    first = utils.scalar_to_ssa(aux_tensors[0][m_idx[0]], cutlass.Int32)
    end = utils.scalar_to_ssa(aux_tensors[1][m_idx[0]], cutlass.Int32)
    second = utils.scalar_to_ssa(aux_tensors[2][m_idx[0]], cutlass.Int32)
    last = utils.scalar_to_ssa(aux_tensors[3][m_idx[0]], cutlass.Int32)
    return ((n_idx >= first) & (n_idx < end)) | ((n_idx >= second) & (n_idx < last))
