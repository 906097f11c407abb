"""The parts of the training loop, and the loop on one rank. Ring 1: no torch.distributed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distattn.config import Config, OptimConfig, load_config
from distattn.data import PackedStream, open_cache
from distattn.errors import TrainingError
from distattn.training.evaluate import evaluate, held_out_sequences, position_edges
from distattn.training.mesh import Mesh, build_mesh
from distattn.training.metrics import peak_flops, peak_memory_bytes, utilisation
from distattn.training.optimizer import build_optimizer, clip_gradients, gradient_square_sum, learning_rate
from distattn.training.plots import draw_losses
from distattn.training.progress import Reporter
from distattn.training.run_dir import RunDir
from distattn.training.trainer import StopRequest, Trainer

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    source = tmp_path / "text"
    source.mkdir()
    words = np.random.default_rng(0).choice(["sea", "sun", "moon", "of", "a", "the\n"], 4000)
    for i in range(8):
        (source / f"{i}.txt").write_text(" ".join(words[500 * i : 500 * (i + 1)]))
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "train: {steps: 6, global_batch: 2}\n"
        "data: {seq_len: 64, eval_sequences: 3, held_out_fraction: 0.2}\n"
        "model: {dim: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 8, ffn_dim: 32}\n"
        "optim: {lr: 1e-2, warmup_steps: 2}\n"
        "checkpoint: {interval: 2}\n"
    )
    return load_config(file, [f"data.source={source}", f"data.cache_dir={tmp_path}/cache", f"run.dir={tmp_path}/run"])


def make_trainer(config: Config, stop: StopRequest | None = None) -> Trainer:
    run = RunDir(config.run.dir)
    run.create()
    return Trainer(config, run, build_mesh(1, 1, 0, CPU), open_cache(config.data), stop or StopRequest())


def losses(config: Config) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in RunDir(config.run.dir).read_metrics()}


def test_learning_rate_warms_up_and_ends_at_the_floor() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[11] == pytest.approx(2.0 * 0.55)
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 1, 1) == pytest.approx(0.1)
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=9), 3, 3) == pytest.approx(1 / 3)


def test_only_matrices_decay(config: Config) -> None:
    model = make_trainer(config).model
    decayed, kept = build_optimizer(config.optim, model).param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_clipping_scales_to_the_limit() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.full((2, 2), 2.0)
    norm = gradient_square_sum(parameters, CPU).sqrt().item()
    assert norm == 5.0
    clip_gradients(parameters, norm, 0.0)
    clip_gradients(parameters, norm, 5.0)
    assert parameters[0].grad.tolist() == [3.0, 0, 0]
    clip_gradients(parameters, norm, 1.0)
    assert gradient_square_sum(parameters, CPU).sqrt().item() == pytest.approx(1.0)


@pytest.mark.parametrize(("seq_len", "bins"), [(8192, 16), (1, 4), (2, 1), (100, 64), (3, 16)])
def test_position_edges_cover_every_position_once(seq_len: int, bins: int) -> None:
    edges = position_edges(seq_len, bins)
    assert edges[0] == 0
    assert edges[-1] >= seq_len
    assert (np.diff(edges) > 0).all()
    assert len(edges) - 1 <= max(bins, 1)


def test_a_run_learns_records_and_draws(config: Config) -> None:
    assert make_trainer(config).run()
    run = RunDir(config.run.dir)
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] == pytest.approx(math.log(256), abs=0.2)
    wanted = {"step", "loss", "tokens", "seq_len", "tokens_per_second", "mfu", "peak_memory_bytes", "step_seconds"}
    assert wanted <= lines[0].keys()
    assert (lines[0]["tokens"], lines[0]["seq_len"], lines[0]["mfu"]) == (128, 64, None)
    assert run.picture.read_bytes().startswith(b"\x89PNG")
    assert run.finished() == 6
    evaluations = json.loads((run.path / "evaluations.json").read_text())
    assert [e["step"] for e in evaluations] == [6]
    assert 0 < evaluations[0]["bigram_loss"] < evaluations[0]["loss"]
    assert sum(evaluations[0]["position_tokens"]) == evaluations[0]["tokens"]


def test_held_out_loss_is_the_mean_over_tokens(config: Config) -> None:
    trainer = make_trainer(config)
    sequences = held_out_sequences(config, trainer.cache)
    result = evaluate(trainer.model, config, trainer.mesh, sequences, 0)
    assert result.tokens == sum(int((s.read(np.arange(s.seq_len))[1] >= 0).sum()) for s in sequences)
    weighted = sum(loss * n for loss, n in zip(result.position_loss, result.position_tokens, strict=True) if loss is not None)
    assert weighted / result.tokens == pytest.approx(result.loss)
    assert result.loss == pytest.approx(math.log(256), abs=0.2)


def test_resuming_gives_the_same_bits(config: Config, tmp_path: Path) -> None:
    assert make_trainer(config).run()
    other = config.replace("run.dir", str(tmp_path / "other"))
    stop = StopRequest()
    trainer = make_trainer(other, stop)
    step_once = trainer._train_step

    def stop_after_three(step: int):
        stop.received = step == 4
        return step_once(step)

    trainer._train_step = stop_after_three  # type: ignore[method-assign]
    assert not trainer.run()
    assert list(losses(other)) == [1, 2, 3]
    resumed = make_trainer(other)
    assert resumed.step == 3
    assert resumed.run()
    assert losses(other) == losses(config)


def test_what_was_written_after_the_checkpoint_is_not_counted_twice(config: Config) -> None:
    trainer = make_trainer(config)
    assert trainer.run()
    RunDir(config.run.dir).path.joinpath("checkpoints", "step-6").rename(Path(config.run.dir) / "gone")
    before = losses(config)
    assert make_trainer(config).run()
    assert losses(config) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(config: Config, value: float) -> None:
    trainer = make_trainer(config)
    compute = trainer.model.loss

    def poisoned(*args, **kwargs):
        loss, count = compute(*args, **kwargs)
        return (loss * value if trainer.step == 4 else loss), count

    trainer.model.loss = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"at step 5, which was not applied; the last good checkpoint is step 4 in"):
        trainer.run()
    assert list(losses(config)) == [1, 2, 3, 4]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert make_trainer(config).step == 4


def test_activation_checkpointing_changes_no_bit(config: Config, tmp_path: Path) -> None:
    results = []
    for mode, offload in (("none", False), ("selective", False), ("full", False), ("selective", True), ("full", True)):
        variant = config.replace("run.dir", str(tmp_path / f"{mode}-{offload}"))
        variant = variant.replace("train.activation_checkpointing", mode).replace("train.activation_offload", offload)
        assert make_trainer(variant.replace("train.steps", 2)).run()
        results.append(losses(variant))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_offload_moves_inputs_of_blocks_and_nothing_else(config: Config, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    moved: list[torch.Size] = []

    def counted(pin_memory: bool) -> torch.autograd.graph.saved_tensors_hooks:
        def pack(x: torch.Tensor) -> torch.Tensor:
            moved.append(x.shape)
            return x

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)

    monkeypatch.setattr("distattn.training.sharding.save_on_cpu", counted)
    variant = config.replace("train.activation_checkpointing", mode).replace("train.activation_offload", True)
    assert make_trainer(variant.replace("train.steps", 1)).run()
    model = config.model
    assert moved == [torch.Size((1, config.data.seq_len, model.dim))] * (model.num_layers * config.train.global_batch)


def test_batches_are_a_function_of_the_step(config: Config) -> None:
    from distattn.training.batches import step_indices

    meshes = [Mesh(2, 2, rank, CPU) for rank in range(4)]
    assert [list(step_indices(3, 4, mesh)) for mesh in meshes] == [[8, 9], [8, 9], [10, 11], [10, 11]]
    stream = PackedStream(open_cache(config.data), "train", 64, 0)
    assert stream.sequence(5).lengths.sum() == 64


def test_measures() -> None:
    assert peak_flops(CPU, torch.float32) is None
    assert utilisation(10.0, 2.0, 2, None) is None
    assert utilisation(10.0, 2.0, 2, 5.0) == 0.5
    assert peak_memory_bytes(CPU) > 10_000_000


def test_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    reporter = Reporter(10, 3, interval_seconds=1000.0, stream=stream)
    for step in range(4, 11):
        reporter.step({"step": step, "loss": 1.5, "tokens_per_second": 1234.0})
    reporter.close()
    assert [line.split()[:4] for line in stream.getvalue().splitlines()] == [
        ["step", "4/10", "loss", "1.5000"],
        ["step", "10/10", "loss", "1.5000"],
    ]


def test_a_bar_where_there_is_one() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    reporter = Reporter(2, 0, interval_seconds=0.0, stream=stream)
    reporter.step({"step": 1, "loss": 1.25, "tokens_per_second": 1234.0})
    reporter.say("[b]not markup[/b]")
    reporter.step({"step": 2, "loss": 1.0, "tokens_per_second": 99.0})
    reporter.close()
    shown = stream.getvalue()
    for part in ("[b]not markup[/b]", "2/2", "loss 1.0000", "99 tokens/s", "ETA"):
        assert part in shown


def test_a_missing_matplotlib_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    reason = draw_losses(tmp_path / "loss.png", [], [])
    assert reason is not None
    assert "pip install 'distattn[plot]'" in reason
