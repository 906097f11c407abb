"""Plan only, but for the mutants that verify accepts: those are executed, and must turn out harmless."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from distattn.errors import VerifyError
from distattn.kernels import BACKENDS
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.in_process import run_in_process
from distattn.parallel.layout import Layout
from distattn.parallel.program import (
    ATTEND_H0,
    ATTEND_H1,
    ATTEND_KV,
    ATTEND_STAGE,
    MOVE_DUE,
    MOVE_ISSUE,
    MOVE_KIND,
    MOVE_SRC,
    SLOT_KIND,
    Program,
)
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.verify import verify
from tests.parallel.cases import inputs, oracle, random_layout, random_mask, random_options

NUM_MUTANTS = 1000


def random_program(rng: np.random.Generator) -> tuple[Mask, Program]:
    ranks, n, kv_heads = int(rng.integers(2, 5)), int(rng.integers(8, 33)), int(rng.integers(1, 3))
    heads = kv_heads * ranks
    mask = random_mask(rng, n)
    name = sorted(SCHEDULERS)[int(rng.integers(len(SCHEDULERS)))]
    options = random_options(rng, name, heads, kv_heads, ranks)
    return mask, SCHEDULERS[name].plan(mask, random_layout(rng, n, ranks), heads, kv_heads, options)


def with_row(table: np.ndarray, i: int, column: int, value: int) -> np.ndarray:
    out = table.copy()
    out[i, column] = value
    return out


def attend_mutants(p: Program, i: int, rng: np.random.Generator) -> dict[str, Program]:
    """One edit of Attend i."""
    a = p.attends
    other = int(rng.integers(len(p.slots)))
    heads = a[i, [ATTEND_H0, ATTEND_H1]]
    return {
        "attend dropped": replace(p, attends=np.delete(a, i, 0)),
        "attend duplicated": replace(p, attends=np.concatenate([a, a[i : i + 1]])),
        "attend shifted": replace(p, attends=with_row(a, i, ATTEND_STAGE, int(a[i, ATTEND_STAGE] + rng.choice([-1, 1])))),
        "attend heads cut": replace(p, attends=with_row(a, i, ATTEND_H1, int(rng.integers(heads[0], heads[1])))),
        "attend of a wrong slot": replace(p, attends=with_row(a, i, ATTEND_KV, other)),
    }


def move_mutants(p: Program, i: int, rng: np.random.Generator) -> dict[str, Program]:
    """One edit of Move i."""
    m = p.moves
    same_kind = np.flatnonzero(p.slots[:, SLOT_KIND] == p.slots[m[i, MOVE_SRC], SLOT_KIND])
    column = int(rng.choice([MOVE_ISSUE, MOVE_DUE]))
    return {
        "move dropped": replace(p, moves=np.delete(m, i, 0)),
        "move duplicated": replace(p, moves=np.concatenate([m, m[i : i + 1]])),
        "move shifted": replace(p, moves=with_row(m, i, column, int(m[i, column] + rng.choice([-1, 1])))),
        "move of a wrong source": replace(p, moves=with_row(m, i, MOVE_SRC, int(rng.choice(same_kind)))),
        "move of a wrong kind": replace(p, moves=with_row(m, i, MOVE_KIND, int(rng.integers(4)))),
    }


def mutate(p: Program, rng: np.random.Generator) -> tuple[str, Program]:
    kind = int(rng.integers(3))
    if kind == 0 and len(p.attends):
        options = attend_mutants(p, int(rng.integers(len(p.attends))), rng)
    elif kind == 1 and len(p.moves):
        options = move_mutants(p, int(rng.integers(len(p.moves))), rng)
    else:
        i = int(rng.integers(len(p.row_ranges)))
        moved = p.row_ranges[i, (end := int(rng.integers(2)))] + int(rng.choice([-1, 1]))
        options = {"range off by one": replace(p, row_ranges=with_row(p.row_ranges, i, end, int(moved)))}
    names = sorted(options)
    name = names[int(rng.integers(len(names)))]
    return name, options[name]


def assert_harmless(program: Program, mask: Mask, name: str) -> None:
    """A mutant that verify accepts must compute exactly what it should, forward and backward."""
    q, k, v, do = inputs(mask.num_queries, program.heads, program.kv_heads)
    expected = oracle(q, k, v, do, mask)
    for keep in (False, True):
        backward = derive_backward(program, keep=keep)
        verify(backward, mask)
        got = run_in_process(program, mask, q, k, v, do, backend=BACKENDS["reference"], backward_program=backward, poison=True)
        for part, x, y in zip(
            ("out", "lse", "dq", "dk", "dv"), (got.out, got.lse, got.dq, got.dk, got.dv), expected, strict=True
        ):
            assert x is not None
            torch.testing.assert_close(
                x, y, rtol=0, atol=1e-10, msg=lambda m, p=part, keep=keep: f"{name}, keep={keep}, {p}: {m}"
            )


def test_no_accepted_mutant_is_wrong() -> None:
    rng = np.random.default_rng(5)
    rejected: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    while rejected.total() + accepted.total() < NUM_MUTANTS:
        mask, program = random_program(rng)
        for _ in range(10):
            name, mutant = mutate(program, rng)
            try:
                verify(mutant, mask)
            except VerifyError:
                rejected[name] += 1
                continue
            accepted[name] += 1
            assert_harmless(mutant, mask, name)
    for name in ("attend duplicated", "move dropped", "move duplicated", "range off by one"):
        assert rejected[name] > 20, (name, rejected, accepted)
    assert rejected.total() > 0.7 * NUM_MUTANTS, (rejected, accepted)


@pytest.fixture
def ring() -> tuple[Mask, Program]:
    mask = Mask.causal(32)
    return mask, SCHEDULERS["ring"].plan(mask, Layout.zigzag(32, 4), 4, 2)


def test_each_invariant_is_named(ring: tuple[Mask, Program]) -> None:
    mask, p = ring
    a, m = p.attends, p.moves
    ulysses = SCHEDULERS["ulysses"].plan(mask, Layout.contiguous(32, 4), 4, 2)
    cases = {
        "computed twice": replace(p, attends=np.concatenate([a, a[:1]])),
        "are not computed for every head": replace(p, attends=a[1:]),
        "filled twice": replace(p, moves=np.concatenate([m, m[:1]])),
        "not filled completely": replace(p, moves=m[1:]),
        "before its rows arrive": replace(p, attends=with_row(a, len(a) - 1, ATTEND_STAGE, 0)),
        "issue < due": replace(p, moves=with_row(m, 0, MOVE_ISSUE, 1)),
        "never reaches its owner": replace(ulysses, moves=ulysses.moves[:-1]),
        "sent twice": replace(ulysses, moves=np.concatenate([ulysses.moves, ulysses.moves[-1:]])),
        "before it is complete": replace(ulysses, moves=with_row(ulysses.moves, len(ulysses.moves) - 1, MOVE_ISSUE, 1)),
        "heads that its slots do not hold": replace(ulysses, attends=with_row(ulysses.attends, 0, ATTEND_H1, 4)),
        "does not exist": replace(p, attends=with_row(a, 0, ATTEND_KV, 999)),
    }
    for message, mutant in cases.items():
        with pytest.raises(VerifyError, match=message):
            verify(mutant, mask)


def test_memory_cap(ring: tuple[Mask, Program]) -> None:
    mask, p = ring
    peak = int(p.verify(mask).peak_rows.max())
    assert peak == 2 * 8 * 2, "a ring holds two chunks: the one in use and the one in flight; 8 rows, 2 KV heads"
    p.verify(mask, max_rows_per_rank=peak)
    with pytest.raises(VerifyError, match="over the cap"):
        p.verify(mask, max_rows_per_rank=peak - 1)


def test_another_mask_is_not_covered(ring: tuple[Mask, Program]) -> None:
    """The window's program does not cover the causal mask; the causal ring computes any mask inside it."""
    _, causal = ring
    window = Mask.sliding_window(32, 3)
    program = SCHEDULERS["ring"].plan(window, Layout.contiguous(32, 4), 4, 2)
    with pytest.raises(VerifyError, match="not computed for every head"):
        verify(program, Mask.causal(32))
    verify(causal, window)
