"""What was measured of one machine: how fast its kernels and links are. ``distattn bench calibrate`` writes it.

A file for each kind of device lies in ``$XDG_CACHE_HOME/distattn`` (default ``~/.cache/distattn``). Choices of kernels and
predictions of schedules read it; without one they use the tables that the package ships.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distattn.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class KernelRate:
    """Seconds that one backend needs for tiles, per direction and head dimension:

        calls · call_s + max(launches · launch_s, rows · row_s + vendor_rows · vendor_row_s + steps · step_s + waits · wait_s
                                                  + pairs · pair_s + cut_pairs · cut_pair_s)

    What is counted is described in ``distattn.kernels.workload``. call_s: until the first kernel of a call runs. launch_s: for
    the host to start one kernel or merge, which counts where it takes longer than these do. row_s: for each query row and head
    that is merged, or that our own kernels write. vendor_row_s: for each that a vendor's kernel writes. step_s: for each block
    of keys along the longest row of each launch; 0 where wait_s says what waiting costs: for each block that the busiest
    processor computes beyond the mean of all. pair_s, cut_pair_s: for each (query, key, head) of blocks that the mask leaves
    whole, and of those that it cuts. error: largest relative error of these numbers on what was measured.
    """

    backend: str
    backward: bool
    head_dim: int
    call_s: float
    launch_s: float
    row_s: float
    step_s: float
    pair_s: float
    cut_pair_s: float
    error: float = 0.0
    vendor_row_s: float = 0.0
    wait_s: float = 0.0

    @property
    def on_device(self) -> tuple[float, float, float, float, float, float]:
        """What each of rows, steps, pairs, cut_pairs, vendor_rows and waits takes there."""
        return self.row_s, self.step_s, self.pair_s, self.cut_pair_s, self.vendor_row_s, self.wait_s


@dataclass(frozen=True)
class KernelCell:
    """How far one measured time was from what the rates say: a choice among kernels corrects the rates near such cells.

    cell: in words, as ``causal 32K 64:8 D128``. group: query heads a KV head. launches, rows, steps, pairs, cut_pairs: as in
    ``KernelRate``, of all kernels of the backend together. ratio: seconds that were measured ÷ seconds by the rates.
    """

    cell: str
    backend: str
    backward: bool
    head_dim: int
    group: int
    launches: float
    rows: float
    steps: float
    pairs: float
    cut_pairs: float
    ratio: float


@dataclass(frozen=True)
class LinkRate:
    """What one operation sustained: seconds = latency_us · 10^-6 + bytes / (gb_per_second · 10^9).

    scope: "inside" a node or "between" nodes. gb_per_second: 10^9 bytes/s that each rank sends, with all ranks at it.
    """

    scope: str
    operation: str
    num_ranks: int
    gb_per_second: float
    latency_us: float


@dataclass(frozen=True)
class Calibration:
    """Measured rates of one machine. device: as torch names it. versions: of torch, CUDA, Triton and so on."""

    device: str
    versions: dict[str, str | None] = field(default_factory=dict)
    commit: str = "unknown"
    kernels: tuple[KernelRate, ...] = ()
    links: tuple[LinkRate, ...] = ()
    cells: tuple[KernelCell, ...] = ()

    @property
    def digest(self) -> str:
        """Equal where the rates are; ranks compare it, since they must make the same choices."""
        rates = json.dumps([self.device, [asdict(x) for x in (*self.kernels, *self.links, *self.cells)]])
        return hashlib.blake2b(rates.encode(), digest_size=8).hexdigest()

    def save(self, path: Path | None = None) -> Path:
        """Write to ``path``, or to where ``load_calibration`` looks for this device, and return that."""
        target = calibration_path(self.device) if path is None else path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        part.write_text(self._text())
        part.replace(target)
        return target

    def _text(self) -> str:
        """JSON with a line for each cell, of which there are hundreds."""
        entry = {"format": FORMAT, **asdict(self)}
        rows = ",\n  ".join(json.dumps(list(cell.values())) for cell in entry.pop("cells"))
        head = json.dumps(entry, indent=1).removesuffix("\n}")
        return f'{head},\n "cells": [\n  {rows}\n ]\n}}\n'

    def updated(self, **changes: Any) -> Calibration:
        """With some fields replaced, as where links are measured after kernels."""
        return replace(self, **changes)


def calibration_path(device: str) -> Path:
    """Where the calibration of a kind of device lies."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "distattn" / f"calibration-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def device_name() -> str:
    """The kind of device that calibrations are kept by: the name of the current CUDA device, or "cpu"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def load_calibration(path: Path | None = None) -> Calibration | None:
    """The calibration at ``path``, or of this machine's kind of device; None where there is no file.

    Raises ConfigError for a file that is not a calibration.
    """
    source = calibration_path(device_name()) if path is None else path
    try:
        text = source.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return parse_calibration(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{source} is no calibration of format {FORMAT} ({error}): run `distattn bench calibrate`, or delete the file"
        ) from error


def parse_calibration(entry: Any) -> Calibration:
    """From what ``save`` wrote, as JSON; ValueError, TypeError or KeyError where it is something else."""
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    return Calibration(
        device=str(entry["device"]),
        versions=dict(entry["versions"]),
        commit=str(entry["commit"]),
        kernels=tuple(KernelRate(**x) for x in entry["kernels"]),
        links=tuple(LinkRate(**x) for x in entry["links"]),
        cells=tuple(KernelCell(*x) for x in entry.get("cells", ())),
    )
