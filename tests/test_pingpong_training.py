"""Training in halves that take turns and with dedicated servers: the losses of one rank. Ring 2: gloo on CPU, 2 to 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distattn.config import Config, load_config
from distattn.errors import ConfigError, InputError
from distattn.models import Decoder
from distattn.testing import run_ranks
from distattn.training.preflight import Ranks, attention_servers
from tests.training.test_trainer_sharding import Losses, Parameters, train

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
STEPS = 3

Grid = dict[str, Any]
GRIDS: dict[int, list[Grid]] = {
    1: [{"train.nano_batches": 2, "parallel.strategy": "ring"}],
    2: [
        {"parallel.servers": 1},
        {"train.nano_batches": 2},
        {
            "train.nano_batches": 2,
            "train.activation_checkpointing": "selective",
            "parallel.backward": "keep",
            "train.activation_offload": True,
        },
        {"train.nano_batches": 2, "parallel.strategy": "ulysses"},
        {"train.nano_batches": 0, "parallel.strategy": "auto"},
        {"parallel.servers": 1, "model.layers": "softmax,kda", "train.activation_checkpointing": "full"},
    ],
    3: [{"train.nano_batches": 2, "parallel.servers": 2}],
    4: [
        {"train.nano_batches": 2, "parallel.servers": 1, "parallel.data": 2, "parallel.context": 2},
        {"parallel.servers": 2, "parallel.backward": "auto", "parallel.keep_bytes": 10_000_000},
    ],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("pingpong"))


def make_config(folder: Path) -> Config:
    """The quickstart's model on sequences of 157 bytes."""
    (folder / "text").mkdir()
    words = np.random.default_rng(1).choice(["server", "query", "key\n", "of", "a"], 6000)
    for i, length in enumerate([5, 30, 60, 150, 400, 2000]):
        (folder / "text" / f"{i}.txt").write_text(" ".join(words[i * 1000 : i * 1000 + length // 3]))
    return load_config(
        QUICKSTART,
        [
            f"data.source={folder}/text", f"data.cache_dir={folder}/cache", f"run.dir={folder}/one", f"train.steps={STEPS}",
            "data.seq_len=157", "data.eval_sequences=2", "data.held_out_fraction=0.3", "train.global_batch=2", "log.plot=false",
            "model.sliding_window=40", "optim.warmup_steps=1", "parallel.context=1", "eval.interval=0",
        ],
    )  # fmt: skip


def variant(config: Config, world: int, number: int, grid: Grid) -> Config:
    settings = {"parallel.strategy": "disaggregated", "parallel.context": world, "parallel.data": 1, **grid}
    for key, value in settings.items():
        config = config.replace(key, value)
    return config.replace("run.dir", str(Path(config.run.dir).parent / f"{world}-{number}"))


def train_all(rank: int, world: int, configs: list[Config]) -> list[tuple[Losses, Parameters, list[float | None]]]:
    return [train(rank, config) for config in configs]


@pytest.fixture(scope="module")
def alone(config: Config) -> dict[str, tuple[Losses, Parameters, list[float | None]]]:
    """By kinds of layers: one rank, every sequence in one piece."""
    kinds = ("softmax", "softmax,kda")
    runs = {kind: config.replace("model.layers", kind).replace("run.dir", f"{config.run.dir}-{len(kind)}") for kind in kinds}
    return {kind: train(0, run.replace("parallel.strategy", "ring")) for kind, run in runs.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", sorted(GRIDS))
def test_losses_are_those_of_one_rank(
    config: Config, alone: dict[str, tuple[Losses, Parameters, list[float | None]]], world: int
) -> None:
    configs = [variant(config, world, i, grid) for i, grid in enumerate(GRIDS[world])]
    for grid, found in zip(GRIDS[world], run_ranks(train_all, world, configs, timeout_s=240)[0], strict=True):
        losses, parameters, by_position = alone[grid.get("model.layers", "softmax")]
        assert len(found[0]) == STEPS
        assert found[0] == pytest.approx(losses, rel=1e-5), grid
        assert found[2] == pytest.approx(by_position, rel=1e-4), grid
        assert found[1].keys() == parameters.keys()
        for name, value in parameters.items():
            np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=2e-4, err_msg=f"{grid} {name}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.servers=1"], "parallel.servers=1 is not possible with parallel.strategy=ring"),
        (["parallel.servers=2", "parallel.strategy=disaggregated"], "parallel.servers=2 leaves none of the parallel.context=2"),
        (["train.nano_batches=3"], "train.nano_batches=3 is not allowed: 1, 2 halves that take turns, or 0 for what is"),
        (["train.nano_batches=0", "model.layers=kda"], "model.layers=kda is not possible with train.nano_batches=0"),
        (["train.nano_batches=2", "train.activation_checkpointing=full"], "full is not possible with train.nano_batches=2"),
        (
            ["train.nano_batches=2", "train.engine=deepspeed"],
            "train.engine=deepspeed is not possible with train.nano",
        ),
        (["train.nano_batches=2", "model.layers=kda"], "model.layers=kda is not possible with train.nano_batches=2"),
        (["train.nano_batches=2", "data.seq_len=1"], "data.seq_len=1 is not possible with train.nano_batches=2"),
        (
            ["train.activation_offload=true"],
            "train.activation_offload=true does not go with train.activation_checkpointing=none",
        ),
        (["parallel.backward=auto"], "parallel.keep_bytes=0 does not go with parallel.backward=auto"),
        (["parallel.keep_bytes=9"], "parallel.keep_bytes=9 does not go with parallel.backward=resend"),
        (["parallel.backward=kep"], "parallel.backward=kep is unknown: choose one of resend, keep, auto; did you mean keep?"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, overrides)


def test_the_last_ranks_of_each_context_group_serve(config: Config) -> None:
    assert attention_servers(config.replace("parallel.servers", 2), Ranks(2, 4, "cpu")) == (2, 3, 6, 7)
    assert attention_servers(config, Ranks(2, 4, "cpu")) == ()


def test_linear_layers_are_refused_by_the_model_too(config: Config) -> None:
    with torch.device("meta"):
        model = Decoder(config.replace("model.layers", "kda").model)
    with pytest.raises(InputError, match="carry a state from one half of a sequence to the other"):
        model.use_ping_pong()
