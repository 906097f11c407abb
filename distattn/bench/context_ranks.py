"""What a rank of ``distattn bench context`` does: every cell in turn, in one set of processes.

    python -m distattn.bench.context_ranks SETTINGS.json       (started by the command, once a rank)

A repeat begins with a barrier of the devices behind a pause of some milliseconds, so that the host runs ahead as it does in
the middle of a training step; every implementation and the ideal are timed alike. Each result is compared with that of one
device. Where a cell takes fewer ranks than there are, groups of ranks do the same at once, and the slowest counts.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.attention import attention
from distattn.bench.context_cases import Case
from distattn.bench.context_peers import PEERS, Engine, Ranks, Refused
from distattn.bench.context_profile import profile_call
from distattn.bench.context_report import IDEAL, Report
from distattn.errors import LayoutError, MaskError, PlanError, UnsupportedError
from distattn.kernels import Case as KernelCase
from distattn.launchers.environment import init_from_environment
from distattn.mask import Mask
from distattn.parallel.cost import Shape, count
from distattn.planning import Plan, plan

MAX_ERROR = 2e-2
"""Relative error (Frobenius) against one device at which a cell counts as wrong; bf16 attention has about 5e-3."""

WARM_UPS = 2
MIN_REPEATS, MAX_REPEATS = 3, 100
TRANSFER_TIMEOUT_S = 60.0
PAUSE_CYCLES = 16_000_000
"""How long the device is kept busy before a call, about 8 ms: the host takes 2 to 10 ms to start a short one."""

FLUSH_BYTES = 256 << 20
PROFILED_MS = 40.0
"""Calls of ours up to this long are profiled: launches and waits only count in those."""

IDEAL_FLOPS = 2.5e14
"""Where one device has more than this to do in a call, forward and backward, it does a share of the heads, which counts for
all of them: heads are independent, and one of them fills a device at such lengths."""

_NO_MORE = ("CUDA error", "NCCL", "TransportError")
"""In an error's text: what leaves the process unfit for another cell."""

_SHOWN_FRAMES = 12
"""Of where a rank was when its cell took too long."""

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Job:
    """Cells of one case on ``ranks`` ranks: those of ``engines`` that ``results`` lacks."""

    case: dict[str, Any]
    ranks: int
    engines: list[str]
    results: str


@dataclass(frozen=True)
class Settings:
    """Of a run; the command writes them as JSON. jobs: fields of Job, in the order in which they are done.

    notes: a path; rank R writes what ended its cell to NOTES.rank-R. deadline: time.time() after which no further cell begins.
    cell_seconds: after so long a cell counts as failed.
    """

    jobs: list[dict[str, Any]]
    notes: str
    device: str
    kernel: str
    seconds: float
    deadline: float
    cell_seconds: float
    profile: bool = False


@dataclass(eq=False)
class Data:
    """Global tensors of one case, alike on every rank: q, do [1, S, H, D]; k, v [1, S, Hk, D]; and what one device makes of
    them: out, dq, dk, dv, of all heads or the first ones. ideal: the cell of that."""

    case: Case
    mask: Mask
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    wanted: tuple[Tensor, ...] | None = None
    ideal: dict[str, Any] | None = None


def make_data(case: Case, device: torch.device, dtype: torch.dtype) -> Data:
    generator = torch.Generator(device).manual_seed(case.seed)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    q, k, v, do = (
        torch.randn(1, case.tokens, h, case.head_dim, device=device, dtype=dtype, generator=generator) for h in heads
    )
    return Data(case, case.build(), (q, k, v, do))


