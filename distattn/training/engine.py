"""Who shards the model and updates it: FSDP2 with our optimizer, or DeepSpeed's ZeRO (``train.engine``).

An engine gives the trainer a model to call, sums its gradients over all ranks, updates, and hands its state to checkpoints in
one form, so that a run may resume under the other engine.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from distattn.config import Config
from distattn.errors import ConfigError
from distattn.models import Decoder
from distattn.training.checkpoint import Restored
from distattn.training.mesh import Mesh
from distattn.training.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_square_sum,
    set_learning_rate,
    set_update_count,
    training_state,
)
from distattn.training.sharding import build_model

Accept = Callable[[float, float], None]
"""``accept(loss_sum, norm)`` of the whole step; raises where one of them is not finite."""

Load = Callable[[Mapping[str, Any]], Restored | None]
"""Reads a checkpoint into tensors or parts of them, in place, and says which."""


class Engine(Protocol):
    """One rank's part of the model, its gradients and its optimizer. All methods are collective over all ranks."""

    model: Decoder
    """What the loop and evaluations call."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of a step's loss, which is divided by the labels of the whole step."""
        ...

    def update(self, loss_sum: Tensor, rate: float, accept: Accept) -> tuple[float, float]:
        """Update once, at this learning rate, after the last ``backward`` of a step.

        loss_sum: 0-d fp64, of this rank's tokens. Returns the sum over all ranks and the norm of the gradient before
        clipping, the same on every rank; parameters change only if ``accept`` does not raise.
        """
        ...

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds (``training_state``), as ``CheckpointManager.save`` takes it."""
        ...

    def restore(self, load: Load) -> Restored | None:
        """Take over what ``load`` reads, if there is anything."""
        ...


class FsdpEngine:
    """FSDP2 and our AdamW."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config, self._mesh = config.optim, mesh
        self.model = build_model(config, mesh)
        self._parameters = list(self.model.parameters())
        self._optimizer = build_optimizer(config.optim, self.model)
        self._tensors = training_state(self.model, self._optimizer)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self, loss_sum: Tensor, rate: float, accept: Accept) -> tuple[float, float]:
        sums = torch.stack([loss_sum, gradient_square_sum(self._parameters, self._mesh.device)])
        total, square_sum = self._mesh.sum(sums).tolist()
        norm = math.sqrt(square_sum)
        accept(total, norm)
        set_learning_rate(self._optimizer, rate)
        clip_gradients(self._parameters, norm, self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, norm

    def state(self) -> dict[str, Any]:
        return dict(self._tensors)

    def restore(self, load: Load) -> Restored | None:
        restored = load(self._tensors)
        if restored is not None:
            set_update_count(self._optimizer, restored.step)
        return restored


def build_engine(config: Config, mesh: Mesh) -> Engine:
    """The engine that ``train.engine`` names. Collective."""
    if config.train.engine == "fsdp":
        return FsdpEngine(config, mesh)
    # DeepSpeed looks for its device when it is imported, and would take a GPU that the run does not.
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
    from distattn.integrations.deepspeed_training import ZeroEngine

    return ZeroEngine(config, mesh)


def check_engine(config: Config) -> None:
    """Whether the engine is installed; ConfigError says how to get it."""
    if config.train.engine != "deepspeed":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "train.engine=deepspeed needs the package deepspeed: pip install 'distattn[deepspeed]', or set train.engine=fsdp."
        )
