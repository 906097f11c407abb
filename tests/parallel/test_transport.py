"""gloo on CPU, 2 and 3 ranks that misbehave: each failure must end in an error that names ranks, stage and buffer, soon."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distattn.attention import attention
from distattn.errors import AgreementError, InputError, TransportError
from distattn.mask import Mask
from distattn.planning import Plan, plan
from distattn.testing import RankFailedError, run_ranks

TIMEOUT_S = 1.5


def make_plan(**changes: Any) -> Plan:
    shape: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 4, "strategy": "ring"}
    return plan(Mask.causal(24), group=dist.group.WORLD, **{**shape, **changes})


def warm_up() -> None:
    """One good call with the group's own timeout, after which all ranks are at the same point."""
    attend(make_plan())
    dist.barrier()


def attend(made: Plan) -> None:
    rows = made.num_local_rows
    q, k, v = (torch.ones(1, rows, heads, 4) for heads in (4, 2, 2))
    attention(q, k, v, made)


def oversleep(rank: int, world: int) -> tuple[str, float]:
    """Rank 0 is late for a call by far more than the timeout."""
    warm_up()
    made = make_plan(timeout_s=TIMEOUT_S)
    if rank == 0:
        time.sleep(4 * TIMEOUT_S)  # and sends to nobody that is left, so it stays out of the transfer
        return "", 0.0
    started = time.monotonic()
    with pytest.raises(TransportError) as caught:
        attend(made)
    return str(caught.value), time.monotonic() - started


def test_a_rank_that_oversleeps_is_named() -> None:
    for rank, (message, seconds) in enumerate(run_ranks(oversleep, 3)):
        if rank:
            assert re.search(rf"rank {rank} waited \d\.\d s at stage \d of the ring forward for ", message), message
            assert "rows from rank" in message
            assert "ranks not seen waiting: 0" in message
            assert TIMEOUT_S * 0.9 < seconds < 3 * TIMEOUT_S + 2


def die(rank: int, world: int, folder: str) -> None:
    """Rank 1 ends without a word; the others write down what they saw."""
    warm_up()
    made = make_plan()
    if rank == 1:
        os._exit(7)
    started = time.monotonic()
    try:
        attend(made)
    except TransportError as error:
        Path(folder, str(rank)).write_text(f"{time.monotonic() - started:.1f} {error}")
        raise


def test_a_rank_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailedError, match="rank 1 failed first: it ended with exit code 7"):
        run_ranks(die, 3, str(tmp_path))
    for rank in (0, 2):
        seconds, message = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert float(seconds) < 10, "a closed connection must be noticed long before the timeout"
        assert message.startswith(f"rank {rank} waited"), message
        assert "of the ring forward for" in message
        assert "ranks not seen waiting: 1" in message


def disagree(rank: int, world: int) -> str:
    """Rank 0 plans other heads. It comes first, so it learns of it only while it waits for a transfer that nobody joins."""
    warm_up()
    if rank == 0:
        made = make_plan(heads=8)
        dist.barrier()
        q, k, v = (torch.ones(1, made.num_local_rows, heads, 4) for heads in (8, 2, 2))
        with pytest.raises(AgreementError) as caught:
            attention(q, k, v, made)
    else:
        dist.barrier()
        with pytest.raises(AgreementError) as caught:
            make_plan()
    return str(caught.value)


def test_a_disagreement_is_raised_on_every_rank() -> None:
    for message in run_ranks(disagree, 3):
        assert re.search("ranks 0 and [12] of one group planned different things in plan call 1", message), message
        assert "rank 0 gave mask=" in message
        assert "heads=8 kv_heads=2" in message
        assert "heads=4 kv_heads=2" in message


def miscount(rank: int, world: int) -> str:
    """A cached plan is compared too: rank 1 asks for the old plan where rank 0 asks for a new one."""
    make_plan()
    dist.barrier()
    if rank == 1:
        dist.barrier()
        with pytest.raises(AgreementError) as caught:
            make_plan()
        dist.barrier()
    else:
        make_plan(head_dim=8)
        dist.barrier()
        dist.barrier()
        with pytest.raises(AgreementError) as caught:
            make_plan()
    return str(caught.value)


def test_cache_hits_are_compared() -> None:
    for message in run_ranks(miscount, 2):
        assert "planned different things in plan call 1" in message


def one_bad_input(rank: int, world: int) -> tuple[str, float]:
    """Rank 1 passes a wrong shape; the ranks that wait for it must not wait for the timeout."""
    warm_up()
    made = make_plan()
    started = time.monotonic()
    if rank == 1:
        with pytest.raises(InputError) as refused:
            attention(*(torch.ones(1, 3, heads, 4) for heads in (4, 2, 2)), made)  # type: ignore[misc]
        return str(refused.value), 0.0
    with pytest.raises(TransportError) as caught:
        attend(made)
    return str(caught.value), time.monotonic() - started


def test_bad_input_on_one_rank_reaches_the_others() -> None:
    results = run_ranks(one_bad_input, 2)
    assert "q must have shape" in results[1][0]
    assert results[0][0].startswith("rank 1 refused its input: q must have shape")
    assert results[0][1] < 5
