"""What a rank of ``distattn bench linear --parts exchanges`` does: every cell in turn, in one set of processes.

    python -m distattn.bench.linear_ranks SETTINGS.json       (started by the command, once a rank)

The exchanges of a cell run on the same inputs and the same kernels, call by call in turn, behind a barrier of the devices. Each
rank checks its rows against one device that holds the whole stream, where that fits, and else against the first exchange.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.bench.linear_problem import Attend, LinearProblem, LinearShape, fla, our_kernel, ours
from distattn.bench.linear_timing import MAX_REPEATS, MIN_REPEATS, WARM_UPS, Clock, quantiles
from distattn.errors import DistattnError, UnsupportedError
from distattn.launchers.environment import init_from_environment

MAX_ERROR = {"cuda": 1e-2, "cpu": 1e-4}
"""Relative error against one device at which a cell counts as wrong."""

CHECKED_TOKENS = 1 << 18
"""Of the whole stream: one device has no room for longer ones."""

ALONE = "alone"
"""Ranks that exchange nothing: each computes its rows as a document of its own."""

FLA_CP = "fla_cp"
"""fla's own context parallelism."""

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Settings:
    """Of a run; the command writes them as JSON. deadline: time.time() after which no further cell begins."""

    results: str
    device: str
    shapes: list[dict[str, Any]]
    engines: list[str]
    seconds: float
    deadline: float


class Ranks:
    """One rank of the benchmark."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rank, self.num_ranks = init_from_environment(settings.device, timeout_s=TIMEOUT_S)
        self.device = f"cuda:{torch.cuda.current_device()}" if settings.device == "cuda" else "cpu"
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        self.clock = Clock(self.device)
        self.sign = torch.zeros(1, device=self.device)

    def engine(self, name: str, shape: LinearShape) -> Attend:
        """Raises UnsupportedError where fla has no context parallelism of the operator."""
        if name == ALONE:
            return ours(shape)
        if name != FLA_CP:
            return ours(shape, group=self.group, exchange=name, timeout_s=TIMEOUT_S)
        if shape.kind not in ("gated_delta", "kda"):
            raise UnsupportedError(f"fla has no context parallelism of {shape.kind}")
        try:
            from fla.ops.cp import build_cp_context  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UnsupportedError(f"fla cannot be imported here ({error}): pip install flash-linear-attention") from error
        whole = torch.tensor([0, shape.tokens * self.num_ranks], device=self.device)
        return fla(shape, cp_context=build_cp_context(whole, group=self.group))

    def cell(self, shape: LinearShape) -> Iterator[dict[str, dict[str, Any]]]:
        """Per engine: errors, then milliseconds of the slowest rank; alike on all ranks. Yields what there is at each step, so
        that a run that is cut short keeps it."""
        x = self.local(shape)
        wanted, judge = self.wanted(shape), "one device"
        found: dict[str, dict[str, Any]] = {}
        calls: dict[str, Attend] = {}
        for name in self.settings.engines:
            attend, got, reason = self.first_call(name, x)
            reasons = [reason for reason in self.everyone(reason) if reason]
            if reasons or attend is None:
                found[name] = reasons[0]
                continue
            found[name] = {"kernel": our_kernel(shape, self.device, x.q.dtype)} if name != FLA_CP else {}
            calls[name] = attend
            if wanted is not None and name != ALONE:
                errors = [_relative(a, b) for a, b in zip(got, wanted, strict=True)]
                found[name]["error"] = max(max(e) for e in self.everyone(errors))
                found[name]["checked_against"] = judge
                found[name]["wrong"] = not found[name]["error"] <= MAX_ERROR[self.settings.device]
            elif name not in (ALONE, FLA_CP):
                wanted, judge = got, name
            del got
        del wanted
        yield found
        for direction in ("forward", "train"):
            for name, times in self.in_turn(x, calls, direction).items():
                found[name][f"{direction}_ms"] = quantiles(times)
            yield found

    def first_call(self, name: str, x: LinearProblem) -> tuple[Attend | None, tuple[Tensor, ...], dict[str, str] | None]:
        """(the engine, its results, None), or why it is none."""
        try:
            attend = self.engine(name, x.shape)
            return attend, x.train(attend), None
        except DistattnError as error:
            return None, (), {"not_run": str(error)}
        except torch.OutOfMemoryError:
            return None, (), {"not_run": "out of device memory"}
        except Exception as error:
            # A peer refuses on every rank alike; of ours an error ends the ranks, which the command tells.
            if name != FLA_CP:
                raise
            return None, (), {"failed": f"{type(error).__name__}: {str(error)[:300]}"}

    def local(self, shape: LinearShape) -> LinearProblem:
        return LinearProblem.make(shape, self.device, seed=1 + self.rank)

    def wanted(self, shape: LinearShape) -> tuple[Tensor, ...] | None:
        """This rank's rows of what one device makes of the whole stream."""
        if shape.tokens * self.num_ranks > CHECKED_TOKENS:
            return None
        parts = [LinearProblem.make(shape, self.device, seed=1 + rank) for rank in range(self.num_ranks)]
        decay = parts[self.rank].decay
        joined = [torch.cat([getattr(p, name).detach() for p in parts], 1) for name in ("q", "k", "v", "do")]
        rates = [
            None if x is None else x.detach() if x.ndim == 1 else torch.cat([getattr(p, name).detach() for p in parts], 1)
            for name, x in (("decay", decay), ("beta", parts[0].beta))
        ]
        q, k, v, do = joined
        whole = LinearProblem(replace(shape, tokens=shape.tokens * self.num_ranks), q, k, v, rates[0], rates[1], do)
        for leaf in whole.leaves:
            leaf.requires_grad_()
        rows = slice(self.rank * shape.tokens, (self.rank + 1) * shape.tokens)
        return tuple(t[:, rows].clone() for t in whole.train(ours(whole.shape)))

    def in_turn(self, x: LinearProblem, calls: dict[str, Attend], direction: str) -> dict[str, list[float]]:
        """Milliseconds of the slowest rank, engine by engine in turn, as often on every rank."""
        run = getattr(x, direction)
        slowest = 0.0
        for attend in calls.values():
            for _ in range(WARM_UPS):
                slowest = max(slowest, self.clock.once_ms(partial(run, attend), self.meet))
        slowest = max(self.everyone(slowest))
        repeats = min(max(int(1e3 * self.settings.seconds / slowest), MIN_REPEATS), MAX_REPEATS)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, attend in calls.items():
                times[name].append(self.clock.once_ms(partial(run, attend), self.meet))
        gathered = self.everyone(times)
        return {name: [max(own) for own in zip(*(each[name] for each in gathered), strict=True)] for name in calls}

    def meet(self) -> None:
        """A barrier of the devices, or of the hosts without them."""
        dist.all_reduce(self.sign)

    def everyone(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(found, value, group=self.group)
        return found


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-12))


def run(settings: Settings) -> None:
    """Every cell; rank 0 writes lines for each, of which the last one counts."""
    ranks = Ranks(settings)
    for entry in settings.shapes:
        if max(ranks.everyone(time.time())) > settings.deadline:
            break
        shape = LinearShape(**entry)
        for cell in ranks.cell(shape):
            if ranks.rank == 0:
                with Path(settings.results).open("a") as file:
                    file.write(json.dumps({"key": shape.key, "engines": cell}) + "\n")
        gc.collect()
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(Settings(**json.loads(Path(sys.argv[1]).read_text())))
