"""How boundary states of linear attention cross ranks: one file an exchange, independent of the operator that made the states.

To add one: a file with its picture, an options dataclass and ``plan(chains, heads, columns, options) -> Table``, and a line in
``EXCHANGES``. Every operator, the backward, all transports and the tests then have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distattn.errors import PlanError
from distattn.parallel.exchanges import all_gather, all_scan, serial, two_level
from distattn.parallel.exchanges.cost import LinkRates, best_blocks, exchange_seconds
from distattn.parallel.exchanges.operators import OPERATORS, BoundaryOp, Map, StateShape
from distattn.parallel.exchanges.runner import ExchangeRun, LoweredExchange, lower_exchange
from distattn.parallel.exchanges.stream import Chains, OwnPieces, Stream, cut_stream
from distattn.parallel.exchanges.table import Table, verify_table

__all__ = [
    "EXCHANGES",
    "OPERATORS",
    "BoundaryOp",
    "Chains",
    "Exchange",
    "ExchangeRun",
    "LinkRates",
    "LoweredExchange",
    "Map",
    "OwnPieces",
    "StateShape",
    "Stream",
    "Table",
    "choose_exchange",
    "cut_stream",
    "default_options",
    "find_exchange",
    "lower_exchange",
    "pick_exchange",
    "verify_table",
]


@dataclass(frozen=True)
class Exchange:
    """One entry of the registry: how it plans, and the type of its options."""

    plan: Callable[..., Table]
    options: type


EXCHANGES: dict[str, Exchange] = {
    "serial": Exchange(serial.plan, serial.SerialOptions),
    "all_gather": Exchange(all_gather.plan, all_gather.AllGatherOptions),
    "all_scan": Exchange(all_scan.plan, all_scan.AllScanOptions),
    "two_level": Exchange(two_level.plan, two_level.TwoLevelOptions),
}


def find_exchange(name: str) -> Exchange:
    """The exchange of this name; PlanError lists those there are."""
    if name not in EXCHANGES:
        raise PlanError(f"exchange={name!r} is unknown; it may be auto, {', '.join(EXCHANGES)}")
    return EXCHANGES[name]


def default_options(name: str, rates: LinkRates, links: int, state_bytes: float) -> Any:
    """Options for a machine: blocks of all_scan by the cost model, nodes of two_level by its size."""
    if name == "all_scan":
        return all_scan.AllScanOptions(best_blocks(rates, links, state_bytes))
    if name == "two_level":
        return two_level.TwoLevelOptions(rates.ranks_per_node)
    return find_exchange(name).options()


def choose_exchange(rates: LinkRates, links: int, state_bytes: float, transition_bytes: float) -> tuple[str, str]:
    """(exchange with the least predicted time, why) for chains of up to ``links`` links. Ties go to the simpler one."""
    if links < 2:
        return "serial", "no document crosses ranks"
    seconds = {name: exchange_seconds(name, rates, links, state_bytes, transition_bytes) for name in EXCHANGES}
    best = min(seconds, key=lambda name: round(seconds[name], 12))
    times = ", ".join(f"{name} {1e6 * t:.3g}" for name, t in seconds.items())
    return best, f"least predicted time over {links} links, in µs: {times}"


def pick_exchange(
    wanted: str, options: Any, rates: LinkRates, links: int, state_bytes: float, transition_bytes: float
) -> tuple[str, Any, str]:
    """(exchange, its options, why) for a caller's choice, which may be "auto". Raises PlanError."""
    if wanted == "auto":
        if options is not None:
            raise PlanError('options belong to one exchange: name it instead of exchange="auto"')
        name, why = choose_exchange(rates, links, state_bytes, transition_bytes)
        return name, default_options(name, rates, links, state_bytes), why
    exchange = find_exchange(wanted)
    if options is not None and not isinstance(options, exchange.options):
        raise PlanError(f"options of {wanted} must be {exchange.options.__name__}, got {type(options).__name__}")
    return wanted, options or default_options(wanted, rates, links, state_bytes), "given by the caller"
