"""Plan only: every scheduler × any mask × any layout × 1 to 16 ranks verifies, forward and backward; traffic is as derived."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.bench.disaggregation_cases import make_lengths
from distattn.errors import ConfigError, PlanError
from distattn.kernels.selection import shipped_rates
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.hardware import HARDWARE
from distattn.parallel.layout import Layout, area_per_rank
from distattn.parallel.program import (
    KV_IN,
    KV_OUT,
    MOVE_DST,
    MOVE_KIND,
    MOVE_ROWS,
    MOVE_SRC,
    Q_IN,
    SLOT_H0,
    SLOT_H1,
    SLOT_KIND,
    SLOT_RANK,
    Program,
    Q,
)
from distattn.parallel.schedulers import SCHEDULERS, find_scheduler
from distattn.parallel.schedulers.all_gather import AllGatherOptions
from distattn.parallel.schedulers.auto import TIE, WORTH_OPTIONS, choose_layout, choose_strategy
from distattn.parallel.schedulers.double_ring import DoubleRingOptions
from distattn.parallel.schedulers.options import parse_options
from distattn.parallel.schedulers.ring import RingOptions
from distattn.parallel.schedulers.ulysses import UlyssesOptions
from distattn.parallel.schedulers.usp import UspOptions, groups_of
from distattn.parallel.simulate import predict
from distattn.parallel.verify import verify
from tests.parallel.cases import random_cross_mask, random_layout, random_mask, random_options


def kv_rows_sent(program: Program) -> np.ndarray:
    """KV rows that cross from each rank to each rank, int64 [P, P]."""
    moves = program.moves[program.moves[:, MOVE_KIND] == KV_IN]
    src, dst = program.slots[moves[:, MOVE_SRC], SLOT_RANK], program.slots[moves[:, MOVE_DST], SLOT_RANK]
    out = np.zeros((program.num_ranks, program.num_ranks), np.int64)
    np.add.at(out, (src, dst), program.row_counts[moves[:, MOVE_ROWS]])
    np.fill_diagonal(out, 0)
    return out


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(1, 16), st.sampled_from(sorted(SCHEDULERS)))
def test_every_scheduler_verifies(seed: int, ranks: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    n, kv_heads = int(rng.integers(2, 90)), int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 5))
    if rng.integers(2):
        heads = kv_heads * ranks
    mask, layout = random_mask(rng, n), random_layout(rng, n, ranks)
    program = SCHEDULERS[name].plan(mask, layout, heads, kv_heads, random_options(rng, name, heads, kv_heads, ranks))
    assert verify(program, mask).area == mask.area
    for keep in (False, True):
        for ranks_per_node in (None, 2):
            verify(derive_backward(program, keep=keep, ranks_per_node=ranks_per_node), mask)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([x for x in sorted(SCHEDULERS) if x != "disaggregated"]))
def test_every_scheduler_verifies_cross_attention(seed: int, ranks: int, name: str) -> None:
    """Queries and keys of different rows, each with a layout of its own."""
    rng = np.random.default_rng(seed)
    n, num_keys, kv_heads = int(rng.integers(1, 60)), int(rng.integers(1, 60)), int(rng.integers(1, 4))
    heads = kv_heads * int(rng.integers(1, 5))
    mask = random_cross_mask(rng, n, num_keys)
    layout, keys = random_layout(rng, n, ranks), random_layout(rng, num_keys, ranks)
    options = random_options(rng, name, heads, kv_heads, ranks)
    program = SCHEDULERS[name].plan(mask, layout, heads, kv_heads, options, keys)
    verify(program, mask)
    verify(derive_backward(program), mask)


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_many_ranks_verify_under_every_variant(name: str, ranks: int) -> None:
    """What auto would try on nodes of 8, over heads that divide (64:8), do not (24:4), and are few (6:2)."""
    n = ranks * 40 + 7
    masks = (Mask.causal(n), Mask.documents([n // 2, 3, 90, n - n // 2 - 93]), Mask.sliding_window(n, 50))
    for i, (heads, kv_heads) in enumerate(((64, 8), (24, 4), (6, 2))):
        for j, options in enumerate(SCHEDULERS[name].variants(heads, kv_heads, ranks, 8)):
            mask = masks[(i + j) % 3]
            layout = (Layout.zigzag(n, ranks), Layout.balanced(mask, ranks), Layout.contiguous(n, ranks))[(i + 2 * j) % 3]
            program = SCHEDULERS[name].plan(mask, layout, heads, kv_heads, options)
            verify(program, mask)
            verify(derive_backward(program, ranks_per_node=8), mask)


def test_scales_to_a_million_tokens_on_256_ranks() -> None:
    n, ranks = 1 << 20, 256
    mask = Mask.causal(n)
    layout = Layout.zigzag(n, ranks)
    for name, heads in (("ring", 32), ("double_ring", 32), ("all_gather", 32), ("ulysses", 256), ("usp", 32)):
        verify(SCHEDULERS[name].plan(mask, layout, heads, 8, SCHEDULERS[name].variants(heads, 8, ranks, 8)[0]), mask)


def test_ring_under_a_window_is_a_halo_exchange() -> None:
    """Each rank sends its last 10 rows to the next rank, and nothing else moves."""
    program = SCHEDULERS["ring"].plan(Mask.sliding_window(800, 10), Layout.contiguous(800, 8), 4, 2)
    expected = np.diag([10] * 7, k=1)
    assert np.array_equal(kv_rows_sent(program), expected)
    assert program.num_stages == 2


def test_ring_sends_each_chunk_to_the_next_rank_only() -> None:
    """Causal zigzag, halves of 8 rows: a first half is seen by all ranks and travels P − 1 hops; the second half of rank r is
    seen by the r ranks before it, and travels on to the last of them; that of rank 0 stays at home."""
    program = SCHEDULERS["ring"].plan(Mask.causal(64), Layout.zigzag(64, 4), 4, 2)
    sent = kv_rows_sent(program)
    assert sent.sum() == 4 * 3 * 8 + (0 + 3 + 3 + 3) * 8
    assert {(a, b) for a, b in np.argwhere(sent).tolist()} == {(r, (r + 1) % 4) for r in range(4)}


def test_documents_within_a_rank_send_nothing() -> None:
    mask = Mask.documents([10, 6, 16, 8, 8])
    for name in ("ring", "all_gather"):
        assert kv_rows_sent(SCHEDULERS[name].plan(mask, Layout.contiguous(48, 3), 4, 2)).sum() == 0


def test_inter_node_traffic_of_the_backward_crosses_each_border_once() -> None:
    """Resent chunks come from a rank of the node where one has them: far fewer rows cross nodes than with direct sends."""
    program = SCHEDULERS["ring"].plan(Mask.causal(4096), Layout.zigzag(4096, 16), 4, 2)
    crossing = {}
    for ranks_per_node in (4, None):
        sent = kv_rows_sent(derive_backward(program, ranks_per_node=ranks_per_node))
        node = np.arange(16) // 4
        crossing[ranks_per_node] = int(sent[node[:, None] != node].sum())
    assert crossing[4] <= 3 * 4096
    assert crossing[None] > 2.5 * crossing[4]


def test_only_rows_that_some_query_sees_are_sent() -> None:
    """Every scheduler: the middle of a rank's rows, which no query of another rank sees, and rows that nobody sees, stay."""
    n, ranks = 96, 4
    # Queries of the last 24 rows see rows 0-3 and 20-23 of rank 0; rows 30-90 see and are seen by nobody.
    mask = Mask.from_bands([(91, 96, 0, 4, -200, 200), (91, 96, 20, 24, -200, 200)], n, n)
    layout = Layout.contiguous(n, ranks)
    for name, scheduler in SCHEDULERS.items():
        for options in scheduler.variants(4, 4, ranks, 2):
            program = scheduler.plan(mask, layout, 4, 4, options)
            touched = np.zeros(n, np.int64)
            copies = np.isin(program.moves[:, MOVE_KIND], (KV_IN, Q_IN))
            for row_set in program.moves[copies, MOVE_ROWS].tolist():
                for start, stop in program.rows(row_set).tolist():
                    touched[start:stop] += 1
            allowed = [*range(4), *range(20, 24), *range(91, 96)]
            if name != "disaggregated":  # it cuts at tiles of 128 rows
                assert set(np.flatnonzero(touched).tolist()) <= set(allowed), (name, options)


