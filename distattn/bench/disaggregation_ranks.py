"""What a rank of ``distattn bench disaggregation`` does: every cell in turn, in one set of processes.

    python -m distattn.bench.disaggregation_ranks SETTINGS.json       (started by the command, once a rank)

A step is the forward and backward of the model's layers over the rank's rows, as the trainer does them, with weights that
every rank holds whole: no update, no sum of gradients, nothing that is alike for all engines. All ranks begin it together; it
has ended when the slowest has. Of every step the time that it waits for transfers is taken (``transfer_clock``).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distattn.bench.disaggregation_cases import SHAPES, Engine, RefusedError, linear_work, make_engine, make_lengths
from distattn.bench.disaggregation_report import exposed, slowest, uncertainty
from distattn.bench.record import Record
from distattn.bench.transfer_clock import TransferClock, clocked, silenced
from distattn.errors import LayoutError, PlanError
from distattn.launchers.environment import init_from_environment
from distattn.mask import Mask
from distattn.models import Decoder, ModelConfig
from distattn.models.decoder import Attention
from distattn.nano_choice import choose_nano_batches
from distattn.pingpong import NanoBatches, cut_in_two
from distattn.planning import plan

TRANSFER_TIMEOUT_S = 30.0
MAX_REPEATS = 40
MAX_ERROR = 5e-2
"""Relative difference (Frobenius) of a gradient from the first engine's at which a cell counts as wrong."""


@dataclass(frozen=True)
class Settings:
    """Of a run; the command writes them as JSON. cells: (tokens a rank, mix, engine); repeats: of each cell at least; silent:
    whether steps without transfers are timed, too; deadline: time.time() after which no further cell begins."""

    results: str
    environment: dict[str, Any]
    device: str
    shape: str
    kernel: str
    transport: str
    layers: int
    cells: list[tuple[int, str, str]]
    seconds: float
    repeats: int
    silent: bool
    deadline: float


@dataclass(eq=False)
class Batch:
    """This rank's rows: tokens, labels int64 [1, n], positions int64 [n] of each nano-batch."""

    nano: NanoBatches
    tokens: list[Tensor]
    labels: list[Tensor]
    positions: list[Tensor]


@dataclass(eq=False)
class Prepared:
    """An engine's step, checked; silent: the same without transfers, where it is timed; about: of it, besides times."""

    batch: Batch
    silent: Batch | None
    about: dict[str, Any]


