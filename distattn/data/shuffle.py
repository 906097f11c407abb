"""A seeded permutation that is the same under every version of numpy, unlike that of `numpy.random.Generator`."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood, 2014), uint64 in and out, wrapping."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), int64 [count], that is a pure function of `count` and the integers of `key`."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state + _GOLDEN) ^ np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64)
    draws = _mix(_mix(state + _GOLDEN) + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return np.argsort(draws, kind="stable").astype(np.int64)
