"""All ranks in one process, no torch.distributed: lowering and execution of any program against the dense fp64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.errors import TransportError
from distattn.kernels import BACKENDS
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.in_process import InProcessResult, run_in_process
from distattn.parallel.layout import Layout
from distattn.parallel.lowering import HOME_KV, Lowered, locate, lower, share_rows
from distattn.parallel.program import KV, KV_IN, Q_IN, Q_OUT, Program, ProgramBuilder, Q
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.transport.base import Message
from distattn.parallel.transport.mailbox import Mailbox
from distattn.parallel.wire import Shape, bundle_of
from tests.parallel.cases import inputs, oracle, random_cross_mask, random_layout, random_mask, random_options

REFERENCE = BACKENDS["reference"]
NAMES = ("out", "lse", "dq", "dk", "dv")


def check(result: InProcessResult, expected: tuple[torch.Tensor, ...]) -> None:
    for name, want in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(getattr(result, name), want, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=90, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(1, 6),
    n=st.integers(3, 40),
    name=st.sampled_from(sorted(SCHEDULERS)),
    heads=st.sampled_from([(12, 3), (12, 12), (60, 2), (6, 1), (7, 7)]),
    keep=st.booleans(),
)
def test_matches_the_oracle_with_poisoned_memory(
    seed: int, ranks: int, n: int, name: str, heads: tuple[int, int], keep: bool
) -> None:
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, n)
    layout = random_layout(rng, n, ranks)
    if layout.num_rows != n:
        mask = Mask.causal(layout.num_rows)
    q, k, v, do = inputs(layout.num_rows, *heads, head_dim=4, value_dim=6, batch=2, seed=seed)
    program = SCHEDULERS[name].plan(mask, layout, *heads, random_options(rng, name, *heads, ranks))
    backward = derive_backward(program, keep=keep)
    result = run_in_process(program, mask, q, k, v, do, backend=REFERENCE, backward_program=backward, poison=True)
    check(result, oracle(q, k, v, do, mask))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(1, 5),
    name=st.sampled_from([x for x in sorted(SCHEDULERS) if x != "disaggregated"]),
    heads=st.sampled_from([(4, 2), (6, 6), (5, 1)]),
    keep=st.booleans(),
)
def test_cross_attention_matches_the_oracle(seed: int, ranks: int, name: str, heads: tuple[int, int], keep: bool) -> None:
    rng = np.random.default_rng(seed)
    n, num_keys = int(rng.integers(1, 30)), int(rng.integers(1, 30))
    mask = random_cross_mask(rng, n, num_keys)
    layout, keys = random_layout(rng, n, ranks), random_layout(rng, num_keys, ranks)
    q, k, v, do = inputs(n, *heads, seed=seed, num_keys=num_keys)
    program = SCHEDULERS[name].plan(mask, layout, *heads, random_options(rng, name, *heads, ranks), keys)
    backward = derive_backward(program, keep=keep)
    result = run_in_process(program, mask, q, k, v, do, backend=REFERENCE, backward_program=backward, poison=True)
    check(result, oracle(q, k, v, do, mask))


def served_remotely(layout: Layout, heads: int, kv_heads: int, cut: int) -> Program:
    """Rank 0's rows are computed on rank 1: heads below ``cut`` whole, the rest in two parts that merge at home.

    Unequal head ranges give slots of several arenas, nonzero shifts, results that are alone and results that are not.
    """
    builder = ProgramBuilder(layout, heads, kv_heads)
    group = heads // kv_heads
    mine, theirs = layout.rank_ranges(0), layout.rank_ranges(1)
    rows, keys = builder.home_rows[0], builder.add_row_set(np.concatenate([mine, theirs]))
    low = builder.add_slots(np.array([[1, Q, 0, cut, rows], [1, KV, 0, -(-cut // group), keys]]))
    high = builder.add_slots(
        np.array([[1, Q, cut, heads, rows], [1, Q, cut, heads, rows], [1, KV, cut // group, kv_heads, keys]])
    )
    home = builder.home_rows
    for q in (low[0], high[0], high[1]):
        builder.add_moves(np.array([[Q_IN, 0, q, rows, 0, 1], [Q_OUT, q, 0, rows, 3, 4]]))
    for kv in (low[1], high[2]):
        builder.add_moves(np.array([[KV_IN, 1, kv, home[0], 0, 1], [KV_IN, 3, kv, home[1], 0, 2]]))
    builder.add_attends(
        np.array(
            [
                [2, low[0], low[1], rows, keys, 0, cut],
                [2, high[0], high[2], rows, home[0], cut, heads],
                [2, high[1], high[2], rows, home[1], cut, heads],
                [0, 2, 3, home[1], home[1], 0, heads],
            ]
        )
    )
    return builder.build()


def test_head_ranges_several_arenas_and_results_that_merge() -> None:
    layout = Layout.given([[(3, 9), (0, 2)], [(9, 14), (2, 3)]])
    # Rows 0-1 and 3-8 are rank 0's and see keys of both ranks; rank 1's own rows are left to keys of rank 1, row 2 sees none.
    mask = Mask.from_bands([(0, 2, 0, 14, -3, 9), (3, 9, 1, 13, -20, 20), (9, 14, 9, 14, -9, 0)], 14, 14)
    q, k, v, do = inputs(14, 12, 3, value_dim=8)
    program = served_remotely(layout, 12, 3, cut=6)
    program.verify(mask)
    check(run_in_process(program, mask, q, k, v, do, backend=REFERENCE, poison=True), oracle(q, k, v, do, mask))
    lowered = lower(program, mask, 1)
    assert len({(a.kind, a.num_heads) for a in lowered.arenas[2:]}) == len(lowered.arenas) - 2
    shifts = {int(x) for step in lowered.steps for group in step.groups for x in group.tiles[:, 8]}
    assert shifts == {0, 2}


def ring(n: int, ranks: int) -> tuple[Mask, Program]:
    mask = Mask.causal(n)
    return mask, SCHEDULERS["ring"].plan(mask, Layout.zigzag(n, ranks), 4, 2)


def chunks_at_once(lowered: Lowered, chunk: int) -> float:
    """Chunks in the KV arenas plus those in flight to this rank, at the worst time."""
    arena = sum(a.num_rows for i, a in enumerate(lowered.arenas) if a.kind == KV and i != HOME_KV)
    flying = [
        sum(item.part.rows.count for x in lowered.exchanges if x.issue <= t < x.due for _, m in x.receives for item in m)
        for t in range(len(lowered.steps))
    ]
    return (arena + max(flying)) / chunk


def test_a_ring_holds_exactly_two_chunks() -> None:
    mask, program = ring(16 * 8, 8)
    for rank in range(8):
        assert chunks_at_once(lower(program, mask, rank), 16) == 2


def test_a_stage_is_one_backend_call_with_few_tiles() -> None:
    mask, program = ring(64 * 4, 4)
    for rank in range(4):
        groups = [step.groups for step in lower(program, mask, rank).steps]
        assert [len(g) for g in groups] == [1, 1, 1, 1, 0]
        assert all(len(g.tiles) == 1 for step in groups for g in step)
    home = lower(program, mask, 2).steps[0].groups[0].tiles
    assert home[0, :4].tolist() == [0, 64, 0, 64], "both halves of a zigzag are one causal tile in arena rows"
    assert home[0, 5] == 0


def test_documents_give_a_tile_each() -> None:
    mask = Mask.documents([7] * 300)
    program = SCHEDULERS["ring"].plan(mask, Layout.contiguous(2100, 2), 4, 2)
    tables = [g.tiles for step in lower(program, mask, 0).steps for g in step.groups]
    assert [len(t) for t in tables] == [150]


def test_results_travel_in_the_input_dtype_only_where_nothing_is_added() -> None:
    mask = Mask.causal(24)
    layout = Layout.zigzag(24, 2)
    ulysses = lower(SCHEDULERS["ulysses"].plan(mask, layout, 4, 2), mask, 0)
    assert ulysses.out_alone
    mixed = lower(served_remotely(layout, 4, 2, cut=2), mask, 0)
    assert not mixed.out_alone
    results = [i for x in mixed.exchanges for _, items in x.receives for i in items if i.kind == Q_OUT]
    assert len(results) == 3
    assert not any(item.alone for item in results)


def test_a_home_that_computes_merges_what_it_receives() -> None:
    mask = Mask.full(12, 12)
    builder = ProgramBuilder(Layout.contiguous(12, 2), 4, 2)
    zero, one = builder.home_rows.tolist()
    away = int(builder.add_slots(np.array([[1, Q, 0, 4, zero]]))[0])
    received = int(builder.add_slots(np.array([[1, KV, 0, 2, zero]]))[0])
    builder.add_moves(np.array([[Q_IN, 0, away, zero, 0, 1], [KV_IN, 1, received, zero, 0, 1], [Q_OUT, away, 0, zero, 2, 3]]))
    builder.add_attends(
        np.array([[0, 0, 1, zero, zero, 0, 4], [0, 2, 3, one, one, 0, 4], [1, away, 3, zero, one, 0, 4],
                  [1, 2, received, one, zero, 0, 4]])
    )  # fmt: skip
    program = builder.build()
    program.verify(mask)
    q, k, v, do = inputs(12, 4, 2)
    check(run_in_process(program, mask, q, k, v, do, backend=REFERENCE, poison=True), oracle(q, k, v, do, mask))
    lowered = lower(program, mask, 0)
    shape = Shape(1, 4, 4, torch.bfloat16, needs_out=False)
    assert not lowered.out_alone
    assert [bundle_of(Q_OUT, lowered, shape, alone)[0][1] for alone in (False, True)] == [torch.float32, torch.bfloat16]


GLOBAL_ROWS = 16
SEEN_BY_ALL = Mask.global_window(256, GLOBAL_ROWS, 0)
"""The first rows see, and are seen by, all ranks: their results and gradients are sums over all, at few Attends in all."""


def bf16_inputs(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, do = (x.to(torch.bfloat16) for x in inputs(256, heads, heads, head_dim=16, value_dim=16))
    return q, k, v, do


def relative_errors(result: InProcessResult, exact: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Frobenius error of out, dq, dk, dv over the exact ones, of the rows that sum over all ranks."""
    pairs = [(name, getattr(result, name), want) for name, want in zip(NAMES, exact, strict=True) if name != "lse"]
    rows = slice(GLOBAL_ROWS)
    return {name: float((x.double() - y)[:, rows].norm() / y[:, rows].norm()) for name, x, y in pairs}


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_bf16_error_does_not_grow_with_ranks(name: str) -> None:
    """From 1 to 64 ranks, whose partial results merge in fp32: at most 5 % more than on one rank, whatever the options."""
    heads = 64 if name == "ulysses" else 4
    tensors = bf16_inputs(heads)
    q, k, v, do = (x.double() for x in tensors)
    exact = oracle(q, k, v, do, SEEN_BY_ALL)

    def errors(ranks: int, options: object) -> dict[str, float]:
        program = SCHEDULERS[name].plan(SEEN_BY_ALL, Layout.contiguous(256, ranks), heads, heads, options)
        return relative_errors(run_in_process(program, SEEN_BY_ALL, *tensors, backend=REFERENCE), exact)

    alone = errors(1, None)
    for ranks in (2, 8, 64):
        for options in SCHEDULERS[name].variants(heads, heads, ranks, 8)[: None if ranks == 8 else 1]:
            for tensor, error in errors(ranks, options).items():
                assert error < 1.05 * alone[tensor], (tensor, ranks, options)


