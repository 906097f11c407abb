"""Tiles cut for vendor kernels cover exactly the same pairs: plan-only, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.kernels.tiles import UNBOUNDED, Kind, Piece, clip_tiles, decompose, head_spans, windows
from tests.kernels.oracle import table, visible

SIZE = 24
HEADS = 3


@st.composite
def tile_rows(draw: st.DrawFn) -> tuple[int, ...]:
    q = sorted(draw(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))))
    k = sorted(draw(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))))
    lo = draw(st.one_of(st.just(-UNBOUNDED), st.integers(-SIZE - 2, SIZE + 2)))
    hi = draw(st.one_of(st.just(UNBOUNDED), st.integers(-SIZE - 2, SIZE + 2)))
    heads = sorted(draw(st.tuples(st.integers(0, HEADS), st.integers(0, HEADS))))
    return (*q, *k, lo, hi, *heads, 0)


TABLES = st.lists(tile_rows(), max_size=3).map(lambda rows: table(*rows))


def pairs(pieces: tuple[Piece, ...] | np.ndarray) -> np.ndarray:
    rows = pieces if isinstance(pieces, np.ndarray) else table(*(piece[1:] for piece in pieces))
    return visible(rows, SIZE, SIZE, HEADS)


def has_no_empty_row_or_key(piece: Piece) -> bool:
    box = pairs((piece,))[piece.h0 : piece.h1, piece.q0 : piece.q1, piece.k0 : piece.k1]
    return bool(box.any(1).all() and box.any(2).all())


def fits_a_window(piece: Piece) -> bool:
    corner, keys = piece.k1 - piece.q1, piece.k1 - piece.k0
    left = piece.lo == -UNBOUNDED or 0 <= corner - piece.lo < keys
    if piece.lo > -UNBOUNDED and piece.hi == UNBOUNDED and piece.q1 - piece.q0 > keys + 1:
        return False
    return left and (piece.hi == UNBOUNDED or 0 <= piece.hi - corner < keys)


@settings(max_examples=150, deadline=None)
@given(tiles=TABLES)
def test_clipping_keeps_the_pairs_and_bounds_that_do_something(tiles: np.ndarray) -> None:
    clipped = clip_tiles(tiles)
    assert np.array_equal(pairs(clipped), pairs(tiles))
    for row in clipped.tolist():
        piece = Piece(Kind.BAND, *row)
        assert has_no_empty_row_or_key(piece)
        diagonals = (piece.k0 - piece.q1 + 1, piece.k1 - 1 - piece.q0)
        assert piece.lo == -UNBOUNDED or piece.lo > diagonals[0]
        assert piece.hi == UNBOUNDED or piece.hi < diagonals[1]


@settings(max_examples=150, deadline=None)
@given(tiles=TABLES, block=st.sampled_from([1, 2, 5, 16, None]))
def test_pieces_cover_the_same_pairs_once(tiles: np.ndarray, block: int | None) -> None:
    pieces = decompose(tiles, block=block)
    assert np.array_equal(pairs(pieces), pairs(tiles))
    for piece in pieces:
        assert has_no_empty_row_or_key(piece)
        rows, keys = piece.q1 - piece.q0, piece.k1 - piece.k0
        if piece.kind == Kind.FULL:
            assert (piece.lo, piece.hi) == (-UNBOUNDED, UNBOUNDED)
        elif piece.kind == Kind.CAUSAL:
            assert (rows, piece.lo, piece.hi) == (keys, -UNBOUNDED, piece.k0 - piece.q0)
        elif block is None:
            assert fits_a_window(piece)
        else:
            assert rows <= block


@settings(max_examples=150, deadline=None)
@given(tiles=TABLES)
def test_windows_are_what_flash_can_do(tiles: np.ndarray) -> None:
    pieces = windows(tiles)
    assert np.array_equal(pairs(pieces), pairs(tiles))
    assert all(fits_a_window(piece) for piece in pieces)


def test_causal_and_its_chunks_need_no_mask() -> None:
    """What rings make of causal: the square stays one piece, a cut off the diagonal at most three."""
    assert [p.kind for p in decompose(table((0, 64, 0, 64, -UNBOUNDED, 0, 0, 1, 0)), block=8)] == [Kind.CAUSAL]
    oblique = decompose(table((0, 64, 0, 64, -UNBOUNDED, 16, 0, 1, 0)), block=8)
    assert sorted(p.kind for p in oblique) == [Kind.FULL, Kind.FULL, Kind.CAUSAL]


def test_the_blocks_of_a_window_compute_little_in_vain() -> None:
    pieces = decompose(table((0, 4096, 0, 4096, -1023, 0, 0, 1, 0)), block=128)
    computed = sum((p.q1 - p.q0) * (p.k1 - p.k0) / (2 if p.kind == Kind.CAUSAL else 1) for p in pieces)
    area = 4096 * 1024 - 1024 * 1023 // 2
    assert area <= computed < 1.1 * area


@pytest.mark.parametrize("group", [1, 2, 3, 5])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_head_spans_share_their_kv_heads_evenly(group: int, shift: int) -> None:
    for h0 in range(8):
        for h1 in range(h0, 13):
            spans = head_spans(h0, h1, shift, group)
            assert len(spans) <= 3
            assert [h for span in spans for h in range(span.h0, span.h1)] == list(range(h0, h1))
            for span in spans:
                for h in range(span.h0, span.h1):
                    assert (h + shift) // group == span.kv0 + (h - span.h0) // span.group


def test_a_thousand_documents_stay_a_thousand_triangles() -> None:
    edges = np.arange(1001) * 37
    tiles = np.stack([edges[:-1], edges[1:], edges[:-1], edges[1:]], axis=1)
    rest = np.tile([-UNBOUNDED, 0, 0, 8, 0], (1000, 1))
    pieces = decompose(np.concatenate([tiles, rest], axis=1), block=128)
    assert len(pieces) == 1000
    assert {p.kind for p in pieces} == {Kind.CAUSAL}
