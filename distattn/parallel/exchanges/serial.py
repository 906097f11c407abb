"""Hand the state from link to link, whole: what LASP-1 does (arXiv 2404.02882).

rank 0   x1 = B0 ──▶ 1
rank 1               x2 = A1 x1 + B1 ──▶ 2
rank 2                                   x3 = A2 x2 + B2 ──▶ 3

One state a rank on the wire, and a chain of P − 1 waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from distattn.parallel.exchanges.all_scan import pipeline
from distattn.parallel.exchanges.stream import Chains
from distattn.parallel.exchanges.table import Table


@dataclass(frozen=True)
class SerialOptions:
    """None."""


def plan(chains: Chains, heads: int, columns: int, options: SerialOptions | None = None) -> Table:
    """The table of a chain of hops."""
    return pipeline("serial", chains, heads, columns, blocks=1)
