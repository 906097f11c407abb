"""Steps that ``distattn bench disaggregation`` measured beside what the simulation says of them, and the factors between both.

    seconds of a rank = layers · (linear · tokens · (2 c_forward + c_backward) + attention · a)

c: a layer's matrices by themselves (``cad-layers``, whole), twice forward since the backward computes them again; a: attention
by its kernel's rates, forward and backward. The two factors are fitted to the steps without disaggregation, rank by rank and
waits left out; what they then say of ``auto`` and disaggregation is a test. They hold what a step has beyond its parts alone:
norms, rotary embedding, loss, clocks that fall under load. Steps of further files, as those of more ranks, are tested only.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distattn.bench.cad_layers import LayerTime
from distattn.bench.disaggregation_cases import SHAPES, Engine, make_engine, make_lengths
from distattn.bench.disaggregation_report import OTHERS, computed, is_measured, slowest
from distattn.errors import ConfigError
from distattn.kernels.selection import shipped_rates
from distattn.mask import Mask
from distattn.models import ModelConfig
from distattn.parallel import kernel_time
from distattn.parallel.backward import derive_backward
from distattn.parallel.hardware import HARDWARE, Hardware
from distattn.parallel.schedulers import find_scheduler
from distattn.parallel.schedulers.auto import choose_layout, layouts_for
from distattn.parallel.simulate import predict

TESTED = ("auto", "disaggregated", "disaggregated_contiguous")
"""Engines that the factors are not fitted to, in one nano-batch."""

LEAST_SPREAD = 1.5
"""By how much attention's share must differ among ranks for two factors to be told apart."""


@dataclass(frozen=True, eq=False)
class Step:
    """One measured cell. Of each rank, float64 [P]: linear, attention, seconds by their parts alone; computed, measured seconds
    without waits. exposed: predicted wait; seconds: of the slowest rank, measured."""

    case: str
    engine: str
    linear: np.ndarray = field(repr=False)
    attention: np.ndarray = field(repr=False)
    computed: np.ndarray = field(repr=False)
    exposed: float
    seconds: float

    def predicted(self, linear: float, attention: float) -> float:
        return float((linear * self.linear + attention * self.attention).max()) + self.exposed


@dataclass(frozen=True)
class Fit:
    """Factors on the seconds of linear layers and of attention by the rates of ``kernel``; misses: of each cell, by
    "tokens|mix|engine", predicted over measured step, less 1; before: their median size without the factors; others: misses in
    files that nothing was fitted to, by file."""

    kernel: str
    linear: float
    attention: float
    misses: dict[str, float] = field(repr=False)
    before: float
    others: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)

    def about(self) -> dict[str, Any]:
        sizes = [abs(miss) for miss in self.misses.values()]
        return {
            "kernel": self.kernel, "linear": self.linear, "attention": self.attention, "median_miss": statistics.median(sizes),
            "median_miss_without_factors": self.before,
            "misses": self.misses, "tested_misses": self.others,
        }  # fmt: skip

    def __str__(self) -> str:
        fitted, tested = (
            [abs(miss) for key, miss in self.misses.items() if (key.split("|")[2] in TESTED) == test] for test in (False, True)
        )
        text = f"linear layers × {self.linear:.3f}, attention by the rates of {self.kernel} × {self.attention:.3f}; steps that "
        text += f"this was fitted to are missed by {statistics.median(fitted):.1%} ({max(fitted):.1%} at most)"
        text += f", others by {statistics.median(tested):.1%} ({max(tested):.1%})" if tested else ""
        text += f"; without the factors the median of all were {self.before:.1%}"
        for name, found in self.others.items():
            missed = [abs(miss) for miss in found.values()]
            text += f"; {len(missed)} of {name} are missed by {statistics.median(missed):.1%} ({max(missed):.1%})"
        return text


def calibrate(paths: Sequence[Path], whole: LayerTime, tested: Sequence[Path] = ()) -> Fit:
    """Fit what ``distattn bench disaggregation`` wrote; whole: a layer of its shape on one device; tested: files whose steps
    are predicted with what the others gave. ConfigError where files hold nothing to fit or to test, or steps of unlike kernels
    or devices."""
    kernel, found = _read([*paths, *tested], whole)
    empty = [str(path) for path in tested if not found[path]]
    if empty:
        raise ConfigError(f"{', '.join(empty)}: no measured steps in one nano-batch whose schedule is known; leave it out")
    steps = [step for path in paths for step in found[path]]
    linear, attention = _factors([step for step in steps if step.engine not in TESTED], paths)

    def misses(steps: Sequence[Step]) -> dict[str, float]:
        return {f"{x.case}|{x.engine}": x.predicted(linear, attention) / x.seconds - 1 for x in steps}

    before = statistics.median(abs(x.predicted(1.0, 1.0) / x.seconds - 1) for x in steps)
    return Fit(kernel, linear, attention, misses(steps), before, {path.name: misses(found[path]) for path in tested})


