"""Pieces cut into spans of chunks that are walked through side by side (``triton_walk.py``)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import Pieces

MIN_SPAN_CHUNKS = 8
"""Below that a span's walk is not worth its state."""


def count_span_chunks(walks: int, wanted: int, num_chunks: int) -> int:
    """Chunks of a span. walks: programs for each span; wanted: what fills the device; num_chunks: of all pieces."""
    return max(MIN_SPAN_CHUNKS, num_chunks * walks // max(wanted, 1))


@dataclass(frozen=True, eq=False)
class Spans:
    """pieces: the spans as pieces, all of which are late and emit. piece int64 [P]: of each. first int64 [N+1]: number of each
    piece's first span."""

    pieces: Pieces
    piece: np.ndarray
    first: np.ndarray
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, whole: Pieces, length: int) -> Spans:
        """length: rows of a span, a multiple of the chunk; the last of a piece is shorter."""
        counts = -(-whole.lengths // length)
        first = np.concatenate([[0], np.cumsum(counts)])
        piece = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(first[-1]) - first[piece]
        lengths = np.minimum(whole.lengths[piece] - nth * length, length)
        every, none = np.arange(len(piece)), np.zeros(0, np.int64)
        return cls(Pieces(lengths, none, every, every, none), piece, first)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``piece`` and ``first`` on a device, int32, uploaded at the first call."""
        if device not in self._tables:
            piece, first = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (self.piece, self.first))
            self._tables[device] = (piece, first)
        return self._tables[device]


_known: weakref.WeakKeyDictionary[Pieces, dict[int, Spans]] = weakref.WeakKeyDictionary()


def spans_of(whole: Pieces, length: int) -> Spans:
    """``Spans.of``, made once for each pieces."""
    made = _known.setdefault(whole, {})
    if length not in made:
        made[length] = Spans.of(whole, length)
    return made[length]
