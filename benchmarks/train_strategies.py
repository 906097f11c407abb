"""Does a long sequence train alike, and how fast, under each strategy?

Trains the same model from the same start for a few steps with each strategy and compares losses; writes tokens/s, MFU and
peak memory as JSON. The text is one document, so that attention is over the whole sequence.

    python benchmarks/train_strategies.py --config configs/llama3.2-1b.yaml --context 2 --seq-len 131072 --steps 10 \
        --json benchmarks/results/train-llama3.2-1b-h100x2.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

WARM_UP_STEPS = 2


def write_one_document(path: Path, num_bytes: int) -> None:
    """The standard library's source as one text: a document as long as the sequences are."""
    with path.open("wb") as out:
        for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            out.write(source.read_bytes())
            if out.tell() > num_bytes:
                return


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def environment(given_commit: str) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if cuda else platform.processor() or platform.machine(),
        "devices": torch.cuda.device_count() if cuda else 0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "distattn": version("distattn") if _installed() else "checkout",
        "commit": given_commit or commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _installed() -> bool:
    try:
        return bool(version("distattn"))
    except Exception:
        return False


def train(strategy: str, arguments: argparse.Namespace, folder: Path, source: Path) -> dict[str, Any]:
    """Run ``distattn train`` once and summarise its metrics."""
    run_dir = folder / strategy
    command = [
        sys.executable, "-m", "distattn", "train", arguments.config,
        f"run.dir={run_dir}", f"data.source={source}", f"data.seq_len={arguments.seq_len}",
        f"data.cache_dir={folder / 'cache'}", f"train.steps={arguments.steps}", f"parallel.context={arguments.context}",
        f"parallel.strategy={strategy}", "data.eval_sequences=1", "log.plot=false", *arguments.overrides,
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"strategy": strategy, "error": (done.stderr or done.stdout).strip()[-2000:]}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = records[WARM_UP_STEPS:]
    return {
        "strategy": strategy,
        "losses": [record["loss"] for record in records],
        "step_seconds": [record["step_seconds"] for record in records],
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in timed),
        "mfu": statistics.median(record["mfu"] for record in timed) if timed[0]["mfu"] is not None else None,
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "run_seconds": time.perf_counter() - began,
        "command": command[1:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/llama3.2-1b.yaml")
    parser.add_argument("--context", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--strategies", default="ring,all_gather,ulysses")
    parser.add_argument("--json", required=True)
    parser.add_argument("--commit", default="", help="commit to record where there is no git checkout")
    parser.add_argument("overrides", nargs="*", help="more KEY=VALUE for distattn train")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "document.txt"
        write_one_document(source, arguments.seq_len * (arguments.steps + 4))
        runs = []
        for strategy in arguments.strategies.split(","):
            run = train(strategy, arguments, Path(folder), source)
            runs.append(run)
            print(json.dumps({k: v for k, v in run.items() if k != "command"}), flush=True)
    whole = [run["losses"] for run in runs if "losses" in run]
    spread = max((max(x) - min(x)) / max(x) for x in zip(*whole, strict=True)) if whole else None
    result = {
        "environment": environment(arguments.commit),
        "config": arguments.config,
        "seq_len": arguments.seq_len,
        "context": arguments.context,
        "steps": arguments.steps,
        "warm_up_steps": WARM_UP_STEPS,
        "largest_relative_loss_difference": spread,
        "runs": runs,
    }
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(f"largest relative difference of a step's loss between strategies: {spread}")
    if any("error" in run for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
