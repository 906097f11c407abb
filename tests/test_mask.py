"""Plan only: Mask against dense boolean arrays, its constructors against their definitions, and what it refuses."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distattn.bands import UNBOUNDED
from distattn.errors import MaskError
from distattn.mask import Mask

MILLION = 1 << 20

# A loaded machine must not fail a test of correctness.
sampled = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def by_definition(n_q, n_k, sees) -> np.ndarray:
    return np.array([[bool(sees(i, j)) for j in range(n_k)] for i in range(n_q)], bool).reshape(n_q, n_k)


def document_of(lengths) -> list[int]:
    return [d for d, length in enumerate(lengths) for _ in range(length)]


def random_mask(draw, n: int) -> Mask:
    """A union of a few of the constructors' masks and of random bands, minus another band."""
    edges = st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)

    def band() -> Mask:
        (q0, q1), (k0, k1) = draw(edges), draw(edges)
        lo = draw(st.integers(-n, n) | st.just(-UNBOUNDED))
        hi = draw(st.integers(max(lo, -n), n + 1) | st.just(UNBOUNDED))
        return Mask.from_bands([(q0, q1, k0, k1, lo, hi)], n, n)

    kind = draw(st.sampled_from(["bands", "causal", "window", "documents", "global"]))
    lengths = draw(st.lists(st.integers(0, n), max_size=3))
    edges_of_documents = np.unique(np.clip(np.cumsum([0, *lengths, n]), 0, n))
    mask = {
        "bands": lambda: Mask.from_bands([], n, n),
        "causal": lambda: Mask.causal(n),
        "window": lambda: Mask.sliding_window(n, draw(st.integers(0, n)), draw(st.integers(0, 3))),
        "documents": lambda: Mask.documents(np.diff(edges_of_documents, prepend=0), draw(st.booleans())),
        "global": lambda: Mask.global_window(n, draw(st.integers(0, n)), draw(st.integers(0, 4))),
    }[kind]()
    for _ in range(draw(st.integers(0, 2))):
        mask = mask | band()
    return mask - band() if draw(st.booleans()) else mask


@st.composite
def masks(draw, number: int = 1):
    n = draw(st.integers(1, 14))
    return tuple(random_mask(draw, n) for _ in range(number))


# Operations


@sampled
@given(masks(2))
def test_set_operations_and_equality(pair):
    a, b = pair
    in_a, in_b = a.dense(), b.dense()
    assert a.area == in_a.sum()
    assert np.array_equal((a & b).dense(), in_a & in_b)
    assert np.array_equal((a | b).dense(), in_a | in_b)
    assert np.array_equal((a - b).dense(), in_a & ~in_b)
    assert (a == b) == np.array_equal(in_a, in_b)
    assert (a & b) | (a - b) == a
    assert hash((a & b) | (a - b)) == hash(a)


@sampled
@given(masks(), st.data())
def test_cut_slice_shift_and_transpose(one, data):
    (mask,) = one
    n, allowed = mask.num_queries, mask.dense()
    edges = st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)
    (q0, q1), (k0, k1) = data.draw(edges), data.draw(edges)
    inside = np.zeros_like(allowed)
    inside[q0:q1, k0:k1] = allowed[q0:q1, k0:k1]
    assert np.array_equal(mask.cut(q0, q1, k0, k1).dense(), inside)
    assert np.array_equal(mask[q0:q1, k0:k1].dense(), allowed[q0:q1, k0:k1])
    assert np.array_equal(mask[-q1:, :k1].dense(), allowed[-q1:, :k1])
    moved = mask.shift(q0, k0)
    assert moved.shape == (n + q0, n + k0)
    assert moved.area == mask.area
    assert np.array_equal(moved.dense()[q0:, k0:], allowed)
    assert np.array_equal(mask.shift(-q0, -k0).dense(), allowed[q0:, k0:])
    assert np.array_equal(mask.transpose().dense(), allowed.T)


@sampled
@given(masks())
def test_bands_are_normal_and_disjoint(one):
    (mask,) = one
    again = Mask.from_bands(mask.bands[::-1], *mask.shape)  # refuses overlaps
    assert np.array_equal(again.bands, mask.bands)
    assert again.digest == mask.digest


@sampled
@given(masks())
def test_segments_are_the_finest_cuts_that_no_pair_crosses(one):
    (mask,) = one
    n = mask.num_queries
    pairs = np.argwhere(mask.dense())
    expected = [c for c in range(n + 1) if not ((pairs.min(1) < c) & (pairs.max(1) >= c)).any()]
    assert mask.segments().tolist() == expected


def test_equal_masks_may_have_different_digests():
    causal = Mask.causal(8)
    cut = Mask.from_bands([(0, 3, 0, 8, -UNBOUNDED, 0), (3, 8, 0, 8, -UNBOUNDED, 0)])
    assert causal == cut
    assert hash(causal) == hash(cut)
    assert causal.digest != cut.digest
    assert causal != Mask.causal(9)
    assert causal.digest != Mask.from_bands(causal.bands, 8, 9).digest
    assert causal != "causal"


