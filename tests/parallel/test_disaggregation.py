"""Plan only: tasks cover the mask, the planner keeps its tolerance and caps, and its counts are those of the program."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.bench.lengths import draw
from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.cost import Shape, count
from distattn.parallel.disaggregation.assemble import assemble, received, task_table
from distattn.parallel.disaggregation.caps import Caps
from distattn.parallel.disaggregation.tasks import band_pairs, home_tasks
from distattn.parallel.layout import Layout
from distattn.parallel.program import ATTEND_Q, SLOT_RANK
from distattn.parallel.schedulers.auto import choose_layout
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, assign, kv_row_bytes, plan
from distattn.parallel.verify import verify
from tests.parallel.cases import random_layout, random_mask

SEQUENCE = 1 << 20
RANK_ROWS = 131_072
HEADS, KV_HEADS = 32, 8
CAPS = Caps(2.0, 4 * 129 * 4 / 512, 2.0 + 4 * 129 * 4 / 512)
"""One query row of four heads, in bf16 there and in fp32 with its LSE back, over a row of K and V."""


def packed(distribution: str, ranks: int, seed: int = 0) -> tuple[Mask, Layout]:
    """Sequences of 1M tokens, eight ranks each."""
    lengths = [n for i in range(ranks // 8) for n in draw(distribution, SEQUENCE, seed + i)]
    return Mask.documents(lengths), Layout.contiguous(RANK_ROWS * ranks, ranks)


def one_giant(ranks: int) -> tuple[Mask, Layout]:
    """A document of three quarters of the tokens, a thousand tiny ones after it."""
    total = 4096 * ranks
    tiny = total // 4 // 1000
    return Mask.documents([total - 1000 * tiny, *[tiny] * 1000]), Layout.contiguous(total, ranks)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1))
def test_home_tasks_are_the_mask(seed: int) -> None:
    """Boxes are disjoint, their pairs are the mask's inside them, and so are those of any clipped part."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 80))
    mask = random_mask(rng, n)
    home = home_tasks(mask, random_layout(rng, n, int(rng.integers(1, 6))), 2)
    dense, covered = mask.dense(), np.zeros((n, n), np.int64)
    for task in (home.task(index) for index in range(len(home.home))):
        covered[task.q0 : task.q1, task.k0 : task.k1] += 1
        assert task.pairs == dense[task.q0 : task.q1, task.k0 : task.k1].sum()
        q0, q1 = sorted(rng.integers(task.q0, task.q1 + 1, 2).tolist())
        k0, k1 = sorted(rng.integers(task.k0, task.k1 + 1, 2).tolist())
        part = task.clip(q0, q1, k0, k1, 0, 1)
        assert (part.pairs if part else 0) == dense[q0:q1, k0:k1].sum()
        wanted = float(rng.random() * task.pairs)
        start = task.start_of_last_rows(task.q1, wanted)
        assert task.pairs_of_rows(start + 1, task.q1) <= wanted
    assert covered.max(initial=0) <= 1
    assert (covered[dense] == 1).all()
    assert all(band_pairs((a, b, c, d, e, f)) > 0 for a, b, c, d, e, f in home.bands.tolist())


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1))
def test_every_assignment_verifies(seed: int) -> None:
    """Any mask, layout, cut size, number of servers, speeds and pools; forward and backward."""
    rng = np.random.default_rng(seed)
    n, kv_heads, ranks = int(rng.integers(2, 90)), int(rng.integers(1, 4)), int(rng.integers(1, 17))
    mask, layout = random_mask(rng, n), random_layout(rng, n, ranks)
    servers = int(rng.integers(0, ranks))
    options = DisaggregatedOptions(
        tolerance=0.02,
        align=int(rng.choice([1, 2, 4, 128])),
        servers=servers,
        capacity=tuple(rng.uniform(0.5, 1.5, ranks)) if rng.random() < 0.5 else None,
        planner="greedy" if rng.random() < 0.2 else "boxes",
    )
    if options.planner == "boxes" and servers in (0, ranks - 1):
        options = replace(options, pool=int(rng.integers(0, ranks + 2)), ranks_per_node=int(rng.choice([1, 2, 3, 8])))
    if servers:
        options = replace(options, pool=0)
    program = plan(mask, layout, kv_heads * int(rng.integers(1, 5)), kv_heads, options)
    assert verify(program, mask).area == mask.area
    for keep in (False, True):
        verify(derive_backward(program, keep=keep), mask)


@pytest.mark.parametrize("distribution", ["prolong512k", "wlb", "prolong"])
@pytest.mark.parametrize("ranks", [8, 64, 256])
def test_real_lengths_are_balanced_with_fewer_bytes_than_the_published_planner(distribution: str, ranks: int) -> None:
    mask, layout = packed(distribution, ranks)
    shape = Shape(head_dim=128, value_dim=128)
    received = {}
    for planner in ("boxes", "greedy"):
        program = plan(mask, layout, HEADS, KV_HEADS, DisaggregatedOptions(tolerance=0.02, planner=planner))
        assert verify(program, mask).area == mask.area
        cost = count(program, mask, shape)
        received[planner] = int(cost.bytes_received_per_rank.max())
        if planner == "boxes":
            assert cost.imbalance <= 1.0201
    assert received["boxes"] <= received["greedy"]