def test_gradient_sums_in_bf16_on_the_wire_cost_what_the_documents_say() -> None:
    """docs/attention.md: dK, dV of a ring lose digits with every hop in bf16, and none in fp32."""
    tensors = bf16_inputs(4)
    q, k, v, do = (x.double() for x in tensors)
    exact = oracle(q, k, v, do, SEEN_BY_ALL)
    error: dict[tuple[int, object], float] = {}
    for ranks in (2, 64):
        program = SCHEDULERS["ring"].plan(SEEN_BY_ALL, Layout.contiguous(256, ranks), 4, 4)
        for wire in (None, torch.bfloat16):
            result = run_in_process(program, SEEN_BY_ALL, *tensors, backend=REFERENCE, reduce_dtype=wire)
            assert result.dk is not None
            assert result.dk.dtype == torch.float32
            error[ranks, wire] = relative_errors(result, exact)["dk"]
    assert error[64, None] < 1.05 * error[2, None]
    assert error[2, None] < error[2, torch.bfloat16] < 4e-3
    assert 2 * error[2, torch.bfloat16] < error[64, torch.bfloat16] < 3e-2


def test_reruns_are_bitwise_equal() -> None:
    mask, program = ring(48, 4)
    q, k, v, do = (x.float() for x in inputs(48, 4, 2))
    first, second = (run_in_process(program, mask, q, k, v, do, backend=REFERENCE) for _ in range(2))
    for name in NAMES:
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_sliding_window_moves_only_the_halo() -> None:
    mask = Mask.sliding_window(64, 3)
    program = SCHEDULERS["ring"].plan(mask, Layout.contiguous(64, 4), 4, 2)
    moved = program.row_counts[program.moves[:, 3]]
    assert (program.moves[:, 0] == KV_IN).all()
    assert moved.tolist() == [3, 3, 3]
    q, k, v, do = inputs(64, 4, 2)
    check(run_in_process(program, mask, q, k, v, do, backend=REFERENCE, poison=True), oracle(q, k, v, do, mask))


