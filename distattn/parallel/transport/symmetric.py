"""Symmetric memory: ranks of one node read each other's staging buffers over NVLink, with copy engines.

    rank r, computing                          rank d, on a stream of its own for each r
    waits for done[d] > e − SLOTS
    packs message e into slot e mod SLOTS
    writes e + 1 to ready[r] of rank d  ─────▶ waits for ready[r] > e
                                               copies its part of r's slot to where the message is received
                                        ◀───── writes e + 1 to done[d] of rank r

Nothing here needs a multiprocessor: flags are written and awaited by the device's front end, parts are moved by its copy
engines. A transfer neither waits for room beside an attention kernel nor takes any from it, as NCCL's kernels do. What it costs
is the packing, which is a copy within the device. No NVLink multicast is used.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import TransportError
from distattn.parallel.per_group import PerGroup
from distattn.parallel.transport.base import Message, StagingTransport
from distattn.parallel.transport.collective import Collective, group_device

SLOTS = 2
"""Messages that a rank may have staged at once; the next waits until the oldest was read."""

MAX_RANKS = 64
_FIRST_FLAG = 256
"""Place of our flags in the signal pad, in 32-bit words; torch's own barrier uses the first ones."""

_ALIGNMENT = 256
_ALL_DONE = 0x3FFFFFFF
"""Beyond any number of messages: lets streams go on that wait for a rank which will not answer."""


@dataclass(frozen=True, eq=False)
class Route:
    """One exchange. sizes: int64 [P, P], bytes from each rank to each."""

    sizes: np.ndarray

    def offset(self, src: int, dst: int) -> int:
        """Where in the slot of ``src`` its bytes for ``dst`` begin."""
        return int(self.sizes[src, :dst].sum())

    @cached_property
    def slot_bytes(self) -> int:
        return int(self.sizes.sum(1).max(initial=0))

    @cached_property
    def targets(self) -> list[list[int]]:
        """For each rank, those that it sends to."""
        return [np.flatnonzero(row).tolist() for row in self.sizes]

    @cached_property
    def sent_bytes(self) -> list[int]:
        """By each rank."""
        return self.sizes.sum(1).tolist()

    def arrivals(self, rank: int) -> list[tuple[int, int, int, int]]:
        """Of each rank that sends this one something: it, where that begins in its slot, and where it begins and ends among all
        that is received, bytes."""
        sizes = self.sizes[:, rank]
        ends = np.cumsum(sizes).tolist()
        return [(x, self.offset(x, rank), ends[x] - int(sizes[x]), ends[x]) for x in np.flatnonzero(sizes).tolist()]


def why_not(group: dist.ProcessGroup) -> str | None:
    """Why the ranks of a group cannot read each other's memory, as far as one rank sees, or None."""
    if group_device(group).type != "cuda":
        return "symmetric memory is a matter of GPUs, and this group has none"
    num_ranks = dist.get_world_size(group)
    if num_ranks > MAX_RANKS:
        return f"symmetric memory serves up to {MAX_RANKS} ranks, not {num_ranks}"
    if num_ranks > torch.cuda.device_count():
        return f"symmetric memory is for the GPUs of one host, which shows {torch.cuda.device_count()} for {num_ranks} ranks"
    peers = [gpu for gpu in range(torch.cuda.device_count()) if gpu != torch.cuda.current_device()]
    if not all(torch.cuda.can_device_access_peer(torch.cuda.current_device(), gpu) for gpu in peers):
        return "these GPUs cannot read each other's memory"
    return None


