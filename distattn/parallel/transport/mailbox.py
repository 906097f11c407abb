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
    """Messages posted and not yet collected. One rank's way to it is ``endpoint(rank)``.

    takes_parts: messages come in parts, as on NCCL.
    """

    def __init__(self, num_ranks: int, *, takes_parts: bool = False) -> None:
        self.num_ranks, self.takes_parts = num_ranks, takes_parts
        self.messages: dict[_Key, list[Tensor]] = {}

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
        self.takes_parts = box.takes_parts
        self.num_transfers = 0
        self.bytes_sent = 0

    def post(self, message: Message) -> _Collect:
        self.num_transfers += 1
        for dst, parts in _by_peer(message, message.send, message.send_splits, "sends").items():
            key = (message.issue, message.due, self.rank, dst)
            if key in self.box.messages:
                raise TransportError(f"rank {self.rank} sent rank {dst} two messages with one identity {key[:2]}")
            self.box.messages[key] = parts
            self.bytes_sent += sum(part.numel() for part in parts)
        return _Collect(self, message)


class _Collect:
    """An exchange in flight through a mailbox."""

    def __init__(self, endpoint: MailboxEndpoint, message: Message) -> None:
        self.endpoint, self.message = endpoint, message

    def wait(self) -> None:
        message, rank = self.message, self.endpoint.rank
        for src, parts in _by_peer(message, message.receive, message.receive_splits, "receives").items():
            sent = self.endpoint.box.messages.pop((message.issue, message.due, src, rank), None)
            sizes = [part.numel() for part in parts]
            if sent is None or [part.numel() for part in sent] != sizes:
                size = "nothing" if sent is None else f"{sum(part.numel() for part in sent)} bytes in {len(sent)} parts"
                raise TransportError(
                    f"rank {rank} waited {message.describe()}, but of {sum(sizes)} bytes from rank {src} in {len(sizes)} "
                    f"parts there was {size}"
                )
            for part, source in zip(parts, sent):
                part.copy_(source)


def _by_peer(message: Message, buffer: Tensor, splits: list[int], side: str) -> dict[int, list[Tensor]]:
    """Buffers for or from each peer that has any."""
    found: dict[int, list[Tensor]] = {}
    if message.parts is not None:
        for peer, part in getattr(message.parts, side):
            found.setdefault(peer, []).append(part)
        return found
    return {peer: [part] for peer, part in enumerate(torch.split(buffer, splits)) if part.numel()}
