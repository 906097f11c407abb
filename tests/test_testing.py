"""gloo on CPU, 2 and 3 ranks: ``run_ranks`` returns results, says who failed first and why, and leaves nobody behind."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from distattn.testing import RankFailedError, run_ranks


def add(rank: int, world: int, number: int) -> tuple[int, int, int]:
    x = torch.tensor(rank + number)
    dist.all_reduce(x)
    return rank, int(x), torch.get_num_threads()


def fail_second(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("the first failure")
    dist.all_reduce(torch.zeros(1))


def leave(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(5)


def hang(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(600)


def children() -> int:
    alive = (p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE)
    return sum("spawn_main" in " ".join(p.cmdline()) for p in alive)


def test_results_come_by_rank() -> None:
    assert run_ranks(add, 3, 10) == [(0, 33, 1), (1, 33, 1), (2, 33, 1)]
    assert children() == 0


def test_first_failure_is_told() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed first: Traceback.*in fail_second.*the first failure"):
        run_ranks(fail_second, 2)
    assert children() == 0


def test_death_without_a_word_is_told() -> None:
    with pytest.raises(RankFailedError, match="rank 0 failed first: it ended with exit code 5 and no result"):
        run_ranks(leave, 2)
    assert children() == 0


def test_hanging_ranks_are_ended() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailedError, match=r"no result after 12 s from rank .*1"):
        run_ranks(hang, 2, timeout_s=12)
    assert time.monotonic() - started < 25
    assert children() == 0
