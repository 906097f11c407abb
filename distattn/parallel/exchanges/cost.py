"""What an exchange takes, in closed form, for one chain through all ranks; fitted to measurements or taken from a machine.

n: bytes of a rank's whole state, n_A of its transition, P ranks in nodes of R, a latency and W bandwidth of a hop, c per call.

serial        c + (P − 1)(a + n / W)
all_scan      c + (P − 2 + K)(a + n / (K W))                        K blocks; best K = √((P − 2) n / (a W))
all_gather    c + (P − 1)(a + (n + n_A) / W)
two_level     3c + 2 (a_in + (n + n_A) / W_in) + (P / R − 1)(a + n / (R W))

Hops inside nodes take a_in and W_in. Not in it: the folds, and what the intra-chunk work hides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.parallel.hardware import Hardware


@dataclass(frozen=True)
class LinkRates:
    """Seconds and bytes a second, per rank and direction. call_seconds: to start one exchange, whatever its size."""

    call_seconds: float
    inside_latency_seconds: float
    between_latency_seconds: float
    inside_bytes_per_second: float
    between_bytes_per_second: float
    ranks_per_node: int

    @classmethod
    def of(cls, hardware: Hardware) -> LinkRates:
        """A machine's, as far as its links go."""
        return cls(
            call_seconds=hardware.launch_us * 1e-6,
            inside_latency_seconds=hardware.inside_latency_us * 1e-6,
            between_latency_seconds=hardware.between_latency_us * 1e-6,
            inside_bytes_per_second=hardware.inside_gb_per_second * 1e9,
            between_bytes_per_second=hardware.between_gb_per_second * 1e9,
            ranks_per_node=hardware.ranks_per_node,
        )

    def slowest(self, num_ranks: int) -> tuple[float, float]:
        """(latency, bandwidth) of the slowest hop of a chain through that many ranks."""
        if num_ranks <= self.ranks_per_node:
            return self.inside_latency_seconds, self.inside_bytes_per_second
        return self.between_latency_seconds, self.between_bytes_per_second


@dataclass(frozen=True)
class Measurement:
    """One published or measured time of an exchange: "all_scan" or "all_gather"."""

    exchange: str
    num_ranks: int
    seconds: float


def exchange_seconds(
    exchange: str, rates: LinkRates, num_ranks: int, state_bytes: float, transition_bytes: float = 0, *, blocks: int = 0
) -> float:
    """Predicted seconds of one exchange over ``num_ranks`` ranks. blocks: of all_scan, 0 the best.

    Raises PlanError for an exchange that the model does not know.
    """
    if num_ranks < 2:
        return 0.0
    latency, bandwidth = rates.slowest(num_ranks)
    if exchange == "serial":
        return rates.call_seconds + (num_ranks - 1) * (latency + state_bytes / bandwidth)
    if exchange == "all_scan":
        k = blocks or best_blocks(rates, num_ranks, state_bytes)
        return rates.call_seconds + (num_ranks - 2 + k) * (latency + state_bytes / (k * bandwidth))
    if exchange == "all_gather":
        return rates.call_seconds + (num_ranks - 1) * (latency + (state_bytes + transition_bytes) / bandwidth)
    if exchange == "two_level":
        return _two_level_seconds(rates, num_ranks, state_bytes, transition_bytes)
    raise PlanError(f"no cost model for exchange={exchange!r}; there is one for serial, all_gather, all_scan and two_level")


def _two_level_seconds(rates: LinkRates, num_ranks: int, state_bytes: float, transition_bytes: float) -> float:
    size = min(rates.ranks_per_node, num_ranks)
    nodes = math.ceil(num_ranks / size)
    deal = rates.inside_latency_seconds + (state_bytes + transition_bytes) / rates.inside_bytes_per_second
    if nodes == 1:
        return 2 * (rates.call_seconds + deal)
    hop = rates.between_latency_seconds + state_bytes / (size * rates.between_bytes_per_second)
    return 3 * rates.call_seconds + 2 * deal + (nodes - 1) * hop


def best_blocks(rates: LinkRates, num_ranks: int, state_bytes: float, most: int = 32) -> int:
    """K of all_scan with the least predicted time."""
    latency, bandwidth = rates.slowest(num_ranks)
    if latency <= 0:
        return most if num_ranks > 2 else 1
    best = math.sqrt(max(num_ranks - 2, 0) * state_bytes / (latency * bandwidth))
    return int(min(max(round(best), 1), most))


def fit_rates(
    points: Sequence[Measurement], state_bytes: float, *, ranks_per_node: int, inside: LinkRates, most_blocks: int = 16
) -> tuple[LinkRates, int]:
    """(rates, K of all_scan) that repeat measured times of all_scan and all_gather best, by relative least squares.

    The call, the latency and the inverse bandwidth enter linearly, K is tried out. Hops are taken to be alike, in nodes and
    between them; ``inside`` gives the in-node rates of two_level, which such measurements do not tell.
    """
    best: tuple[float, np.ndarray, int] | None = None
    for k in range(1, most_blocks + 1):
        rows = []
        for point in points:
            scan = point.exchange == "all_scan"
            hops = point.num_ranks - 2 + k if scan else point.num_ranks - 1
            rows.append([1.0, hops, hops * state_bytes / (k if scan else 1)])
        seconds = np.array([point.seconds for point in points])
        matrix = np.array(rows) / seconds[:, None]
        scale = np.abs(matrix).max(0)
        found, *_ = np.linalg.lstsq(matrix / scale, np.ones(len(points)), rcond=None)
        found = found / scale
        error = float(np.square(matrix @ found - 1).sum())
        if (found >= 0).all() and (best is None or error < best[0]):
            best = error, found, k
    if best is None:
        raise PlanError("no non-negative call time, latency and bandwidth repeat these measurements")
    call, latency, inverse = best[1].tolist()
    rates = LinkRates(
        call, inside.inside_latency_seconds, latency, inside.inside_bytes_per_second, 1 / max(inverse, 1e-30), ranks_per_node
    )
    return rates, best[2]


def overtaking_ranks(rates: LinkRates, state_bytes: float, transition_bytes: float = 0, *, blocks: int = 0) -> int | None:
    """First number of ranks, in whole nodes up to 1,024, from which two_level is faster than all_scan; None: it never is."""
    counts = list(range(2 * rates.ranks_per_node, 1025, rates.ranks_per_node))
    faster = [
        exchange_seconds("two_level", rates, p, state_bytes, transition_bytes)
        < exchange_seconds("all_scan", rates, p, state_bytes, blocks=blocks)
        for p in counts
    ]
    behind = [i for i, wins in enumerate(faster) if not wins]
    first = behind[-1] + 1 if behind else 0
    return counts[first] if first < len(counts) else None
