"""``distattn train`` of a hybrid, gloo on CPU: two context ranks, checkpointed or not, give the losses of one rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
train: {{steps: 3, global_batch: 1, device: cpu, activation_checkpointing: {checkpointing}}}
data: {{source: {folder}/text, cache_dir: {folder}/cache, seq_len: 96, eval_sequences: 1, held_out_fraction: 0.2}}
model:
  {{dim: 16, num_layers: 8, num_heads: 2, num_kv_heads: 1, head_dim: 8, ffn_dim: 24, attention_gate: true,
   layers: "lightning,gated_delta,kda,aaren,softmax,titans_mac,titans_mag,titans_mal", init_std: 0.2,
   linear: {{num_heads: 1, num_value_heads: 2, head_dim: 8, value_head_dim: 4}}}}
optim: {{lr: 1e-2}}
parallel: {{context: {context}, strategy: ring}}
log: {{plot: false}}
"""


def losses(folder: Path, context: int, checkpointing: str) -> list[float]:
    run = folder / f"run-{context}-{checkpointing}"
    config = folder / f"{run.name}.yaml"
    config.write_text(CONFIG.format(folder=folder, context=context, checkpointing=checkpointing))
    command = [sys.executable, "-m", "distattn.cli.main", "train", str(config), f"run.dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_sharding_does_not_change_the_losses(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} states cross the border, " * 40)
    whole = losses(tmp_path, 1, "none")
    assert len(whole) == 3
    assert whole[2] < whole[0]
    for checkpointing in ("none", "selective"):
        assert losses(tmp_path, 2, checkpointing) == pytest.approx(whole, rel=2e-5)
