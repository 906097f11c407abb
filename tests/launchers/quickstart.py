"""A few steps of the quickstart config, as it is, for tests that compare where it runs."""

from __future__ import annotations

from pathlib import Path

from distattn.training.run_dir import RunDir

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
STEPS = 3


def arguments(folder: Path, name: str) -> list[str]:
    """Of ``distattn train`` and ``submit``: the config, how many steps, and where the run and its tokens go."""
    return [str(CONFIG), f"train.steps={STEPS}", f"data.cache_dir={folder}/cache", f"run.dir={folder}/{name}"]


def curve(folder: Path, name: str) -> list[float]:
    """Losses of a run that must be done."""
    found = [line["loss"] for line in RunDir(folder / name).read_metrics()]
    assert len(found) == STEPS
    return found
