"""Compressed rows: lists of lists as one flat array and a pointer array."""

from __future__ import annotations

import numpy as np


def expand(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All members of the lists ``[starts[i], starts[i] + counts[i])``: (list index, flat index), int64 [sum(counts)]."""
    total = int(counts.sum())
    which = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    return which, np.asarray(starts)[which] + offset


def pointers(sorted_keys: np.ndarray, num_lists: int) -> np.ndarray:
    """Pointer array [num_lists + 1] of a flat array whose list keys are sorted."""
    return np.searchsorted(sorted_keys, np.arange(num_lists + 1))


def segment_starts(*columns: np.ndarray) -> np.ndarray:
    """Flat index of the first member of each run of equal keys (columns sorted together)."""
    n = len(columns[0])
    if not n:
        return np.zeros(0, np.int64)
    changed = np.zeros(n, bool)
    changed[0] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changed)
