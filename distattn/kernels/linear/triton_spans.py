"""Pieces cut into spans of chunks that are walked through side by side (``triton_walk.py``)."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import SCALAR, VECTOR, Operands, Pieces
from distattn.kernels.linear.triton_configs import LinearConfigs, padded

CHUNK = 64

MIN_SPAN_CHUNKS = 8
"""Below that a span's walk is not worth its state."""

MAX_WALK_DIM = 128
"""Of keys and values that a walk by spans holds whole."""

MAX_PROGRAMS = 65_535
"""Along the second axis of a CUDA grid, where walks have one for each piece, batch entry and value head."""

MAX_ROUNDS = 4
"""Of programs, that walks are cut for."""

KEPT_SHARE = 4
"""The forward keeps what enters its spans for the backward where that takes at most one part in so many of q, k and v."""


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

    @cached_property
    def most(self) -> int:
        """Spans of the piece that has the most."""
        return int(np.diff(self.first).max(initial=0))

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``piece`` and ``first`` on a device, int32, uploaded at the first call."""
        if device not in self._tables:
            piece, first = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (self.piece, self.first))
            self._tables[device] = (piece, first)
        return self._tables[device]


def spans_for(x: Operands, pieces: Pieces, configs: LinearConfigs) -> Spans | None:
    """How pieces are cut for walks side by side, or None where outputs and gradients come from states of all chunks: a vector
    of gates, the delta family, wide heads, and pieces so short that states of spans would take more memory."""
    batch, key_dim, (heads, value_dim) = x.q.shape[0], x.q.shape[3], x.v.shape[2:]
    if x.beta is not None or x.gate == VECTOR or max(key_dim, value_dim) > MAX_WALK_DIM:
        return None
    if configs.span_chunks:
        return spans_of(pieces, configs.span_chunks * CHUNK)
    chosen, key = _chosen.setdefault(pieces, {}), (batch, heads, value_dim, configs, x.v.device)
    if key not in chosen:
        chosen[key] = _choose_spans(batch, heads, value_dim, pieces, configs, x.v.device)
    return chosen[key]


def _choose_spans(
    batch: int, heads: int, value_dim: int, pieces: Pieces, configs: LinearConfigs, device: torch.device
) -> Spans | None:
    num_chunks = int((-(-pieces.lengths // CHUNK)).sum())
    walks = batch * heads * -(-value_dim // min(configs.walk.block_v, padded(value_dim)))

    def cut(wanted: int) -> Spans:
        return spans_of(pieces, max(MIN_SPAN_CHUNKS, -(-num_chunks // wanted)) * CHUNK)

    # Where ends of pieces make more of them than wanted, another round begins: the shorter its spans, the less of it is idle.
    *fewer, most = span_counts(walks, 2 * num_multiprocessors(device))
    spans = next((cut(wanted) for wanted in fewer if len(cut(wanted).piece) <= wanted), cut(most))
    number = len(spans.piece)
    return spans if 2 * number <= num_chunks and batch * number * heads <= MAX_PROGRAMS else None


def span_counts(walks: int, slots: int) -> list[int]:
    """How many spans there may be, ascending. walks: programs for each; slots: how many the device has room for.

    Every round of programs costs a beginning and an end: the fewer the better, if they leave at most a tenth of it idle.
    """
    counts = [rounds * slots // walks for rounds in range(1, MAX_ROUNDS + 1)]
    full = [number for rounds, number in enumerate(counts, 1) if 10 * number * walks >= 9 * rounds * slots]
    return [*full, max(1, counts[-1])]


def walk_blocks(x: Operands, configs: LinearConfigs) -> tuple[int, int]:
    """How many blocks of columns walks have that make rows of K, and of V."""
    dims = (padded(x.q.shape[3]), padded(x.v.shape[3]))
    k, v = (-(-dim // min(configs.walk.block_v, dim)) for dim in dims)
    return k, v


def fits_at_once(x: Operands, pieces: Pieces, spans: Spans, configs: LinearConfigs) -> bool:
    """Whether one launch walks through all spans (``triton_fused.py``): no state crosses a border, and the device has room for
    all programs at once, and at one a multiprocessor for those that meet.

    The latter alone is enough that none waits for ever: those that meet are neighbours, and devices start programs in order.
    """
    blocks_k, blocks_v = walk_blocks(x, configs)
    if len(pieces.late) or len(pieces.emit) or blocks_k != blocks_v:
        return False
    room, walks = num_multiprocessors(x.v.device), x.v.shape[0] * x.v.shape[2] * len(spans.piece)
    return x.v.device.type == "cpu" or (walks * blocks_v <= 2 * room and spans.most * blocks_v <= room)


def count_kept(x: Operands, spans: Spans | None) -> tuple[int, int]:
    """How many numbers in fp32 the forward keeps for the backward: (what enters each span, and the gate's sums before it; a
    gate's running sums, of a gate a row). The former not under a gate a row, whose backward by walks is rare."""
    sums = x.v.shape[:3].numel() if x.gate == SCALAR else 0
    if spans is None or x.gate == SCALAR:
        return 0, sums
    number = x.q.shape[0] * len(spans.piece) * x.v.shape[2]
    size = x.q.shape[3] * x.v.shape[3]
    given = sum(t.numel() * t.element_size() for t in (x.q, x.k, x.v))
    return number * (size + 1) if KEPT_SHARE * 4 * number * size <= given else 0, sums


@lru_cache(maxsize=64)
def num_multiprocessors(device: torch.device) -> int:
    """1 in the interpreter, where nothing is gained by more programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_known: weakref.WeakKeyDictionary[Pieces, dict[int, Spans]] = weakref.WeakKeyDictionary()
_chosen: weakref.WeakKeyDictionary[Pieces, dict[tuple, Spans | None]] = weakref.WeakKeyDictionary()


def spans_of(whole: Pieces, length: int) -> Spans:
    """``Spans.of``, made once for each pieces."""
    made = _known.setdefault(whole, {})
    if length not in made:
        made[length] = Spans.of(whole, length)
    return made[length]