def test_windows_move_only_the_halo() -> None:
    """Ring, double ring and all-gather: the last 10 rows of each rank, to the next rank, in one hop."""
    mask, layout = Mask.sliding_window(800, 10), Layout.contiguous(800, 8)
    for name in ("ring", "double_ring", "all_gather"):
        for options in SCHEDULERS[name].variants(4, 1, 8, 4):
            sent = kv_rows_sent(SCHEDULERS[name].plan(mask, layout, 4, 1, options))
            assert np.array_equal(sent, np.diag([10] * 7, k=1)), (name, options)


def test_a_global_prefix_and_a_window_leave_the_rows_between_at_home() -> None:
    """Rows needed of one rank in two parts are sent as two parts, not as their hull."""
    mask = Mask.global_window(320, 4, 8) & Mask.causal(320)
    sent = kv_rows_sent(SCHEDULERS["all_gather"].plan(mask, Layout.contiguous(320, 4), 2, 2))
    assert sent[0].tolist() == [0, 12, 4, 4]
    hops = kv_rows_sent(SCHEDULERS["ring"].plan(mask, Layout.contiguous(320, 4), 2, 2))
    assert hops[0].tolist() == [0, 12, 0, 0]
    assert hops[1].tolist() == [0, 0, 12, 0]


def test_double_ring_crosses_each_border_of_nodes_with_every_rank() -> None:
    """16 ranks in nodes of 4, full mask: the flat ring sends 15 chunks through one rank at each border, the double ring 3
    through each; what crosses in all is the same."""
    mask, layout, node = Mask.full(1600, 1600), Layout.contiguous(1600, 16), np.arange(16) // 4
    crossing = {}
    for name in ("ring", "double_ring"):
        sent = kv_rows_sent(SCHEDULERS[name].plan(mask, layout, 4, 2))
        crossing[name] = np.where(node[:, None] != node, sent, 0).sum(1)
    assert crossing["ring"].max() == 15 * 100
    assert crossing["double_ring"].tolist() == [3 * 100] * 16


