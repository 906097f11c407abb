"""The model as it is trained: weights sharded by FSDP2 over all ranks, activation checkpointing chosen by the config.

Parameters, gradients and optimizer states are cut over data × context ranks alike, since context ranks hold the same weights
as data ranks do. Gradients are summed, not averaged: the loss is already divided by the number of tokens of the whole step,
so loss and gradients do not depend on how the batch was sharded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from distattn.attention import checkpoint_contexts
from distattn.config import Config
from distattn.models import Decoder
from distattn.models.hf_weights import load_weights
from distattn.training.mesh import Mesh


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """dtype of activations and of the gathered weights; master weights, gradients and optimizer states are fp32."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if config.train.precision == "float32" else torch.bfloat16


def build_model(config: Config, mesh: Mesh) -> Decoder:
    """The decoder with its initial weights, which are the same whatever the mesh. Collective."""
    dtype = compute_dtype(config, mesh.device)
    with torch.device("meta"):
        model = Decoder(config.model)
    if config.train.nano_batches != 1:
        with torch.device("meta"):
            model.use_ping_pong()
    if mesh.all_ranks is not None and (mesh.world > 1 or dtype != torch.float32):
        _shard(model, mesh, dtype)
    model.to_empty(device=mesh.device)
    model.init_weights(config.train.seed)
    if config.model.init_from:
        load_weights(model, config.model.init_from)
    recompute_blocks(model, config.train.activation_checkpointing, offload=config.train.activation_offload)
    return model


def recompute_blocks(model: Decoder, mode: str, *, offload: bool) -> None:
    """Activation checkpointing of every block, as ``train.activation_checkpointing`` says.

    offload: the blocks' inputs wait in pinned host memory for their backward (``train.activation_offload``).
    """
    if mode != "none":
        contexts = {"context_fn": checkpoint_contexts} if mode == "selective" else {}
        run = functools.partial(checkpoint, use_reentrant=False, **contexts)
        model.set_block_runner(functools.partial(_with_inputs_on_host, run) if offload else run)


def _with_inputs_on_host(run: Callable[..., Any], *args: Any) -> Tensor:
    """A checkpointed call: the checkpoint's own hooks are the inner ones, so that only what it keeps is moved."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return run(*args)


def _shard(model: Decoder, mesh: Mesh, dtype: torch.dtype) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = model.blocks if model.ping_pong is None else model.ping_pong.phases
    for unit in units:
        fully_shard(unit, mesh=mesh.all_ranks, mp_policy=policy)
    # Weights of a phase are reached through the blocks too, where they are nobody's.
    taken = {parameter for unit in units for parameter in unit.parameters()}
    fully_shard(model, mesh=mesh.all_ranks, mp_policy=policy, ignored_params=taken)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    for method in ("loss", "nano_loss", "token_losses"):
        register_fsdp_forward_method(model, method)
