"""Where jobs run, by name. A target is imported when it is asked for: nobody needs Ray to submit to Slurm."""

from __future__ import annotations

import importlib

from distattn.errors import ConfigError
from distattn.launchers.request import Target

_CLASSES = {
    "local": ("distattn.launchers.local_target", "LocalTarget"),
    "slurm": ("distattn.launchers.slurm", "SlurmTarget"),
    "ray": ("distattn.launchers.ray_target", "RayTarget"),
}


def find_target(name: str) -> Target:
    """The target of that name; ConfigError lists those there are."""
    if name not in _CLASSES:
        raise ConfigError(f"--on {name!r} is unknown: choose one of {', '.join(_CLASSES)}.")
    module, kind = _CLASSES[name]
    return getattr(importlib.import_module(module), kind)()
