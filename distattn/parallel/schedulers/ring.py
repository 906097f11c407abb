"""Ring: queries stay, key/value chunks travel round the ranks (Liu et al., arXiv 2310.01889).

    stage 0   rank r attends to its own chunk            chunk r leaves for the next rank that needs it
    stage s   rank r attends to the chunk of rank r − s   … and is passed on while it is being used

A rank that needs nothing of a chunk is skipped, and a hop carries only the rows that some rank further along needs: under a
sliding window the ring is a halo exchange. Two options: chunks go both ways at once (half the stages), or queries travel and
keys stay (their results fly home), which is less traffic where there are as many KV heads as query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.need import Need, analyse
from distattn.parallel.program import KV, KV_IN, Q_IN, Q_OUT, Program, ProgramBuilder, Q
from distattn.parallel.relay import Path, Stops, chain, pairs, relay


@dataclass(frozen=True)
class RingOptions:
    """moves: "kv", or "q": queries travel. two_way: half the chunks' way goes up the ranks, half down, at the same time."""

    moves: str = "kv"
    two_way: bool = False

    def __post_init__(self) -> None:
        if self.moves not in ("kv", "q"):
            raise PlanError(f'moves must be "kv" or "q", got {self.moves!r}')


def variants(heads: int, kv_heads: int, num_ranks: int, ranks_per_node: int) -> list[RingOptions]:
    """Options worth a prediction, the default first."""
    found = [RingOptions()]
    if num_ranks > 2:
        found.append(RingOptions(two_way=True))
    if 2 * kv_heads > heads:  # with fewer KV heads, queries and results are more bytes than keys and values
        found.append(RingOptions(moves="q"))
    return found


def plan(
    mask: Mask,
    layout: Layout,
    heads: int,
    kv_heads: int,
    options: RingOptions | None = None,
    key_layout: Layout | None = None,
) -> Program:
    """Ring attention over any mask and layout."""
    options = options or RingOptions()
    builder = ProgramBuilder(layout, heads, kv_heads, key_layout)
    if options.moves == "kv":
        need = analyse(mask, layout, key_layout)
        add_home_attends(builder, need.area)
        add_travelling_keys(builder, relay(need, ring_path(need, two_way=options.two_way)))
    else:
        keys_need = analyse(mask.transpose(), key_layout or layout, layout if key_layout else None)
        path = ring_path(keys_need, two_way=options.two_way)
        last = int(path.due.max(initial=0))
        add_home_attends(builder, keys_need.area, late=last + 1 if last else 0)
        _add_travelling_queries(builder, relay(keys_need, path))
    return builder.build()


def ring_path(need: Need, *, two_way: bool = False) -> Path:
    """From each owner to the next rank that needs its chunk, and so on; one stage a rank of distance."""
    ranks = need.layout.num_ranks
    owner, holder = pairs(need)
    distance = (holder - owner) % ranks
    down = (2 * distance > ranks) & two_way
    return chain(owner, holder, down.astype(np.int64), np.where(down, ranks - distance, distance))


def add_home_attends(builder: ProgramBuilder, area: np.ndarray, late: int = 0) -> None:
    """Stage 0: every rank whose queries see keys of their own rank attends to its home chunk.

    late: a stage to which half of the heads are left, where there is something to wait for and nothing else to compute.
    """
    ranks = np.flatnonzero(np.diagonal(area) > 0)
    rows, keys, zero = builder.home_rows[ranks], builder.home_keys[ranks], 0 * ranks
    half = builder.heads // 2 if late else 0
    for stage, h0, h1 in ((late, 0, half), (0, half, builder.heads)):
        builder.add_attends(np.stack([zero + stage, 2 * ranks, 2 * ranks + 1, rows, keys, zero + h0, zero + h1], 1))


def add_travelling_keys(builder: ProgramBuilder, stops: Stops) -> None:
    """KV chunks go from stop to stop; every stop attends to what it got."""
    path = stops.path
    row_sets = stops.add_row_sets(builder, builder.keys or builder.layout, builder.home_keys)
    away = np.flatnonzero(~path.is_root)
    slot = 2 * path.owner + 1
    zero, one, holder, rows = 0 * away, 0 * away + 1, path.holder[away], row_sets[away]
    slot[away] = builder.add_slots(np.stack([holder, one * KV, zero, zero + builder.kv_heads, rows], 1))
    source, issue, due = slot[path.source[away]], path.issue[away], path.due[away]
    builder.add_moves(np.stack([one * KV_IN, source, slot[away], rows, issue, due], 1))
    queries = builder.home_rows[holder]
    builder.add_attends(np.stack([due, 2 * holder, slot[away], queries, rows, zero, zero + builder.heads], 1))


def _add_travelling_queries(builder: ProgramBuilder, stops: Stops) -> None:
    """Queries go from stop to stop; what every stop computes for them flies straight home."""
    path = stops.path
    row_sets = stops.add_row_sets(builder, builder.layout, builder.home_rows)
    away = np.flatnonzero(~path.is_root)
    slot = 2 * path.owner
    zero, one, holder, rows = 0 * away, 0 * away + 1, path.holder[away], row_sets[away]
    slot[away] = builder.add_slots(np.stack([holder, one * Q, zero, zero + builder.heads, rows], 1))
    source, issue, due = slot[path.source[away]], path.issue[away], path.due[away]
    builder.add_moves(np.stack([one * Q_IN, source, slot[away], rows, issue, due], 1))
    builder.add_moves(np.stack([one * Q_OUT, slot[away], 2 * path.owner[away], rows, due + 1, due + 2], 1))
    keys = builder.home_keys[holder]
    builder.add_attends(np.stack([due, slot[away], 2 * holder + 1, rows, keys, zero, zero + builder.heads], 1))
