"""Document lengths of long-context corpora, as seeded draws that fill a sequence.

    pile, prolong64k, prolong512k   LongCA-bench's (arXiv 2510.17896): a log-normal body with uniform tails that we fitted to
                                    its histograms; the distance between the distribution functions is at most 0.04
    wlb, prolong                    those of DistCA's evaluation (arXiv 2510.18121): quantiles, and log-uniform between them
    @FILE                           a histogram of yours, JSON {"[first,last)": weight, …}; uniform in each bin

Most tokens of prolong512k lie in its last bin, and a benchmark hangs on the law inside it: here it is uniform.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from distattn.errors import ConfigError


class Lengths(Protocol):
    """A distribution of document lengths."""

    def sample(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count], any values; what is below 1 counts as 1."""
        ...


@dataclass(frozen=True)
class LogNormalWithTails:
    """ln(length) ~ N(mean, deviation), but with each tail's weight uniform over its [first, last]."""

    mean: float
    deviation: float
    tails: tuple[tuple[float, int, int], ...]

    def sample(self, generator: np.random.Generator, count: int) -> np.ndarray:
        lengths = np.exp(generator.normal(self.mean, self.deviation, count)).astype(np.int64)
        weights = [weight for weight, _, _ in self.tails]
        which = generator.choice(len(weights) + 1, count, p=[1 - sum(weights), *weights])
        for i, (_, first, last) in enumerate(self.tails):
            inside = np.flatnonzero(which == i + 1)
            lengths[inside] = generator.integers(first, last, len(inside), endpoint=True)
        return lengths


@dataclass(frozen=True)
class Quantiles:
    """Lengths at given shares of the documents, from 0 to 1 and ascending, and log-uniform in between."""

    points: tuple[tuple[float, int], ...]

    def sample(self, generator: np.random.Generator, count: int) -> np.ndarray:
        shares, lengths = np.array(self.points).T
        return np.exp(np.interp(generator.random(count), shares, np.log(lengths))).astype(np.int64)


@dataclass(frozen=True)
class Histogram:
    """Bins (first, last, weight), uniform in each, both ends included."""

    bins: tuple[tuple[int, int, float], ...]

    def sample(self, generator: np.random.Generator, count: int) -> np.ndarray:
        first, last, weights = np.array(self.bins).T
        which = generator.choice(len(weights), count, p=weights / weights.sum())
        return generator.integers(first[which].astype(np.int64), last[which].astype(np.int64), endpoint=True)


DISTRIBUTIONS: Mapping[str, Lengths] = {
    "pile": LogNormalWithTails(5.59, 1.20, ((0.0022, 14208, 9323168),)),
    "prolong64k": LogNormalWithTails(5.92, 1.08, ((0.0100, 8928, 50272), (0.0015, 50272, 61920))),
    "prolong512k": LogNormalWithTails(5.84, 1.04, ((0.0073, 10912, 475872),)),
    "wlb": Quantiles(
        (
            (0, 64), (0.10, 646), (0.50, 3227), (0.90, 5784), (0.95, 6110), (0.99, 26058), (0.995, 69097), (0.999, 119793),
            (1, 124913),
        )
    ),
    "prolong": Quantiles(
        (
            (0, 64), (0.10, 919), (0.50, 1913), (0.90, 6051), (0.95, 8378), (0.99, 16269), (0.995, 21357), (0.999, 47397),
            (1, 340149),
        )
    ),
}  # fmt: skip

_DRAWN_AT_ONCE = 1024


def draw(name: str, total: int, seed: int) -> list[int]:
    """Documents that fill ``total`` tokens: drawn one after another, the last one clipped to what is left.

    name: one of ``DISTRIBUTIONS``, or @FILE. The draw is the same for the same arguments. Raises ConfigError.
    """
    lengths, generator = find_lengths(name), np.random.default_rng(seed)
    if total < 1:
        raise ConfigError(f"documents of {total} tokens in all were asked for; it must be at least 1")
    drawn: list[np.ndarray] = []
    left = total
    while left > 0:
        batch = np.maximum(lengths.sample(generator, _DRAWN_AT_ONCE), 1)
        ends = np.cumsum(batch)
        stop = int(np.searchsorted(ends, left))
        if stop < len(batch):
            batch = batch[: stop + 1].copy()
            batch[-1] -= ends[stop] - left
        drawn.append(batch)
        left -= int(ends[-1])
    return np.concatenate(drawn).tolist()


def find_lengths(name: str) -> Lengths:
    """The distribution of this name, or of the histogram in @FILE; ConfigError says what there is."""
    if name.startswith("@"):
        return read_histogram(Path(name[1:]))
    if name not in DISTRIBUTIONS:
        raise ConfigError(f"unknown document lengths {name!r}: choose one of {', '.join(DISTRIBUTIONS)}, or @FILE.json")
    return DISTRIBUTIONS[name]


def read_histogram(path: Path) -> Histogram:
    """A JSON file {"[first,last)": weight, …}; ConfigError names what is wrong in it."""
    try:
        entries = json.loads(path.read_text())
        bins = [(*(int(x) for x in key.strip("[]() ").split(",")), float(weight)) for key, weight in entries.items()]
    except OSError as error:
        raise ConfigError(f"the histogram {path} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f'{path} is no histogram {{"[first,last)": weight, …}}: {error}') from error
    found = []
    for entry in bins:
        if len(entry) != 3 or not 0 <= entry[0] <= entry[1] or not entry[2] >= 0:
            raise ConfigError(f"{path} has the bin {entry}: it needs 0 ≤ first ≤ last and a weight that is not negative")
        found.append(entry)
    if not found or sum(weight for _, _, weight in found) <= 0:
        raise ConfigError(f"{path} has no bin of positive weight")
    return Histogram(tuple(found))
