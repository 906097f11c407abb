"""Waits for transfers are timed, and nothing else of a transport changes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from distattn.bench.transfer_clock import TransferClock, clocked, silenced
from distattn.mask import Mask
from distattn.parallel.transport.base import Message, StagingTransport
from distattn.pingpong import NanoBatches
from distattn.planning import plan

CPU = torch.device("cpu")


class Slow:
    """A transport whose transfers arrive 20 ms after they are waited for."""

    takes_parts, board = False, "board"

    def __init__(self) -> None:
        self.num_transfers = self.bytes_sent = 0

    def post(self, message: Message) -> Slow:
        self.num_transfers += 1
        self.bytes_sent += message.send.numel()
        return self

    def wait(self) -> None:
        time.sleep(0.02)


class SlowStaging(Slow, StagingTransport):
    def routes(self, key: object, send_splits: Sequence[Sequence[int]]) -> Sequence[object]:
        return [(key, tuple(splits)) for splits in send_splits]

    def staging(self, route: object) -> torch.Tensor:
        return torch.full((2,), 7, dtype=torch.uint8)


def nano_over(transport: Any) -> NanoBatches:
    return NanoBatches.of(dataclasses.replace(plan(Mask.causal(8), heads=1, head_dim=4), transport=transport))


def message() -> Message:
    return Message(0, 1, torch.zeros(3, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8), [3], [8], lambda: "for rows")


@pytest.mark.parametrize("kind", [Slow, SlowStaging])
def test_waits_are_timed_and_the_transport_is_as_before(kind: type[Slow]) -> None:
    inner, clock = kind(), TransferClock(CPU)
    transport: Any = clocked(nano_over(inner), clock).plans[0].transport
    stages = isinstance(transport, StagingTransport)
    assert stages == isinstance(inner, StagingTransport)
    if stages:
        assert transport.routes("key", [[1], [2]]) == [("key", (1,)), ("key", (2,))]
        assert transport.staging(None).tolist() == [7, 7]
    for _ in range(2):
        transport.post(message()).wait()
    assert (transport.num_transfers, transport.bytes_sent, transport.board, transport.takes_parts) == (2, 6, "board", False)
    assert clock.seconds() >= 0.04
    clock.start()
    assert clock.seconds() == 0


def test_steps_without_transfers_send_nothing_and_compute_on_ordinary_numbers() -> None:
    inner = Slow()
    transport: Any = silenced(nano_over(inner), CPU, torch.float32).plans[0].transport
    given = message()
    transport.post(given).wait()
    assert inner.num_transfers == transport.bytes_sent == 0
    assert given.receive.view(torch.float32).abs().max() < 10


def test_ranks_without_a_transport_keep_none() -> None:
    nano = NanoBatches.of(plan(Mask.causal(8), heads=1, head_dim=4))
    assert clocked(nano, TransferClock(CPU)).plans[0].transport is None
