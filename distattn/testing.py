"""Start ranks on this machine, for tests of anything that runs on torch.distributed.

run_ranks ──▶ server, started once: has imported torch ──fork──▶ rank ──▶ result, or the traceback of the first that failed

Importing torch costs seconds, a fork milliseconds. The server runs nothing but imports, so every rank begins alike, whatever
ranks before it did; it ends with the process that started it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_PRELOADED = ["torch.distributed", "distattn"]
_GRACE_S = 10.0
"""How long the other ranks may go on after the first has failed, to report what they saw."""


class RankFailedError(RuntimeError):
    """A rank raised, died or hung; the message holds the traceback of the rank that failed first."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, backend: str = "gloo", timeout_s: float = 60) -> list[Any]:
    """Run ``fn(rank, world, *args)`` in ``world`` processes and return what each returned, by rank.

    fn must be importable (module level); its result and ``args`` must pickle. torch.distributed is initialised through a file
    store: no TCP port but loopback. Each process has the environment of this moment (what torch reads while it is imported is
    of the first call) and one torch thread; with backend "nccl" rank r uses device r. Raises RankFailedError with the
    traceback of the rank that failed first, or after ``timeout_s`` seconds. No rank is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # As bytes, for the rank to take apart itself: its environment comes before fn's module.
    call, environment = pickle.dumps((fn, args)), dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="distattn-ranks-") as folder:
        pipes, processes = [], []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(call, rank, world, backend, folder, timeout_s, environment, sender),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout_s)
        finally:
            for process in processes:
                process.join(1.0)
                if process.is_alive():
                    process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _rank_main(
    call: bytes,
    rank: int,
    world: int,
    backend: str,
    folder: str,
    timeout_s: float,
    environment: dict[str, str],
    sender: Connection,
) -> None:
    """One rank: initialise, call, report, leave without destructors that could wait for dead peers."""
    os.environ.clear()
    os.environ.update(environment, GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    try:
        fn, args = pickle.loads(call)
        store = dist.FileStore(str(Path(folder) / "store"), world)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=max(1.0, timeout_s))
        )
        result = fn(rank, world, *args)
        sender.send(("done", result))
        # A rank that leaves early closes connections on which others may still wait.
        dist.barrier()
        code = 0
    except BaseException:
        sender.send(("failed", (time.time(), traceback.format_exc())))
        code = 1
    sender.close()
    os._exit(code)


def _collect(pipes: list[Connection], processes: list[BaseProcess], timeout_s: float) -> list[Any]:
    """Wait for every rank's report; after a failure only for a while."""
    results: dict[int, Any] = {}
    failures: dict[int, tuple[float, str]] = {}
    deadline = time.monotonic() + timeout_s
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                kind, report = pipe.recv()
            except EOFError:
                processes[rank].join(5.0)
                kind, report = "failed", (time.time(), f"it ended with exit code {processes[rank].exitcode} and no result")
            if kind == "done":
                results[rank] = report
            else:
                failures[rank] = report
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        first = min(failures, key=lambda rank: failures[rank][0])
        others = [f"\nrank {r} later: {text.splitlines()[-1]}" for r, (_, text) in sorted(failures.items()) if r != first]
        raise RankFailedError(f"rank {first} failed first: {failures[first][1]}{''.join(others)}")
    if waiting:
        raise RankFailedError(f"no result after {timeout_s} s from rank " + ", ".join(map(str, sorted(waiting.values()))))
    return [results[rank] for rank in range(len(pipes))]
