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


def see(rank: int, world: int, leave: str) -> tuple[str | None, str | None]:
    """What is in the environment and in a module; leaves something in both for whoever comes after in this process."""
    seen = os.environ.get("COLOUR"), getattr(torch, "left_by_a_rank", None)
    os.environ["COLOUR"] = leave
    torch.left_by_a_rank = leave  # pyright: ignore[reportAttributeAccessIssue]
    return seen


def children() -> int:
    """Ranks, which the server has forked; the server itself stays."""
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    assert len(servers) == 1
    return len(servers[0].children(recursive=True))


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
    with pytest.raises(RankFailedError, match=r"no result after 3 s from rank .*1"):
        run_ranks(hang, 2, timeout_s=3)
    assert time.monotonic() - started < 16
    assert children() == 0


def test_ranks_have_the_environment_of_now_and_no_past(monkeypatch: pytest.MonkeyPatch) -> None:
    for colour in ("grün", "blau"):
        monkeypatch.setenv("COLOUR", colour)
        assert run_ranks(see, 2, "rot") == [(colour, None)] * 2
    monkeypatch.delenv("COLOUR")
    assert run_ranks(see, 1, "rot") == [(None, None)]