def test_a_mask_cannot_be_changed():
    mask = Mask.causal(8)
    with pytest.raises(ValueError, match="read-only"):
        mask.bands[0, 0] = 1
    with pytest.raises(AttributeError):
        mask.num_queries = 4  # pyright: ignore[reportAttributeAccessIssue]
    given_table = np.array([[0, 4, 0, 4, -UNBOUNDED, 0]])
    copied = Mask.from_bands(given_table)
    given_table[:] = 0
    assert copied == Mask.causal(4)


def test_repr():
    assert repr(Mask.causal(100)) == "Mask(100x100, 1 bands, 0.505 of all pairs)"
    assert repr(Mask.causal(0)) == "Mask(0x0, 0 bands)"


# Constructors


@pytest.mark.parametrize("n", [0, 1, 7])
def test_full_causal_and_window(n):
    assert np.array_equal(Mask.full(n, 5).dense(), np.ones((n, 5), bool))
    assert np.array_equal(Mask.causal(n).dense(), by_definition(n, n, lambda i, j: j <= i))
    for left, right in [(0, 0), (2, 0), (1, 2), (0, 9), (9, 9)]:
        expected = by_definition(n, n, lambda i, j: -left <= j - i <= right)  # noqa: B023
        assert np.array_equal(Mask.sliding_window(n, left, right).dense(), expected)


@pytest.mark.parametrize("lengths", [[], [0], [5], [3, 0, 4, 1], [0, 0, 2, 2, 0]], ids=str)
@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_documents_and_block_causal(lengths, as_type):
    doc, n = document_of(lengths), sum(lengths)
    start = [sum(lengths[: doc[i]]) for i in range(n)]
    given_lengths = as_type(lengths) if lengths or as_type is list else as_type([0])
    for causal in (True, False):
        expected = by_definition(n, n, lambda i, j: doc[i] == doc[j] and (not causal or j <= i))  # noqa: B023
        mask = Mask.documents(given_lengths, causal)
        assert np.array_equal(mask.dense(), expected)
        assert len(mask.bands) == len([x for x in lengths if x])
    for block in (1, 2, 3, 10):
        expected = by_definition(
            n,
            n,
            lambda i, j: doc[i] == doc[j] and (j - start[i]) // block <= (i - start[i]) // block,  # noqa: B023
        )
        assert np.array_equal(Mask.block_causal(given_lengths, block).dense(), expected)


def test_segments_recover_documents():
    assert Mask.documents([3, 0, 4, 1]).segments().tolist() == [0, 3, 7, 8]
    assert Mask.documents([3, 0, 4, 1], causal=False).segments().tolist() == [0, 3, 7, 8]
    assert Mask.causal(5).segments().tolist() == [0, 5]
    assert Mask.from_bands([], 2, 2).segments().tolist() == [0, 1, 2]
    assert Mask.causal(0).segments().tolist() == [0]


@pytest.mark.parametrize("prefix", [0, 1, 4, 7])
def test_prefix_lm(prefix):
    expected = by_definition(7, 7, lambda i, j: j <= i or (i < prefix and j < prefix))
    assert np.array_equal(Mask.prefix_lm(7, prefix).dense(), expected)


@pytest.mark.parametrize(("question", "answers"), [(0, [2]), (4, []), (3, [2, 0, 1, 3])], ids=str)
def test_share_question(question, answers):
    part = [-1] * question + document_of(answers)
    n = len(part)
    expected = by_definition(n, n, lambda i, j: j <= i and (part[j] == -1 or part[i] == part[j]))
    assert np.array_equal(Mask.share_question(question, answers).dense(), expected)


@pytest.mark.parametrize(("globals_", "left", "right"), [(0, 2, 0), (2, 1, 0), (3, 2, 1), (9, 0, 0)])
def test_global_window(globals_, left, right):
    expected = by_definition(9, 9, lambda i, j: i < globals_ or j < globals_ or -left <= j - i <= right)
    assert np.array_equal(Mask.global_window(9, globals_, left, right).dense(), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_from_cu_seqlens_is_aligned_at_the_bottom_right(causal):
    cu_q, cu_k = [0, 2, 2, 7, 10], [0, 5, 6, 8, 11]
    expected = np.zeros((10, 11), bool)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k)):
        block = np.ones((q1 - q0, k1 - k0), bool)
        expected[q0:q1, k0:k1] = np.tril(block, (k1 - k0) - (q1 - q0)) if causal else block
    mask = Mask.from_cu_seqlens(torch.tensor(cu_q, dtype=torch.int32), cu_k, causal)
    assert mask.shape == (10, 11)
    assert np.array_equal(mask.dense(), expected)


def test_from_bands_takes_the_shape_of_the_furthest_row():
    mask = Mask.from_bands([(0, 3, 2, 6, -UNBOUNDED, UNBOUNDED), (3, 3, 0, 1, 0, 0)])
    assert mask.shape == (3, 6)
    assert mask.area == 12
    assert Mask.from_bands([]).shape == (0, 0)


# A million tokens


