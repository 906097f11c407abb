"""Plan only: any stream that can be cut in two is; each pair is in one half, and tokens are even where they can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.disaggregation.halves import WHOLE_DOCUMENTS, arrange, check_cut, first_mask, own_mask, second_half
from distattn.parallel.layout import Layout
from tests.parallel.cases import random_layout, random_lengths, random_mask


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32 - 1))
def test_halves_hold_every_pair_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 70))
    mask = Mask.documents(random_lengths(rng, n, 1 + n // 3)) if rng.random() < 0.5 else random_mask(rng, n)
    found = arrange(mask)
    if found is None:
        assert len(mask.segments()) == 2
        assert mask.dense()[: (n + 1) // 2, (n + 1) // 2 :].any()
        return
    order = np.arange(n) if found.order is None else found.order
    assert sorted(order.tolist()) == list(range(n))
    assert (found.mask.dense() == mask.dense()[np.ix_(order, order)]).all()
    assert 0 < found.cut < n
    assert not found.mask.dense()[: found.cut, found.cut :].any()
    ranks = int(rng.integers(1, 5))
    first, own = (random_layout(rng, size, ranks) for size in (found.cut, n - found.cut))
    later = second_half(found, first, own)
    assert first_mask(found).area + later.mask.area == mask.area
    assert own_mask(found).num_queries == n - found.cut
    assert (later.layout.counts - own.counts).sum() == found.cut - later.seen
    assert (later.own_rows == own.counts).all()
    assert ((later.joined == 0) | (later.joined == later.layout.counts)).all()


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_even_and_a_document_is_cut_only_where_they_would_not_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = random_lengths(rng, 4000, 60 if seed else 3)
    found = arrange(Mask.documents(lengths))
    assert found is not None
    assert abs(found.cut - 2000) <= 4000 * WHOLE_DOCUMENTS
    later = second_half(found, Layout.contiguous(found.cut, 2), Layout.contiguous(4000 - found.cut, 2))
    assert (later.seen == found.cut) == (max(lengths) <= 2000 * (1 + 2 * WHOLE_DOCUMENTS) and len(lengths) > 3)


def test_many_tiny_segments_are_dealt_in_bunches() -> None:
    """A diagonal has a segment a row; what no pair crosses is found without looking at each."""
    found = arrange(Mask.documents([7, *[1] * 9000]))
    assert found is not None
    assert abs(found.cut - 4504) <= 9007 * WHOLE_DOCUMENTS
    assert found.mask.area == 28 + 9000


def test_a_place_to_cut_that_is_none_is_refused() -> None:
    with pytest.raises(PlanError, match="at=0 must leave rows on both sides"):
        check_cut(Mask.causal(8), 0)
    with pytest.raises(PlanError, match="rows before it see rows behind it"):
        check_cut(Mask.full(8, 8), 4)
