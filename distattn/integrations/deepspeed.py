"""DeepSpeed's ZeRO over data × context ranks, and its ``DistributedAttention`` on our schedules.

    rank = data_rank · context + context_rank

    context group     the ranks of one sequence: attention talks here          DeepSpeed's sequence-parallel group
    all ranks         parameters, gradients and optimizer states are cut here  DeepSpeed's sequence-data-parallel group

DeepSpeed *averages* gradients over ranks, and over which number depends on the stage: multiply a loss that is already divided
by the tokens of all ranks by ``gradient_divisor(engine)``, and gradients are sums.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.utils import groups
from torch import nn

from distattn.errors import PlanError, UnsupportedError
from distattn.integrations.deepspeed_attention import DistributedAttention, LocalAttention

__all__ = [
    "ContextParallelUnit",
    "DistributedAttention",
    "LocalAttention",
    "context_group",
    "device_type",
    "gradient_divisor",
    "initialize",
    "refuse",
]

STAGES = (1, 2, 3)

_NAME = "distattn.integrations.deepspeed"


class ContextParallelUnit:
    """The ``mpu`` of ``deepspeed.initialize``: context parallel as DeepSpeed's sequence parallelism.

    It has no data-parallel group on purpose: ZeRO stage 3 would cut parameters over that group alone and never sum the
    gradients of context ranks. Model parallelism is a group of one, not the sequence-parallel group as in DeepSpeed's own
    ``parallel_state_sp``: norms of gradients are summed over it.
    """

    def __init__(self, context: int, context_group: dist.ProcessGroup | None = None) -> None:
        """context: ranks that share a sequence, neighbours, a divisor of the number of ranks. context_group: theirs, if there
        is one already. Collective."""
        if not dist.is_initialized():
            raise PlanError("DeepSpeed needs torch.distributed: call torch.distributed.init_process_group first")
        rank, world = dist.get_rank(), dist.get_world_size()
        if context < 1 or world % context:
            raise PlanError(f"context={context} must be a divisor of the {world} ranks; change it or start other ranks")
        if context_group is not None and dist.get_world_size(context_group) != context:
            raise PlanError(f"context_group has {dist.get_world_size(context_group)} ranks, but context={context}")
        # Only its members make a group: with a thousand ranks the loop over all groups would take minutes.
        self._alone = _new_group([rank])
        first = rank - rank % context
        self.context_group = _new_group(range(first, first + context)) if context_group is None else context_group
        self.context = context

    def initialize_sequence_parallel(self, sequence_parallel_size: int) -> None:
        """The groups exist already; DeepSpeed takes the method's presence for "no data-parallel group but all ranks"."""
        if sequence_parallel_size != self.context:
            raise PlanError(f"the groups are of {self.context} context ranks, and {sequence_parallel_size} were asked for")

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.context_group

    def get_sequence_parallel_world_size(self) -> int:
        return self.context

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self.context_group)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