@pytest.mark.parametrize(("ranks", "seeds"), [(8, 5), (64, 3), (256, 2)])
@pytest.mark.parametrize("distribution", ["prolong512k", "wlb", "prolong"])
def test_no_rank_receives_more_than_under_the_published_planner(distribution: str, ranks: int, seeds: int) -> None:
    """Several draws, without a program; the next test shows that this counts what the program moves."""
    for seed in range(seeds):
        mask, layout = packed(distribution, ranks, 1000 * (seed + 1))
        worst = {}
        for planner in ("boxes", "greedy"):
            found = assign(mask, layout, HEADS, KV_HEADS, DisaggregatedOptions(tolerance=0.02, planner=planner))
            worst[planner] = received(task_table(found), layout, KV_HEADS, CAPS).max()
            assert planner == "greedy" or found.imbalance <= 1.0201
        assert worst["boxes"] <= worst["greedy"], seed


def test_a_rank_that_fetches_much_already_takes_no_more() -> None:
    """This draw's emptiest rank once took tasks of so many documents that it received 0.99 times the published worst."""
    mask, layout = packed("prolong512k", 256, 6000)
    options = DisaggregatedOptions(tolerance=0.02)
    worst = [
        received(task_table(assign(mask, layout, HEADS, KV_HEADS, replace(options, planner=x))), layout, KV_HEADS, CAPS).max()
        for x in ("boxes", "greedy")
    ]
    assert worst[0] <= 0.9 * worst[1]


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ([1024] * 16, "contiguous"),  # nothing travels
        ([16384], "zigzag"),  # nothing moves
        ([8192, *[512] * 16], "per_document_zigzag"),  # the long document alone is cut
    ],
)
def test_rows_lie_where_balancing_them_sends_least(lengths: list[int], chosen: str) -> None:
    mask = Mask.documents(lengths)
    placed = choose_layout(mask, 4, "disaggregated", heads=HEADS, kv_heads=KV_HEADS)
    assert placed.layout.name == chosen
    assert "over the least of all layouts that keep the tolerance" in placed.reason
    worst = {}
    for layout in (placed.layout, Layout.contiguous(sum(lengths), 4)):
        program = plan(mask, layout, HEADS, KV_HEADS)
        assert verify(program, mask).area == mask.area
        cost = count(program, mask, Shape(128, 128))
        assert cost.imbalance <= 1.0501
        worst[layout.name] = int(cost.bytes_received_per_rank.max())
    assert worst[chosen] == min(worst.values())
    assert (worst[chosen] == 0) == (chosen == "contiguous")


def test_rows_stay_contiguous_where_other_layouts_are_not_looked_at() -> None:
    """With caps, pools or the greedy planner, or where they shall not be placed; and dedicated servers hold none."""
    mask = Mask.causal(4096)
    for options in (
        DisaggregatedOptions(place_rows=False),
        DisaggregatedOptions(pool=2, ranks_per_node=2),
        DisaggregatedOptions(receive_bytes=1e12),
        DisaggregatedOptions(planner="greedy"),
    ):
        placed = choose_layout(mask, 4, "disaggregated", heads=HEADS, kv_heads=KV_HEADS, options=options)
        assert placed.layout.name == "contiguous", options
    served = choose_layout(mask, 4, "disaggregated", heads=HEADS, options=DisaggregatedOptions(servers=1))
    assert served.layout.counts.tolist()[-1] == 0


def test_local_work_of_rows_that_other_tasks_share_is_left_out_of_the_one_box() -> None:
    """A window with global rows: what one task disturbs disturbs its neighbours, until all that share rows are apart."""
    mask = Mask.global_window(20, 1, 0, 0)
    layout = Layout.per_document_zigzag([20], 14)
    options = DisaggregatedOptions(tolerance=0.02, align=2, servers=7, planner="greedy")
    assert verify(plan(mask, layout, 2, 2, options), mask).area == mask.area


def test_a_plan_for_256_ranks_takes_less_than_50_ms_of_one_core() -> None:
    """From lengths to the program; on the thread's own clock, since other tests share the cores."""
    lengths = [n for i in range(32) for n in draw("wlb", SEQUENCE, i)]
    least = 1.0
    for _ in range(8):
        began = time.thread_time()
        plan(
            Mask.documents(lengths),
            Layout.contiguous(RANK_ROWS * 256, 256),
            HEADS,
            KV_HEADS,
            DisaggregatedOptions(tolerance=0.02),
        )
        least = min(least, time.thread_time() - began)
        if least < 0.05:
            break
    assert least < 0.05