class Runner:
    """One rank: its peers, its devices, and how it takes times. ``ranks``: those of the job at hand."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        rank, num_ranks = init_from_environment(settings.device, timeout_s=2 * TRANSFER_TIMEOUT_S)
        self.cuda = settings.device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.rank, self.num_ranks = rank, num_ranks
        self.groups = {size: self._group(size) for size in sorted({job["ranks"] for job in settings.jobs} | {num_ranks})}
        self.ranks = self.groups[num_ranks]
        # Of hosts alone, so that ranks can speak of errors while the devices' group is stuck.
        hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=TRANSFER_TIMEOUT_S))
        assert isinstance(hosts, dist.ProcessGroup)
        self.hosts = hosts
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=self.device)
        self.meet = torch.zeros(1, device=self.device)
        self.host_ms: list[float] = []

    def _group(self, size: int) -> Ranks:
        """This rank's among the groups of ``size`` neighbours; every rank makes all of them."""
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        if 1 < size < self.num_ranks:  # what one rank does alone needs no group
            made = [dist.new_group(list(range(first, first + size))) for first in range(0, self.num_ranks, size)]
            group = made[self.rank // size]
            assert isinstance(group, dist.ProcessGroup)
        return Ranks(self.rank % size, size, self.device, group)

    def everyone(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(found, value, group=self.hosts)
        return found

    def own(self, name: str, case: Case, mask: Mask) -> Engine:
        """A strategy of ours, its transport and "keep" each after a plus; or the ideal: the same attention on one device."""
        strategy, *words = name.split("+")
        transport = next((word for word in words if word != "keep"), "auto")
        group = None if strategy == IDEAL or self.ranks.num_ranks == 1 else self.ranks.group
        try:
            made = plan(
                mask, heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim, group=group, dtype=self.dtype,
                strategy="ring" if strategy == IDEAL else strategy, kernel=self.settings.kernel,
                timeout_s=None if group is None else TRANSFER_TIMEOUT_S, transport=transport,
                backward="keep" if "keep" in words else "resend",
            )  # fmt: skip
        except (PlanError, LayoutError, MaskError, UnsupportedError) as error:
            raise Refused(str(error)) from error
        return Engine(made.positions, False, lambda q, k, v: attention(q, k, v, made), self._details(made, case))

    def _details(self, made: Plan, case: Case) -> dict[str, Any]:
        shape = Shape(case.head_dim, case.head_dim, str(self.dtype).removeprefix("torch."))
        cost = count(made.program, made.mask, shape)
        kernel = KernelCase(self.device.type, self.dtype, case.head_dim, case.head_dim, case.heads, case.kv_heads)
        return {
            "strategy": made.strategy,
            "transport": made.reasons.get("transport"),
            "backward": made.backward_program.digest,
            "layout": made.layout.name,
            "kernel": made.backend(kernel).name,
            "program": made.program.digest,
            "imbalance": cost.imbalance,
            "forward_bytes_sent": cost.bytes_sent_per_rank.tolist(),
        }

    def engine(self, name: str, data: Data) -> Engine:
        if name in PEERS:
            return PEERS[name](data.case, data.mask, self.ranks)
        return self.own(name, data.case, data.mask)

    def once(self, engine: Engine, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[tuple[float, float, float], tuple]:
        """((forward, backward, total) milliseconds, (out, dq, dk, dv))."""
        if not self.cuda:
            dist.barrier(self.hosts)
            begin = time.perf_counter()
            out = engine.call(q, k, v)
            middle = time.perf_counter()
            found = (out.detach(), *torch.autograd.grad(out, (q, k, v), do))
            end = time.perf_counter()
            return (1e3 * (middle - begin), 1e3 * (end - middle), 1e3 * (end - begin)), found
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.flush.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(PAUSE_CYCLES)
        dist.all_reduce(self.meet)
        began = time.perf_counter()
        begin.record()
        out = engine.call(q, k, v)
        middle.record()
        found = (out.detach(), *torch.autograd.grad(out, (q, k, v), do))
        end.record()
        self.host_ms.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize()
        return (begin.elapsed_time(middle), middle.elapsed_time(end), begin.elapsed_time(end)), found

    def measure(self, name: str, data: Data) -> dict[str, Any]:
        """One cell; raises Refused, or whatever the implementation raises."""
        parts = ideal_parts(data) if name == IDEAL else 1
        engine = self.own(IDEAL, part_of(data.case, parts), data.mask) if name == IDEAL else self.engine(name, data)
        if name == IDEAL:
            engine.details["heads_measured"] = data.case.heads // parts
        try:
            positions = engine.positions.to(self.device)
            local = [x[:, :, : x.shape[2] // parts].index_select(1, positions) for x in data.inputs]
            if engine.heads_first:
                local = [x.transpose(1, 2).contiguous() for x in local]
            q, k, v = (x.requires_grad_() for x in local[:3])
            before = 0
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            _, found = self.once(engine, q, k, v, local[3])
            first_call_s = time.perf_counter() - began
            if engine.heads_first:
                found = tuple(x.transpose(1, 2) for x in found)
            errors = self._errors(name, data, positions, found)
            del found
            peak = torch.cuda.max_memory_allocated() - before if self.cuda else 0
            self.host_ms.clear()
            times = self._repeat(engine, q, k, v, local[3])
            if self.host_ms:
                # Where it is longer than the device's time and the pause before it, the host was what took so long.
                engine.details["host_ms"] = max(self.everyone(statistics.median(self.host_ms)))
            if self._profiles(name, times):
                engine.details["profile"] = profile_call(lambda: self.once(engine, q, k, v, local[3]))
        finally:
            engine.close()
        times = [(parts * forward, parts * backward, parts * total) for forward, backward, total in times]
        return self._cell(name, data, engine.details, times, errors, peak, first_call_s)

    def _profiles(self, name: str, times: list[tuple[float, float, float]]) -> bool:
        """Whether a profile is wanted of this cell, decided alike on every rank."""
        wanted = self.settings.profile and self.cuda and name not in PEERS
        return wanted and max(self.everyone(statistics.median(t[2] for t in times))) < PROFILED_MS

    def _repeat(self, engine: Engine, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[tuple[float, float, float]]:
        """After the first call: the other warm-ups, then as many repeats as fill the seconds, alike on every rank."""
        slowest = 0.0
        for _ in range(WARM_UPS - 1):
            slowest = max(self.everyone(self.once(engine, q, k, v, do)[0][2]))
        repeats = math.ceil(1e3 * self.settings.seconds / max(slowest, 1e-3))
        return [self.once(engine, q, k, v, do)[0] for _ in range(min(max(repeats, MIN_REPEATS), MAX_REPEATS))]

    def _errors(self, name: str, data: Data, positions: Tensor, found: tuple[Tensor, ...]) -> dict[str, float]:
        """Relative errors of this rank's rows; of the ideal, those of some rows against fp32."""
        if name == IDEAL:
            data.wanted = found
            return _errors_of_some_rows(data)
        if data.wanted is None:
            return {}
        return {
            label: relative(got[:, :, : wanted.shape[2]], wanted.index_select(1, positions))
            for label, got, wanted in zip(NAMES, found, data.wanted, strict=True)
        }

    def _cell(
        self, name: str, data: Data, details: dict[str, Any], times: list[tuple[float, float, float]], errors: dict[str, float],
        peak: int, first_call_s: float,
    ) -> dict[str, Any]:  # fmt: skip
        gathered = self.everyone((times, errors, peak))
        area = data.mask.area
        worst = {label: max(e.get(label, 0.0) for _, e, _ in gathered) for label in NAMES if label in errors}
        return {
            "copies": self.num_ranks // (1 if name == IDEAL else self.ranks.num_ranks),
            "forward_ms": [[t[0] for t in r] for r, _, _ in gathered],
            "backward_ms": [[t[1] for t in r] for r, _, _ in gathered],
            "total_ms": [[t[2] for t in r] for r, _, _ in gathered],
            "forward_flops": data.case.flops(area, backward=False),
            "backward_flops": data.case.flops(area, backward=True),
            "peak_memory_bytes": max(p for _, _, p in gathered),
            "first_call_s": first_call_s,
            "errors": worst,
            "wrong": any(not x <= MAX_ERROR for _, e, _ in gathered for x in e.values()),
            "details": details,
        }


def ideal_parts(data: Data) -> int:
    """Into how many shares of the heads one device's work is cut, of which it does one."""
    flops = sum(data.case.flops(data.mask.area, backward=backward) for backward in (False, True))
    choices = [n for n in range(1, data.case.kv_heads + 1) if data.case.kv_heads % n == 0]
    return next((n for n in choices if flops / n <= IDEAL_FLOPS), choices[-1])


def part_of(case: Case, parts: int) -> Case:
    """The same with a share of the heads."""
    return replace(case, heads=case.heads // parts, kv_heads=case.kv_heads // parts)


def relative(got: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of ``wanted``; 0 where both are nothing, as on a rank without rows."""
    difference, norm = ((x.float()).norm().item() for x in (got.float() - wanted.float(), wanted))
    return difference / norm if norm else (0.0 if difference == 0 else math.inf)


def _errors_of_some_rows(data: Data) -> dict[str, float]:
    """out and dq of some queries in the middle and at the end, against fp32 over all their keys."""
    assert data.wanted is not None
    q, k, v, do = data.inputs
    n, group = data.case.tokens, data.case.heads // data.case.kv_heads
    heads = data.wanted[0].shape[2]
    rows = torch.from_numpy(np.unique(np.concatenate([np.arange(n // 2, n // 2 + 32) % n, np.arange(max(0, n - 32), n)])))
    allowed = _allowed(data.mask, rows.numpy()).to(q.device)
    rows = rows.to(q.device)
    found_out, found_dq, want_out, want_dq = [], [], [], []
    for h in range(heads):
        qh, doh, kh, vh = (
            q[0, rows, h].float(),
            do[0, rows, h].float(),
            k[0, :, h // group].float(),
            v[0, :, h // group].float(),
        )
        scale = data.case.head_dim**-0.5
        p = torch.softmax((scale * qh @ kh.T).masked_fill(~allowed, float("-inf")), 1).nan_to_num(0.0)
        out = p @ vh
        ds = p * (doh @ vh.T - (doh * out).sum(1, keepdim=True))
        want_out.append(out)
        want_dq.append(scale * ds @ kh)
        found_out.append(data.wanted[0][0, rows, h])
        found_dq.append(data.wanted[1][0, rows, h])
    found = {"out": (found_out, want_out), "dq": (found_dq, want_dq)}
    return {name: relative(torch.stack(got), torch.stack(want)) for name, (got, want) in found.items()}


def _allowed(mask: Mask, rows: np.ndarray) -> Tensor:
    """Bool [rows, S]."""
    out = np.zeros((len(rows), mask.num_keys), bool)
    for i, row in enumerate(rows.tolist()):
        for _, _, k0, k1, lo, hi in mask.bands[(mask.bands[:, 0] <= row) & (row < mask.bands[:, 1])].tolist():
            out[i, max(k0, row + lo) : max(0, min(k1, row + hi + 1))] = True
    return torch.from_numpy(out)


def run(settings: Settings) -> int:
    """Every cell that the results lack. 0: done; 1: a cell left this process unfit, the command starts new ones."""
    runner = Runner(settings)
    data: Data | None = None
    for job in (Job(**entry) for entry in settings.jobs):
        case = Case(**job.case)
        report = Report.read(Path(job.results))
        missing = [name for name in job.engines if f"{case.name}|{name}" not in report.results]
        if not missing:
            continue
        runner.ranks = runner.groups[job.ranks]
        if data is None or data.case != case:
            del data
            data = None
        # The others are compared with the ideal's results, which are not on disk.
        for name in dict.fromkeys([IDEAL, *missing]):
            if max(runner.everyone(time.time())) > settings.deadline:
                return 0
            data = data or make_data(case, runner.device, runner.dtype)
            if not _cell(runner, report, name, data):
                return 1
    return 0


def _cell(runner: Runner, report: Report, name: str, data: Data) -> bool:
    """Measure a cell and write it down; whether further ones may run here."""
    first, key = runner.rank == 0, f"{data.case.name}|{name}"
    if name == IDEAL and data.ideal is not None:
        cell, fit = data.ideal, True
    else:
        if first:
            report.running = key
            report.save()
        with _limited(runner):
            cell, fit = _attempt(runner, report, name, data)
        if name == IDEAL:  # measured again by a run that goes on, for its results: the cells there are compared with the first
            cell = data.ideal = report.results[key] if "total_ms" in report.results.get(key, {}) else cell
    # Ranks but the first keep results in memory only: twins are looked up there.
    report.results[key] = cell
    if first:
        report.running = None
        report.save()
        print(f"{runner.ranks.num_ranks} ranks, {key}: {_line(cell)}", flush=True)
    return fit


@contextmanager
def _limited(runner: Runner) -> Iterator[None]:
    """End this process if what is inside takes too long: a rank may wait in a collective that nobody else joins, where no
    exception reaches it. The command then starts new ones."""

    def expire() -> None:
        frames = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
        where = " < ".join(f"{Path(x.filename).name}:{x.lineno} {x.name}" for x in reversed(frames[-_SHOWN_FRAMES:]))
        _note(runner).write_text(f"took longer than {runner.settings.cell_seconds:g} s, in {where}")
        os._exit(1)

    timer = threading.Timer(runner.settings.cell_seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _note(runner: Runner) -> Path:
    return Path(f"{runner.settings.notes}.rank-{runner.rank}")


def _attempt(runner: Runner, report: Report, name: str, data: Data) -> tuple[dict[str, Any], bool]:
    """(cell, whether further cells may run here). An error of one rank becomes the cell's error on all."""
    cell: dict[str, Any] = {}
    problem = None
    note = _note(runner)
    try:
        twin = None if name in PEERS or name == IDEAL else _twin(runner, report, name, data)
        cell = twin or runner.measure(name, data)
    except Refused as error:
        cell = {"refused": str(error)}
    except Exception as error:  # whatever a peer raises ends its cell, not the run
        problem = f"{type(error).__name__}: {str(error).strip()[:500]}"
        note.write_text(problem)
    gc.collect()
    fit = not any(word in (problem or "") for word in _NO_MORE)
    if runner.cuda and fit:
        torch.cuda.empty_cache()
    told = runner.everyone((problem, fit))
    problems = [x for x, _ in told if x is not None]
    note.unlink(missing_ok=True)
    if not problems:
        return cell, True
    return {"failed": problems[0]}, len(problems) == len(told) and all(fit for _, fit in told)


def _twin(runner: Runner, report: Report, name: str, data: Data) -> dict[str, Any] | None:
    """The cell of an engine of ours that runs the very same program, which needs no second measurement."""
    try:
        details = runner.own(name, data.case, data.mask).details
    except Refused:
        return None
    found = None
    for key, cell in report.results.items():
        case, engine = key.split("|")
        mine = case == data.case.name and engine != IDEAL and "same_as" not in cell
        same = all(cell.get("details", {}).get(part) == details[part] for part in ("program", "transport", "backward"))
        if mine and same and "total_ms" in cell:
            found = {**cell, "details": details, "same_as": engine}
    return runner.everyone(found)[0]


def _line(cell: dict[str, Any]) -> str:
    if "total_ms" not in cell:
        return cell.get("refused") or cell["failed"]
    slowest = statistics.median(max(times) for times in zip(*cell["total_ms"], strict=True))
    worst = max(cell["errors"].values(), default=0.0)
    return f"{slowest:.3f} ms, {len(cell['total_ms'][0])} repeats, error {worst:.1e}{' WRONG' if cell['wrong'] else ''}"


def main() -> None:
    settings = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    code = run(settings)
    sys.stdout.flush()
    # A group whose collectives hang would keep its destructors waiting.
    os._exit(code)


if __name__ == "__main__":
    main()
