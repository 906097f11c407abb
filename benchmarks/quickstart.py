"""Does `make train` work for somebody new, how long does it take, and what loss does it reach?

Clones the repository's last commit into an empty folder, with an empty HOME and no virtual environment, runs `make train`
there, and writes what came out as JSON.

    python benchmarks/quickstart.py --json benchmarks/results/quickstart.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def run_in(clone: Path, home: Path) -> tuple[float, subprocess.CompletedProcess[bytes]]:
    """Seconds of `make train`, and how it ended; its output goes to the terminal."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON", "XDG_CACHE"))}
    environment = {**kept, "HOME": str(home)}
    began = time.perf_counter()
    done = subprocess.run(["make", "train", f"PYTHON={sys.executable}"], cwd=clone, env=environment, check=False)
    return time.perf_counter() - began, done


def summary(clone: Path, seconds: float) -> dict[str, Any]:
    run = clone / "runs" / "quickstart"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((run / "evaluations.json").read_text())[-1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True).stdout.strip()
    probe = "import torch; print(torch.__version__)"
    torch = subprocess.run([clone / ".venv/bin/python", "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
    return {
        "device": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": "make train, from a clean clone with an empty HOME",
        "minutes_in_all": seconds / 60,
        "minutes_of_training": sum(line["step_seconds"] for line in metrics) / 60,
        "steps": len(metrics),
        "seq_len": metrics[0]["seq_len"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in metrics),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in metrics),
        "held_out_loss": last["loss"],
        "bigram_loss": last["bigram_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--picture", default="", help="copy the run's loss.png there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder) / "clone", Path(folder) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds, done = run_in(clone, home)
        if done.returncode:
            sys.exit(done.returncode)
        result = summary(clone, seconds)
        if arguments.picture:
            Path(arguments.picture).write_bytes((clone / "runs" / "quickstart" / "loss.png").read_bytes())
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