class Runner:
    """One rank: its peers, its model, and how it takes times."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rank, self.num_ranks = init_from_environment(settings.device, timeout_s=2 * TRANSFER_TIMEOUT_S)
        self.cuda = settings.device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.shape: ModelConfig = dataclasses.replace(SHAPES[settings.shape], num_layers=settings.layers)
        hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=4 * TRANSFER_TIMEOUT_S))
        assert isinstance(hosts, dist.ProcessGroup)
        self.hosts = hosts
        self.clock = TransferClock(self.device)
        with self.device:
            self.model = Decoder(self.shape).to(self.dtype)
        self.model.use_ping_pong()
        self.model.set_block_runner(functools.partial(checkpoint, use_reentrant=False))

    def everyone(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(found, value, group=self.hosts)
        return found

    def plan(self, engine: Engine, mask: Mask) -> NanoBatches:
        group = dist.group.WORLD
        arguments: dict[str, Any] = {
            "heads": self.shape.num_heads, "kv_heads": self.shape.num_kv_heads, "head_dim": self.shape.head_dim, "group": group,
            "strategy": engine.strategy, "options": engine.options, "dtype": self.dtype, "timeout_s": TRANSFER_TIMEOUT_S,
            "kernel": self.settings.kernel, "transport": self.settings.transport,
            "backward": "keep" if engine.name.endswith("keep") else "resend",
        }  # fmt: skip
        if engine.nano_batches == 2:
            return cut_in_two(mask, **arguments)
        if engine.nano_batches == 0:
            return choose_nano_batches(mask, linear_flops=linear_work(self.shape), layers=self.shape.num_layers, **arguments)
        return NanoBatches.of(plan(mask, layout=engine.layout, **arguments))

    def batch(self, nano: NanoBatches, lengths: list[int]) -> Batch:
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        stream = torch.randint(0, self.shape.vocab_size, (sum(lengths) + 1,), generator=torch.Generator().manual_seed(0))
        batch = Batch(nano, [], [], [])
        for rows in nano.positions:
            batch.tokens.append(stream[rows][None].to(self.device))
            batch.labels.append(stream[rows + 1][None].to(self.device))
            batch.positions.append((rows - torch.from_numpy(starts)[rows]).to(self.device))
        return batch

    def step(self, batch: Batch) -> None:
        self.model.zero_grad(set_to_none=True)
        loss, _ = self.model.nano_loss(batch.tokens, batch.positions, batch.labels, batch.nano)
        loss.backward()

    def checked_step(self, batch: Batch) -> Tensor:
        """Gradient of the first layer's V projection, summed over ranks: what came through every layer's attention."""
        self.step(batch)
        mixer = self.model.blocks[0].attention
        assert isinstance(mixer, Attention)
        assert mixer.v.weight.grad is not None
        total = mixer.v.weight.grad.float()
        dist.all_reduce(total)
        return total

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds from when all ranks begin until this one has ended."""
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier(self.hosts)
        begin = time.perf_counter()
        call()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def prepare(self, tokens: int, mix: str, name: str) -> Prepared:
        """Plan an engine's step and check it; raises RefusedError where the engine cannot hold the mix."""
        lengths = make_lengths(mix, self.num_ranks, tokens)
        began = time.perf_counter()
        try:
            nano = self.plan(make_engine(name, lengths, self.num_ranks, tokens, self.shape), Mask.documents(lengths))
        except (PlanError, LayoutError) as error:
            raise RefusedError(str(error)) from error
        for made in nano.plans:
            _ = made.lowered, made.lowered_backward
        plan_seconds = time.perf_counter() - began
        nano = clocked(nano, self.clock)
        batch = self.batch(nano, lengths)
        sent = _bytes_sent(nano)
        gradient = self.checked_step(batch)
        sent = _bytes_sent(nano) - sent
        wanted = self._gradients.setdefault((tokens, mix), gradient)
        error = ((gradient - wanted).norm() / wanted.norm()).item()
        about = {
            "error": error,
            "wrong": not error <= MAX_ERROR,
            "rows": self.everyone([len(rows) for rows in nano.positions]),
            "bytes_sent": self.everyone(sent),
            "chosen": _chosen(nano),
            "plan_seconds": max(self.everyone(plan_seconds)),
            "documents": len(lengths),
            "longest": max(lengths),
        }
        silent = self.settings.silent and max(about["bytes_sent"]) > 0
        return Prepared(batch, self.silenced(batch) if silent else None, about)

    def measure(self, engines: dict[str, Prepared]) -> dict[str, dict[str, Any]]:
        """Seconds of each rank in each repeat, of one case's engines in turns, so that clocks and temperatures drift alike for
        all of them, and each repeat begins with another one; as many repeats as fill the time of one."""
        names = list(engines)
        times: dict[str, list[float]] = {name: [] for name in names}
        waits: dict[str, list[float]] = {name: [] for name in names}
        silent: dict[str, list[float]] = {name: [] for name in names}
        peaks: dict[str, int] = {}
        repeats, count = self.settings.repeats, 0
        while count < repeats:
            first = count % max(len(names), 1)
            for name in names[first:] + names[:first]:
                engine = engines[name]
                if self.cuda:
                    torch.cuda.reset_peak_memory_stats()
                self.clock.start()
                times[name].append(self.timed(lambda batch=engine.batch: self.step(batch)))
                waits[name].append(self.clock.seconds())
                peaks[name] = torch.cuda.max_memory_allocated() if self.cuda else 0
                if engine.silent is not None:
                    silent[name].append(self.timed(lambda batch=engine.silent: self.step(batch)))
            if not count:
                mean = sum(max(found) for found in zip(*self.everyone([x[0] for x in times.values()]), strict=True))
                repeats = int(self.settings.seconds * len(engines) / max(mean, 1e-4))
                repeats = max(self.settings.repeats, min(repeats, MAX_REPEATS))
            count += 1
        found = {}
        for name, engine in engines.items():
            found[name] = {"seconds": self.everyone(times[name]), "waited_seconds": self.everyone(waits[name])}
            if engine.silent is not None:
                found[name]["silent_seconds"] = self.everyone(silent[name])
            found[name] |= {"peak_memory_bytes": max(self.everyone(peaks[name])), **engine.about}
        return found

    def silenced(self, batch: Batch) -> Batch:
        return dataclasses.replace(batch, nano=silenced(batch.nano, self.device, self.dtype))

    @functools.cached_property
    def _gradients(self) -> dict[tuple[int, str], Tensor]:
        """By case, of the first engine that was measured here."""
        return {}


def _chosen(nano: NanoBatches) -> str:
    """Strategy and layout of each nano-batch's attention, and why there are so many."""
    parts = " + ".join(f"{made.strategy} on {made.layout.name}" for made in nano.plans)
    return f"{parts}; {nano.reason}" if nano.reason else parts


def _bytes_sent(nano: NanoBatches) -> int:
    return sum(made.transport.bytes_sent for made in nano.plans if made.transport is not None)


def run(settings: Settings) -> None:
    """Every case that lacks results, until the deadline."""
    runner = Runner(settings)
    record = Record(Path(settings.results), settings.environment)
    cases: dict[tuple[int, str], list[str]] = {}
    for tokens, mix, name in settings.cells:
        if f"{tokens}|{mix}|{name}" not in record:
            cases.setdefault((tokens, mix), []).append(name)
    for (tokens, mix), names in cases.items():
        if max(runner.everyone(time.time())) > settings.deadline:
            break
        engines, cells = {}, {}
        for name in names:
            try:
                engines[name] = runner.prepare(tokens, mix, name)
            except RefusedError as error:
                cells[name] = {"refused": str(error)}
        cells |= runner.measure(engines)
        del engines
        gc.collect()
        if runner.cuda:
            torch.cuda.empty_cache()
        for name in names if runner.rank == 0 else ():
            record.add(f"{tokens}|{mix}|{name}", cells[name])
            print(f"{tokens}|{mix}|{name}: {_line(cells[name])}", flush=True)


def _line(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return cell["refused"]
    step, off = 1e3 * slowest(cell["seconds"]), 1e3 * uncertainty(cell)
    return f"{step:.1f} ms ± {off:.1f}, {1e3 * exposed(cell):.2f} of it waiting for transfers, error {cell['error']:.1e}"


def main() -> None:
    settings = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    run(settings)
    sys.stdout.flush()
    # A group whose collectives hang would keep its destructors waiting.
    os._exit(0)


if __name__ == "__main__":
    main()