def test_two_way_rings_take_half_the_stages() -> None:
    mask, layout = Mask.full(800, 800), Layout.contiguous(800, 8)
    one, two = (SCHEDULERS["ring"].plan(mask, layout, 4, 2, RingOptions(two_way=x)) for x in (False, True))
    assert (one.num_stages, two.num_stages) == (8, 5)
    assert kv_rows_sent(one).sum() == kv_rows_sent(two).sum()


def test_moving_queries_sends_no_keys_in_either_direction() -> None:
    mask, layout = Mask.causal(64), Layout.zigzag(64, 4)
    program = SCHEDULERS["ring"].plan(mask, layout, 4, 4, RingOptions(moves="q"))
    for direction in (program, derive_backward(program)):
        assert not np.isin(direction.moves[:, MOVE_KIND], (KV_IN, KV_OUT)).any()


def test_heads_that_do_not_divide_fall_to_the_sequence() -> None:
    """6 heads over 4 ranks: 2 ways by heads, a ring over 2 groups; 7 heads: a ring alone."""
    mask, layout = Mask.causal(48), Layout.zigzag(48, 4)
    program = SCHEDULERS["ulysses"].plan(mask, layout, 6, 2)
    verify(program, mask)
    received = program.slots[8:]
    assert set(map(tuple, received[received[:, SLOT_KIND] == Q][:, [SLOT_H0, SLOT_H1]].tolist())) == {(0, 3), (3, 6)}
    assert program.digest == SCHEDULERS["usp"].plan(mask, layout, 6, 2).digest
    ring = SCHEDULERS["ring"].plan(mask, layout, 7, 7)
    assert SCHEDULERS["ulysses"].plan(mask, layout, 7, 7).digest == ring.digest


