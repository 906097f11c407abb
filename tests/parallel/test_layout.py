"""Plan only: layouts own every row once, whatever the lengths and ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.errors import LayoutError
from distattn.parallel.layout import MAX_STRIPES_PER_RANK, Layout


def owned_once(layout: Layout) -> bool:
    rows = np.concatenate([layout.rows(r) for r in range(layout.num_ranks)])
    return np.array_equal(np.sort(rows), np.arange(layout.num_rows))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 300), st.integers(1, 16), st.integers(1, 40))
def test_constructors_own_every_row_once(n: int, ranks: int, block: int) -> None:
    for layout in (Layout.contiguous(n, ranks), Layout.zigzag(n, ranks), Layout.striped(n, ranks, block=block)):
        assert layout.num_ranks == ranks
        assert owned_once(layout)
        assert layout.counts.sum() == n
        assert layout.counts.tolist() == [len(layout.rows(r)) for r in range(ranks)]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 400), max_size=20), st.integers(1, 16), st.integers(1, 10))
def test_per_document_zigzag_cuts_only_long_documents(lengths: list[int], ranks: int, min_cut: int) -> None:
    layout = Layout.per_document_zigzag(lengths, ranks, min_cut=min_cut)
    assert owned_once(layout)
    ends = np.cumsum(lengths)
    for start, end, n in zip(ends - lengths, ends, lengths, strict=True):
        owners = {r for r in range(ranks) if ((layout.rows(r) >= start) & (layout.rows(r) < end)).any()}
        if n >= min_cut * 2 * ranks:
            assert len(owners) == ranks
        elif n:
            assert len(owners) == 1


def test_zigzag_is_the_published_index_map() -> None:
    """rank r, local x: r·c + x below c, (2P−1−r)·c + (x−c) above."""
    ranks, c = 4, 3
    layout = Layout.zigzag(2 * ranks * c, ranks)
    for r in range(ranks):
        expected = [r * c + x for x in range(c)] + [(2 * ranks - 1 - r) * c + x for x in range(c)]
        assert layout.rows(r).tolist() == expected


def test_stripes_are_limited() -> None:
    layout = Layout.striped(100_000, 8, block=1)
    assert max(np.diff(layout.ptr)) <= MAX_STRIPES_PER_RANK


def test_given_keeps_storage_order() -> None:
    layout = Layout.given([[(6, 8), (0, 2)], [], [(2, 6)]])
    assert layout.rows(0).tolist() == [6, 7, 0, 1]
    assert layout.counts.tolist() == [4, 0, 4]


@pytest.mark.parametrize("ranges", [[[(0, 4)], [(3, 6)]], [[(0, 2)], [(3, 6)]], [[(1, 4)]]], ids=["overlap", "gap", "late"])
def test_rows_owned_twice_or_never_are_refused(ranges: list[list[tuple[int, int]]]) -> None:
    with pytest.raises(LayoutError, match=r"each of its .* rows exactly once"):
        Layout.given(ranges)


def test_nonsense_is_refused() -> None:
    with pytest.raises(LayoutError, match="at least one row"):
        Layout.striped(10, 2, block=0)
    with pytest.raises(LayoutError, match="ranks >= 1"):
        Layout.contiguous(10, 0)
    with pytest.raises(LayoutError, match="must not be negative"):
        Layout.per_document_zigzag([3, -1], 2)
