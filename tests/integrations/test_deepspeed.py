"""ZeRO under our context parallel trains as one rank does; DistributedAttention; refusals. Gloo on CPU, real DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distattn.config import Config, load_config
from distattn.errors import ConfigError, InputError, PlanError, UnsupportedError
from distattn.testing import run_ranks
from distattn.training.engine import check_engine
from tests.integrations import deepspeed_cases as cases

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
STEPS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("zero")
    (folder / "text").mkdir()
    words = np.random.default_rng(1).choice(["ring", "all", "gather", "head\n", "of", "a"], 9000)
    for i, length in enumerate([10, 40, 100, 150, 200, 500, 1000, 3000]):
        (folder / "text" / f"{i}.txt").write_text(" ".join(words[i * 1000 : i * 1000 + length // 3]))
    file = folder / "tiny.yaml"
    file.write_text(
        f"train: {{steps: {STEPS}, global_batch: 2, precision: float32}}\n"
        "data: {seq_len: 253, eval_sequences: 3, held_out_fraction: 0.3}\n"
        "model: {dim: 48, num_layers: 2, num_heads: 6, num_kv_heads: 1, head_dim: 8, ffn_dim: 64}\n"
        "optim: {lr: 3e-3, warmup_steps: 2}\n"
        "log: {plot: false}\n"
    )
    return load_config(file, [f"data.source={folder}/text", f"data.cache_dir={folder}/cache", f"run.dir={folder}/one"])


def variant(config: Config, name: str, **changes: Any) -> Config:
    """The config with dotted keys changed (two underscores for the dot), in a folder of its own."""
    for key, value in {"parallel__data": 1, **changes}.items():
        config = config.replace(key.replace("__", "."), value)
    return config.replace("run.dir", str(Path(config.run.dir).parent / name))


def zero(config: Config, stage: int, name: str, **changes: Any) -> Config:
    return variant(config, name, train__engine="deepspeed", train__zero_stage=stage, **changes)


@pytest.fixture(scope="module")
def one_rank(config: Config) -> tuple[cases.Curve, list[float | None]]:
    curve, by_position, _ = cases.train(0, variant(config, "one"))
    return curve, by_position


def close(ran: tuple[cases.Curve, list[float | None], list[str]], one: tuple[cases.Curve, list[float | None]]) -> bool:
    """Losses, gradient norms and the evaluation by position are those of one rank."""
    np.testing.assert_allclose(ran[0], one[0], rtol=1e-5, atol=1e-6)
    if ran[1]:  # rank 0 keeps it
        expected = [0.0 if x is None else x for x in one[1]]
        np.testing.assert_allclose([0.0 if x is None else x for x in ran[1]], expected, rtol=2e-5, atol=1e-5)
    return len(ran[0]) == STEPS


def test_zero_equals_one_rank(config: Config, one_rank: tuple[cases.Curve, list[float | None]]) -> None:
    """Every stage on two ranks that share a sequence; resumed from FSDP2 and by it; what is not finite changes nothing."""
    configs = [
        zero(config, 1, "z1", parallel__context=2, parallel__strategy="ring"),
        zero(config, 2, "z2", parallel__context=2, parallel__strategy="usp", train__activation_checkpointing="selective"),
        zero(config, 3, "z3", parallel__context=2, parallel__strategy="all_gather"),
        zero(config, 3, "z3-selective", parallel__context=2, train__activation_checkpointing="selective"),
        zero(
            config, 3, "z3-offload", parallel__context=2, train__activation_checkpointing="full", train__activation_offload=True
        ),
        zero(config, 2, "z2-data", parallel__data=2),
    ]
    ring = {"parallel__context": 2, "parallel__strategy": "ring"}
    resumed = [
        (variant(config, "from-fsdp", **ring), zero(config, 3, "from-fsdp", **ring)),
        (zero(config, 3, "to-fsdp", **ring), variant(config, "to-fsdp", **ring)),
        (zero(config, 1, "stages", **ring), zero(config, 2, "stages", **ring)),
    ]
    bad = [zero(config, stage, f"bad-{stage}", **ring) for stage in (2, 3)]
    results = run_ranks(cases.train_all, 2, configs, resumed, bad, timeout_s=240)
    for rank in results:
        curves, continued, poisoned = rank
        assert all(close(ran, one_rank) for ran in [*curves, *continued])
        assert all("resuming after step 2" in remarks for _, _, remarks in continued)
        for message, unchanged in poisoned:
            assert "which was not applied" in message
            assert unchanged


def test_zero_over_data_and_context(config: Config, one_rank: tuple[cases.Curve, list[float | None]]) -> None:
    configs = [
        zero(config, stage, f"grid-{stage}", parallel__data=2, parallel__context=2, parallel__strategy="ring")
        for stage in (1, 3)
    ]
    for curves, _, _ in run_ranks(cases.train_all, 4, configs, [], [], timeout_s=240):
        assert all(close(ran, one_rank) for ran in curves)


def test_distributed_attention_equals_one_rank() -> None:
    world = 3
    ranks = run_ranks(cases.attend_all, world)
    for i, name in enumerate(cases.ATTENTIONS):
        for j, whole in enumerate(cases.expected(name)):
            ours = np.concatenate([rank[i][j] for rank in ranks], 1)
            np.testing.assert_allclose(ours, whole, rtol=1e-10, atol=1e-10, err_msg=f"{name}, tensor {j}")


ZERO: dict[str, Any] = {"zero_optimization": {"stage": 2}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no ZeRO": ({}, "zero_optimization.stage=0"),
    "fp16": ({**ZERO, "fp16": {"enabled": True}}, "fp16 is not supported"),
    "its sequence parallelism": ({**ZERO, "sequence_parallel_size": 2}, "sequence_parallel_size in DeepSpeed's configuration"),
    "autosp": ({**ZERO, "compile": {"deepcompile": True, "passes": ["autosp"]}}, "the compiler pass autosp"),
    "tensor parallel": ({**ZERO, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported"),
    "two divisors": ({"zero_optimization": {"stage": 3, "reduce_scatter": False}}, "reduce_scatter=false"),
    "ZeRO++": ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, r"ZeRO\+\+"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_settings(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        cases.deepspeed.refuse(nn.Linear(1, 1), settings)


def test_refuses_what_shards_the_sequence_already(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = cases.deepspeed.refuse
    refuse(nn.Linear(1, 1), ZERO)
    pipeline = object.__new__(cases.deepspeed.PipelineModule)
    with pytest.raises(UnsupportedError, match="pipeline engine"):
        refuse(pipeline, ZERO)
    with monkeypatch.context() as patch:
        patch.setattr(cases.deepspeed.parallel_state_sp, "_SEQUENCE_PARALLEL_GROUP", object())
        with pytest.raises(UnsupportedError, match="parallel_state_sp"):
            refuse(nn.Linear(1, 1), ZERO)
    with monkeypatch.context() as patch:
        patch.setattr(cases.deepspeed.groups, "mesh_device", object(), raising=False)
        with pytest.raises(UnsupportedError, match="device mesh"):
            refuse(nn.Linear(1, 1), ZERO)

    def wrapper() -> None: ...

    wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    loaded = SimpleNamespace(ALL_ATTENTION_FUNCTIONS={"eager": cases.expected, "sdpa": wrapper})
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", loaded)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="sdpa replaced by UlyssesSPAttentionHF"):
        refuse(nn.Linear(1, 1), ZERO)


def test_distributed_attention_names_what_is_wrong() -> None:
    rule, layer_of = cases.deepspeed.LocalAttention(), cases.deepspeed.DistributedAttention
    with pytest.raises(InputError, match=r"must be a distattn\.integrations\.deepspeed\.LocalAttention, got Linear"):
        layer_of(nn.Linear(1, 1), None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"attention dropout of 0\.1"):
        layer_of(cases.deepspeed.LocalAttention(dropout=0.1), None)
    for given, message in [
        ({"scatter_idx": 1}, "scatter_idx is 1"),
        ({"gather_idx": 2}, "gather_idx is 2"),
        ({"sp_stream": 1}, "sp_stream"),
    ]:
        with pytest.raises(InputError, match=message):
            layer_of(rule, None, **given)
    x = torch.randn(6, 1, 4, 8)
    layer = layer_of(rule, None, 2, 0, num_kv_heads=4)
    assert layer(x, x, x, 1).shape == x.shape
    with pytest.raises(InputError, match="both 0"):
        layer(x, x, x, 0)
    with pytest.raises(InputError, match="batch_dim_idx is 2"):
        layer(x, x, x, 2)
    with pytest.raises(InputError, match="num_kv_heads is 4, but key has 2"):
        layer(x, x[:, :, :2], x[:, :, :2], 1)
    with pytest.raises(InputError, match="key is"):
        layer(x, x[:5], x, 1)
    with pytest.raises(InputError, match="cu_seqlens must rise from 0 to the 6 rows"):
        layer(x, x, x, 1, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(InputError, match="they must be of all 6 rows"):
        layer(x, x, x, 1, (torch.ones(1, 5, 1, 8), torch.ones(1, 5, 1, 8)))
    with pytest.raises(UnsupportedError, match="rotary_pos_emb over 3 features"):
        layer(x, x, x, 1, (torch.ones(1, 6, 1, 3), torch.ones(1, 6, 1, 3)))
    for call in (lambda: layer(x, x, x, 1, None, torch.ones(6, 6)), lambda: layer(x, x, x, 1, attention_mask=torch.ones(6, 6))):
        with pytest.raises(UnsupportedError, match="an attention mask as a tensor"):
            call()
    with pytest.raises(UnsupportedError, match="the argument alibi"):
        layer(x, x, x, 1, alibi=torch.ones(4))


def test_the_engine_is_checked_before_anything_starts(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"train\.zero_stage=0 is not allowed"):
        load_config(Path(config.run.dir).parent / "tiny.yaml", ["train.zero_stage=0"])
    with pytest.raises(ConfigError, match=r"train\.engine=deepspeed is not possible with train\.nano_batches=2"):
        load_config(Path(config.run.dir).parent / "tiny.yaml", ["train.engine=deepspeed", "train.nano_batches=2"])
    with pytest.raises(PlanError, match=r"DeepSpeed needs torch\.distributed"):
        cases.deepspeed.ContextParallelUnit(2)
    with pytest.raises(PlanError, match="has no context group"):
        cases.deepspeed.context_group(SimpleNamespace(mpu=None))  # type: ignore[arg-type]
    wanted = zero(config, 2, "absent")
    check_engine(wanted)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_engine(config)
    with pytest.raises(ConfigError, match=r"needs the package deepspeed: pip install 'distattn\[deepspeed\]'"):
        check_engine(wanted)


def run_example(name: str, world: int) -> list[float]:
    """The losses that an example prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        [*command, "--nproc-per-node", str(world), str(EXAMPLES / name)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [float(line.split()[-1]) for line in ran.stdout.splitlines() if line.startswith("step ")]


def test_the_example_learns() -> None:
    losses = run_example("deepspeed_zero.py", 2)
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)


def test_the_quickstart_loads() -> None:
    config = load_config(EXAMPLES.parent / "configs" / "quickstart-deepspeed.yaml")
    assert (config.train.engine, config.train.zero_stage, config.parallel.context) == ("deepspeed", 3, 2)
