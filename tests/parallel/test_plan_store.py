"""Plans kept by what was asked for: how many, for how long, and under which handle."""

import gc
from dataclasses import dataclass

import pytest

from distattn.parallel.plan_store import PlanStore


@dataclass(frozen=True, eq=False)
class Made:
    handle: int


def test_a_plan_is_made_once_and_found_by_its_handle() -> None:
    store: PlanStore[tuple[str, int], Made] = PlanStore()
    first = store.find_or_make(("rows", 3), None, Made)
    assert store.find_or_make(("rows", 3), None, Made) is first is store[first.handle]
    assert store.find_or_make(("rows", 4), None, Made).handle != first.handle


def test_the_one_that_was_used_longest_ago_goes() -> None:
    store: PlanStore[str, Made] = PlanStore(size=2)
    a, b = store.find_or_make("a", None, Made), store.find_or_make("b", None, Made)
    store.find_or_make("a", None, Made)
    store.find_or_make("c", None, Made)
    assert store.find_or_make("a", None, Made) is a
    assert store.find_or_make("b", None, Made) is not b


def test_a_handle_lives_as_long_as_someone_holds_the_plan() -> None:
    store: PlanStore[str, Made] = PlanStore(size=1)
    held = store.find_or_make("a", None, Made)
    store.find_or_make("b", None, Made)
    handle = held.handle
    assert store[handle] is held
    del held
    gc.collect()
    with pytest.raises(KeyError):
        store[handle]


def test_what_fails_is_not_kept() -> None:
    store: PlanStore[str, Made] = PlanStore()
    with pytest.raises(ZeroDivisionError):
        store.find_or_make("a", None, lambda handle: Made(handle // 0))
    assert store.find_or_make("a", None, Made).handle
