"""Pieces of the delta rules cut into parts that walk side by side: where a piece's walk would leave most of the device idle.

A walk from chunk to chunk has few programs and is as long as its piece. A part of a piece turns the state that enters it into
M · state + B, as a piece does, so that what enters every part follows from the parts' M and B and from what enters the piece:

summary     B and M of all parts, side by side                  backward: D, and M transposed
fold        x ← M x + B from part to part                       from the last to the first
walk        all parts again, side by side, from their states

A piece that waits for another rank folds when that state is there, and has then a walk of one part's length before it. If
another rank waits for it in turn, it hands on what it leaves before that walk.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import Pieces

MAX_PARTS = 8
MIN_PART_CHUNKS = 32
"""Below that a part's walk is not worth its summary."""


def count_parts(programs: int, wanted: int, longest: int) -> int:
    """Into how many parts to cut. programs: of a walk through whole pieces; wanted: what fills the device; longest: chunks of
    the longest piece that is cut."""
    return max(1, min(wanted // max(programs, 1), longest // MIN_PART_CHUNKS, MAX_PARTS))


@dataclass(frozen=True, eq=False)
class Parts:
    """Pieces that hand states on or get them, cut into parts at chunks; the others are a part each.

    pieces: the parts, as pieces of their own: a first part whose piece is not late is in ``enter``, all
    other parts of those pieces are ``late``, and all but the last ones of pieces that do not emit are in ``emit``.
    piece: int64, piece of each part. first: int64 [N+1], number of each piece's first part.
    """

    pieces: Pieces
    piece: np.ndarray
    first: np.ndarray
    _masks: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, whole: Pieces, number: int, chunk: int) -> Parts:
        """number: parts of each piece that crosses, at most one a chunk."""
        crossing = np.union1d(whole.late, whole.emit)
        chunks = -(-whole.lengths // chunk)
        counts = np.ones(len(chunks), np.int64)
        counts[crossing] = np.minimum(number, chunks[crossing])
        first = np.concatenate([[0], np.cumsum(counts)])
        piece = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(first[-1]) - first[piece]
        ends = np.minimum(chunks[piece] * (nth + 1) // counts[piece] * chunk, whole.lengths[piece])
        lengths = ends - np.where(nth > 0, np.concatenate([[0], ends[:-1]]), 0)
        crosses = np.isin(piece, crossing)
        begins = (nth == 0) & ~np.isin(piece, whole.late)
        ceases = (nth == counts[piece] - 1) & ~np.isin(piece, whole.emit)
        ends_final = (nth == counts[piece] - 1) & np.isin(piece, whole.final)
        enter, late, emit, final = (
            np.flatnonzero(crosses & chosen) for chosen in (begins, ~begins, ~ceases, ends_final)
        )  # fmt: skip
        return cls(Pieces(lengths, enter, late, emit, final), piece, first)

    @property
    def several(self) -> np.ndarray:
        """Pieces of more than one part."""
        return np.flatnonzero(np.diff(self.first) > 1)

    def of_pieces(self, members: np.ndarray) -> np.ndarray:
        """All parts of some pieces."""
        return np.flatnonzero(np.isin(self.piece, members))

    def row(self, name: str, part: int) -> int:
        """Row of a part among the states of a set of parts, −1 if it is not in it."""
        members = getattr(self.pieces, name)
        at = int(np.searchsorted(members, part))
        return at if at < len(members) and members[at] == part else -1

    def mask(self, name: str, members: np.ndarray, number: int, device: torch.device) -> Tensor:
        """Which of ``number`` pieces or parts a walk takes, int32: −1 for the others. Uploaded once; name: tells them apart."""
        if (name, device) not in self._masks:
            rows = np.full(number, -1, np.int32)
            rows[members] = 0
            self._masks[name, device] = torch.from_numpy(rows).to(device)
        return self._masks[name, device]

    def fold(
        self, piece: int, entering: Tensor | None, offsets: Tensor, maps: Tensor
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """(state that enters each late part of a piece, state that leaves the piece if that is known). entering: None is zero.

        offsets: B of the parts in ``emit``; maps: M of those in ``maps``. [B, number, HV, K, ·]
        """
        x, starts = entering, {}
        for part in range(self.first[piece], self.first[piece + 1]):
            if self.row("late", part) >= 0:
                starts[part] = torch.zeros_like(offsets[:, 0]) if x is None else x
            row = self.row("emit", part)
            if row < 0:
                return starts, None
            through = self.row("maps", part)
            x = offsets[:, row] if x is None or through < 0 else maps[:, through] @ x + offsets[:, row]
        return starts, x

    def fold_back(
        self, piece: int, leaving: Tensor | None, offsets: Tensor, maps: Tensor
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """(gradient of the state that leaves each emitting part of a piece, gradient of what entered the piece if it is late).

        offsets: D of the parts in ``late``; the rest as in ``fold``, transposed.
        """
        y, ends = leaving, {}
        for part in range(self.first[piece + 1] - 1, self.first[piece] - 1, -1):
            if self.row("emit", part) >= 0:
                ends[part] = torch.zeros_like(offsets[:, 0]) if y is None else y
            row = self.row("late", part)
            if row < 0:
                return ends, None
            through = self.row("maps", part)
            y = offsets[:, row] if y is None or through < 0 else maps[:, through].transpose(-1, -2) @ y + offsets[:, row]
        return ends, y

    def map_of(self, piece: int, maps: Tensor) -> Tensor:
        """M of a whole piece in ``maps``: the product of its parts', the last one leftmost."""
        product = None
        for part in range(self.first[piece], self.first[piece + 1]):
            own = maps[:, self.row("maps", part)]
            product = own if product is None else own @ product
        assert product is not None, "a piece has a part"
        return product


_known: weakref.WeakKeyDictionary[Pieces, dict[tuple[int, int], Parts]] = weakref.WeakKeyDictionary()


def parts_of(whole: Pieces, number: int, chunk: int) -> Parts:
    """``Parts.of``, made once for each pieces."""
    made = _known.setdefault(whole, {})
    if (number, chunk) not in made:
        made[number, chunk] = Parts.of(whole, number, chunk)
    return made[number, chunk]
