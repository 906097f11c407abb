"""What is kept for a process group ends with it."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distattn import Mask, attention, plan
from distattn.parallel.per_group import PerGroup, let_go
from distattn.testing import run_ranks


def attend(group: dist.ProcessGroup) -> None:
    made = plan(Mask.causal(12), heads=1, head_dim=4, kv_heads=1, group=group)
    q = torch.zeros(1, made.num_local_rows, 1, 4, requires_grad=True)
    attention(q, q, q, made).sum().backward()


def destroyed_groups_that_live(rank: int, world: int) -> bool:
    """Whether a destroyed group is still there once the next one was used."""
    first: Any = dist.new_group([0, 1])
    attend(first)
    seen = weakref.ref(first)
    dist.destroy_process_group(first)
    del first
    second: Any = dist.new_group([0, 1])
    attend(second)
    gc.collect()
    return seen() is not None


def test_a_destroyed_group_is_let_go() -> None:
    """As values of weak keys, plans kept their group for ever, and with it gloo's threads, which abort at Python's end."""
    assert run_ranks(destroyed_groups_that_live, 2) == [False, False]


def threads_that_stay(rank: int, world: int) -> list[str]:
    """Gloo's threads once the default group is destroyed and what was kept for it cleared, as when Python exits."""
    assert dist.group.WORLD is not None
    attend(dist.group.WORLD)
    dist.destroy_process_group()
    let_go()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def test_nothing_keeps_the_default_group() -> None:
    """torch's own functions did, whose default argument is the group that there is when they are imported."""
    assert run_ranks(threads_that_stay, 2) == [[], []]


def entries(rank: int, world: int) -> list[list[str]]:
    kept: PerGroup[str] = PerGroup()
    found = []
    for name in ("a", "b"):
        group: Any = dist.new_group([0, 1])
        kept[group] = name
        found.append(sorted(kept.values()))
        if name == "a":
            dist.destroy_process_group(group)
    assert dist.group.WORLD is not None
    kept[dist.group.WORLD] = "c"
    found.append(sorted(kept.values()))
    return found


def test_only_entries_of_destroyed_groups_go() -> None:
    assert run_ranks(entries, 2) == [[["a"], ["b"], ["b", "c"]]] * 2
