"""Documents packed into sequences of equal length, each reachable by its number.

    stream      | doc 7 | doc 2       | doc 9 | … | doc 9 | doc 2 | …      epochs, each in an order of its own
    sequences   |-- seq_len --|-- seq_len --|-- seq_len --| …
    pieces      | 7     | 2   | 2'    | 9   | …                            2' is packed as a document of its own

The stream is the concatenation of all epochs, cut into sequences of seq_len rows. Training takes them in rounds of about an
epoch, each round in an order of its own: in the stream's order, a book or a table of a million tokens would be all that a
hundred steps see. Which rows are sequence i depends on the seed and i alone, so that a run resumes anywhere without replaying
what came before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from distattn.data.cache import Split, TokenCache
from distattn.data.shuffle import shuffled
from distattn.errors import DataError, InputError

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """One sequence: where its pieces lie in the cache. Making it reads no token.

    `pieces`: int64 [num_pieces, 3]: first token, token after the last, and end of the document that the piece is cut
    from.
    """

    tokens: np.ndarray = field(repr=False)
    pieces: np.ndarray = field(repr=False)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, int64 [num_pieces], all positive: the documents of the sequence's mask."""
        return self.pieces[:, 1] - self.pieces[:, 0]

    @cached_property
    def _bounds(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def seq_len(self) -> int:
        """Tokens of the sequence."""
        return int(self._bounds[-1])

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and positions of some rows of the sequence, int64 [num_rows] each, in the order of `rows`.

        rows: int64 [num_rows], 0 ≤ row < seq_len, in any order. Only the tokens of these rows and the ones after them are
        read. The label is the document's next token, also where the sequence ends before the document does, and
        IGNORED_LABEL (−100) at the document's last token. Positions count from the start of the piece. Raises InputError
        for rows that the sequence has not got.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.seq_len:
            raise InputError(f"rows must lie in [0, {self.seq_len}), the sequence's length: got {rows.min()} to {rows.max()}.")
        piece = np.searchsorted(self._bounds, rows, side="right") - 1
        positions = rows - self._bounds[piece]
        address = self.pieces[piece, 0] + positions
        last = address + 1 == self.pieces[piece, 2]
        tokens = self.tokens[address].astype(np.int64)
        labels = self.tokens[np.where(last, address, address + 1)].astype(np.int64)
        labels[last] = IGNORED_LABEL
        return tokens, labels, positions


class PackedStream:
    """The sequences of a split.

    "train" has no end: epoch after epoch, each in an order that is a pure function of (seed, epoch). "held_out" is one pass
    in an order that depends on nothing; the part of it that does not fill a sequence is dropped, unless it is all there is:
    then it is the only sequence, and shorter than seq_len.

    split: "train" or "held_out"; seq_len: tokens of a sequence; seed: any integer.
    """

    def __init__(self, cache: TokenCache, split: Split, seq_len: int, seed: int = 0) -> None:
        if split not in ("train", "held_out"):
            raise DataError(f"split={split!r} is unknown: give 'train' or 'held_out'.")
        if seq_len < 1:
            raise DataError(f"data.seq_len={seq_len} is not a length: give at least 1 token.")
        self.split = split
        self.seq_len = seq_len
        self.seed = seed
        self._tokens = cache.tokens
        self._documents = cache.documents(split)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.num_documents = len(self._documents)
        self.num_tokens = int((self._documents[:, 1] - self._documents[:, 0]).sum())
        self._rounds: dict[int, np.ndarray] = {}

    @property
    def num_sequences(self) -> int | None:
        """Sequences of the held-out pass, at least 1; None for training, which has no end."""
        return None if self.split == "train" else max(1, self.num_tokens // self.seq_len)

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index`, from 0: O(log num_documents + pieces), and O(num_documents) where a new epoch begins."""
        if index < 0 or (self.num_sequences is not None and index >= self.num_sequences):
            raise IndexError(f"sequence {index} does not exist: {self.split} has {self.num_sequences or 'all from 0 on'}.")
        first = self.place(index) * self.seq_len
        stop = first + self.seq_len
        if self.num_sequences is not None:
            stop = min(stop, self.num_tokens)
        pieces = []
        while first < stop:
            epoch, offset = divmod(first, self.num_tokens)
            end = min(offset + stop - first, self.num_tokens)
            pieces.append(self._pieces(epoch, offset, end))
            first += end - offset
        return PackedSequence(self._tokens, np.concatenate(pieces))

    def place(self, index: int) -> int:
        """Where sequence `index` lies in the stream, in sequences: a permutation of each round in training."""
        if self.split != "train":
            return index
        length = max(1, self.num_tokens // self.seq_len)
        number, offset = divmod(index, length)
        if number not in self._rounds:
            self._rounds = {number: shuffled(length, self.seed, number, 1)}
        return number * length + int(self._rounds[number][offset])

    def _pieces(self, epoch: int, first: int, stop: int) -> np.ndarray:
        """Pieces of rows [first, stop) of one epoch, int64 [n, 3]."""
        documents, bounds = self._epoch(epoch)
        a = int(np.searchsorted(bounds, first, side="right")) - 1
        b = int(np.searchsorted(bounds, stop, side="left"))
        pieces = documents[a:b][:, [0, 1, 1]]
        pieces[0, 0] += first - bounds[a]
        pieces[-1, 1] -= bounds[b] - stop
        return pieces

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in its order, int64 [n, 2], and the rows at which they begin, int64 [n + 1]."""
        if epoch not in self._epochs:
            documents = self._documents
            if self.split == "train":
                documents = documents[shuffled(len(documents), self.seed, epoch)]
            bounds = np.concatenate([[0], np.cumsum(documents[:, 1] - documents[:, 0])])
            # A sequence may span two epochs, and a round takes its sequences in any order.
            self._epochs = {e: order for e, order in self._epochs.items() if abs(e - epoch) == 1}
            self._epochs[epoch] = (documents, bounds)
        return self._epochs[epoch]