def initialize(
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    context: int,
    context_group: dist.ProcessGroup | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    model_parameters: Any = None,
    lr_scheduler: Any = None,
) -> deepspeed.DeepSpeedEngine:
    """``deepspeed.initialize`` with our context parallelism; ``context_group(engine)`` is the group to plan over.

    config: DeepSpeed's own, as a mapping, with ``zero_optimization.stage`` 1, 2 or 3; gradients are communicated in fp32 where
    it says nothing else. context, context_group: as for ``ContextParallelUnit``. optimizer, model_parameters, lr_scheduler: as
    DeepSpeed takes them. Collective over all ranks; torch.distributed is initialised.

    Multiply the loss by ``gradient_divisor(engine)``. Raises UnsupportedError for what cannot be right together, before any
    communication, and PlanError for a context that does not divide the ranks.
    """
    settings = {"seq_parallel_communication_data_type": "fp32", "communication_data_type": "fp32", **config}
    refuse(model, settings)
    unit = ContextParallelUnit(context, context_group)
    # DeepSpeed insists on the variable, which its own launcher and torchrun set.
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if device_type() == "cuda" else 0))
    with _without_compiling():
        # Not ``deepspeed.initialize`` alone: where torch.distributed exists already, this only adopts it.
        deepspeed.comm.init_distributed(_accelerator().communication_backend_name(), auto_mpi_discovery=False)
        engine, *_ = deepspeed.initialize(
            model=model,
            config=settings,
            mpu=unit,
            optimizer=optimizer,
            model_parameters=model_parameters,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    return engine


def device_type() -> str:
    """The device that DeepSpeed has chosen when it was imported, such as "cpu" or "cuda"."""
    return _accelerator().device_name()


def context_group(engine: deepspeed.DeepSpeedEngine) -> dist.ProcessGroup:
    """The ranks that share a sequence with this one: the group to plan over."""
    unit = engine.mpu
    if not isinstance(unit, ContextParallelUnit):
        raise PlanError("this engine was not made by distattn.integrations.deepspeed.initialize, and has no context group")
    return unit.context_group


def gradient_divisor(engine: deepspeed.DeepSpeedEngine) -> float:
    """What this engine divides the sum of all ranks' gradients by.

    Stages 1 and 2 divide by the data ranks, ranks / context; stage 3 by all ranks (``__avg_scatter_grads``, which reduces
    and scatters, does not look at sequence parallelism).
    """
    ranks = dist.get_world_size()
    return float(ranks) if engine.zero_optimization_stage() == 3 else ranks / engine.sequence_parallel_size


def refuse(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for what would be wrong, or untried, together with our context parallelism."""
    for feature, given, reason, alternative in _refusals(model, config):
        if given:
            raise UnsupportedError(feature, _NAME, reason, alternative)


def _refusals(model: nn.Module, config: Mapping[str, Any]) -> Iterator[tuple[str, bool, str, str]]:
    """(feature, whether it was asked for, why not, what instead)."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    twice = "the sequence would be sharded twice"
    yield (
        f"zero_optimization.stage={stage}", stage not in STAGES, "only stages 1, 2 and 3 sum the gradients of context ranks",
        "take one of them",
    )  # fmt: skip
    yield (
        "DeepSpeed's pipeline engine", isinstance(model, PipelineModule), "it hands tensors from stage to stage, and not plans",
        "pass a plain nn.Module",
    )  # fmt: skip
    yield (
        "fp16", bool((config.get("fp16") or {}).get("enabled")), "loss scaling has not been tried with summed gradients",
        "take bf16",
    )  # fmt: skip
    yield (
        "sequence_parallel_size in DeepSpeed's configuration", config.get("sequence_parallel_size", 1) > 1, twice,
        "leave it out: context is the argument",
    )  # fmt: skip
    yield (
        "DeepSpeed's device mesh", getattr(groups, "mesh_device", None) is not None,
        "its sequence-parallel group would win over ours", "initialize without mesh_param",
    )  # fmt: skip
    yield (
        "DeepSpeed's own sequence parallelism (parallel_state_sp)", parallel_state_sp._SEQUENCE_PARALLEL_GROUP is not None,
        twice, "do not call initialize_sequence_parallel",
    )  # fmt: skip
    replaced = _replaced_attention()
    yield (
        f"attn_implementation={replaced} replaced by UlyssesSPAttentionHF", bool(replaced), twice,
        "do not call register_with_transformers",
    )  # fmt: skip
    yield (
        "the compiler pass autosp", "autosp" in ((config.get("compile") or {}).get("passes") or ()), twice,
        "leave it out of compile.passes",
    )  # fmt: skip
    yield (
        "tensor_parallel", (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1,
        "it cuts heads that a plan counts whole", "leave it out",
    )  # fmt: skip
    yield (
        "zero_optimization.reduce_scatter=false", stage == 3 and zero.get("reduce_scatter") is False,
        "small and large gradients would be divided by different numbers", "leave it out",
    )  # fmt: skip
    shared = zero.get("zero_hpz_partition_size", 1) > 1 or bool(zero.get("zero_quantized_gradients"))
    yield "ZeRO++", shared, "its divisor of gradients has not been tried with context ranks", "leave it out"


def _replaced_attention() -> str:
    """The attention functions of transformers that DeepSpeed has put its own in place of, where transformers is loaded."""
    modeling = sys.modules.get("transformers.modeling_utils")
    functions = getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        return ""
    names = functions.valid_keys() if hasattr(functions, "valid_keys") else list(functions)
    return ", ".join(n for n in names if (getattr(functions[n], "__module__", "") or "").startswith("deepspeed."))


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Keep DeepSpeed from compiling an all-reduce for inference on CPUs, a minute of gcc that training has no use for."""
    compatible = deepspeed.ops.__compatible_ops__
    name = "deepspeed_shm_comm"
    before = compatible.get(name)
    compatible[name] = False
    try:
        yield
    finally:
        if before is None:
            del compatible[name]
        else:
            compatible[name] = before


def _accelerator() -> Any:
    return get_accelerator()


def _new_group(ranks: Any) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
