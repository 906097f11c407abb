"""What the Megatron integration refuses, and why. Config and call are read by name: this file imports no Megatron."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distattn.errors import UnsupportedError
from distattn.integrations.megatron_schedule import KEEP, LINEAR, Schedule
from distattn.integrations.refusals import (
    refuse_bias,
    refuse_cache,
    refuse_dropout,
    refuse_tensor_mask,
    refuse_torch_context_parallel,
    refuse_unknown_arguments,
)

_DENSE_MASK = (
    "pass --no-create-attention-mask-in-dataloader (causal masks are made here), and packed sequences instead of "
    "--reset-attention-mask"
)


def refuse_construction(
    name: str, config: Any, schedule: Schedule, mask_type: Any, attention_type: str, dropout: float | None
) -> None:
    """Everything that the config and the layer's arguments say; ``name`` is the schedule and its layer."""
    if schedule.strategy == LINEAR:
        raise UnsupportedError(
            "the schedule of a linear layer", name, "this layer is softmax attention", "name a strategy such as distattn:ring"
        )
    if attention_type != "self":
        reason = "Megatron cuts one sequence over ranks, and its cross attention has two"
        raise UnsupportedError(f"{attention_type} attention", name, reason, "leave these layers on Megatron's own class")
    if mask_type.name == "arbitrary":
        reason = "an arbitrary mask is a tensor, whose rows do not say which tokens they are"
        raise UnsupportedError("attn_mask_type arbitrary", name, reason, "use causal, no_mask, or packed documents")
    refuse_dropout(config.attention_dropout if dropout is None else dropout, name, "pass --attention-dropout 0")
    for option, reason, alternative in (
        ("qk_clip", "its kernels do not return the largest logit", "turn it off; qk_layernorm bounds logits too"),
        ("log_max_attention_logit", "its kernels do not return the largest logit", "turn it off"),
        ("fp8_dot_product_attention", "it computes in 16 or 32 bits", "turn it off; projections may stay in fp8"),
        ("fp8_multi_head_attention", "it computes in 16 or 32 bits", "turn it off; projections may stay in fp8"),
        ("batch_invariant_mode", "its kernels choose their tiles by the batch", "turn it off"),
    ):
        if getattr(config, option, False):
            raise UnsupportedError(option, name, reason, alternative)
    _refuse_graphs(name, config)
    if config.fp8 and schedule.remat == KEEP:
        reason = "Transformer Engine's fp8 checkpoint does not tell a first pass from a recomputation"
        raise UnsupportedError("remat=keep_out_lse with fp8", name, reason, "use remat=recompute, or drop core_attn")
    _refuse_dynamic(name, config)


def _refuse_graphs(name: str, config: Any) -> None:
    """CUDA graphs around attention."""
    kind = getattr(config, "cuda_graph_impl", "none")
    legacy = getattr(config, "enable_cuda_graph", False) or getattr(config, "external_cuda_graph", False)
    parts = getattr(config, "cuda_graph_modules", None)
    if parts is None:
        parts = getattr(config, "cuda_graph_scope", None)
    parts = [parts] if isinstance(parts, str) else parts or []
    names = {str(getattr(part, "name", part)) for part in parts}
    if (kind != "none" or legacy) and (not names or names & {"full", "attn", "full_iteration"}):
        reason = "its transfers are waited for by the host, with a timeout that names ranks"
        raise UnsupportedError("a CUDA graph around attention", name, reason, "graph other parts, or pass cuda_graph_impl none")


def _refuse_dynamic(name: str, config: Any) -> None:
    """Groups of another size in each batch, with what Megatron itself does not combine them with."""
    if not getattr(config, "hybrid_context_parallel", False):
        return
    pipeline = getattr(config, "pipeline_model_parallel_size", 1)
    for given, feature, alternative in (
        (getattr(config, "multi_latent_attention", False), "multi-latent attention", "turn either off"),
        (pipeline > 1, f"pipeline parallelism over {pipeline} ranks", "use one pipeline rank"),
        (not config.calculate_per_token_loss, "a loss that is averaged by rank", "pass --calculate-per-token-loss"),
    ):
        if given:
            reason = "Megatron's hybrid context parallelism does not combine with it"
            raise UnsupportedError(f"hybrid_context_parallel with {feature}", name, reason, alternative)


def refuse_call(
    name: str, query: Tensor, key: Tensor, mask_type: Any, packed: bool, mask: Any, bias: Any, arguments: Mapping[str, Any]
) -> None:
    """Everything that one call passes besides groups and documents."""
    refuse_tensor_mask(mask, name, _DENSE_MASK)
    refuse_bias(bias, name)
    refuse_unknown_arguments(arguments, name)
    refuse_cache(query.shape[0], key.shape[0], name)
    if mask_type.name == "padding" and not packed:
        reason = "nothing says which tokens are padding, so that they would be attended to"
        raise UnsupportedError("attn_mask_type padding without packed sequences", name, reason, "pass packed_seq_params (thd)")
    if mask_type.name == "arbitrary":
        reason = "an arbitrary mask is a tensor, whose rows do not say which tokens they are"
        raise UnsupportedError("attn_mask_type arbitrary", name, reason, "use causal, no_mask, or packed documents")
    refuse_torch_context_parallel(name)


def refuse_group(
    name: str, group: dist.ProcessGroup | None, size: int | None, static: dist.ProcessGroup | None, packed: bool
) -> None:
    """The group of a call, from ``packed_seq_params.cp_group`` and ``local_cp_size``."""
    if group is None and size is not None and size > 1:
        reason = "ranks that take part in a call must be told, and a size does not tell them"
        raise UnsupportedError(f"local_cp_size {size} without cp_group", name, reason, "pass packed_seq_params.cp_group too")
    if group is not None and size is not None and dist.get_world_size(group) != size:
        reason = f"the group in cp_group has {dist.get_world_size(group)} ranks"
        raise UnsupportedError(f"local_cp_size {size}", name, reason, "pass a group of that size")
    dynamic = (group is not None and group is not static) or (group is None and size == 1)
    if packed and dynamic and static is not None and dist.get_world_size(static) > 1:
        reason = "Megatron rotates packed positions by the static group, so that they would be wrong"
        raise UnsupportedError("packed sequences (thd) with a group of their own", name, reason, "use sbhd for such batches")


def refuse_cross_documents(name: str, packed: Any, read: Callable[[Tensor], bytes]) -> None:
    """Queries and keys of packed self-attention are the same documents."""
    for queries, keys in (
        (packed.cu_seqlens_q, packed.cu_seqlens_kv),
        (packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded),
    ):
        if queries is keys or keys is None or queries is None:
            continue
        if read(queries) != read(keys):
            reason = "queries and keys of self-attention are the same tokens"
            raise UnsupportedError("cu_seqlens_kv other than cu_seqlens_q", name, reason, "pass one cu_seqlens for both")


def refuse_undeclared_loss(name: str, config: Any, schedule: Schedule) -> None:
    """Padded documents leave ranks with unequal tokens: a mean of their means is not the mean."""
    if config.calculate_per_token_loss or schedule.loss == "reduced":
        return
    reason = "context ranks hold unequal numbers of real tokens, and Megatron averages the ranks' own means"
    alternative = "pass --calculate-per-token-loss, or loss=reduced if the loss function sums tokens over context ranks itself"
    raise UnsupportedError("padded documents with a loss that is averaged by rank", name, reason, alternative)
