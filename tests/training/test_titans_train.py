"""Two context ranks give the losses of one for each kind of Titans layer. Gloo on CPU with 2 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distattn.config import Config, load_config
from distattn.data import open_cache
from distattn.models.config import TITANS
from distattn.testing import run_ranks
from distattn.training.mesh import build_mesh
from distattn.training.run_dir import RunDir
from distattn.training.trainer import StopRequest, Trainer

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "titans.yaml"
SMALL = {
    "model.dim": 16, "model.num_layers": 1, "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 4,
    "model.ffn_dim": 24, "model.init_std": 0.2, "model.sliding_window": 11, "model.linear.num_heads": 1,
    "model.linear.num_value_heads": 2, "model.linear.head_dim": 4, "model.linear.value_head_dim": 6, "model.memory.chunk": 8,
    "data.seq_len": 93, "data.eval_sequences": 1, "data.held_out_fraction": 0.2, "train.steps": 3, "train.device": "cpu",
    "optim.lr": 1e-2, "parallel.data": 1, "log.plot": False,
}  # fmt: skip
"""Borders of documents and ranks inside chunks, and a window over the border."""


def tiny(kind: str, folder: Path, context: int) -> Config:
    changes = SMALL | {
        "model.layers": kind,
        "parallel.context": context,
        "data.source": f"{folder}/text",
        "data.cache_dir": f"{folder}/cache",
        "run.dir": f"{folder}/{kind}-{context}",
    }
    return load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()])


def train(rank: int, config: Config) -> list[float]:
    """Every step's loss, and the held-out loss at the end."""
    run = RunDir(config.run.dir)
    run.create()
    mesh = build_mesh(1, config.parallel.context, rank, torch.device("cpu"))
    trainer = Trainer(config, run, mesh, open_cache(config.data), StopRequest())
    assert trainer.run()
    evaluated = [] if trainer.evaluations is None else [trainer.evaluations.records[-1]["loss"]]  # on rank 0
    return [line["loss"] for line in run.read_metrics()] + evaluated


def train_all(rank: int, world: int, configs: list[Config]) -> list[list[float]]:
    return [train(rank, config) for config in configs]


def test_context_ranks_do_not_change_the_losses(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} states cross the border, " * (1 + 5 * i))
    whole = [train(0, tiny(kind, tmp_path, 1)) for kind in TITANS]
    sharded = run_ranks(train_all, 2, [tiny(kind, tmp_path, 2) for kind in TITANS], timeout_s=200)[0]
    for kind, alone, both in zip(TITANS, whole, sharded, strict=True):
        assert len(alone) == 4
        assert alone[2] < alone[0], kind
        assert both == pytest.approx(alone, rel=2e-5), kind
