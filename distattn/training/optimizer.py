"""AdamW with a warm-up and a cosine, and the norm of a sharded gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distattn.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of the step-th of ``steps`` updates, counted from 1.

    Linear up to ``lr`` at step ``warmup_steps``, then half a cosine down to ``min_lr_ratio · lr`` at the last step.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


MOMENTS = ("exp_avg", "exp_avg_sq")


def parameter_groups(config: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """AdamW's groups: matrices, which decay, and the rest."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over all parameters; only matrices decay. Its state exists at once, so that a checkpoint can be read into it."""
    groups = parameter_groups(config, model)
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for p in (p for group in groups for p in group["params"]):
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def training_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """All that a checkpoint holds: ``model.NAME``, ``optimizer.exp_avg.NAME`` and ``optimizer.exp_avg_sq.NAME``."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for moment in MOMENTS:
            tensors[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
    return tensors


def set_update_count(optimizer: torch.optim.AdamW, step: int) -> None:
    """Tell AdamW's bias correction how many updates there were; the count is the checkpoint's step, not a tensor of it."""
    for state in optimizer.state.values():
        state["step"].fill_(float(step))


@torch.no_grad()
def gradient_square_sum(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Sum of squares of this rank's shards of the gradients, 0-d fp64: summed over ranks, the squared global norm."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for p in parameters:
        if p.grad is not None:
            grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            total += torch.linalg.vector_norm(grad, dtype=torch.float32).double().square()
    return total


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale all gradients by limit / norm where the global norm exceeds the limit; a limit of 0 is off."""
    if limit == 0 or norm <= limit:
        return
    for p in parameters:
        if p.grad is not None:
            grad = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            grad.mul_(limit / norm)
