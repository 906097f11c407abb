"""Plans of one kind of call: kept by what was asked for, and found again by the integer that custom operators take."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch.distributed as dist

from distattn.parallel.per_group import PerGroup

K = TypeVar("K")
P = TypeVar("P")


class PlanStore(Generic[K, P]):
    """The last ``size`` plans of each process group, and of calls on one rank; thread-safe.

    A plan that falls out of the store lives on while someone holds it, such as a backward that has yet to run, and its handle
    finds it for as long. Plans must allow weak references.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._handles = itertools.count(1)
        self._living: weakref.WeakValueDictionary[int, P] = weakref.WeakValueDictionary()
        self._local: OrderedDict[K, P] = OrderedDict()
        self._by_group: PerGroup[OrderedDict[K, P]] = PerGroup()

    def __getitem__(self, handle: int) -> P:
        """The living plan with this handle; KeyError where there is none."""
        return self._living[handle]

    def find_or_make(self, key: K, group: dist.ProcessGroup | None, make: Callable[[int], P]) -> P:
        """The plan of a key, hashable by value, on a group, or None for one rank; ``make`` takes the handle of a new one.

        Nothing is locked while a plan is made: ranks may have to talk about it.
        """
        kept = self._local if group is None else self._by_group.setdefault(group, OrderedDict())
        with self._lock:
            if key in kept:
                kept.move_to_end(key)
                return kept[key]
        handle = next(self._handles)
        made = make(handle)
        with self._lock:
            self._living[handle] = made
            kept[key] = made
            if len(kept) > self._size:
                kept.popitem(last=False)
        return made
