"""Results of a benchmark as JSON: where they were measured, and one entry a cell, so that a run can be resumed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distattn.errors import ConfigError

PACKAGES = ("triton", "flash-attn-4", "flash-linear-attention")
SAME = ("device", "commit", "torch")
"""Parts of the environment that must agree for old entries to be kept."""


def environment(commit: str = "") -> dict[str, str | None]:
    """Device and versions. commit: where the checkout is no git repository."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
        "num_devices": str(torch.cuda.device_count() if on_gpu else 0),
        "commit": commit or _commit_of_checkout(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else None,
        **{name: _version(name) for name in PACKAGES},
    }


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """ConfigError where ``path`` holds entries that were made under other settings: values at its top or in its environment."""
    try:
        before = json.loads(path.read_text()) if path.exists() else {}
        found = {**before.get("environment", {}), **before}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no benchmark results ({error}): give another file, or delete it") from error
    for name, value in settings.items():
        if before.get("results") and found.get(name) != value:
            raise ConfigError(
                f"{path} has results with {name} = {found.get(name)!r}, and this run would add some with {value!r}: "
                "give another file, or delete it"
            )


class Record:
    """One JSON file: ``environment`` and ``results`` by key. Every new entry is on disk before the next is measured."""

    def __init__(self, path: Path, environment: dict[str, str | None], about: dict[str, Any] | None = None) -> None:
        """Resume what ``path`` holds if it was measured in the same place; about: what else the file says, at its top."""
        self.path, self.environment, self.about = path, environment, about or {}
        self.results: dict[str, Any] = {}
        if path.exists():
            try:
                before = json.loads(path.read_text())
                same = all(before["environment"].get(key) == environment.get(key) for key in SAME)
                self.results = dict(before["results"]) if same else {}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{path} holds no benchmark results ({error}): give another file, or delete it") from error

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def add(self, key: str, entry: Any) -> None:
        """Keep an entry and write the file, which is never half written."""
        self.results[key] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        part.write_text(json.dumps({"environment": self.environment, **self.about, "results": self.results}, indent=1) + "\n")
        part.replace(self.path)


def _commit_of_checkout() -> str:
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
