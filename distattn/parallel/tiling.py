"""From Attends to tile tables: mask ∩ (query rows × key rows), in arena coordinates, as few tiles as possible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from distattn import bands as band_algebra
from distattn.mask import Mask
from distattn.parallel.csr import expand, pointers, segment_starts

_STRIDE = 1 << 31  # (list, position) pairs become one sortable integer


def build_tiles(
    mask: Mask,
    q_segments: Sequence[np.ndarray],
    kv_segments: Sequence[np.ndarray],
    heads: np.ndarray,
    call: np.ndarray,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Tile tables of one rank's Attends.

    q_segments, kv_segments: per Attend, int64 [k, 3]: first global row, first arena row, count; heads: int64 [n, 3] arena
    heads h0, h1 and shift; call: int64 [n, c], equal for Attends of one backend call. Returns (distinct calls that have
    tiles, ascending [m, c]; their tables [t, 9] with the columns of ``distattn.kernels.protocol``).
    """
    q_of, q = _flat(q_segments)
    kv_of, kv = _flat(kv_segments)
    attend, qi, ki = _boxes(mask, q_of, q, kv_of, kv)
    boxes = np.zeros((len(attend), 6), np.int64)
    boxes[:, 0], boxes[:, 1] = q[qi, 0], q[qi, 0] + q[qi, 2]
    boxes[:, 2], boxes[:, 3] = kv[ki, 0], kv[ki, 0] + kv[ki, 2]
    boxes[:, 4], boxes[:, 5] = -band_algebra.UNBOUNDED, band_algebra.UNBOUNDED
    pieces, box, _ = band_algebra.intersect_rows(boxes, mask.bands)
    attend, qi, ki = attend[box], qi[box], ki[box]
    pieces = _moved(band_algebra.open_edges(pieces), q[qi, 1] - q[qi, 0], kv[ki, 1] - kv[ki, 0])
    kinds, kind = np.unique(np.concatenate([call, heads], 1)[attend], axis=0, return_inverse=True)
    pieces, kind = _coalesce_each(pieces, kind.reshape(-1))
    tiles = np.concatenate([pieces, kinds[kind][:, call.shape[1] :]], 1)
    calls, which = np.unique(kinds[:, : call.shape[1]], axis=0, return_inverse=True)
    which = which.reshape(-1)[kind]
    order = np.lexsort((tiles[:, 2], tiles[:, 0], tiles[:, 6], which))
    bounds = pointers(which[order], len(calls))
    tables = [np.ascontiguousarray(tiles[order[a:b]]) for a, b in itertools.pairwise(bounds.tolist())]
    return calls, tables


def _flat(segments: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(list of each segment [n], segments [n, 3])."""
    return np.repeat(np.arange(len(segments)), [len(x) for x in segments]), np.concatenate(segments)


def _boxes(
    mask: Mask, q_of: np.ndarray, q: np.ndarray, kv_of: np.ndarray, kv: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(Attend, query segment, key segment) triples that may see each other: only key segments within the hull of the keys
    that the query segment sees, since packed documents put hundreds of unrelated segments into one Attend."""
    first_key, last_key = _hull_of_keys(mask, q)
    by_key = np.lexsort((kv[:, 0], kv_of))
    start, stop = kv[by_key, 0], kv[by_key, 0] + kv[by_key, 2]
    base = kv_of[by_key] * _STRIDE
    first = np.searchsorted(base + stop, q_of * _STRIDE + first_key, "right")
    last = np.searchsorted(base + start, q_of * _STRIDE + last_key, "left")
    qi, flat = expand(first, np.maximum(last - first, 0))
    return q_of[qi], qi, by_key[flat]


def _hull_of_keys(mask: Mask, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First key and one past the last key that each query segment sees; equal where it sees none."""
    starts, stops = q[:, 0], q[:, 0] + q[:, 2]
    breaks = np.unique(np.concatenate([starts, stops]))
    pieces, _, _ = band_algebra.cut_axis(mask.bands, breaks, 0)
    pieces = band_algebra.tighten(pieces)
    strip = np.searchsorted(breaks, pieces[:, 0], "right")
    order = np.argsort(strip, kind="stable")
    strip, pieces = strip[order], pieces[order]
    low = np.full(len(breaks) + 2, _STRIDE - 1)
    high = np.zeros(len(breaks) + 2, np.int64)
    head = segment_starts(strip)
    if len(head):
        low[strip[head]] = np.minimum.reduceat(pieces[:, 2], head)
        high[strip[head]] = np.maximum.reduceat(pieces[:, 3], head)
    first = np.searchsorted(breaks, starts, "right")
    last = np.searchsorted(breaks, stops, "left")
    # Segments of one slot mostly are one strip; the rest reduce over the strips [first, last].
    edges = np.stack([first, last + 1], 1).ravel()
    lowest = np.minimum.reduceat(low, edges)[::2]
    highest = np.maximum.reduceat(high, edges)[::2]
    return np.where(lowest < highest, lowest, 0), np.where(lowest < highest, highest, 0)


def _moved(bands: np.ndarray, dq: np.ndarray, dk: np.ndarray) -> np.ndarray:
    """Bands shifted by dq queries and dk keys; open edges stay open."""
    moved = bands.copy()
    moved[:, :2] += dq[:, None]
    moved[:, 2:4] += dk[:, None]
    bound = np.abs(bands[:, 4:]) < band_algebra.UNBOUNDED
    moved[:, 4:] += np.where(bound, (dk - dq)[:, None], 0)
    return moved


def _coalesce_each(bands: np.ndarray, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge neighbours within each kind: kinds are set apart along both axes, so that none of them touch."""
    if not len(bands):
        return bands, kind
    pitch = int(max(bands[:, 1].max(), bands[:, 3].max())) + 1
    per_round = max(1, band_algebra.MAX_LENGTH // pitch)
    merged, kinds = [], []
    for low in range(0, int(kind.max()) + 1, per_round):
        chosen = (kind >= low) & (kind < low + per_round)
        offset = (kind[chosen] - low) * pitch
        table = bands[chosen].copy()
        table[:, :4] += offset[:, None]
        table = band_algebra.coalesce(table)
        local = table[:, 0] // pitch
        table[:, :4] -= (local * pitch)[:, None]
        merged.append(table)
        kinds.append(local + low)
    return np.concatenate(merged), np.concatenate(kinds)