def _read(paths: Sequence[Path], whole: LayerTime) -> tuple[str, dict[Path, list[Step]]]:
    """The kernel of all files, and the steps of each."""
    steps: dict[Path, list[Step]] = {}
    kernels = set()
    for path in paths:
        try:
            record = json.loads(path.read_text())
            place = record["environment"]
            kernels.add((place["kernel"], place["device"]))
            steps[path] = read_steps(record["results"], place, whole)
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} holds no steps of a model ({error}): `distattn bench disaggregation --json {path}` writes them"
            ) from error
    if len(kernels) != 1:
        raise ConfigError(f"measured steps must be of one kernel on one kind of device, got {sorted(kernels)}: leave files out")
    return next(iter(kernels))[0], steps


def read_steps(cells: dict[str, dict[str, Any]], place: dict[str, Any], whole: LayerTime) -> list[Step]:
    """The cells of engines in one piece whose schedule is known, with what the simulation says of their parts."""
    shape, ranks, layers = SHAPES[place["shape"]], int(place["ranks"]), int(place["layers"])
    hardware = rated(place["kernel"])
    steps = []
    for key, cell in cells.items():
        tokens, mix, name = key.split("|")
        if not is_measured(cell) or not (name in TESTED or name.startswith(OTHERS)) or len(cell["rows"][0]) > 1:
            continue
        lengths = make_lengths(mix, ranks, int(tokens))
        mask = Mask.documents(lengths)
        engine = make_engine(name, lengths, ranks, int(tokens), shape)
        if name == "auto":
            engine = _chosen(cell["chosen"], mask, ranks)
        rows, attention, exposed = parts_of(engine, mask, ranks, shape, hardware)
        measured = np.array(computed(cell)), layers * exposed, slowest(cell["seconds"])
        steps.append(Step(f"{tokens}|{mix}", name, layers * rows * whole.step_s, layers * attention, *measured))
    return steps


def rated(kernel: str) -> Hardware:
    """An H200 with the shipped rates of one kernel, of all where it is ``auto``. ConfigError where there are none."""
    rates = tuple(rate for rate in shipped_rates().kernels if kernel in ("auto", rate.backend))
    if not rates:
        known = ", ".join(sorted({rate.backend for rate in shipped_rates().kernels}))
        raise ConfigError(f"no rates came with distattn for the kernel {kernel!r} of the measured steps; there are {known}")
    return replace(HARDWARE["h200"], kernels=rates)


def _chosen(text: str, mask: Mask, ranks: int) -> Engine:
    """What ``auto`` took, from how a cell tells it: "strategy on layout; one nano-batch: …"."""
    strategy, name = text.split(";")[0].split(" on ")
    layout = next((x for x in layouts_for(mask, ranks, np.arange(ranks)) if x.name == name), None)
    if layout is None:
        raise ConfigError(f"auto took {text!r}, and today's layouts of this mix have none called {name}: measure it again")
    return Engine("auto", strategy, layout)


def parts_of(
    engine: Engine, mask: Mask, ranks: int, shape: ModelConfig, hardware: Hardware
) -> tuple[np.ndarray, np.ndarray, float]:
    """Of one layer's attention: rows and seconds of each rank, float64 [P], and seconds that it waits for transfers."""
    heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
    scheduler = find_scheduler(engine.strategy)
    options = engine.options or scheduler.options()
    layout = engine.layout or choose_layout(
        mask, ranks, engine.strategy, heads=heads, kv_heads=kv_heads, options=options
    ).layout  # fmt: skip
    program = scheduler.plan(mask, layout, heads, kv_heads, options)
    seconds, exposed = np.zeros(ranks), 0.0
    for direction in (program, derive_backward(program)):
        price = kernel_time.price(mask, hardware, heads, width, backward=direction.backward, group=heads // kv_heads)
        found = predict(direction, mask, replace(hardware, kernels=()), width, price=price)
        seconds += (found.timeline.done - found.timeline.go[:, :-1]).sum(1)
        exposed += found.exposed_communication_seconds
    return layout.counts.astype(float), seconds, exposed


def _factors(steps: list[Step], paths: Sequence[Path]) -> tuple[float, float]:
    """Least squares of relative misses over all ranks of all steps."""
    shares = np.concatenate([np.zeros(0), *(step.attention / step.linear for step in steps)])
    if not len(shares) or shares.max() < LEAST_SPREAD * shares.min():
        raise ConfigError(
            f"{', '.join(map(str, paths))}: too little to tell linear layers from attention; measure two mixes or more, each "
            f"with one of {', '.join(OTHERS)}"
        )
    matrix = np.concatenate([np.stack([step.linear, step.attention], 1) / step.computed[:, None] for step in steps])
    found = np.linalg.lstsq(matrix, np.ones(len(matrix)), rcond=None)[0]
    if found.min() <= 0:
        raise ConfigError(
            f"measured steps give factors of {found[0]:.3g} and {found[1]:.3g}: they were measured on another machine"
        )
    return float(found[0]), float(found[1])
