"""What this process keeps for each process group: notice boards, plans, transports."""

from __future__ import annotations

import atexit
import weakref
from collections import UserDict
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

V = TypeVar("V")


class PerGroup(UserDict[dist.ProcessGroup, V]):
    """A dictionary by process group. Entries of destroyed groups go at the next new entry, and all when Python exits.

    Values may hold their group, which weak keys would keep alive for ever: gloo's threads would then outlive the interpreter
    and abort the process when they let go of a tensor (seen: "terminate called without an active exception").
    """

    def __init__(self) -> None:
        super().__init__()
        self._listed: set[dist.ProcessGroup] = set()
        _all.add(self)

    __hash__ = object.__hash__  # of all dictionaries here, none equals another

    def __setitem__(self, group: dist.ProcessGroup, value: V) -> None:
        living: Any = distributed_c10d._world.pg_map
        for destroyed in [known for known in self._listed if known not in living]:
            self._listed.discard(destroyed)
            self.data.pop(destroyed, None)
        if group in living:
            self._listed.add(group)
        super().__setitem__(group, value)

    def clear(self) -> None:
        self._listed.clear()
        super().clear()


_all: weakref.WeakSet[PerGroup[Any]] = weakref.WeakSet()


@atexit.register
def _let_go() -> None:
    for kept in _all:
        kept.clear()
