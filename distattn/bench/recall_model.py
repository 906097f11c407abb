"""A small decoder for each kind of layer, trained on one task and scored by distance.

for each step:  a batch of the task at one of a few lengths ─▶ Decoder.loss at the scored positions ─▶ AdamW
every so often: accuracy on a few held-out sequences; enough is enough
at the end:     accuracy on many, by distance
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distattn.bench.recall_tasks import TASKS, Examples, Task, scaled
from distattn.config import OptimConfig
from distattn.errors import ConfigError
from distattn.mask import Mask
from distattn.models.config import LINEAR_KINDS, SOFTMAX, TITANS, LinearConfig, MemoryConfig, ModelConfig, RopeConfig
from distattn.models.decoder import Decoder
from distattn.planning import Plan, plan
from distattn.short_convolution import short_convolution
from distattn.training.optimizer import build_optimizer, clip_gradients, gradient_square_sum, learning_rate, set_learning_rate

WINDOW = 16
"""Keys that a query of a sliding-window layer sees, itself included."""

KINDS: dict[str, tuple[str, int]] = {
    SOFTMAX: (SOFTMAX, 0),
    "sliding_window": (SOFTMAX, WINDOW),
    **{kind: (kind, 0) for kind in LINEAR_KINDS},
    "gated_delta+softmax": ("gated_delta,softmax", 0),
    "lightning+softmax": ("lightning,softmax", 0),
    "sliding_window+gated_delta": ("softmax,gated_delta", WINDOW),
    **{kind: (kind, WINDOW) for kind in TITANS},
}
"""What is compared: ``model.layers`` and the window of its softmax attention, 0 for none. Segments are as long as windows."""

_SHIFT_WIDTH = 3
"""Taps of the short convolution over embeddings."""

_HELD_OUT = 1 << 40
"""Seeds from here on are of held-out sequences, those below of batches."""


@dataclass(frozen=True)
class Recipe:
    """How every model is built and trained, the same for all kinds.

    num_layers, dim: of the decoder. head_dim: features of its one linear head, whose state is head_dim × head_dim numbers a
    layer, and of its softmax heads. fractions: of the task's length (and pairs), taken in turn. batch: sequences of a step,
    fewer where they would have more than ``tokens``. stop_at: accuracy at which training ends early, looked at every
    check_every steps.
    """

    steps: int = 500
    batch: int = 64
    tokens: int = 4096
    num_layers: int = 2
    dim: int = 64
    head_dim: int = 32
    num_heads: int = 1
    lr: float = 5e-3
    fractions: tuple[float, ...] = (0.25, 0.25, 0.5, 1.0)
    check_every: int = 100
    stop_at: float = 0.995
    test_sequences: int = 512

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "tokens", "num_layers", "dim", "head_dim", "num_heads", "check_every", "test_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be at least 1.")


@dataclass(frozen=True)
class Trial:
    """One model: a task, a kind of ``KINDS`` and a seed, which decides its weights and its batches."""

    task: str
    kind: str
    seed: int
    recipe: Recipe = Recipe()
    device: str = "cpu"

    @property
    def key(self) -> str:
        return f"{self.task}|{self.kind}|seed {self.seed}|{self.recipe.steps} steps"

    def run(self) -> dict[str, Any]:
        """Train and score: ``accuracy``, ``by_distance`` (see ``by_distance``), ``steps``, ``seconds``, ``num_parameters``."""
        return _Run(self).result()


def model_config(kind: str, task: Task, recipe: Recipe) -> ModelConfig:
    """The decoder of a kind for a task. Raises ConfigError for an unknown kind, with those there are."""
    if kind not in KINDS:
        raise ConfigError(f"there is no kind {kind!r}: choose one of {', '.join(KINDS)}.")
    layers, window = KINDS[kind]
    return ModelConfig(
        vocab_size=task.vocab_size,
        dim=recipe.dim,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_heads,
        head_dim=recipe.head_dim,
        ffn_dim=2 * recipe.dim,
        layers=layers,
        sliding_window=window,
        init_std=0.1,  # 0.02 is for widths in the thousands: here it would leave every logit near 0 for long
        rope=RopeConfig(theta=10_000.0),
        linear=LinearConfig(
            num_heads=1, num_value_heads=1, head_dim=recipe.head_dim, value_head_dim=recipe.head_dim, conv_width=1
        ),
        memory=MemoryConfig(chunk=WINDOW),
    )


def by_distance(found: np.ndarray, examples: Examples) -> dict[str, list[Any]]:
    """Accuracy of tokens [B, T] at the scored positions, in bins of distance that double.

    ``edges``: bin i holds distances from edges[i] up to, not including, edges[i + 1]; ``accuracy``: None where a bin is
    empty; ``count``: scored positions in the bin.
    """
    right, distances = (found == examples.targets)[examples.scored], examples.distances[examples.scored]
    edges = [1 << i for i in range(int(distances.max()).bit_length() + 1)]
    bins = [(distances >= low) & (distances < high) for low, high in pairwise(edges)]
    return {
        "edges": edges,
        "accuracy": [float(right[b].mean()) if b.any() else None for b in bins],
        "count": [int(b.sum()) for b in bins],
    }


class ConvolvedEmbedding(nn.Embedding):
    """tokens [B, T] ─▶ e + conv(e) [B, T, dim], e the tokens' embeddings, conv a causal depthwise convolution.

    Zoology gives every mixer such a convolution, attention too: the tokens of a pair meet before the first layer, and what is
    compared is what a layer remembers, not how long it takes to learn to look one token back. weight: [vocab_size, dim].
    """

    def __init__(self, weight: Tensor, seed: int) -> None:
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight.detach())
        taps = torch.randn(weight.shape[1], _SHIFT_WIDTH, generator=torch.Generator().manual_seed(seed))
        self.taps = nn.Parameter((taps * _SHIFT_WIDTH**-0.5).to(weight.device))

    def forward(self, input: Tensor) -> Tensor:
        embedded = super().forward(input)
        return embedded + short_convolution(embedded, self.taps)


def make_model(kind: str, task: Task, recipe: Recipe, seed: int, device: str) -> Decoder:
    """The decoder of a kind, its weights drawn from the seed alone."""
    with torch.device(device):
        model = Decoder(model_config(kind, task, recipe), seed=seed)
    model.embedding = ConvolvedEmbedding(model.embedding.weight, seed)
    return model


class _Run:
    """A trial as it runs."""

    def __init__(self, trial: Trial) -> None:
        self.trial, self.recipe = trial, trial.recipe
        self.task = TASKS[trial.task]
        self.model = make_model(trial.kind, self.task, self.recipe, trial.seed, trial.device)
        config = self.model.config
        self.optim = OptimConfig(lr=self.recipe.lr, warmup_steps=50, weight_decay=0.0)
        self.stages = [Stage(scaled(self.task, f), config, trial.device) for f in self.recipe.fractions]
        self.whole = Stage(self.task, config, trial.device)

    def result(self) -> dict[str, Any]:
        start = time.perf_counter()
        steps = self._train()
        examples = self.task.sample(self.recipe.test_sequences, _HELD_OUT + 1)
        found = self.whole.answers(self.model, examples)
        return {
            "accuracy": accuracy(found, examples),
            "by_distance": by_distance(found, examples),
            "steps": steps,
            "seconds": time.perf_counter() - start,
            "num_parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def _train(self) -> int:
        """Steps until the model is good enough, or all of them."""
        recipe, optimizer = self.recipe, build_optimizer(self.optim, self.model)
        parameters = list(self.model.parameters())
        few = self.task.sample(64, _HELD_OUT)
        for step in range(1, recipe.steps + 1):
            stage = self.stages[step % len(self.stages)]
            set_learning_rate(optimizer, learning_rate(self.optim, step, recipe.steps))
            count = max(min(recipe.batch, recipe.tokens // stage.task.seq_len), 1)
            stage.loss(self.model, stage.task.sample(count, self.trial.seed << 20 | step)).backward()
            norm = gradient_square_sum(parameters, parameters[0].device).sqrt().item()
            clip_gradients(parameters, norm, self.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if step % recipe.check_every == 0 and accuracy(self.whole.answers(self.model, few), few) >= recipe.stop_at:
                return step
        return recipe.steps


@dataclass(frozen=True)
class Stage:
    """A task at one length: what the decoder is called with."""

    task: Task
    config: ModelConfig
    device: str

    @cached_property
    def plan(self) -> Plan:
        length, window, c = self.task.seq_len, self.config.sliding_window, self.config
        mask = Mask.sliding_window(length, window - 1) if window else Mask.causal(length)
        return plan(mask, heads=c.num_heads, kv_heads=c.num_kv_heads, head_dim=c.head_dim, dtype=torch.float32)

    def loss(self, model: Decoder, examples: Examples) -> Tensor:
        """Mean loss of the scored positions, in nats."""
        total, count = model.loss(self._put(examples.tokens), self._positions, self._put(examples.targets), self.plan)
        return total / count

    @torch.no_grad()
    def answers(self, model: Decoder, examples: Examples) -> np.ndarray:
        """The likeliest token after every position, [B, T]."""
        chunks = self._put(examples.tokens).split(64)
        hidden = (model(chunk, self._positions, self.plan) for chunk in chunks)
        return torch.cat([(h @ model.output_weight.T).argmax(-1) for h in hidden]).cpu().numpy()

    @cached_property
    def _positions(self) -> Tensor:
        return torch.arange(self.task.seq_len, device=self.device)

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def accuracy(found: np.ndarray, examples: Examples) -> float:
    """Share of the scored positions that found [B, T] has right."""
    return float((found == examples.targets)[examples.scored].mean())