@pytest.mark.parametrize("ranks", [3, 8, 31])
def test_one_giant_document_is_balanced(ranks: int) -> None:
    mask, layout = one_giant(ranks)
    program = plan(mask, layout, HEADS, KV_HEADS)
    assert count(program, mask, Shape(128, 128)).imbalance <= 1.0501
    assert program.digest == plan(mask, layout, HEADS, KV_HEADS).digest


def test_only_servers_compute_and_speeds_are_kept() -> None:
    mask, layout = one_giant(8)
    options = DisaggregatedOptions(servers=3, capacity=(1.0,) * 5 + (1.0, 1.0, 2.0))
    program = plan(mask, layout, HEADS, KV_HEADS, options)
    assert set(program.slots[program.attends[:, ATTEND_Q], SLOT_RANK].tolist()) == {5, 6, 7}
    work = count(program, mask, Shape(128, 128)).flops_per_rank
    share = np.array([0, 0, 0, 0, 0, 0.25, 0.25, 0.5]) * work.sum()
    assert (work <= 1.0501 * share).all()


def capped_at(cap: str, limit: float) -> DisaggregatedOptions:
    return replace(DisaggregatedOptions(), **{cap: limit})


@pytest.mark.parametrize("cap", ["receive_bytes", "memory_bytes"])
def test_caps_are_kept_and_counted_as_the_program_is(cap: str) -> None:
    """With room for it the plan stays under the cap; what the planner counts is what the program moves; far too small a cap is
    an error that names it."""
    mask, layout = packed("prolong512k", 64)
    free = assign(mask, layout, HEADS, KV_HEADS, DisaggregatedOptions(receive_bytes=1e15, memory_bytes=1e15))
    assert free.usage is not None
    unit = kv_row_bytes(DisaggregatedOptions())
    worst = {"receive_bytes": free.usage.received, "memory_bytes": free.usage.held}[cap].max() * unit
    limit = 0.95 * worst
    capped = assign(mask, layout, HEADS, KV_HEADS, capped_at(cap, limit))
    assert capped.usage is not None
    program = assemble(task_table(capped), layout, HEADS, KV_HEADS)
    verify(program, mask)
    cost = count(program, mask, Shape(head_dim=128, value_dim=128))
    assert np.array_equal(cost.bytes_received_per_rank, (capped.usage.received * unit).round())
    if cap == "receive_bytes":
        assert cost.bytes_received_per_rank.max() <= limit
    else:
        home = 4 * RANK_ROWS * (HEADS + 2 * KV_HEADS) * 128  # at least q, k, v of its own rows
        assert (capped.usage.held * unit).max() <= limit < cost.peak_memory_bytes_per_rank.max() < limit + 4 * home
    with pytest.raises(PlanError, match=f"keeps {cap}=1000000: rank [0-9]+ would need [0-9.]+; raise the cap"):
        assign(mask, layout, HEADS, KV_HEADS, capped_at(cap, 1e6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be positive and at most 10"),
        ({"planner": "best"}, "planner must be boxes or greedy, got 'best'"),
        ({"align": 0}, "align must be positive"),
        ({"receive_bytes": -1.0}, "must not be negative"),
        ({"servers": 8}, "servers must be fewer than the 8 ranks, got 8"),
        ({"capacity": (1.0,)}, "one speed for each of the 8 ranks, got 1"),
        ({"capacity": (0.0,) * 8}, "not all 0"),
        ({"planner": "greedy", "pool": 4}, "the greedy planner knows no pools"),
        ({"round_bytes": -1}, "round_bytes must not be negative"),
        ({"servers": 1, "pool": 2, "ranks_per_node": 1}, "1 servers cannot be divided over 7 pools"),
        ({"capacity": (0.0,) * 4 + (1.0,) * 4, "pool": 4, "ranks_per_node": 4}, "a pool has work, but none of its ranks"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(*one_giant(8), HEADS, KV_HEADS, DisaggregatedOptions(**options))


@pytest.mark.parametrize("servers", [0, 3])
def test_what_ranks_receive_is_known_before_there_is_a_program(servers: int) -> None:
    """By which one plan of several is chosen; the chosen one is not worse than the published planner's."""
    mask, layout = Mask.documents(draw("wlb", 1 << 18, 0)), Layout.contiguous(1 << 18, 16)
    options = DisaggregatedOptions(tolerance=0.02, servers=servers)
    tasks = task_table(assign(mask, layout, HEADS, KV_HEADS, options))
    found = received(tasks, layout, KV_HEADS, CAPS) * kv_row_bytes(options)
    counted = count(assemble(tasks, layout, HEADS, KV_HEADS), mask, Shape(128, 128)).bytes_received_per_rank
    computes = np.unique(tasks.server)
    assert len(computes) == (servers or 16)
    assert np.allclose(found[computes], counted[computes], rtol=1e-12)
