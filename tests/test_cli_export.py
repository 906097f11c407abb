"""``distattn export`` and ``distattn eval`` as users meet them. Ring 2: real processes, gloo on CPU with 2 ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distattn
from distattn.cli.main import main
from distattn.config import load_config
from distattn.models import Decoder, ModelConfig
from distattn.models.hf_weights import load_weights, with_shape, write_config
from distattn.training.checkpoint_format import CheckpointReader

STEPS = 3
SHAPE = "vocab_size: 256, dim: 24, num_layers: 1, num_heads: 4, num_kv_heads: 2, head_dim: 4, ffn_dim: 32, qk_norm: true"


def distattn_command(*arguments: str) -> str:
    """What the command prints; it must succeed."""
    ended = subprocess.run(
        [sys.executable, "-m", "distattn", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a configuration, and a finished run of two ranks."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "text").mkdir()
    for i in range(6):
        (folder / "text" / f"{i}.txt").write_text(f"{i} rings in the sea, " * 60)
    (folder / "tiny.yaml").write_text(
        f"train: {{steps: {STEPS}, precision: float32}}\n"
        f"data: {{source: {folder}/text, cache_dir: {folder}/cache, seq_len: 96, eval_sequences: 2, held_out_fraction: 0.2}}\n"
        f"model: {{{SHAPE}}}\n"
        "optim: {lr: 1e-2}\n"
        "parallel: {context: 2, strategy: ring}\n"
        "log: {interval_seconds: 0, plot: false}\n"
    )
    distattn_command("train", str(folder / "tiny.yaml"), f"run.dir={folder}/run")
    return folder


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence of a command that ends with exit code 2."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["distattn", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_there_and_back(folder: Path) -> None:
    """Run → transformers: the same logits. Exported folder → init_from → train: the same weights, and the run's own loss."""
    said = distattn_command("export", str(folder / "run"), "--to", "hf", str(folder / "hf"), "--max-shard-gb", "2e-5")
    assert "a qwen3 model" in said
    assert (folder / "hf" / "model.safetensors.index.json").exists()
    reader = CheckpointReader(folder / "run" / "checkpoints" / f"step-{STEPS}")

    from distattn.integrations import transformers as adapter  # first: it hides the checkout's links from transformers

    adapter.register()
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "hf", attn_implementation="distattn", dtype=torch.float32
    )
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    shape = with_shape(ModelConfig(init_from=str(folder / "hf")), set())
    ours = Decoder(shape)
    load_weights(ours, folder / "hf")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, reader.read(f"model.{name}"))
    plan = distattn.plan(distattn.Mask.causal(40), heads=shape.num_heads, kv_heads=shape.num_kv_heads, head_dim=shape.head_dim)
    with torch.no_grad():
        logits = ours(tokens, torch.arange(40), plan) @ ours.output_weight.T
        torch.testing.assert_close(theirs.eval()(tokens, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)

    # lr 0: the first step's evaluation is of the weights that came in.
    distattn_command(
        "train", str(folder / "tiny.yaml"), f"run.dir={folder}/again", f"model.init_from={folder}/hf", "optim.lr=1e-30",
        "train.steps=1", "train.nano_batches=1",
    )  # fmt: skip
    before = json.loads((folder / "run" / "evaluations.json").read_text())[-1]["loss"]
    after = json.loads((folder / "again" / "evaluations.json").read_text())[-1]["loss"]
    assert after == pytest.approx(before, rel=1e-6)
    assert f"init_from: {folder}/hf" in (folder / "again" / "config.yaml").read_text()


def test_eval(folder: Path) -> None:
    """The trainer's own number, at another number of ranks; overrides; the run is not changed."""
    before = json.loads((folder / "run" / "evaluations.json").read_text())[-1]
    metrics = (folder / "run" / "metrics.jsonl").read_bytes()
    said = distattn_command("eval", str(folder / "run"), "parallel.context=1", "parallel.data=1")
    result = json.loads((folder / "run" / "eval.json").read_text())
    assert result["step"] == STEPS
    assert result["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert result["bigram_loss"] == pytest.approx(before["bigram_loss"])
    assert result["position_tokens"] == before["position_tokens"]
    assert result["overrides"] == ["parallel.context=1", "parallel.data=1"]
    assert f"step {STEPS}" in said
    assert "position" in said
    distattn_command("eval", str(folder / "run"), "data.seq_len=50", "eval.position_bins=4", "data.eval_sequences=1")
    result = json.loads((folder / "run" / "eval.json").read_text())
    assert result["position_edges"][-1] == 50
    assert len(result["position_loss"]) <= 4
    assert (folder / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{tmp}"], "holds no run"),
        (["eval", "{run}", "--step", "2"], "no checkpoint of step 2: it has 3"),
        (["eval", "{run}", "run.dir=elsewhere"], "is not possible here"),
        (["eval", "{run}", "eval.bins=3"], "unknown key eval.bins"),
        (["export", "{tmp}", "{tmp}/hf"], "holds no run"),
        (["export", "{run}", "{tmp}/hf", "--to", "gguf"], "--to gguf is unknown"),
        (["export", "{run}", "{tmp}/hf", "--dtype", "int8"], "--dtype int8 is unknown"),
        (["export", "{run}", "{run}"], "not an empty folder"),
        (["export", "{run}", "{tmp}/hf", "--step", "7"], "no checkpoint of step 7"),
        (["train", "{config}", "model.init_from={tmp}"], "config.json cannot be read"),
        (["train", "{config}", "run.dir={tmp}/x", "model.init_from={hf}", "model.dim=32"], "model.dim=32 does not fit"),
        (["train", "{config}", "run.dir={tmp}/x", "model.init_from={bare}"], "neither model.safetensors nor"),
    ],
)
def test_refused(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"tmp": tmp_path, "run": folder / "run", "config": folder / "tiny.yaml", "hf": folder / "hf"}
    places["bare"] = tmp_path / "bare"
    places["bare"].mkdir()
    write_config(load_config(folder / "tiny.yaml").model, places["bare"], seq_len=64)
    if "{hf}" in "".join(arguments) and not (folder / "hf").exists():
        distattn_command("export", str(folder / "run"), str(folder / "hf"))
    shown = refused(monkeypatch, capsys, *(text.format(**places) for text in arguments))
    assert message in " ".join(shown.split())
