"""Plan only: every scheduler × any mask × any layout × 1 to 16 ranks verifies, forward and backward; traffic is as derived."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.layout import Layout
from distattn.parallel.program import KV_IN, MOVE_DST, MOVE_KIND, MOVE_ROWS, MOVE_SRC, SLOT_RANK, Program
from distattn.parallel.schedulers import SCHEDULERS, find_scheduler
from distattn.parallel.schedulers.auto import choose_layout, choose_strategy
from distattn.parallel.verify import verify
from tests.parallel.cases import random_layout, random_mask


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
    if SCHEDULERS[name].why_not(heads, ranks):
        heads = kv_heads * ranks
    mask, layout = random_mask(rng, n), random_layout(rng, n, ranks)
    program = SCHEDULERS[name].plan(mask, layout, heads, kv_heads)
    assert verify(program, mask).area == mask.area
    for keep in (False, True):
        for ranks_per_node in (None, 2):
            verify(derive_backward(program, keep=keep, ranks_per_node=ranks_per_node), mask)


def test_scales_to_a_million_tokens_on_256_ranks() -> None:
    n, ranks = 1 << 20, 256
    mask = Mask.causal(n)
    layout = Layout.zigzag(n, ranks)
    for name, heads in (("ring", 32), ("all_gather", 32), ("ulysses", 256)):
        verify(SCHEDULERS[name].plan(mask, layout, heads, 8), mask)


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


def test_ulysses_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(PlanError, match=r'heads=6 over 4 ranks; use strategy "ring"'):
        SCHEDULERS["ulysses"].plan(Mask.causal(8), Layout.contiguous(8, 4), 6, 2)


def test_unknown_strategy_lists_what_exists() -> None:
    with pytest.raises(PlanError, match="unknown strategy 'rong'; choose one of auto, ring, all_gather, ulysses"):
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


def test_auto_names_every_candidate() -> None:
    choice = choose_strategy(Mask.causal(8192), 4, 6, 2, head_dim=64)
    assert choice.strategy in ("ring", "all_gather")
    assert set(choice.predicted_seconds) == {"ring", "all_gather"}
    assert "do not divide for ulysses" in choice.reason
    choice.program.verify(Mask.causal(8192))


def test_mask_and_layout_must_agree() -> None:
    with pytest.raises(PlanError, match="9 queries and 9 keys, but the layout holds 8 rows"):
        SCHEDULERS["ring"].plan(Mask.causal(9), Layout.contiguous(8, 2), 2, 2)