class Symmetric(Collective, StagingTransport):
    """Ranks of one node as transport. Its staging slots belong to the group, and are shared by all plans on it."""

    def __init__(self, group: dist.ProcessGroup, *, timeout_s: float | None = None) -> None:
        super().__init__(group, timeout_s=timeout_s)
        self.takes_parts = False  # a message is packed straight into its slot
        self._routes: dict[Any, list[Route]] = {}
        self._heap = heap_of(group)

    def routes(self, key: object, send_splits: Sequence[Sequence[int]]) -> list[Route]:
        """How the exchanges of one lowered program and shape go. Collective where ``key`` is new.

        send_splits: of each exchange, the bytes that this rank sends to each.
        """
        if key not in self._routes:
            told = self._heap.tell_everyone([list(splits) for splits in send_splits], self.timeout_s)
            tables = np.array(told, np.int64).reshape(self.board.num_ranks, len(send_splits), self.board.num_ranks)
            self._routes[key] = [Route(tables[:, i]) for i in range(len(send_splits))]
            self._heap.reserve(max((route.slot_bytes for route in self._routes[key]), default=0), self.group)
        return self._routes[key]

    def staging(self, route: object) -> Tensor:
        """Where the next message is packed: uint8 [bytes that this rank sends]. What is queued from now on may write there."""
        assert isinstance(route, Route)
        return self._heap.staging(route)

    def post(self, message: Message) -> _Pulling:
        if self._watch is not None:
            self._watch.raise_failure()
        route = message.route
        assert isinstance(route, Route)
        self.num_transfers += 1
        self.bytes_sent += message.send.numel()
        pulling = _Pulling(message, self._heap.exchange(route, message.receive))
        self._look_after(pulling)
        return pulling

    def give_up(self) -> None:
        self._heap.release()
        super().give_up()


class _Pulling:
    """One exchange in flight: events after which its parts are here. Its buffers are held by whoever waits."""

    def __init__(self, message: Message, events: list[torch.cuda.Event]) -> None:
        self.describe, self.events = message.describe, events
        self.posted = time.monotonic()

    def is_completed(self) -> bool:
        return all(event.query() for event in self.events)

    def wait(self) -> None:
        for event in self.events:
            event.wait()  # orders the stream; the host does not block


