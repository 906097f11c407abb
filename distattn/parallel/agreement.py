"""What the ranks of a group tell each other through its store: that they plan the same, what they wait for, what went wrong.

No call here waits for a peer, nor for ever for a store that does not answer. Notices are read by whoever waits anyway, so that
one rank's mistake reaches all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import distributed_c10d

from distattn.bounded_store import BoundedStore
from distattn.errors import AgreementError, DistattnError, TransportError
from distattn.parallel.per_group import PerGroup

_NOTICES = "distattn/notice"
_GAVE_UP = "distattn/gave_up"
_LOOK_S, _PLAN_S = 10.0, 60.0
"""How long the store may take: for what can be looked at again, and for a plan call, which fails without it."""

_KINDS: dict[str, type[DistattnError]] = {"agreement": AgreementError, "transport": TransportError}


class Board:
    """A group's notice board. Make one with ``board_of(group)``: all users of a group share its counters.

    waiting: describes the transfer that this rank waits for at the moment, if it waits for one.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._store = BoundedStore(store, limit_s=_LOOK_S)
        self.waiting: Callable[[], str] | None = None
        self._num_plans = 0
        self._num_read = 0
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def agree(self, inputs: str) -> None:
        """Compare one ``plan`` call's inputs with those of the rank that came first; raises AgreementError on a mismatch.

        A rank that came first learns of it at its next wait or plan. TransportError: the store does not answer.
        """
        self.check()
        number, self._num_plans = self._num_plans, self._num_plans + 1
        digest = hashlib.blake2b(inputs.encode(), digest_size=16).hexdigest()
        mine = json.dumps([digest, self.rank, inputs])
        try:
            first = self._store.within(_PLAN_S).compare_set(f"distattn/plan/{number}", "", mine).decode()
        except dist.DistError as error:
            raise TransportError(f"rank {self.rank} could not compare plan call {number} with the others' ({error})") from error
        other_digest, other_rank, other_inputs = json.loads(first)
        if other_digest != digest:
            text = (
                f"ranks {other_rank} and {self.rank} of one group planned different things in plan call {number}: "
                f"rank {other_rank} gave {other_inputs}; rank {self.rank} gave {inputs}. "
                "Every rank of the group must call plan() with the same arguments, in the same order"
            )
            self.post_notice("agreement", f"plan {number}", text)
            raise AgreementError(text)

    def post_notice(self, kind: str, topic: str, text: str) -> None:
        """Tell all ranks of an error; a rank raises one error a topic. kind: "agreement" or "transport"."""
        with self._lock:
            self._known.add(topic)
        with contextlib.suppress(dist.DistError):  # the caller raises the error itself, which matters more
            number = self._store.add("distattn/num_notices", 1) - 1
            self._store.set(f"{_NOTICES}/{number}", json.dumps([kind, topic, text]))

    def check(self) -> None:
        """Raise the first error that another rank posted and this rank has not raised yet."""
        with self._lock:
            while (notice := self._read(f"{_NOTICES}/{self._num_read}")) is not None:
                kind, topic, text = json.loads(notice)
                self._num_read += 1
                if topic not in self._known:
                    self._known.add(topic)
                    raise _KINDS[kind](text)

    def report_wait(self, waiting: str, grace_s: float) -> str:
        """Publish what this rank waits for, give the others ``grace_s`` seconds to do so, and say who did not.

        Those are the ranks that everyone else waits for, or that died.
        """
        try:
            return self._report_wait(waiting, grace_s)
        except dist.DistError as error:
            return f"the others cannot be asked ({error})"

    def someone_gave_up(self) -> bool:
        """Whether any rank has reported a wait: the transfer cannot be completed, so there is no use in waiting on."""
        return self._read(_GAVE_UP) is not None

    def _report_wait(self, waiting: str, grace_s: float) -> str:
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        keys = [f"distattn/waiting/{rank}" for rank in others]
        store = self._store
        store.set(f"distattn/waiting/{self.rank}", waiting)
        store.set(_GAVE_UP, str(self.rank))
        deadline = time.monotonic() + grace_s
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)
        missing = [rank for rank, key in zip(others, keys, strict=True) if not store.check([key])]
        if missing:
            return "ranks not seen waiting: " + ", ".join(map(str, missing))
        waits = [f"rank {rank} waits {store.get(key).decode()}" for rank, key in zip(others, keys, strict=True)]
        return "every rank waits: " + "; ".join(waits)

    def _read(self, key: str) -> bytes | None:
        """The value of a key, if it is set; a store that cannot be reached has nothing to say."""
        try:
            return self._store.get(key) if self._store.check([key]) else None
        except dist.DistError:
            return None


_boards: PerGroup[Board] = PerGroup()


def board_of(group: dist.ProcessGroup) -> Board:
    """The group's notice board, in the store that the group was made with."""
    if group not in _boards:
        store = distributed_c10d._get_process_group_store(group)
        _boards[group] = Board(store, dist.get_rank(group), dist.get_world_size(group))
    return _boards[group]


def current_waits() -> list[str]:
    """What this process waits for now, a sentence for each group: for a report of ranks that hang. Safe from any thread."""
    found = []
    for group, board in list(_boards.data.items()):  # one step of the interpreter: another thread may add a group meanwhile
        waiting = board.waiting
        if waiting is not None:
            members = ", ".join(map(str, dist.get_process_group_ranks(group)))
            found.append(f"{waiting()} (as rank {board.rank} of the group of ranks {members})")
    return found
