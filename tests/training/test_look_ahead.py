"""Plans made ahead: the same ones as without, on every rank, and counted where they are late."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch.distributed as dist

from distattn.data import PackedSequence
from distattn.errors import AgreementError, PlanError
from distattn.mask import Mask
from distattn.planning import plan
from distattn.testing import run_ranks
from distattn.training.look_ahead import LookAhead


def sequence(*lengths: int) -> PackedSequence:
    ends = np.cumsum(lengths)
    return PackedSequence(np.zeros(int(ends[-1]), np.uint8), np.stack([ends - lengths, ends, ends], 1))


def test_plans_are_made_once_in_order_and_late_ones_are_waited_for() -> None:
    made: list[int] = []
    go = threading.Event()

    def make(coming: PackedSequence) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if coming.seq_len == 3:
            assert go.wait(30)
        made.append(coming.seq_len)

    ahead = LookAhead(make)
    ahead.expect([(1, sequence(1)), (2, sequence(2))])
    ahead.expect([(2, sequence(2)), (3, sequence(3))])
    ahead.settle([1, 2, 7])
    assert made[:2] == [1, 2]
    late = ahead.late
    threading.Timer(0.2, go.set).start()
    ahead.settle([3])
    assert made == [1, 2, 3]
    assert (ahead.made, ahead.late) == (3, late + 1)
    assert ahead.waited_seconds > 0.1
    assert ahead.describe().startswith(f"3 plans made ahead, {late + 1} of them late")
    ahead.close()


def test_an_error_is_left_to_the_plan_itself() -> None:
    def make(coming: PackedSequence) -> None:
        raise PlanError("no")

    ahead = LookAhead(make)
    ahead.expect([(0, sequence(4))])
    ahead.settle([0])
    ahead.close()
    assert ahead.made == 1


def planned_ahead(rank: int, world: int) -> None:
    """A plan made ahead in another thread is the one that plan() returns; the ranks still compare what they ask for."""
    arguments = {"heads": 4, "kv_heads": 2, "head_dim": 8, "group": dist.group.WORLD, "strategy": "disaggregated"}
    masks = [Mask.documents([50, 3 + i, 40]) for i in range(3)]
    plan(Mask.causal(16), **arguments)
    ahead = LookAhead(lambda coming: plan(Mask.documents(coming.lengths), **arguments, ahead=True))
    # Ranks that are ahead of, or behind, each other agree all the same: planning ahead tells nobody.
    ahead.expect((i, sequence(50, 3 + i, 40)) for i in range(3 if rank else 2))
    ahead.settle(range(3))
    found = [plan(mask, **arguments) for mask in masks]
    assert "lowered" in vars(found[0])
    assert "lowered_backward" in vars(found[1])
    assert ("lowered" in vars(found[2])) == (rank > 0)
    assert found[0] is plan(masks[0], **arguments)
    if rank == 0:
        plan(Mask.causal(32), **arguments)
    dist.barrier()
    if rank == 1:
        with pytest.raises(AgreementError, match="planned different things"):
            plan(Mask.causal(33), **arguments)
    dist.barrier()
    ahead.close()


def test_ranks_agree_on_plans_that_were_made_ahead() -> None:
    run_ranks(planned_ahead, 2)
