"""DeepSpeed's ZeRO as the trainer's engine: ``train.engine=deepspeed``, ``train.zero_stage=1|2|3``.

What a step computes is what it computes under FSDP2: the same losses, the same checkpoints (safetensors and JSON, never
DeepSpeed's own, which are pickles), so that a run may go on under either.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from distattn.config import Config
from distattn.errors import ConfigError
from distattn.integrations.deepspeed import device_type, gradient_divisor, initialize
from distattn.models import Decoder
from distattn.models.hf_weights import load_weights
from distattn.planning import Plan
from distattn.training.checkpoint import Restored
from distattn.training.checkpoint_parts import Block, Part, TensorInfo
from distattn.training.engine import Accept, Load
from distattn.training.mesh import Mesh
from distattn.training.optimizer import MOMENTS, parameter_groups, set_learning_rate, set_update_count
from distattn.training.sharding import compute_dtype, recompute_blocks

_NEVER = 1 << 60


class ZeroEngine:
    """``distattn.training.engine.Engine`` on DeepSpeed. Every rank holds the whole model once, while it is made."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Collective. ConfigError: torch.distributed is missing, or DeepSpeed has taken another device."""
        if mesh.all_ranks is None:
            raise ConfigError("train.engine=deepspeed needs torch.distributed: start the run with distattn train or torchrun.")
        device = device_type()
        if device != mesh.device.type:
            raise ConfigError(
                f"train.device={mesh.device.type} is not the device of DeepSpeed, {device}: set the environment variable "
                f"DS_ACCELERATOR={mesh.device.type}."
            )
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # DeepSpeed 0.19 calls two collectives by the names that torch 2.13 deprecates, in every step.
        warnings.filterwarnings(
            "ignore", r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)`", FutureWarning
        )
        self._mesh = mesh
        self._num_batches = config.train.global_batch // mesh.data
        self._num_backward = 0
        with torch.device(mesh.device):
            self._decoder = Decoder(config.model, seed=config.train.seed)
        if config.model.init_from:
            load_weights(self._decoder, config.model.init_from)
        recompute_blocks(self._decoder, config.train.activation_checkpointing, offload=config.train.activation_offload)
        optim = config.optim
        self._adam = torch.optim.AdamW(
            parameter_groups(optim, self._decoder), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        self._engine = initialize(
            _Method(self._decoder, external=config.train.zero_stage == 3),
            zero_settings(config, mesh),
            context=mesh.context,
            context_group=mesh.context_group,
            optimizer=self._adam,
        )
        _make_moments(self._engine.optimizer, self._adam)
        # The part of a decoder that trainers and evaluations call.
        self.model = cast(Decoder, ZeroModel(self._engine, self._decoder))

    def backward(self, loss: Tensor) -> None:
        if self._num_backward:
            self._engine.step()  # of the sequence before: counts it, and updates nothing until the last
        self._engine.backward(loss * gradient_divisor(self._engine), scale_wrt_gas=False)
        self._num_backward += 1

    def update(self, loss_sum: Tensor, rate: float, accept: Accept) -> tuple[float, float]:
        assert self._num_backward == self._num_batches, "DeepSpeed updates after the number of sequences that it was told"
        self._num_backward = 0
        total = self._mesh.sum(loss_sum).item()
        accept(total, 0.0)
        set_learning_rate(self._adam, rate)
        # It computes the norm on the way and passes over a step whose gradient is not finite.
        self._engine.step()
        zero: Any = self._engine.optimizer
        norm = math.inf if zero.overflow else float(zero._global_grad_norm)
        accept(total, norm)
        return total, norm

    def state(self) -> dict[str, Any]:
        """Each tensor is gathered whole, one at a time, and this rank's rows of it are copied to the CPU."""
        parts: dict[str, Any] = {}
        for name, parameter in self._decoder.named_parameters():
            parts[f"model.{name}"] = self._part(f"model.{name}", _whole_tensor(safe_get_full_fp32_param(parameter)))
            for moment in MOMENTS:
                key = f"optimizer.{moment}.{name}"
                parts[key] = self._part(key, _whole_tensor(safe_get_full_optimizer_state(parameter, moment)))
        return parts

    def restore(self, load: Load) -> Restored | None:
        parts: dict[str, Part] = {}
        for name, parameter in self._decoder.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for key in (f"model.{name}", *(f"optimizer.{moment}.{name}" for moment in MOMENTS)):
                block = self._rows(tuple(shape))
                info = TensorInfo(tuple(shape), torch.float32)
                parts[key] = Part(key, info, block, torch.zeros(block.shape))
        restored = load(parts)
        if restored is None:
            return None
        for name, parameter in self._decoder.named_parameters():
            whole = self._gather(parts.pop(f"model.{name}"))
            safe_set_full_fp32_param(parameter, whole)
            _set_weight(parameter, whole)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, self._gather(parts.pop(f"optimizer.{moment}.{name}")), moment)
        set_update_count(self._adam, restored.step)
        return restored

    def _part(self, name: str, whole: Tensor) -> Part:
        block = self._rows(tuple(whole.shape))
        rows = whole.detach()[block.offset[0] : block.offset[0] + block.shape[0]]
        return Part(name, TensorInfo(tuple(whole.shape), whole.dtype), block, rows.to("cpu", copy=True))

    def _rows(self, shape: tuple[int, ...]) -> Block:
        """This rank's rows of a tensor, as torch.chunk cuts."""
        piece = -(-shape[0] // self._mesh.world)
        first = min(self._mesh.rank * piece, shape[0])
        return Block((first, *(0 for _ in shape[1:])), (min(piece, shape[0] - first), *shape[1:]))

    def _gather(self, part: Part) -> Tensor:
        shape = part.info.shape
        stride = torch.empty(shape, device="meta").stride()
        assert self._mesh.all_ranks is not None
        local = part.values.to(self._mesh.device)
        return DTensor.from_local(
            local, self._mesh.all_ranks, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        ).full_tensor()


class ZeroModel:
    """The decoder through DeepSpeed's engine, whose hooks gather the weights."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decoder: Decoder) -> None:
        self._engine, self._decoder = engine, decoder

    def loss(
        self, tokens: Tensor, positions: Tensor, labels: Tensor, plan: Plan, *, chunk_tokens: int = 1024
    ) -> tuple[Tensor, Tensor]:
        """As ``Decoder.loss``."""
        return self._engine("loss", tokens, positions, labels, plan, chunk_tokens=chunk_tokens)

    def token_losses(
        self, tokens: Tensor, positions: Tensor, labels: Tensor, plan: Plan, *, chunk_tokens: int = 1024
    ) -> Tensor:
        """As ``Decoder.token_losses``."""
        self._engine.eval()  # or it would count the call among those of the step
        try:
            with torch.no_grad():
                return self._engine("token_losses", tokens, positions, labels, plan, chunk_tokens=chunk_tokens)
        finally:
            self._engine.train()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As ``Decoder.parameters``; in stage 3 they are empty outside of a call."""
        return self._decoder.parameters(recurse)


class _Method(nn.Module):
    """Calls a method of the decoder as a module's forward, which is what DeepSpeed hooks into."""

    def __init__(self, decoder: Decoder, *, external: bool) -> None:
        super().__init__()
        self.decoder = decoder
        if external:
            # Read outside of the module that owns it, by the loss.
            deepspeed.zero.register_external_parameter(self, decoder.output_weight)

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.decoder, method)(*args, **kwargs)


def zero_settings(config: Config, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's configuration of a run."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.train.global_batch // mesh.data,
        "gradient_clipping": config.optim.clip_norm,
        "steps_per_print": _NEVER,
        "zero_optimization": {"stage": config.train.zero_stage},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if compute_dtype(config, mesh.device) == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return settings


def _make_moments(zero: Any, adam: torch.optim.AdamW) -> None:
    """AdamW's state at once, so that a checkpoint can be read into it; ZeRO has put flat pieces in place of parameters."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    pieces = next(getattr(zero, name) for name in names if hasattr(zero, name))
    for piece in pieces:
        adam.state[piece] = {
            "step": torch.zeros((), dtype=torch.float32, device=piece.device),
            "exp_avg": torch.zeros_like(piece, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(piece, requires_grad=False),
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _whole_tensor(gathered: Any) -> Tensor:
    assert isinstance(gathered, Tensor), "every parameter is trained"
    return gathered


@torch.no_grad()
def _set_weight(parameter: nn.Parameter, whole: Tensor) -> None:
    """The copy of the weight that forwards read."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(whole)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.copy_(whole)