def test_a_missing_message_is_an_error() -> None:
    box = Mailbox(2)
    empty, four = torch.empty(0, dtype=torch.uint8), torch.empty(4, dtype=torch.uint8)
    message = Message(0, 1, empty, four, [0, 0], [0, 4], lambda: "at stage 1 for KV rows from rank 1")
    with pytest.raises(TransportError, match=r"rank 0 waited at stage 1 for KV rows from rank 1.*nothing"):
        box.endpoint(0).post(message).wait()
    box.endpoint(1).post(Message(0, 1, four, empty, [4, 0], [0, 0], lambda: ""))
    with pytest.raises(TransportError, match="never received: rank 1 to 0"):
        box.check_empty()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(0, 9)), max_size=12))
def test_rows_of_slots_alive_together_do_not_overlap(intervals: list[tuple[int, int, int]]) -> None:
    birth = np.array([b for b, _, _ in intervals], np.int64)
    death = birth + np.array([d for _, d, _ in intervals], np.int64)
    sizes = np.array([s for _, _, s in intervals], np.int64)
    base, total = share_rows(birth, death, sizes)
    assert total <= sizes.sum()
    for i in range(len(base)):
        assert 0 <= base[i] <= base[i] + sizes[i] <= total
        for j in range(i):
            if birth[i] <= death[j] and birth[j] <= death[i]:
                assert base[i] + sizes[i] <= base[j] or base[j] + sizes[j] <= base[i] or not sizes[i] or not sizes[j]


def test_locate_follows_storage_order() -> None:
    within = np.array([[10, 14], [0, 3], [3, 5], [20, 21]])
    found = locate(np.array([[20, 21], [1, 4], [11, 12]]), within)
    assert found.tolist() == [[20, 9, 1], [1, 5, 2], [3, 7, 1], [11, 1, 1]]
