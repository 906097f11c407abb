"""Which queries attend to which keys, as disjoint banded rectangles: the first input of every schedule.

A mask is a table of bands (see ``distattn.bands``), a few rows per document or block, whatever the length. It can be
cut, shifted, intersected, united and measured in milliseconds at a million tokens, and it never becomes an S×S array.

Windows are inclusive, as in flash-attn: key j is seen from query i when ``-left <= j - i <= right``.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from distattn import bands as band_algebra
from distattn.bands import MAX_LENGTH, UNBOUNDED
from distattn.errors import MaskError

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    Integers = Sequence[int] | np.ndarray | torch.Tensor

MAX_DENSE_PAIRS = 1 << 26


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """An immutable set of allowed (query, key) pairs; make one with the class methods, or with ``&``, ``|``, ``-``.

    num_queries, num_keys: the shape; bands: int64 [R, 6], read-only, rows ``q0, q1, k0, k1, lo, hi`` as in
    ``distattn.bands``: disjoint, sorted, none empty, boxes no larger than their pairs, edges that bind nowhere unbounded.
    (Calling the class itself trusts that the rows are disjoint and inside the shape; ``from_bands`` checks.)

    There is no canonical form: the same pairs may be cut up in different ways. ``==`` compares the pairs, ``digest``
    the tables.
    """

    num_queries: int
    num_keys: int
    bands: np.ndarray

    def __post_init__(self) -> None:
        bands = np.asarray(self.bands, np.int64).reshape(-1, 6)
        bands = band_algebra.open_edges(band_algebra.tighten(bands))
        bands = np.ascontiguousarray(bands[np.lexsort(bands.T[::-1])])
        bands.flags.writeable = False
        object.__setattr__(self, "bands", bands)

    # What a mask is

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_queries, self.num_keys

    @cached_property
    def area(self) -> int:
        """Number of allowed pairs."""
        return int(band_algebra.area(self.bands).sum())

    @cached_property
    def digest(self) -> str:
        """Hex digest of shape and table: equal digests mean equal masks, but equal masks may have different digests."""
        h = hashlib.blake2b(np.array(self.shape, np.int64).tobytes(), digest_size=16)
        h.update(self.bands.tobytes())
        return h.hexdigest()

    def __eq__(self, other: object) -> bool:
        """Whether both allow the same pairs, however they are cut up."""
        if not isinstance(other, Mask):
            return NotImplemented
        if self.shape != other.shape or self.area != other.area:
            return False
        return self.digest == other.digest or (self & other).area == self.area

    def __hash__(self) -> int:
        # Not the digest: equal masks must hash alike, and they may be cut up differently.
        return hash((self.num_queries, self.num_keys, self.area))

    def __repr__(self) -> str:
        pairs = self.num_queries * self.num_keys
        share = f", {self.area / pairs:.3g} of all pairs" if pairs else ""
        return f"Mask({self.num_queries}x{self.num_keys}, {len(self.bands)} bands{share})"

    def dense(self) -> np.ndarray:
        """Bool [num_queries, num_keys], True where allowed; for tests and pictures, refused above 2^26 pairs."""
        if self.num_queries * self.num_keys > MAX_DENSE_PAIRS:
            raise MaskError(
                f"a dense mask of {self.num_queries}x{self.num_keys} was asked for and at most {MAX_DENSE_PAIRS} pairs "
                "are allowed: cut a part out first, mask[q0:q1, k0:k1].dense()"
            )
        allowed = np.zeros(self.shape, bool)
        for q0, q1, k0, k1, lo, hi in self.bands.tolist():
            distance = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
            allowed[q0:q1, k0:k1] |= (distance >= lo) & (distance <= hi)
        return allowed

    def segments(self) -> np.ndarray:
        """Sorted int64 cut points 0 … n of a square mask: the finest ones such that no allowed pair crosses a cut.

        Of a mask of documents these are the documents' edges. Rows that neither see nor are seen stand alone.
        """
        if self.num_queries != self.num_keys:
            raise MaskError(
                f"segments are defined for square masks and this one is {self.num_queries}x{self.num_keys}: queries "
                "and keys must count the same positions"
            )
        # A pair (i, j) forbids the cuts min(i,j)+1 … max(i,j). Those of a band below the diagonal form one interval.
        crossed = np.zeros(self.num_queries + 2, np.int64)
        for bands in (self.bands, band_algebra.transpose(self.bands)):
            below = bands.copy()
            below[:, 5] = np.minimum(below[:, 5], -1)
            below = band_algebra.tighten(below)
            np.add.at(crossed, below[:, 2] + 1, 1)
            np.add.at(crossed, below[:, 1], -1)
        return np.flatnonzero(np.cumsum(crossed[:-1]) == 0)

    # Masks from masks

    def cut(self, q0: int, q1: int, k0: int, k1: int) -> Mask:
        """Only the pairs with ``q0 <= i < q1`` and ``k0 <= j < k1``; shape and positions stay."""
        return Mask(self.num_queries, self.num_keys, band_algebra.clip(self.bands, q0, q1, k0, k1))

    def shift(self, dq: int, dk: int) -> Mask:
        """Move every pair (i, j) to (i + dq, j + dk); the shape grows by as much, and new leading rows see nothing.

        Negative distances drop leading queries or keys.
        """
        num_queries, num_keys = (
            _size("num_queries + dq", self.num_queries + dq),
            _size("num_keys + dk", self.num_keys + dk),
        )
        moved = self.bands + np.array([dq, dq, dk, dk, dk - dq, dk - dq])
        return Mask(num_queries, num_keys, band_algebra.clip(moved, 0, num_queries, 0, num_keys))

    def transpose(self) -> Mask:
        """Queries and keys swapped."""
        return Mask(self.num_keys, self.num_queries, band_algebra.transpose(self.bands))

    def __getitem__(self, box: tuple[slice, slice]) -> Mask:
        """``mask[q0:q1, k0:k1]``: that part, with positions that count from 0."""
        if not (isinstance(box, tuple) and len(box) == 2 and all(isinstance(s, slice) for s in box)):
            raise MaskError(f"a mask is indexed by two slices, mask[q0:q1, k0:k1], and got {box!r}")
        if any(s.step not in (None, 1) for s in box):
            raise MaskError(f"a mask is sliced in steps of 1, and got {box!r}")
        q0, q1, _ = box[0].indices(self.num_queries)
        k0, k1, _ = box[1].indices(self.num_keys)
        q1, k1 = max(q0, q1), max(k0, k1)
        part = band_algebra.clip(self.bands, q0, q1, k0, k1) - np.array([q0, q0, k0, k0, k0 - q0, k0 - q0])
        return Mask(q1 - q0, k1 - k0, part)

    def __and__(self, other: Mask) -> Mask:
        """Pairs that both allow."""
        return self._combine(other, "&", band_algebra.intersection)

    def __or__(self, other: Mask) -> Mask:
        """Pairs that either allows."""
        return self._combine(other, "|", band_algebra.union)

    def __sub__(self, other: Mask) -> Mask:
        """Pairs that this one allows and the other does not."""
        return self._combine(other, "-", band_algebra.difference)

    def _combine(self, other: Mask, symbol: str, combine: Any) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        if self.shape != other.shape:
            raise MaskError(
                f"a mask of {self.num_queries}x{self.num_keys} and one of {other.num_queries}x{other.num_keys} cannot "
                f"be combined with {symbol}: their shapes must be equal"
            )
        return Mask(self.num_queries, self.num_keys, combine(self.bands, other.bands))

    # Constructors

    @classmethod
    def full(cls, n_q: int, n_k: int) -> Mask:
        """Every query sees every key."""
        n_q, n_k = _size("n_q", n_q), _size("n_k", n_k)
        return cls(n_q, n_k, np.array([[0, n_q, 0, n_k, -UNBOUNDED, UNBOUNDED]]))

    @classmethod
    def causal(cls, n: int) -> Mask:
        """Query i sees keys 0 … i."""
        n = _size("n", n)
        return cls(n, n, np.array([[0, n, 0, n, -UNBOUNDED, 0]]))

    @classmethod
    def sliding_window(cls, n: int, left: int, right: int = 0) -> Mask:
        """Query i sees keys i - left … i + right, both included (so a causal window of W keys has left = W - 1)."""
        n, left, right = _size("n", n), _size("left", left), _size("right", right)
        return cls(n, n, np.array([[0, n, 0, n, -left, right]]))

    @classmethod
    def documents(cls, lengths: Integers, causal: bool = True) -> Mask:
        """Documents one after the other, each seeing itself only; lengths: tokens of each, zeros are dropped."""
        ends = np.cumsum(_sizes("lengths", lengths))
        edges = np.concatenate([[0], ends])
        return cls.from_cu_seqlens(edges, edges, causal)

    @classmethod
    def prefix_lm(cls, n: int, prefix: int) -> Mask:
        """The first ``prefix`` positions see each other; the rest is causal."""
        n, prefix = _size("n", n), _size("prefix", prefix)
        if prefix > n:
            raise MaskError(f"prefix is {prefix} and must be at most n, which is {n}")
        bands = [[0, prefix, 0, prefix, -UNBOUNDED, UNBOUNDED], [prefix, n, 0, n, -UNBOUNDED, 0]]
        return cls(n, n, np.array(bands))

    @classmethod
    def share_question(cls, question: int, answers: Integers) -> Mask:
        """A question of ``question`` tokens, then answers that each see the question and, causally, themselves."""
        question, lengths = _size("question", question), _sizes("answers", answers)
        ends = question + np.cumsum(lengths)
        n = _size("question + answers", int(ends[-1]) if len(ends) else question)
        starts, zero, far = ends - lengths, np.zeros_like(ends), np.full_like(ends, UNBOUNDED)
        bands = [
            np.array([[0, question, 0, question, -UNBOUNDED, 0]]),
            np.stack([starts, ends, zero, zero + question, -far, far], 1),
            np.stack([starts, ends, starts, ends, -far, zero], 1),
        ]
        return cls(n, n, np.concatenate(bands))

    @classmethod
    def global_window(cls, n: int, globals: int, left: int, right: int = 0) -> Mask:
        """The first ``globals`` positions see and are seen by all, later ones too; elsewhere a sliding window.

        Not causal; for a causal one, ``Mask.global_window(…) & Mask.causal(n)``.
        """
        n, g, left, right = _size("n", n), _size("globals", globals), _size("left", left), _size("right", right)
        if g > n:
            raise MaskError(f"globals is {g} and must be at most n, which is {n}")
        bands = [[0, g, 0, n, -UNBOUNDED, UNBOUNDED], [g, n, 0, g, -UNBOUNDED, UNBOUNDED], [g, n, g, n, -left, right]]
        return cls(n, n, np.array(bands))

    @classmethod
    def block_causal(cls, lengths: Integers, block: int) -> Mask:
        """Documents in blocks of ``block`` tokens (the last may be shorter): a query sees its document up to the end of
        its own block."""
        lengths, block = _sizes("lengths", lengths), _size("block", block)
        if block == 0:
            raise MaskError("block is 0 and must be at least 1 token")
        n = int(lengths.sum())
        num_blocks = -(-lengths // block)
        document = np.repeat(np.arange(len(lengths)), num_blocks)
        ends = np.cumsum(lengths)[document]
        starts = ends - lengths[document]
        index = np.arange(len(document)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
        q0, q1 = starts + index * block, np.minimum(starts + (index + 1) * block, ends)
        far = np.full_like(q0, UNBOUNDED)
        return cls(n, n, np.stack([q0, q1, starts, q1, -far, far], 1))

    @classmethod
    def from_cu_seqlens(cls, cu_q: Integers, cu_k: Integers, causal: bool) -> Mask:
        """Sequences as in flash-attn's varlen functions: s has queries cu_q[s]:cu_q[s+1] and keys cu_k[s]:cu_k[s+1].

        cu_q, cu_k: cumulative lengths from 0, one more than there are sequences. causal: the last query of a sequence
        sees its last key (bottom-right alignment), so with more queries than keys the first queries see nothing.
        """
        edges_q, edges_k = _cumulative("cu_q", cu_q), _cumulative("cu_k", cu_k)
        if len(edges_q) != len(edges_k):
            raise MaskError(
                f"cu_q describes {len(edges_q) - 1} sequences and cu_k {len(edges_k) - 1}: they must describe the same"
            )
        q0, q1, k0, k1 = edges_q[:-1], edges_q[1:], edges_k[:-1], edges_k[1:]
        far = np.full_like(q0, UNBOUNDED)
        return cls(int(edges_q[-1]), int(edges_k[-1]), np.stack([q0, q1, k0, k1, -far, k1 - q1 if causal else far], 1))

    @classmethod
    def from_bands(
        cls, bands: Iterable[Sequence[int]] | np.ndarray, num_queries: int | None = None, num_keys: int | None = None
    ) -> Mask:
        """Rows ``q0, q1, k0, k1, lo, hi`` (see ``distattn.bands``), checked: inside the shape, disjoint.

        Where the shape isn't given, it ends with the furthest row; ``lo`` and ``hi`` that bind nowhere are
        ∓``distattn.bands.UNBOUNDED``.
        """
        table = _integers("bands", bands)
        if table.size % 6 or (table.ndim != 2 and table.size):
            raise MaskError(f"bands must be rows of six integers q0, q1, k0, k1, lo, hi, and have shape {table.shape}")
        table = table.reshape(-1, 6)
        table[:, 4:] = table[:, 4:].clip(-UNBOUNDED, UNBOUNDED)
        shape = [
            _size(name, int(table[:, end].max(initial=0)) if given is None else given)
            for name, given, end in (("num_queries", num_queries, 1), ("num_keys", num_keys, 3))
        ]
        q0, q1, k0, k1, lo, hi = table.T
        wrong = (q0 < 0) | (q0 > q1) | (q1 > shape[0]) | (k0 < 0) | (k0 > k1) | (k1 > shape[1]) | (lo > hi)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise MaskError(
                f"band {row} is {table[row].tolist()} in a mask of {shape[0]}x{shape[1]}: q0 <= q1, k0 <= k1 and "
                "lo <= hi must hold and the box must lie inside the mask"
            )
        if (overlap := band_algebra.first_overlap(table)) is not None:
            i, j = overlap
            raise MaskError(
                f"bands {i} and {j}, {table[i].tolist()} and {table[j].tolist()}, share pairs and bands must be "
                "disjoint: make a mask of each and unite them with |"
            )
        return cls(shape[0], shape[1], table)

    # torch's FlexAttention

    @classmethod
    def from_flex(cls, block_mask: BlockMask) -> Mask:
        """The mask of a FlexAttention BlockMask, exactly. Shape: its ``seq_lengths``.

        Full blocks are taken as they are, partial ones are evaluated through ``mask_mod``. Raises MaskError where the
        heads or batch entries of the BlockMask differ. (One that was built with B=None and H=None is taken at
        b = h = 0, which is all that it says.)
        """
        from distattn.mask_flex import from_block_mask

        num_queries, num_keys, bands = from_block_mask(block_mask)
        return cls(num_queries, num_keys, bands)

    def to_flex(self, device: str | torch.device = "cpu", block_size: int = 128) -> BlockMask:
        """A FlexAttention BlockMask of the same pairs, for any batch size and heads.

        Its own tables hold (num_queries / block_size) × (num_keys / block_size) entries: take larger blocks for longer
        sequences. ``mask_mod`` looks up the keys that a query sees, in constant time for masks of documents.
        """
        from distattn.mask_flex import to_block_mask

        return to_block_mask(self.num_queries, self.num_keys, self.bands, device, _size("block_size", block_size))


def _integers(name: str, values: Any) -> np.ndarray:
    """An own int64 copy of integers from a sequence, an array or a tensor on any device."""
    try:
        array = np.array(values.tolist() if hasattr(values, "tolist") else list(values))
    except (TypeError, ValueError) as error:
        raise MaskError(f"{name} must hold integers in rows of equal length, and is {values!r:.80}") from error
    if array.size and array.dtype.kind not in "iu":
        raise MaskError(f"{name} must hold integers, and holds {array.dtype}")
    return array.astype(np.int64)


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError as error:
        raise MaskError(f"{name} is {value!r} and must be an integer of tokens") from error
    if not 0 <= size <= MAX_LENGTH:
        raise MaskError(f"{name} is {size} and must be from 0 to {MAX_LENGTH} tokens")
    return size


def _sizes(name: str, values: Integers) -> np.ndarray:
    array = _integers(name, values)
    if array.ndim != 1:
        raise MaskError(f"{name} must be a flat list of lengths, and has the shape {array.shape}")
    if len(array) and not (array.min() >= 0 and array.max() <= MAX_LENGTH):
        worst = array.min() if array.min() < 0 else array.max()
        raise MaskError(f"{name} holds {worst} and every length must be from 0 to {MAX_LENGTH} tokens")
    _size(f"the sum of {name}", int(array.sum()))
    return array


def _cumulative(name: str, values: Integers) -> np.ndarray:
    array = _integers(name, values)
    if array.ndim != 1 or not len(array) or array[0] != 0 or (np.diff(array) < 0).any():
        raise MaskError(f"{name} must be cumulative lengths that start at 0 and never fall, and is {array.tolist()!r:.80}")
    _size(f"the last of {name}", int(array[-1]))
    return array
