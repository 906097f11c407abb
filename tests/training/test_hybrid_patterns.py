"""Two context ranks give the losses of one for the layer patterns of published hybrids. Gloo on CPU with 2 ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distattn.config import Config, load_config
from distattn.data import open_cache
from distattn.testing import run_ranks
from distattn.training.mesh import build_mesh
from distattn.training.run_dir import RunDir
from distattn.training.trainer import StopRequest, Trainer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATTERNS = ("hybrid-minimax", "hybrid-qwen3-next", "hybrid-infinitevl", "hybrid-transnormer")
SMALL = {
    "model.vocab_size": 256, "model.dim": 16, "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 4,
    "model.ffn_dim": 24, "model.init_std": 0.2, "model.linear.num_heads": 2, "model.linear.num_value_heads": 4,
    "model.linear.head_dim": 4, "model.linear.value_head_dim": 8, "data.seq_len": 93, "data.eval_sequences": 1,
    "data.held_out_fraction": 0.2, "train.steps": 3, "train.device": "cpu", "optim.lr": 1e-2, "parallel.data": 1,
    "log.plot": False,
}  # fmt: skip
"""What is made small of a published shape. The pattern, the convolution, the gates, the window and checkpointing stay."""


def tiny(name: str, folder: Path, context: int) -> Config:
    """A committed configuration with one period of its layers, a window shorter than a rank's rows, and little of all else."""
    whole = load_config(CONFIGS / f"{name}.yaml", [])
    period = {"hybrid-minimax": 8, "hybrid-transnormer": 3}.get(name, 4)
    changes = SMALL | {
        "model.num_layers": period,
        "model.sliding_window": min(whole.model.sliding_window, 11),
        "parallel.context": context,
        "data.source": f"{folder}/text",
        "data.cache_dir": f"{folder}/cache",
        "run.dir": f"{folder}/{name}-{context}",
    }
    return load_config(CONFIGS / f"{name}.yaml", [f"{key}={value}" for key, value in changes.items()])


def train(rank: int, config: Config) -> list[float]:
    """Every step's loss, and the held-out loss at the end."""
    run = RunDir(config.run.dir)
    run.create()
    mesh = build_mesh(1, config.parallel.context, rank, torch.device("cpu"))
    trainer = Trainer(config, run, mesh, open_cache(config.data), StopRequest())
    assert trainer.run()
    evaluated = [] if trainer.evaluations is None else [trainer.evaluations.records[-1]["loss"]]
    return [line["loss"] for line in run.read_metrics()] + evaluated


def train_all(rank: int, world: int, configs: list[Config]) -> list[list[float]]:
    return [train(rank, config) for config in configs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrids")
    (folder / "text").mkdir()
    for i in range(6):
        (folder / "text" / f"{i}.txt").write_text(f"{i} states cross the border, " * (1 + 5 * i))
    return folder


@pytest.fixture(scope="module")
def sharded(folder: Path) -> dict[str, list[float]]:
    """All patterns over one start of two ranks."""
    open_cache(tiny(PATTERNS[0], folder, 2).data)
    found = run_ranks(train_all, 2, [tiny(name, folder, 2) for name in PATTERNS], timeout_s=200)
    return dict(zip(PATTERNS, found[0], strict=True))


@pytest.mark.parametrize("name", PATTERNS)
def test_context_ranks_do_not_change_the_losses(name: str, folder: Path, sharded: dict[str, list[float]]) -> None:
    whole = train(0, tiny(name, folder, 1))
    assert len(whole) >= 3
    assert whole[2] < whole[0]
    assert sharded[name] == pytest.approx(whole, rel=2e-5)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("hybrid-minimax", ["lightning"] * 7 + ["softmax"]),
        ("hybrid-qwen3-next", ["gated_delta"] * 3 + ["softmax"]),
        ("hybrid-infinitevl", ["softmax"] + ["gated_delta"] * 3),
        ("hybrid-transnormer", ["lightning"] * 3),
    ],
)
def test_patterns_are_those_of_their_architectures(name: str, kinds: list[str], folder: Path) -> None:
    model = tiny(name, folder, 2).model
    assert model.layer_kinds == kinds
    assert (model.sliding_window > 0) == (name == "hybrid-infinitevl")
    assert model.linear.conv_width == (4 if "gated_delta" in kinds else 1)
    assert model.linear.output_gate == ("silu" if "gated_delta" in kinds else "sigmoid")
