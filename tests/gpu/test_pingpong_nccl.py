"""NCCL on 2 GPUs: ping-pong, servers and both backward modes, exactly as on gloo; and training with them as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distattn.config import Config
from distattn.testing import run_ranks
from tests.test_pingpong import TOLERANCE, run_cases
from tests.test_pingpong_training import make_config, variant
from tests.training.test_trainer_sharding import Losses, train

pytestmark = pytest.mark.gpu(2)

WAYS: list[dict[str, Any]] = [
    {"parallel.strategy": "ring"},
    {"train.nano_batches": 2},
    {"train.nano_batches": 2, "parallel.backward": "keep"},
    {"train.nano_batches": 2, "parallel.servers": 1, "train.activation_checkpointing": "selective"},
    {"train.nano_batches": 2, "parallel.servers": 1, "parallel.backward": "keep"},
    {"train.nano_batches": 0, "parallel.strategy": "auto"},
]
"""The first is what the others are compared with: one piece, no server."""


def test_results_and_gradients_are_exact() -> None:
    for rank, errors in enumerate(run_ranks(run_cases, 2, "cuda", backend="nccl", timeout_s=200)):
        assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}, f"rank {rank}"


def train_all(rank: int, world: int, configs: list[Config]) -> list[Losses]:
    torch.cuda.set_device(rank)
    return [train(rank, config, f"cuda:{rank}")[0] for config in configs]


@pytest.mark.timeout(300)
def test_losses_of_training_are_those_of_one_piece(tmp_path: Path) -> None:
    plain = make_config(tmp_path).replace("kernel", "reference").replace("train.precision", "float32")
    configs = [variant(plain, 2, i, way) for i, way in enumerate(WAYS)]
    for found in run_ranks(train_all, 2, configs, backend="cpu:gloo,cuda:nccl", timeout_s=280):
        for way, losses in zip(WAYS[1:], found[1:], strict=True):
            assert losses == pytest.approx(found[0], rel=1e-5), way
