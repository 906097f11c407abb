"""gloo on CPU, 2 and 3 ranks that misbehave: each failure must end in an error that names ranks, stage and buffer, soon.

And in one process: messages that are packed where the transport says, and how symmetric memory divides its slots.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distattn.attention import attention
from distattn.calibration import Calibration, LinkRate
from distattn.errors import AgreementError, InputError, PlanError, TransportError
from distattn.kernels import BACKENDS
from distattn.mask import Mask
from distattn.parallel import in_process
from distattn.parallel.executor import Execution
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.transport import choice
from distattn.parallel.transport.base import Message, StagingTransport
from distattn.parallel.transport.mailbox import Mailbox, MailboxEndpoint
from distattn.parallel.transport.symmetric import Route
from distattn.planning import Plan, plan
from distattn.testing import RankFailedError, run_ranks
from tests.parallel.cases import inputs, oracle

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
    dist.barrier()  # else the refusal may reach a rank that still plans
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


class StagingEndpoint(MailboxEndpoint, StagingTransport):
    """Has messages packed into buffers of its own, full of what was there before, as slots of symmetric memory are."""

    def routes(self, key: object, send_splits: Sequence[Sequence[int]]) -> Sequence[int]:
        return [sum(splits) for splits in send_splits]

    def staging(self, route: object) -> torch.Tensor:
        assert isinstance(route, int)
        return torch.full((route,), 255, dtype=torch.uint8)

    def post(self, message: Message) -> Any:
        assert message.route == message.send.numel(), "packed elsewhere"
        return super().post(message)


@pytest.mark.parametrize("strategy", list(SCHEDULERS))
def test_messages_are_packed_where_the_transport_says(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mailbox, "endpoint", lambda self, rank: StagingEndpoint(self, rank))
    mask, layout = Mask.documents([5, 1, 19, 12]), Layout.zigzag(37, 4)
    program = SCHEDULERS[strategy].plan(mask, layout, 4, 2, None)
    q, k, v, do = inputs(37, 4, 2)
    found = in_process.run_in_process(program, mask, q, k, v, do, backend=BACKENDS["reference"], poison=True)
    for got, wanted in zip((found.out, found.lse, found.dq, found.dk, found.dv), oracle(q, k, v, do, mask), strict=True):
        assert got is not None
        assert torch.allclose(got, wanted, atol=1e-10, rtol=0)


def test_who_looks_after_an_exchange_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a thread keeps what is in flight until it looks again: were it whole calls, their memory would pile up."""
    kept = []
    post = MailboxEndpoint.post

    def watched(self: MailboxEndpoint, message: Message) -> Any:
        kept.append(message.describe)
        return post(self, message)

    monkeypatch.setattr(MailboxEndpoint, "post", watched)
    mask, layout = Mask.causal(24), Layout.zigzag(24, 2)
    program = SCHEDULERS["ring"].plan(mask, layout, 4, 2, None)
    in_process.run_in_process(program, mask, *inputs(24, 4, 2), backend=BACKENDS["reference"])
    gc.collect()
    assert "of the forward for KV rows from rank" in kept[0]() or "of the forward for its rows" in kept[0]()
    assert not [x for x in gc.get_objects() if type(x) is Execution]


def test_slots_of_symmetric_memory_hold_what_each_rank_sends() -> None:
    sizes = np.array([[0, 32, 64], [16, 0, 0], [0, 48, 0]])
    route = Route(sizes)
    assert [route.offset(0, dst) for dst in range(3)] == [0, 0, 32]
    assert route.offset(2, 1) == 0
    assert route.slot_bytes == 96
    assert Route(np.zeros((2, 2), np.int64)).slot_bytes == 0


def choose_on_gloo(rank: int, world: int) -> list[str]:
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    found = [" ".join(choice.choose_transport(group)), make_plan().describe()]
    for name in ("symmetric", "pigeons"):
        with pytest.raises(PlanError) as caught:
            choice.choose_transport(group, name)
        found.append(str(caught.value))
    return found


def test_a_transport_that_cannot_serve_is_refused_with_the_reason() -> None:
    chosen, described, symmetric, unknown = run_ranks(choose_on_gloo, 2)[1]
    assert chosen == "collective gloo: symmetric memory is a matter of GPUs, and this group has none"
    assert "transport  collective (gloo: " in described
    assert "transport='symmetric' cannot serve this group" in symmetric
    assert "it may be auto, collective, symmetric" in unknown


@pytest.mark.parametrize(("latency_us", "chosen"), [(20.0, "symmetric"), (200.0, "collective")])
def test_symmetric_memory_is_taken_where_it_measured_faster(
    latency_us: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = (LinkRate("inside", "ring", 2, 330, 60), LinkRate("inside", "symmetric", 2, 330, latency_us))
    monkeypatch.setattr(choice, "why_not", lambda group: None)
    monkeypatch.setattr(choice, "group_device", lambda group: torch.device("cuda"))
    monkeypatch.setattr(choice, "load_calibration", lambda: Calibration("a GPU", links=links))
    name, why = choice._chosen(None, "auto")  # type: ignore[arg-type]
    assert name == chosen
    assert "µs through symmetric memory" in why
    monkeypatch.setattr(choice, "load_calibration", lambda: None)
    assert choice._chosen(None, "auto")[0] == "collective"  # type: ignore[arg-type]
