"""Bandwidth and latency of the links between the ranks of this machine, by message size: ring exchange and all-to-all.

    python -m distattn.bench.calibrate_links          as ranks that a launcher started on several nodes: also between nodes

Each operation is timed at sizes from 64 KB on, with all ranks at it, as the transport posts it; latency and bandwidth are the
non-negative line through the times with the least relative error.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import distattn
from distattn.calibration import LinkRate, device_name, load_calibration
from distattn.launchers.environment import init_from_environment, joined_by_environment
from distattn.launchers.local import launch_local
from distattn.parallel.transport.base import Message
from distattn.parallel.transport.symmetric import Symmetric, why_not

SIZES = tuple(1 << power for power in range(16, 29, 2))
"""Bytes that a rank sends in one operation."""
_CPU_SIZES = SIZES[:4]
_WARM_UPS, _REPEATS = 3, 7
_AT_ONCE = 5
"""Operations in a row for one time, so that the start of the first does not count for all."""


def calibrate_links(ranks: int | None = None) -> tuple[LinkRate, ...]:
    """Links between the GPUs of this machine (or two processes on its CPU). Empty where there is one GPU only."""
    on_gpu = torch.cuda.is_available()
    ranks = ranks or (torch.cuda.device_count() if on_gpu else 2)
    if ranks < 2:
        return ()
    with tempfile.TemporaryDirectory(prefix="distattn-links-") as folder:
        found = Path(folder) / "links.json"
        root = str(Path(distattn.__file__).resolve().parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        code = launch_local(
            [sys.executable, "-m", "distattn.bench.calibrate_links", str(found)],
            ranks,
            log_dir=Path(folder) / "logs",
            env={"PYTHONPATH": path},
        )
        if code:
            raise RuntimeError("the ranks that measure links failed; their output is above")
        return tuple(LinkRate(**entry) for entry in json.loads(found.read_text()))


def measure_links(ranks_per_node: int, device: torch.device) -> list[LinkRate]:
    """Rates of this group's links; every rank calls it and learns the same."""
    num_ranks = dist.get_world_size()
    found = []
    inside = min(ranks_per_node, num_ranks)
    if inside > 1:
        for operation, post in (("ring", _ring_in_node), ("all_to_all", _all_to_all_in_node)):
            found.append(_rate("inside", operation, inside, post(ranks_per_node), device))
        group = dist.group.WORLD
        if isinstance(group, dist.ProcessGroup) and why_not(group) is None:
            found.append(_rate("inside", "symmetric", inside, _symmetric_ring(group), device))
    if num_ranks > ranks_per_node:
        found.append(_rate("between", "ring", num_ranks, _shift(ranks_per_node), device))
        found.append(_rate("between", "all_to_all", num_ranks, _all_to_all(None), device))
    return found


Post = Callable[[torch.Tensor, torch.Tensor], None]
"""Send the first buffer's bytes and fill the second; returns when the device's stream is ordered after it."""


def _ring_in_node(ranks_per_node: int) -> Post:
    """To the next rank of the node, from the one before."""
    rank, size = dist.get_rank(), min(ranks_per_node, dist.get_world_size())
    first, place = rank // size * size, rank % size
    return _splits(first + (place + 1) % size, first + (place - 1) % size)


def _symmetric_ring(group: dist.ProcessGroup) -> Post:
    """To the next rank, packed into symmetric memory and read from there."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    transport = Symmetric(group)

    def post(send: torch.Tensor, receive: torch.Tensor) -> None:
        splits = [send.numel() if peer == (rank + 1) % num_ranks else 0 for peer in range(num_ranks)]
        (route,) = transport.routes(send.numel(), [splits])
        staged = transport.staging(route)
        staged.copy_(send)
        arriving = [receive.numel() if peer == (rank - 1) % num_ranks else 0 for peer in range(num_ranks)]
        transport.post(Message(0, 1, staged, receive, splits, arriving, lambda: "", route=route)).wait()

    return post


def _shift(distance: int) -> Post:
    """To the rank ``distance`` further on, which is in another node."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    return _splits((rank + distance) % num_ranks, (rank - distance) % num_ranks)


def _splits(to: int, source: int) -> Post:
    num_ranks = dist.get_world_size()

    def post(send: torch.Tensor, receive: torch.Tensor) -> None:
        sent, received = [0] * num_ranks, [0] * num_ranks
        sent[to], received[source] = send.numel(), receive.numel()
        _wait(dist.all_to_all_single(receive, send, received, sent, async_op=True))

    return post


def _all_to_all_in_node(ranks_per_node: int) -> Post:
    size = min(ranks_per_node, dist.get_world_size())
    first = dist.get_rank() // size * size
    return _all_to_all(range(first, first + size))


def _all_to_all(members: Sequence[int] | None) -> Post:
    num_ranks = dist.get_world_size()
    peers = [rank for rank in members or range(num_ranks) if rank != dist.get_rank()]

    def post(send: torch.Tensor, receive: torch.Tensor) -> None:
        splits = [send.numel() // len(peers) if rank in peers else 0 for rank in range(num_ranks)]
        used = sum(splits)
        _wait(dist.all_to_all_single(receive[:used], send[:used], splits, splits, async_op=True))

    return post


def _wait(work: dist.Work | None) -> None:
    assert work is not None
    work.wait()


def _rate(scope: str, operation: str, num_ranks: int, post: Post, device: torch.device) -> LinkRate:
    sizes = SIZES if device.type == "cuda" else _CPU_SIZES
    seconds = [_seconds(post, size, device) for size in sizes]
    latency, per_byte = fit_line(np.array(sizes, float), np.array(seconds))
    return LinkRate(scope, operation, num_ranks, 1e-9 / per_byte, 1e6 * latency)


def _seconds(post: Post, num_bytes: int, device: torch.device) -> float:
    """One operation of the slowest rank; median."""
    send = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    receive = torch.empty_like(send)
    times = []
    for _ in range(_WARM_UPS + _REPEATS):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(_AT_ONCE):
            post(send, receive)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / _AT_ONCE)
    slowest = torch.tensor([statistics.median(times[_WARM_UPS:])], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def fit_line(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float]:
    """(latency s, s a byte), latency not negative, with the least squared relative error; float64 [n] each."""
    rows = np.stack([1 / seconds, sizes / seconds], 1)
    scale = rows.max(0)
    latency, per_byte = np.linalg.lstsq(rows / scale, np.ones(len(rows)), rcond=None)[0] / scale
    if latency < 0 or per_byte <= 0:
        latency = 0.0
        per_byte = float((rows[:, 1] / (rows[:, 1] @ rows[:, 1])).sum())
    return float(latency), float(per_byte)


def main() -> None:
    """A rank. With a path it writes the rates there; without, rank 0 adds them to this machine's calibration."""
    if not joined_by_environment():
        sys.exit("error: these ranks come from a launcher; on one machine, use `distattn bench calibrate --only links`")
    rank, num_ranks = init_from_environment("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rates = measure_links(int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)), device)
    if rank == 0 and len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps([vars(rate) for rate in rates]))
    elif rank == 0:
        known = load_calibration()
        if known is None:
            sys.exit(f"error: {device_name()} has no calibration yet: run `distattn bench calibrate --only kernels` first")
        print(f"written to {known.updated(links=tuple(rates)).save()}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
