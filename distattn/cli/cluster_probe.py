"""One rank of ``distattn doctor --cluster``: computes on its device, then exchanges data with every other rank.

round 0: 0↔3 1↔2      Every round pairs all ranks, each with one other, so that no pair waits for or slows another one;
round 1: 0↔2 3↔1      after the last every pair has met once and sent in both directions.
round 2: 0↔1 2↔3

``python -m distattn.cli.cluster_probe FOLDER`` joins the ranks that the environment describes; rank 0 writes the result.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from distattn.launchers.environment import init_from_environment
from distattn.training.atomic_file import replace_text

RESULT = "cluster.json"
_TIMEOUT_S = 300.0
_REPEATS = 5
_SMALL_BYTES = 8
# Large enough that latency hardly counts, small enough for a CPU's gloo to take milliseconds.
_LARGE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
_MATRIX = {"cpu": 384, "cuda": 8192}


@dataclass(frozen=True)
class Device:
    """What one rank saw of its own device. error: empty if the result was right; tflops: 10^12 operations a second."""

    rank: int
    host: str
    device: str
    tflops: float
    error: str


@dataclass(frozen=True)
class Link:
    """One direction between two ranks: seconds of a message of 8 bytes and back, bytes a second of a large one."""

    source: int
    target: int
    round_trip_s: float
    bytes_per_s: float
    error: str


class Wire(Protocol):
    """Sends and receives a tensor; tests slow one down."""

    def send(self, tensor: torch.Tensor, to: int) -> None: ...

    def receive(self, tensor: torch.Tensor, source: int) -> None: ...


class GroupWire:
    """torch.distributed's default group."""

    def send(self, tensor: torch.Tensor, to: int) -> None:
        dist.send(tensor, to)
        _finish(tensor.device)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        dist.recv(tensor, source)
        _finish(tensor.device)


def rounds(world: int) -> list[list[tuple[int, int]]]:
    """Pairs of ranks by round: every pair once, no rank twice in a round (the circle method)."""
    seats = list(range(world + world % 2))
    found = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[i], seats[-1 - i]) for i in range(len(seats) // 2)]
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < world])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def measure_device(rank: int, device: torch.device) -> Device:
    """A matrix product that is checked and timed; an error of the device's is a finding, not a crash."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    size = _MATRIX[device.type]
    try:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(rank)
        a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
        best, product = float("inf"), a
        for _ in range(_REPEATS):
            _finish(device)
            began = time.perf_counter()
            product = a @ b
            _finish(device)
            best = min(best, time.perf_counter() - began)
        # Row sums by another road: (A·B)·1 = A·(B·1). Rounding makes them differ by a little of a row's norm.
        right = a.double() @ b.double().sum(1)
        worst = float((product.double().sum(1) - right).abs().max() / right.abs().max())
        error = "" if worst < 0.05 else f"a matrix product is wrong by {worst:.0%}"
        return Device(rank, host, name, 2.0 * size**3 / best / 1e12, error)
    except RuntimeError as problem:
        return Device(rank, host, name, 0.0, f"{type(problem).__name__}: {str(problem).splitlines()[0]}")


def measure_links(rank: int, world: int, device: torch.device, wire: Wire) -> list[Link]:
    """This rank's outgoing links, measured while all ranks call this. Collective."""
    found = []
    for pairs in rounds(world):
        for first, second in pairs:
            for source, target in ((first, second), (second, first)):
                if rank == source:
                    found.append(_measure(source, target, device, wire))
                elif rank == target:
                    _answer(source, device, wire)
        dist.barrier()
    return sorted(found, key=lambda link: link.target)


def _measure(source: int, target: int, device: torch.device, wire: Wire) -> Link:
    small, large = _buffers(source, device)
    reply = torch.zeros_like(small)
    best = {}
    for name, message in (("small", small), ("large", large)):
        seconds = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            wire.send(message, target)
            wire.receive(reply, target)
            seconds.append(time.perf_counter() - began)
        best[name] = min(seconds)
    # The receiver counts what came as it was sent: its verdict comes back in the last reply.
    changed = 2 * _REPEATS - int(reply[0])
    error = f"{changed} of {2 * _REPEATS} messages arrived changed" if changed else ""
    return Link(source, target, best["small"], large.numel() / best["large"], error)


def _answer(source: int, device: torch.device, wire: Wire) -> None:
    small, large = _buffers(source, device)
    right = 0
    for expected in (small, large):
        for _ in range(_REPEATS):
            received = torch.zeros_like(expected)
            wire.receive(received, source)
            right += int(torch.equal(received, expected))
            wire.send(torch.full_like(small, right), source)


def _buffers(source: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes that say who sent them and where in the message they stand."""
    large = (torch.arange(_LARGE_BYTES[device.type], device=device) * 31 + source).to(torch.uint8)
    return large[:_SMALL_BYTES].clone(), large


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def probe(rank: int, world: int, device: torch.device, wire: Wire) -> dict[str, list[dict]] | None:
    """Devices and links of all ranks on rank 0, None on the others. Collective."""
    own = {"devices": [asdict(measure_device(rank, device))]}
    dist.barrier()
    own["links"] = [asdict(link) for link in measure_links(rank, world, device, wire)]
    gathered: list[dict] | None = [{} for _ in range(world)] if rank == 0 else None
    dist.gather_object(own, gathered)
    if gathered is None:
        return None
    return {key: [entry for part in gathered for entry in part[key]] for key in ("devices", "links")}


def main(arguments: Sequence[str]) -> int:
    (folder,) = arguments
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = init_from_environment(kind, timeout_s=_TIMEOUT_S)
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    if dist.is_initialized():
        found = probe(rank, world, device, GroupWire())
        dist.destroy_process_group()
    else:
        found = {"devices": [asdict(measure_device(0, device))], "links": []}
    if found is not None:
        replace_text(Path(folder) / RESULT, json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
