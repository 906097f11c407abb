"""Plan only: the algebra of banded rectangles against dense tables of pairs."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distattn import bands
from distattn.bands import UNBOUNDED
from distattn.errors import MaskError

N = 12

# A loaded machine must not fail a test of correctness.
sampled = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FAR = UNBOUNDED


def dense(table: np.ndarray, n: int = N) -> np.ndarray:
    """How often each pair occurs, by the definition, int64 [n, n]."""
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    count = np.zeros((n, n), np.int64)
    for q0, q1, k0, k1, lo, hi in table.tolist():
        count += (i >= q0) & (i < q1) & (j >= k0) & (j < k1) & (j - i >= lo) & (j - i <= hi)
    return count


edge = st.integers(0, N)
diagonal = st.integers(-N - 2, N + 2)
row = st.tuples(edge, edge, edge, edge, diagonal | st.just(-FAR), diagonal | st.just(FAR)).map(list)
any_table = st.lists(row, max_size=5).map(lambda rows: np.array(rows, np.int64).reshape(-1, 6))


def disjoint(table: np.ndarray) -> np.ndarray:
    """The same pairs, each once: every row loses what the rows before it have, pair by pair."""
    seen = np.zeros((N, N), bool)
    rows = []
    for i in range(len(table)):
        new = dense(table[i : i + 1]).astype(bool) & ~seen
        seen |= new
        if new.sum() == dense(table[i : i + 1]).sum():
            rows.append(table[i])
        else:
            rows += [[q, q + 1, k, k + 1, -FAR, FAR] for q, k in np.argwhere(new).tolist()]
    return np.array(rows, np.int64).reshape(-1, 6)


table = any_table.map(disjoint)


@sampled
@given(any_table)
def test_area_counts_pairs(rows):
    expected = [dense(rows[i : i + 1]).sum() for i in range(len(rows))]
    assert bands.area(rows).tolist() == expected


def test_area_is_exact_at_the_longest_length():
    n = bands.MAX_LENGTH
    rows = np.array([[0, n, 0, n, -FAR, FAR], [0, n, 0, n, -FAR, 0], [0, n, 0, n, -3, 0], [0, n, 0, n, 1, 0]])
    assert bands.area(rows).tolist() == [n * n, n * (n + 1) // 2, 4 * n - 6, 0]


@sampled
@given(any_table)
def test_tighten_keeps_the_pairs_and_leaves_no_empty_line(rows):
    tight = bands.tighten(rows)
    assert np.array_equal(dense(tight), dense(rows))
    for i in range(len(tight)):
        q0, q1, k0, k1 = tight[i, :4]
        inside = dense(tight[i : i + 1])[q0:q1, k0:k1]
        assert inside.any(0).all()
        assert inside.any(1).all()
    assert np.array_equal(dense(bands.open_edges(tight)), dense(rows))


@sampled
@given(any_table)
def test_transpose(rows):
    assert np.array_equal(dense(bands.transpose(rows)), dense(rows).T)


@sampled
@given(any_table, st.sets(edge, max_size=4), st.sampled_from([0, 2]))
def test_cut_axis_keeps_the_pairs_and_names_strip_and_source(rows, breaks, axis):
    breaks = np.array(sorted(breaks), np.int64)
    pieces, source, strip = bands.cut_axis(rows, breaks, axis)
    assert np.array_equal(dense(pieces), dense(rows))
    assert (np.diff(source) >= 0).all()
    edges = np.concatenate([[-1], breaks, [N + 1]])
    assert (pieces[:, axis] < pieces[:, axis + 1]).all()
    assert (pieces[:, axis] >= edges[strip]).all()
    assert (pieces[:, axis + 1] <= edges[strip + 1]).all()
    for s in np.unique(source):
        assert np.array_equal(dense(pieces[source == s]), dense(rows[s : s + 1]))


def test_cut_axis_takes_tables_with_more_columns():
    wide = np.array([[0, 4, 0, 4, -FAR, FAR, 7]])
    pieces, _, strip = bands.cut_axis(wide, np.array([3]), 0)
    assert pieces[:, [0, 1, 6]].tolist() == [[0, 3, 7], [3, 4, 7]]
    assert strip.tolist() == [0, 1]


@sampled
@given(st.lists(st.integers(0, 4), max_size=8), st.lists(st.integers(0, 4), max_size=8))
def test_match_keys(a, b):
    i, j = bands.match_keys(np.array(a, np.int64), np.array(b, np.int64))
    expected = [(x, y) for x in range(len(a)) for y in range(len(b)) if a[x] == b[y]]
    assert sorted(zip(i.tolist(), j.tolist())) == expected
    assert (np.diff(i) >= 0).all()


@sampled
@given(table, table)
def test_set_operations(a, b):
    in_a, in_b = dense(a), dense(b)
    assert np.array_equal(dense(bands.intersection(a, b)), in_a & in_b)
    assert np.array_equal(dense(bands.difference(a, b)), in_a & (1 - in_b))
    assert np.array_equal(dense(bands.union(a, b)), in_a | in_b)


@sampled
@given(table)
def test_coalesce_keeps_the_pairs(a):
    merged = bands.coalesce(a)
    assert np.array_equal(dense(merged), dense(a))
    assert len(merged) <= len(a)


@pytest.mark.parametrize("band", [(-FAR, FAR), (-FAR, 0), (-5, 2), (0, FAR)], ids=["full", "causal", "window", "upper"])
@pytest.mark.parametrize("size", [16, 37])
def test_coalesce_undoes_a_grid_cut(band, size):
    whole = np.array([[0, 256, 0, 256, *band]], np.int64)
    breaks = np.arange(size, 256, size)
    pieces = bands.cut_axis(bands.cut_axis(whole, breaks, 0)[0], breaks, 2)[0]
    assert len(pieces) > 30
    assert bands.coalesce(pieces).tolist() == whole.tolist()


@sampled
@given(any_table)
def test_first_overlap(rows):
    found = bands.first_overlap(rows)
    if dense(rows).max() <= 1:
        assert found is None
    else:
        assert found is not None
        i, j = found
        assert i < j
        assert dense(rows[[i, j]]).max() == 2


def test_columns_against_strips_are_cut_along_the_cheaper_axis(monkeypatch):
    n = 400
    cuts = np.arange(n)
    low, far = np.zeros_like(cuts), np.full_like(cuts, FAR)
    columns = np.stack([low, low + n, cuts, cuts + 1, -far, far], 1)[::2]
    box = np.array([[0, n, 0, n, -FAR, 0]])
    monkeypatch.setattr(bands, "MAX_PIECES", 4 * n)  # by queries alone this would take n²/2 pieces
    tall = bands.intersection(columns, bands.cut_axis(box, cuts[1:], 2)[0])
    assert np.array_equal(dense(tall, n), np.tril(np.ones((n, n), np.int64)) * (cuts % 2 == 0))


def test_too_many_pieces_are_refused(monkeypatch):
    monkeypatch.setattr(bands, "MAX_PIECES", 100)
    rows = np.array([[0, 64, 0, 64, -FAR, FAR]] * 2)
    with pytest.raises(MaskError, match="makes 128 pieces and at most 100 are allowed"):
        bands.cut_axis(rows, np.arange(1, 64), 0)
    with pytest.raises(MaskError, match="makes 121 pieces"):
        bands.match_keys(np.zeros(11, np.int64), np.zeros(11, np.int64))
