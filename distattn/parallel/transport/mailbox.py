"""All ranks in one process: messages are handed over through a dictionary, ranks run in lockstep.

Used to run a schedule of many ranks without processes: in tests, and to debug a schedule on a laptop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distattn.errors import TransportError
from distattn.parallel.transport.base import Message

_Key = tuple[int, int, int, int]  # issue, due, src, dst


class Mailbox:
    """Messages posted and not yet collected. One rank's way to it is ``endpoint(rank)``."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.messages: dict[_Key, Tensor] = {}

    def endpoint(self, rank: int) -> MailboxEndpoint:
        return MailboxEndpoint(self, rank)

    def check_empty(self) -> None:
        """Raise TransportError if somebody was sent what nobody collected."""
        if self.messages:
            left = ", ".join(f"rank {s} to {d} issued at {i} due at {t}" for i, t, s, d in sorted(self.messages))
            raise TransportError(f"messages were sent and never received: {left}")


class MailboxEndpoint:
    """One rank's transport through a mailbox."""

    def __init__(self, box: Mailbox, rank: int) -> None:
        self.box, self.rank = box, rank
        self.num_transfers = 0
        self.bytes_sent = 0

    def post(self, message: Message) -> _Collect:
        self.num_transfers += 1
        self.bytes_sent += message.send.numel()
        for dst, part in enumerate(torch.split(message.send, message.send_splits)):
            if part.numel():
                key = (message.issue, message.due, self.rank, dst)
                if key in self.box.messages:
                    raise TransportError(f"rank {self.rank} sent rank {dst} two messages with one identity {key[:2]}")
                self.box.messages[key] = part
        return _Collect(self, message)


class _Collect:
    """An exchange in flight through a mailbox."""

    def __init__(self, endpoint: MailboxEndpoint, message: Message) -> None:
        self.endpoint, self.message = endpoint, message

    def wait(self) -> None:
        message, rank = self.message, self.endpoint.rank
        for src, part in enumerate(torch.split(message.receive, message.receive_splits)):
            if not part.numel():
                continue
            sent = self.endpoint.box.messages.pop((message.issue, message.due, src, rank), None)
            if sent is None or sent.numel() != part.numel():
                size = "nothing" if sent is None else f"{sent.numel()} bytes"
                raise TransportError(
                    f"rank {rank} waited {message.describe()}, but of {part.numel()} bytes from rank {src} there was {size}"
                )
            part.copy_(sent)