def test_a_million_tokens_stay_small_tables():
    rng = np.random.default_rng(0)
    lengths = rng.multinomial(MILLION - 10_000, np.ones(10_000) / 10_000) + 1
    other = rng.multinomial(MILLION - 7_000, np.ones(7_000) / 7_000) + 1
    documents, window = Mask.documents(lengths), Mask.sliding_window(MILLION, 4096)
    assert len(documents.bands) == 10_000
    assert documents.area == int((lengths * (lengths + 1) // 2).sum())
    assert len((documents & window).bands) == 10_000  # none is longer than the window
    assert documents & window == documents
    assert len((documents | window).bands) == 1
    assert documents | window == window
    assert (window - documents).area == window.area - documents.area
    assert documents.segments().tolist() == [0, *np.cumsum(lengths).tolist()]

    blocks = Mask.block_causal([MILLION], 32)
    assert len(blocks.bands) == 32_768
    assert len((blocks & documents).bands) <= 32_768 + 10_000
    assert len((blocks | documents).bands) == 32_768

    a, b = Mask.documents(lengths, causal=False), Mask.documents(other, causal=False)
    both = a & b
    edges = np.union1d(np.cumsum(lengths), np.cumsum(other))
    assert len(both.bands) == len(edges)
    assert (a | b).area == a.area + b.area - both.area
    assert len((a | b).bands) < 40_000


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask.causal(-1), "n is -1 and must be from 0 to"),
        (lambda: Mask.causal(2.5), "n is 2.5 and must be an integer"),  # pyright: ignore[reportArgumentType]
        (lambda: Mask.full(1 << 31, 4), "n_q is 2147483648 and must be from 0 to 1073741824"),
        (lambda: Mask.sliding_window(8, -1), "left is -1 and must be"),
        (lambda: Mask.documents([3, -2]), "lengths holds -2"),
        (lambda: Mask.documents([3.5]), "lengths must hold integers, and holds float64"),  # pyright: ignore[reportArgumentType]
        (lambda: Mask.documents([[3]]), r"lengths must be a flat list.*\(1, 1\)"),  # pyright: ignore[reportArgumentType]
        (lambda: Mask.documents([[3], [4, 5]]), "rows of equal length"),  # pyright: ignore[reportArgumentType]
        (lambda: Mask.documents([1 << 30, 1]), "the sum of lengths is"),
        (lambda: Mask.prefix_lm(4, 5), "prefix is 5 and must be at most n, which is 4"),
        (lambda: Mask.global_window(4, 5, 1), "globals is 5 and must be at most n"),
        (lambda: Mask.block_causal([4], 0), "block is 0 and must be at least 1"),
        (lambda: Mask.from_cu_seqlens([0, 2], [0, 1, 2], True), "cu_q describes 1 sequences and cu_k 2"),
        (lambda: Mask.from_cu_seqlens([0, 2, 1], [0, 1, 2], True), "cu_q must be cumulative .* never fall"),
        (lambda: Mask.from_cu_seqlens([0], [1], True), "cu_k must be cumulative lengths that start at 0"),
        (lambda: Mask.from_bands([(0, 1, 2)]), r"rows of six integers .* shape \(1, 3\)"),
        (lambda: Mask.from_bands([(0, 5, 0, 4, 0, 0)], 4, 4), r"band 0 is \[0, 5, 0, 4, 0, 0\] in a mask of 4x4"),
        (lambda: Mask.from_bands([(-1, 3, 0, 4, 0, 0)]), "the box must lie inside the mask"),
        (lambda: Mask.from_bands([(0, 3, 0, 4, 1, 0)]), "lo <= hi must hold"),
        (
            lambda: Mask.from_bands([(0, 4, 0, 4, 1, 9), (0, 4, 0, 4, -9, 0), (2, 3, 2, 3, 0, 0)]),
            r"bands 1 and 2, \[0, 4, 0, 4, -9, 0\] and \[2, 3, 2, 3, 0, 0\], share pairs",
        ),
        (lambda: Mask.causal(4) & Mask.causal(5), "a mask of 4x4 and one of 5x5 cannot be combined with &"),
        (lambda: Mask.causal(4) | Mask.full(4, 5), "4x5 cannot be combined with |"),
        (lambda: Mask.causal(MILLION).dense(), "at most 67108864 pairs are allowed: cut a part out"),
        (lambda: Mask.full(4, 5).segments(), "square masks and this one is 4x5"),
        (lambda: Mask.causal(4).shift(-5, 0), r"num_queries \+ dq is -1"),
        (lambda: Mask.causal(4)[1:2], r"mask\[q0:q1, k0:k1\]"),  # pyright: ignore[reportArgumentType]
        (lambda: Mask.causal(4)[::2, :], "sliced in steps of 1"),
    ],
)
def test_refusals_say_what_was_given_and_what_is_allowed(make, message):
    with pytest.raises(MaskError, match=message):
        make()


def test_other_types_are_not_combined():
    with pytest.raises(TypeError):
        Mask.causal(4) & 3  # pyright: ignore[reportOperatorIssue, reportUnusedExpression]
