"""What the executor asks of a transport: post one exchange of byte buffers, and wait for it later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Parts:
    """An exchange as separate buffers: uint8 [bytes] each, with the peer; for and from one peer in the same order.

    What is sent may be a caller's own tensor, which nobody writes to until ``wait`` has returned.
    """

    sends: list[tuple[int, Tensor]]
    receives: list[tuple[int, Tensor]]


@dataclass(frozen=True, eq=False)
class Message:
    """One rank's side of one exchange.

    issue, due: stages between which it is in flight. send, receive: uint8 [bytes], one part a rank, in rank order;
    send_splits, receive_splits: bytes for and from each rank. describe: what this rank waits for, for error messages, such as
    "at stage 2 of forward for KV rows from rank 0". parts: set for a transport that takes them; ``send`` and ``receive`` are
    then only where some of the parts lie. route: what a transport that stages said of this exchange.
    """

    issue: int
    due: int
    send: Tensor
    receive: Tensor
    send_splits: list[int]
    receive_splits: list[int]
    describe: Callable[[], str]
    parts: Parts | None = None
    route: object = None


class Pending(Protocol):
    """An exchange in flight."""

    def wait(self) -> None:
        """Return when ``receive`` is filled (on CUDA: when work queued from now on sees it filled).

        Raises TransportError if it fails or takes longer than the transport's timeout.
        """
        ...


class Transport(Protocol):
    """Carries the exchanges of one rank. Every rank posts the same exchanges in the same order.

    takes_parts: whether messages come in parts, which saves packing. num_transfers, bytes_sent: exchanges posted and bytes
    handed over since the start, for tests and reports.
    """

    takes_parts: bool
    num_transfers: int
    bytes_sent: int

    def post(self, message: Message) -> Pending:
        """Start an exchange; its buffers belong to the transport until ``wait`` has returned."""
        ...


class StagingTransport(ABC):
    """What a transport adds that says where messages are packed. A class, not a protocol: it is asked for in every call."""

    @abstractmethod
    def routes(self, key: object, send_splits: Sequence[Sequence[int]]) -> Sequence[object]:
        """What ``staging`` and messages are given for each exchange of a lowered program and shape; collective where ``key`` is
        new. send_splits: of each exchange, the bytes that this rank sends to each."""

    @abstractmethod
    def staging(self, route: object) -> Tensor:
        """uint8 [bytes that this rank sends]: the ``send`` of the next message, which work queued from now on may fill."""
