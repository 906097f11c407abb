"""Slurm for tests: without its programs they do not run, and the list at the end says why."""

from __future__ import annotations

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skips where slurm/devcluster could not start; it looks in sbin too."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"Slurm: {', '.join(missing)} not found: apt-get install slurm-wlm munge")
