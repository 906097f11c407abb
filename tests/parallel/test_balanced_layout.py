"""Plan only: the layout that deals chunks by mask area, and what it repairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.mask import Mask
from distattn.parallel.cost import Shape, count
from distattn.parallel.layout import UNEVEN_ROWS, Layout, area_per_rank
from distattn.parallel.schedulers import find_scheduler
from distattn.parallel.schedulers.auto import choose_layout, choose_strategy
from distattn.parallel.verify import verify
from tests.parallel.cases import random_mask


def imbalance(mask: Mask, layout: Layout) -> float:
    area = area_per_rank(mask, layout)
    return float(area.max() / area.mean())


def long_tailed(total: int, mean_log: float, seed: int) -> list[int]:
    """Document lengths as they come: lognormal, filled up to ``total``."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(min(rng.lognormal(mean_log, 1.0) + 1, total - sum(lengths))))
    return lengths


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_every_rank_has_the_same_rows(seed: int, ranks: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 90))
    layout = Layout.balanced(random_mask(rng, n), ranks)
    assert np.array_equal(np.sort(np.concatenate([layout.rows(r) for r in range(ranks)])), np.arange(n))
    assert layout.counts.max() - layout.counts.min() <= 1


def test_of_a_causal_mask_it_makes_zigzag() -> None:
    assert np.array_equal(Layout.balanced(Mask.causal(640), 8).ranges, Layout.zigzag(640, 8).ranges)


def test_ten_thousand_documents_on_256_ranks() -> None:
    """Dealt by rows, whole short documents leave one rank with several times the mean work."""
    lengths = long_tailed(1 << 20, 4.2, seed=0)
    assert len(lengths) > 9_000
    mask = Mask.documents(lengths)
    assert imbalance(mask, Layout.per_document_zigzag(lengths, 256)) > 3
    assert imbalance(mask, Layout.balanced(mask, 256)) < 1.05
    assert choose_layout(mask, 256, "ring").layout.name == "balanced"


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize(
    "mask",
    [
        Mask.documents([60_000, *long_tailed(68_000, 5.8, seed=1)]),
        Mask.share_question(20_000, [3_000] * 30),
        Mask.global_window(65_536, 9_000, 1_000) & Mask.causal(65_536),
        Mask.prefix_lm(65_536, 30_000),
        Mask.block_causal([40_000, 25_536], 1024),
    ],
    ids=["documents", "share_question", "global_window", "prefix_lm", "block_causal"],
)
def test_balances_any_mask_with_few_ranges(mask: Mask, ranks: int) -> None:
    layout = Layout.balanced(mask, ranks)
    assert imbalance(mask, layout) < 1.06
    cuts = len(mask.segments()) - 1
    assert len(layout.ranges) <= 16 * ranks + 2 * cuts


def test_short_documents_stay_whole() -> None:
    """Where documents are short, only those that fill up a rank are cut."""
    lengths = [100] * 64
    layout = Layout.balanced(Mask.documents(lengths), 8)
    edges = set(np.cumsum([0, *lengths]).tolist())
    cut = {int(x) for x in layout.ranges.ravel()} - edges
    assert len(cut) <= 8


def test_a_mask_that_allows_nothing_and_one_of_no_rows() -> None:
    assert Layout.balanced(Mask.from_bands(np.zeros((0, 6), np.int64), 50, 50), 4).counts.tolist() == [12, 13, 12, 13]
    assert Layout.balanced(Mask.causal(0), 3).counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("ranks", [2, 7, 64])
def test_whole_documents_send_nothing_and_are_even(ranks: int) -> None:
    lengths = [min(n, 2_000) for n in long_tailed(ranks * 40_000, 5.5, seed=ranks)]
    mask = Mask.documents(lengths)
    layout = Layout.whole_documents(mask, ranks, mask.segments())
    assert layout is not None
    assert layout.counts.max() <= np.ceil((1 + UNEVEN_ROWS) * mask.num_queries / ranks)
    assert imbalance(mask, layout) < 1.02
    program = find_scheduler("ring").plan(mask, layout, 2, 1, None, None)
    assert verify(program, mask).area == mask.area
    assert count(program, mask, Shape(64, 64)).bytes_received_per_rank.max() == 0


@pytest.mark.parametrize(
    "lengths",
    [
        [1000, *[50] * 60],  # one document has more than a rank's rows
        [1700, *[10] * 230],  # it fits, but no rank's attention comes near it
        [1025] * 7,  # as whole documents, one rank would have twice the other's rows, or half as many again
        [4000, 4000],  # a document a rank: contiguous rows are that already
        [1] * 70_000,  # rows that stand alone, more than are dealt one by one
    ],
)
def test_documents_are_cut_where_whole_ones_are_uneven(lengths: list[int]) -> None:
    mask = Mask.documents(lengths)
    ranks = 4 if lengths[0] == 1000 else 2
    assert Layout.whole_documents(mask, ranks, mask.segments()) is None


def test_auto_keeps_short_documents_whole() -> None:
    """Contiguous rows would cut one document and tie ranks together in every layer; zigzag of documents would cut many."""
    lengths = long_tailed(2 * 65_536, 6.0, seed=3)
    mask = Mask.documents(lengths)
    assert choose_strategy(mask, 2, 32, 8, head_dim=128).layout.name == "whole_documents"
    assert choose_layout(mask, 2, "disaggregated", heads=32, kv_heads=8).layout.name == "whole_documents"
