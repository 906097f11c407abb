"""The same losses and parameters however the batch is sharded. Ring 2: gloo on CPU with 2, 3 and 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from distattn.config import Config, load_config
from distattn.data import open_cache
from distattn.testing import run_ranks
from distattn.training.mesh import build_mesh
from distattn.training.run_dir import RunDir
from distattn.training.trainer import StopRequest, Trainer

STEPS = 5
STRATEGIES = ("ring", "all_gather", "ulysses")

Losses = list[float]
Parameters = dict[str, np.ndarray]


def train(rank: int, config: Config, device: str = "cpu") -> tuple[Losses, Parameters, list[float | None]]:
    """Train to the end in this process; every step's loss, the final parameters whole, and the loss by position."""
    run = RunDir(config.run.dir)
    run.create()
    mesh = build_mesh(config.parallel.data, config.parallel.context, rank, torch.device(device))
    trainer = Trainer(config, run, mesh, open_cache(config.data), StopRequest())
    assert trainer.run()
    whole: Parameters = {}
    for name, tensor in trainer.engine.state().items():
        if name.startswith("model."):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[name] = full.detach().cpu().numpy().copy()
    by_position = [] if trainer.evaluations is None else trainer.evaluations.records[-1]["position_loss"]
    return [line["loss"] for line in run.read_metrics()], whole, by_position


def train_all(rank: int, world: int, configs: list[Config]) -> list[tuple[Losses, Parameters, list[float | None]]]:
    return [train(rank, config) for config in configs]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "text").mkdir()
    words = np.random.default_rng(1).choice(["ring", "all", "gather", "head\n", "of", "a"], 9000)
    for i, length in enumerate([10, 40, 100, 150, 200, 500, 1000, 3000]):
        (folder / "text" / f"{i}.txt").write_text(" ".join(words[i * 1000 : i * 1000 + length // 3]))
    file = folder / "tiny.yaml"
    file.write_text(
        f"train: {{steps: {STEPS}, global_batch: 2, precision: float32}}\n"
        "data: {seq_len: 253, eval_sequences: 3, held_out_fraction: 0.3}\n"
        "model: {dim: 48, num_layers: 2, num_heads: 12, num_kv_heads: 4, head_dim: 4, ffn_dim: 64}\n"
        "optim: {lr: 3e-3, warmup_steps: 2}\n"
        "log: {plot: false}\n"
    )
    return load_config(file, [f"data.source={folder}/text", f"data.cache_dir={folder}/cache", f"run.dir={folder}/one"])


def variant(config: Config, data: int, context: int, strategy: str, recompute: str = "none") -> Config:
    folder = str(Path(config.run.dir).parent / f"{data}-{context}-{strategy}-{recompute}")
    changed = config.replace("train.activation_checkpointing", recompute)
    changed = changed.replace("parallel.data", data).replace("parallel.context", context)
    return changed.replace("parallel.strategy", strategy).replace("run.dir", folder)


def stop_on_one_rank(config: Config, last_step: int) -> None:
    """Leave a run that one rank was asked to stop after ``last_step``."""
    run, stop = RunDir(config.run.dir), StopRequest()
    run.create()
    trainer = Trainer(config, run, build_mesh(1, 1, 0, torch.device("cpu")), open_cache(config.data), stop)
    step_once = trainer._train_step

    def step_until_stopped(step: int) -> dict[str, Any] | None:
        stop.received = step > last_step
        return step_once(step)

    trainer._train_step = step_until_stopped
    assert not trainer.run()


@pytest.fixture(scope="module")
def one_rank(config: Config) -> tuple[Losses, Parameters, list[float | None]]:
    return train(0, config.replace("parallel.data", 1))


@pytest.mark.parametrize(
    ("world", "grids"),
    [
        (2, [(1, 2, strategy) for strategy in STRATEGIES] + [(2, 1, "ring"), (1, 2, "ring", "selective")]),
        (3, [(1, 3, strategy) for strategy in STRATEGIES]),
        (4, [(1, 4, strategy) for strategy in STRATEGIES] + [(2, 2, "ring"), (2, 2, "auto")]),
    ],
    ids=["2 ranks", "3 ranks", "4 ranks"],
)
def test_same_losses_whatever_the_sharding(
    config: Config,
    one_rank: tuple[Losses, Parameters, list[float | None]],
    world: int,
    grids: list[Any],
) -> None:
    losses, parameters, by_position = one_rank
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1
    configs = [variant(config, *grid) for grid in grids]
    if world == 2:
        # A run that one rank began goes on with two.
        grids = [*grids, ("resumed",)]
        configs.append(variant(config, 1, 2, "all_gather").replace("run.dir", f"{config.run.dir}-resumed"))
        stop_on_one_rank(configs[-1].replace("parallel.context", 1).replace("parallel.data", 1), 2)
    results = run_ranks(train_all, world, configs, timeout_s=240)
    for grid, found in zip(grids, results[0], strict=True):
        assert found[0] == pytest.approx(losses, rel=1e-5), grid
        assert found[2] == pytest.approx(by_position, rel=1e-4), grid
        assert found[1].keys() == parameters.keys()
        for name, value in parameters.items():
            np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-4, err_msg=f"{grid} {name}")
