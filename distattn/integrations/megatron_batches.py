"""Packed batches for Megatron without Transformer Engine, whose kernel stock Megatron slices them with."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core import utils as megatron_utils
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from distattn.errors import InputError, UnsupportedError
from distattn.integrations.megatron_layout import thd_indices

_NOT_ROWS = ("attention_mask", "cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def packed_params(cu_seqlens: Tensor, cu_seqlens_padded: Tensor | None = None) -> PackedSeqParams:
    """``PackedSeqParams`` of packed documents; cu_seqlens [D+1] int32 of the whole stream, undivided: real lengths, and the
    lengths that they are padded to where those differ (each a multiple of 2P)."""
    room = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
    longest = int(room.diff().max())
    values: dict[str, Any] = {"qkv_format": "thd", "max_seqlen_q": longest, "max_seqlen_kv": longest}
    for side in ("q", "kv"):
        values |= {f"cu_seqlens_{side}": cu_seqlens, f"cu_seqlens_{side}_padded": cu_seqlens_padded}
    return PackedSeqParams(**values)


def slice_thd_batch(
    batch: dict[str, Any], cu_seqlens_padded: Tensor, *, num_ranks: int | None = None, rank: int | None = None
) -> dict[str, Any]:
    """This context rank's rows of a packed batch: every tensor [1, T, …] in it, in the order in which layers hold them.

    num_ranks, rank: of the context-parallel group, default Megatron's. Keys that hold no rows, and None, stay. Raises
    InputError where a tensor has another length, UnsupportedError where a padded length is no multiple of 2P.
    """
    if num_ranks is None:
        num_ranks = parallel_state.get_context_parallel_world_size()
    if rank is None:
        rank = parallel_state.get_context_parallel_rank()
    if num_ranks == 1:
        return batch
    indices = thd_indices(cu_seqlens_padded, num_ranks, rank)
    rows = int(cu_seqlens_padded.reshape(-1)[-1])
    sliced = dict(batch)
    for name, x in batch.items():
        if name in _NOT_ROWS or x is None:
            continue
        if x.shape[1] != rows:
            raise InputError(f"{name} has {x.shape[1]} rows, but the padded documents have {rows}: pad them alike")
        sliced[name] = x.index_select(1, indices.to(x.device))
    return sliced


def install_thd_slicing() -> list[str]:
    """Have stock Megatron slice packed batches with ``slice_thd_batch`` instead of a kernel of Transformer Engine's.

    Replaces the function in ``megatron.core.utils`` and in modules that imported it already; returns their names. Call it
    before training starts, on every rank. Raises UnsupportedError for a release that slices otherwise.
    """
    for name, ours in (
        ("get_thd_batch_on_this_cp_rank", _get_thd_batch_on_this_cp_rank),
        ("_get_batch_on_this_cp_rank_per_document_balancing", _get_batch_per_document),
    ):
        theirs = getattr(megatron_utils, name, None)
        if theirs is None:
            continue
        modules = [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is theirs]
        for module in modules:
            setattr(module, name, ours)
        return sorted(module.__name__ for module in modules)
    raise UnsupportedError(
        "slicing packed batches without Transformer Engine",
        "this release of Megatron-core",
        "it has no function for packed batches that is known here",
        "call slice_thd_batch in your own get_batch",
    )


def _get_thd_batch_on_this_cp_rank(
    batch: dict[str, Any],
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor,
    max_seqlen: Tensor,
    cp_size: int | None = None,
    cp_rank: int | None = None,
) -> tuple[dict[str, Any], PackedSeqParams]:
    """Megatron-core 0.16 and 0.17."""
    return slice_thd_batch(batch, cu_seqlens_padded, num_ranks=cp_size, rank=cp_rank), packed_params(
        cu_seqlens, cu_seqlens_padded
    )


def _get_batch_per_document(batch: dict[str, Any], cp_group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Megatron-core 0.18 and later."""
    size = None if cp_group is None else dist.get_world_size(cp_group)
    rank = None if cp_group is None else dist.get_rank(cp_group)
    padded = batch.get("cu_seqlens_padded")
    return slice_thd_batch(batch, batch["cu_seqlens"] if padded is None else padded, num_ranks=size, rank=rank)