class Heap:
    """The staging slots of a group's ranks, and their flags. Make one with ``heap_of(group)``.

    Message numbers count up alike on all ranks, since all post the same exchanges in the same order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.store = dist.distributed_c10d._get_process_group_store(group)
        self.streams = [torch.cuda.Stream(self.device, priority=-1) for _ in range(self.num_ranks)]
        self.capacity, self.number, self._num_told = 0, 0, 0
        self._slots: Tensor | None = None
        self._handle: Any = None
        self._staged: list[Route | None] = [None] * SLOTS
        self._remote: weakref.WeakKeyDictionary[Route, dict[int, list[tuple[int, Tensor, int, int]]]] = (
            weakref.WeakKeyDictionary()
        )

    def tell_everyone(self, value: object, timeout_s: float) -> list[Any]:
        """Every rank's value, by rank, through the group's store."""
        topic = f"distattn/symmetric/{self._num_told}"
        self._num_told += 1
        keys = [f"{topic}/{rank}" for rank in range(self.num_ranks)]
        self.store.set(keys[self.rank], json.dumps(value))
        try:
            self.store.wait(keys, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            text = f"rank {self.rank} waited {timeout_s:.1f} s to hear from ranks {missing} what they will send"
            raise TransportError(text) from error
        return [json.loads(self.store.get(key)) for key in keys]

    def reserve(self, slot_bytes: int, group: dist.ProcessGroup) -> None:
        """Have slots of this size; collective where they are smaller. Every rank asks for the same."""
        if slot_bytes <= self.capacity:
            return
        # Peers may still read the old slots; each has come this far only when its own reading is done.
        torch.cuda.synchronize(self.device)
        # A multicast object would be made along with the memory, and is of no use here.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        import torch.distributed._symmetric_memory as symmetric_memory

        self.capacity = -(-slot_bytes // _ALIGNMENT) * _ALIGNMENT
        self._slots = symmetric_memory.empty(SLOTS * self.capacity, dtype=torch.uint8, device=self.device)
        self._handle = symmetric_memory.rendezvous(self._slots, group)
        self._handle.get_signal_pad(self.rank, (_FIRST_FLAG + 2 * self.num_ranks,), torch.int32).zero_()
        torch.cuda.synchronize(self.device)
        self.tell_everyone("ready", 60.0)
        self.number = 0
        self._staged = [None] * SLOTS
        self._remote.clear()

    def staging(self, route: Route) -> Tensor:
        """The slot of the next message, free of what was there."""
        slot = self.number % SLOTS
        before = self._staged[slot]
        if before is not None:
            stream = torch.cuda.current_stream(self.device)
            for peer in before.targets[self.rank]:
                _driver().wait_for(stream, self._flag(self.rank, self.num_ranks + peer), self.number - SLOTS + 1)
        assert self._slots is not None or not route.slot_bytes
        first = slot * self.capacity
        size = route.sent_bytes[self.rank]
        if self._slots is None:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return self._slots[first : first + size]

    def exchange(self, route: Route, receive: Tensor) -> list[torch.cuda.Event]:
        """Say that the slot is packed, and read what is for this rank: uint8 [bytes], one part a rank, in rank order."""
        number, slot = self.number + 1, self.number % SLOTS
        self.number, self._staged[slot] = number, route
        stream = torch.cuda.current_stream(self.device)
        for peer in route.targets[self.rank]:
            _driver().write(stream, self._flag(peer, self.rank), number)
        allocated = torch.cuda.Event()
        allocated.record(stream)
        events = []
        for source, part, start, stop in self._parts(route, slot):
            own = self.streams[source]
            own.wait_event(allocated)  # the memory may be that of a tensor which is still read
            _driver().wait_for(own, self._flag(self.rank, source), number)
            with torch.cuda.stream(own):
                receive[start:stop].copy_(part, non_blocking=True)
            _driver().write(own, self._flag(source, self.num_ranks + self.rank), number)
            events.append(torch.cuda.Event())
            events[-1].record(own)
        return events

    def _parts(self, route: Route, slot: int) -> list[tuple[int, Tensor, int, int]]:
        """For each rank that sends this one something: it, its part of its slot, and where that goes; found once."""
        known = self._remote.setdefault(route, {})
        if slot not in known:
            first = slot * self.capacity
            known[slot] = [
                (source, self._handle.get_buffer(source, (stop - start,), torch.uint8, first + offset), start, stop)
                for source, offset, start, stop in route.arrivals(self.rank)
            ]
        return known[slot]

    def release(self) -> None:
        """Let everything on this device go on that waits for a flag."""
        if self._handle is None:
            return
        stream = torch.cuda.Stream(self.device)
        for word in range(2 * self.num_ranks):
            _driver().write(stream, self._flag(self.rank, word), _ALL_DONE)

    def _flag(self, rank: int, word: int) -> int:
        """Address of ready[word], or done[word − P], of a rank."""
        return self._handle.signal_pad_ptrs[rank] + 4 * (_FIRST_FLAG + word)


_heaps: PerGroup[Heap] = PerGroup()


def heap_of(group: dist.ProcessGroup) -> Heap:
    """The group's staging slots."""
    if group not in _heaps:
        _heaps[group] = Heap(group)
    return _heaps[group]


class _Driver:
    """Two calls of the CUDA driver that torch does not offer: the front end of a device writes and awaits 32-bit words."""

    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._write, self._wait = library.cuStreamWriteValue32_v2, library.cuStreamWaitValue32_v2
        for call in (self._write, self._wait):
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]

    def write(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        """After all that is queued on the stream, and visible after it."""
        self._check(self._write(stream.cuda_stream, address, value, 0), "cuStreamWriteValue32")

    def wait_for(self, stream: torch.cuda.Stream, address: int, value: int) -> None:
        """Until the word is at least ``value``."""
        self._check(self._wait(stream.cuda_stream, address, value, 0), "cuStreamWaitValue32")

    @staticmethod
    def _check(status: int, call: str) -> None:
        if status:
            raise TransportError(
                f"{call} failed with CUDA error {status}, so that these GPUs cannot signal each other; plan with "
                'transport="collective"'
            )


@lru_cache(maxsize=1)
def _driver() -> _Driver:
    return _Driver()