def test_pieces_expose_less_of_ulysses() -> None:
    """In four turns the first arrival and the last departure are a quarter of the rows × heads."""
    mask, layout = Mask.causal(65536), Layout.contiguous(65536, 4)
    seconds = []
    for pieces in (1, 4):
        program = SCHEDULERS["ulysses"].plan(mask, layout, 64, 8, UlyssesOptions(pieces))
        prediction = predict(program, mask, HARDWARE["h100"], 128)
        seconds.append(prediction.exposed_communication_seconds)
    assert seconds[1] < 0.5 * seconds[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("usp", lambda: UspOptions(3), "head_ranks must divide the query heads and the ranks, got 3 for 12 heads over 4"),
        ("usp", lambda: UspOptions(placement="middle"), "placement must be one of head_first, context_first"),
        ("usp", lambda: UspOptions(pieces=0), "pieces must be at least 1, got 0"),
        ("usp", lambda: UspOptions(2, groups_per_window=3), "groups_per_window must divide the groups, got 3 for 2"),
        ("double_ring", lambda: DoubleRingOptions(3), "ranks_per_window must divide the ranks into equal windows, got 3 for 4"),
        ("ring", lambda: RingOptions(moves="o"), 'moves must be "kv" or "q"'),
        ("all_gather", lambda: AllGatherOptions(0), "pieces must be at least 1"),
        ("ulysses", lambda: UlyssesOptions(0), "pieces must be at least 1"),
    ],
)
def test_wrong_options_are_named(name: str, options: Callable[[], Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SCHEDULERS[name].plan(Mask.causal(16), Layout.contiguous(16, 4), 12, 12, options())


@pytest.mark.parametrize(
    ("strategy", "settings", "expected"),
    [
        ("ring", [], None),
        ("ring", ["moves=q", "two_way=true"], RingOptions("q", two_way=True)),
        ("usp", ["head_ranks=2", "placement=context_first"], UspOptions(2, "context_first")),
        ("usp", ["head_ranks=none"], UspOptions(None)),
    ],
)
def test_options_from_text(strategy: str, settings: list[str], expected: Any) -> None:
    assert parse_options(strategy, settings) == expected


@pytest.mark.parametrize(
    ("strategy", "setting", "message"),
    [
        ("auto", "moves=q", "belongs to one strategy"),
        ("ring", "move=q", "options of ring are moves=…, two_way=…; got 'move=q'"),
        ("usp", "pieces=two", "option pieces of usp must be int, got 'two'"),
        ("ring", "two_way=1", "option two_way of ring must be bool, got '1'"),
    ],
)
def test_wrong_options_from_text(strategy: str, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(strategy, [setting])


def test_unknown_strategy_lists_what_exists() -> None:
    with pytest.raises(
        PlanError, match="unknown strategy 'rong'; choose one of auto, ring, double_ring, all_gather, ulysses, usp"
    ):
        find_scheduler("rong")


@pytest.mark.parametrize(
    ("mask", "strategy", "layout"),
    [
        (Mask.causal(4096), "ring", "zigzag"),
        (Mask.sliding_window(4096, 64), "ring", "contiguous"),
        (Mask.full(4096, 4096), "ring", "contiguous"),
        (Mask.documents([3000] + [8] * 137), "ring", "per_document_zigzag"),
        (Mask.causal(4096), "ulysses", "contiguous"),
    ],
    ids=["causal", "window", "full", "documents", "ulysses"],
)
def test_layout_is_chosen_by_balance(mask: Mask, strategy: str, layout: str) -> None:
    choice = choose_layout(mask, 4, strategy)
    assert choice.layout.name == layout
    assert choice.reason


def test_documents_that_balance_whole_are_not_cut() -> None:
    """Each cut document is a launch of its own and sends its keys: one long one balances this batch."""
    lengths = [700, 40_000, 900, 1_500, 2_000, 600]
    mask = Mask.documents(lengths)
    layout = choose_layout(mask, 2, "ring").layout
    assert layout.name == "per_document_zigzag"
    assert len(layout.ranges) < len(Layout.per_document_zigzag(lengths, 2).ranges)
    assert area_per_rank(mask, layout).max() * 2 <= 1.01 * mask.area
    # These balance only where the two longest are cut.
    mask = Mask.documents([40_000, 700, 15_000, 900, 9_000])
    assert area_per_rank(mask, choose_layout(mask, 2, "ring").layout).max() * 2 <= 1.05 * mask.area


def test_auto_names_every_candidate_and_the_winner_is_the_best() -> None:
    mask = Mask.causal(8192)
    choice = choose_strategy(mask, 4, 6, 2, head_dim=64)
    for name in ("ring", "double_ring", "all_gather", "ulysses"):
        assert any(label.startswith(name) for label in choice.predicted_seconds)
        assert name in choice.table
    best = min(choice.predicted_seconds.values())
    label = choice.table.splitlines()[0].split("  ")[0]
    assert (1 - WORTH_OPTIONS) * choice.predicted_seconds[label] <= TIE * best
    assert "least predicted forward + backward time on h100" in choice.reason
    choice.program.verify(mask)


def test_auto_takes_other_options_only_where_they_save_enough() -> None:
    for mask in (Mask.causal(131072), Mask.causal(16384)):
        choice = choose_strategy(mask, 2, 16, 16, head_dim=128)
        seconds = choice.predicted_seconds
        usual = min(seconds[label] for label in seconds if " " not in label.rpartition(", ")[0])
        saved = 1 - min(seconds.values()) / usual
        label = choice.table.splitlines()[0].split("  ")[0]
        if saved < WORTH_OPTIONS:
            assert " " not in label.rpartition(", ")[0]
            assert saved == 0 or "less than the 10% to trust" in choice.reason
        else:
            assert seconds[label] <= TIE * min(seconds.values())


def test_auto_takes_no_slower_layout_for_a_percent_of_memory() -> None:
    """Of the WLB lengths on two H200, a step with rows balanced in chunks took 1.7 % longer than one with documents cut."""
    lengths = make_lengths("wlb", 2, 131072)
    rated = replace(HARDWARE["h200"], kernels=shipped_rates().kernels)
    choice = choose_strategy(Mask.documents(lengths), 2, 32, 8, head_dim=128, hardware=rated)
    assert choice.layout.name == "per_document_zigzag"
    assert choice.predicted_seconds["ring, per_document_zigzag"] < choice.predicted_seconds["ring, balanced"]


def test_auto_moves_queries_only_where_there_are_as_many_kv_heads() -> None:
    for kv_heads, moves_queries in ((8, True), (2, False)):
        labels = choose_strategy(Mask.causal(4096), 4, 8, kv_heads, head_dim=64).predicted_seconds
        assert any("moves=q" in label for label in labels) == moves_queries


def test_auto_tries_other_layouts_where_communication_dominates() -> None:
    """Short documents over nodes: what balances best need not be fastest."""
    mask = Mask.documents([200, 90, 410, 35] * 120)
    choice = choose_strategy(mask, 16, 16, 2, head_dim=128)
    layouts = {label.rpartition(", ")[2] for label in choice.predicted_seconds}
    assert {"contiguous", "balanced"} <= layouts
    assert choice.predicted_seconds[f"{choice.table.splitlines()[0].split('  ')[0]}"] == min(choice.predicted_seconds.values())


def test_auto_disaggregates_only_where_no_layout_balances() -> None:
    mask = Mask.documents([3000] + [8] * 137)
    free = choose_strategy(mask, 4, 8, 2, head_dim=64).predicted_seconds
    held = choose_strategy(mask, 4, 8, 2, head_dim=64, layout=Layout.contiguous(mask.num_queries, 4)).predicted_seconds
    assert not any("disaggregated" in label for label in free)
    assert any("disaggregated" in label for label in held)


def test_layout_of_groups_keeps_their_rows_together() -> None:
    """context_first: ranks 0 and 2 are one group, and hold neighbouring shares."""
    options = UspOptions(2, "context_first")
    choice = choose_layout(Mask.causal(64), 4, "usp", heads=4, options=options)
    group = choice.layout.grouped(groups_of(options, 4, 4))
    assert len(group.ranges) <= 4
    assert np.bincount([0, 1, 0, 1], weights=area_per_rank(Mask.causal(64), choice.layout)).std() <= 0.05 * 64 * 65


def test_mask_and_layout_must_agree() -> None:
    with pytest.raises(PlanError, match="9 queries and 9 keys, but the layout holds 8 rows"):
        SCHEDULERS["ring"].plan(Mask.causal(9), Layout.contiguous(8, 2), 2, 2)


def test_auto_predicts_other_options_only_where_they_could_win() -> None:
    """A long causal mask is near its ideal with default options; a short one, bound by transfers and launches, is not."""
    labels = [list(choose_strategy(Mask.causal(n), 4, 16, 16, head_dim=128).predicted_seconds) for n in (262144, 8192)]
    others = [[label for label in x if "pieces=" in label or "moves=q" in label or "two_way" in label] for x in labels]
    assert others[0] == []
    assert len(others[1]) >= 3
    assert {label.replace(",", " ").split()[0] for label in labels[0]} >= {"ring", "double_ring", "all_gather", "ulysses"}
