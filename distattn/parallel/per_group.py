"""What this process keeps for each process group: notice boards, plans, transports."""

from __future__ import annotations

import atexit
import gc
from collections import UserDict
from typing import Any, TypeVar

import torch.distributed as dist

# Its functions' default is the group that there is at its import, which torch.compile's machinery does in the first call of
# an operator: a group made by then would be kept.
import torch.distributed.nn.functional  # noqa: F401
from torch.distributed import distributed_c10d

V = TypeVar("V")


class PerGroup(UserDict[dist.ProcessGroup, V]):
    """A dictionary by process group. Entries of destroyed groups go at the next new entry, and all when Python exits.

    Values may hold their group, which weak keys would keep alive for ever: a thread of gloo's that frees a work's tensors while
    the interpreter ends wants its lock, and aborts the process (seen: "terminate called without an active exception").
    """

    def __init__(self) -> None:
        super().__init__()
        self._listed: set[dist.ProcessGroup] = set()
        _all.append(self)

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


_all: list[PerGroup[Any]] = []


@atexit.register
def let_go() -> None:
    """Clear all that is kept, circles of references included: gloo's threads cannot free what is found after this."""
    for kept in _all:
        kept.clear()
    gc.collect()
