"""Which rows Megatron gives each context rank, and the masks over them: a layout that is given, not chosen.

    rank r of P holds chunks r and 2P − 1 − r of 2P       of the sequence (SBHD), or of each padded document (THD)

Packed documents are placed by their padded lengths; only their real tokens see and are seen.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distattn.bands import UNBOUNDED
from distattn.errors import InputError, UnsupportedError
from distattn.mask import Mask
from distattn.parallel.layout import Layout

PER_DOCUMENT = "document"
PER_SEQUENCE = "sequence"

Window = tuple[int, int]
"""(left, right): key j is seen from query i when −left ≤ j − i ≤ right; −1 is no bound."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Rows of all ranks in one call. The same arguments give the same object, so that plans can be kept by it.

    layout: of the padded stream. starts, lengths: int64 [D], first row and real tokens of each document. padded: whether some
    document has rows that are not real tokens.
    """

    layout: Layout
    starts: np.ndarray
    lengths: np.ndarray
    padded: bool

    @property
    def documents(self) -> np.ndarray:
        """cu_seqlens of the padded stream, int64 [D+1]: what follows a document's real tokens is its own."""
        return np.append(self.starts, self.layout.num_rows)

    def mask(self, *, causal: bool, window: Window | None) -> Mask:
        """Documents, each seeing its own real tokens, inside the window."""
        left, right = (-1, -1) if window is None else window
        lo = -left if left >= 0 else -UNBOUNDED
        hi = right if right >= 0 else UNBOUNDED
        ends = self.starts + self.lengths
        low, high = np.full_like(ends, lo), np.full_like(ends, min(hi, 0) if causal else hi)
        rows = self.layout.num_rows
        return Mask(rows, rows, np.stack([self.starts, ends, self.starts, ends, low, high], 1))


def sequence_placement(local_rows: int, num_ranks: int) -> Placement:
    """One sequence, ``local_rows`` of it on each rank. Raises UnsupportedError where it is not 2P equal chunks."""
    return _placed(local_rows, num_ranks, None, None, PER_SEQUENCE)


def packed_placement(local_rows: int, num_ranks: int, real: bytes, padded: bytes | None, order: str) -> Placement:
    """Packed documents. real, padded: cu_seqlens as int64 bytes, of the whole stream. order: what was cut in zigzag, each
    document or the whole sequence. Raises UnsupportedError or InputError where rows and documents do not fit."""
    return _placed(local_rows, num_ranks, real, padded, order)


_CACHE_SIZE = 256
_placements: OrderedDict[tuple, Placement] = OrderedDict()
_lock = threading.Lock()


def _placed(local_rows: int, num_ranks: int, real: bytes | None, padded: bytes | None, order: str) -> Placement:
    key = (local_rows, num_ranks, real, padded, order)
    with _lock:
        if key in _placements:
            _placements.move_to_end(key)
            return _placements[key]
        made = _place(*key)
        _placements[key] = made
        if len(_placements) > _CACHE_SIZE:
            _placements.popitem(last=False)
    return made


def _place(local_rows: int, num_ranks: int, real: bytes | None, padded: bytes | None, order: str) -> Placement:
    rows = local_rows * num_ranks
    whole = np.array([0, rows], np.int64)
    cu = whole if real is None else np.frombuffer(real, np.int64)
    cu_padded = cu if padded is None else np.frombuffer(padded, np.int64)
    _check_documents(cu, cu_padded, rows)
    starts, room, lengths = cu_padded[:-1], np.diff(cu_padded), np.diff(cu)
    if order == PER_SEQUENCE:
        _check_chunks(np.array([rows]), num_ranks, "the sequence")
        layout = Layout.zigzag(rows, num_ranks)
    else:
        _check_chunks(room, num_ranks, "a packed document")
        layout = Layout.per_document_zigzag(room, num_ranks, min_cut=1)
    kept = room > 0
    return Placement(layout, starts[kept], lengths[kept], bool((lengths < room).any()))


def _check_documents(cu: np.ndarray, cu_padded: np.ndarray, rows: int) -> None:
    if len(cu) != len(cu_padded) or len(cu) < 2 or cu[0] != 0 or cu_padded[0] != 0:
        raise InputError(
            f"cu_seqlens and cu_seqlens_padded must begin with 0 and name the same documents; they have {len(cu)} and "
            f"{len(cu_padded)} entries and begin with {cu[:1].tolist()} and {cu_padded[:1].tolist()}"
        )
    if (np.diff(cu) < 0).any() or (np.diff(cu) > np.diff(cu_padded)).any():
        raise InputError("no document may have fewer than 0 tokens, or more than its padded length: check cu_seqlens")
    if cu_padded[-1] != rows:
        raise UnsupportedError(
            f"a packed batch of {rows} rows over all ranks whose (padded) documents end at {cu_padded[-1]}",
            "Megatron's layout",
            "rows outside of documents have no place in it, or cu_seqlens is not that of the whole stream",
            "pass cu_seqlens undivided, with padding as part of the last document",
        )


def _check_chunks(lengths: np.ndarray, num_ranks: int, what: str) -> None:
    if num_ranks > 1 and (lengths % (2 * num_ranks)).any():
        wrong = int(lengths[lengths % (2 * num_ranks) != 0][0])
        raise UnsupportedError(
            f"{what} of {wrong} rows",
            f"Megatron's zigzag over {num_ranks} ranks",
            f"it cannot be cut into {2 * num_ranks} equal chunks, so that tokens would be lost or misplaced",
            f"pad it to a multiple of {2 * num_ranks}, with the real lengths in cu_seqlens and the others in cu_seqlens_padded",
        )


_read = WeakTensorKeyDictionary()


def host_lengths(cu_seqlens: Tensor) -> bytes:
    """cu_seqlens as int64 bytes on the host. All layers of a micro-batch pass one tensor, which is read once."""
    version = cu_seqlens._version
    known = _read.get(cu_seqlens)
    if known is None or known[0] != version:
        known = (version, cu_seqlens.detach().to("cpu", torch.int64).reshape(-1).numpy().tobytes())
        _read[cu_seqlens] = known
    return known[1]


def thd_indices(cu_seqlens_padded: Tensor, num_ranks: int, rank: int) -> Tensor:
    """Rows of a packed stream that a context rank holds, int64 [T / P]: chunks r and 2P − 1 − r of each document.

    cu_seqlens_padded [D+1], integers, on any device: every length is a multiple of 2P, else UnsupportedError. Does what
    Transformer Engine's ``thd_get_partitioned_indices`` does, without it.
    """
    cu = cu_seqlens_padded.reshape(-1).to(torch.int64)
    lengths = cu.diff()
    if num_ranks == 1:
        return torch.arange(int(cu[-1]), device=cu.device)
    _check_chunks(lengths.cpu().numpy(), num_ranks, "a packed document")
    chunk = lengths // (2 * num_ranks)
    held = 2 * chunk
    document = torch.repeat_interleave(torch.arange(len(held), device=cu.device), held)
    j = torch.arange(len(document), device=cu.device) - (held.cumsum(0) - held)[document]
    size = chunk[document]
    second = (2 * num_ranks - 1 - rank) * size + j - size
    return cu[:-1][document] + torch.where(j < size, rank * size + j, second)
