"""USP: heads × sequence, all-to-all inside groups of U ranks and a ring over R = P / U groups (arXiv 2405.07719).

    stage 0       rank (g, u) receives, of all rows of group g, query heads u·H/U … and the KV heads that these use
    stage 1       … attends to the keys of its own group               and hands them to (g + 1, u)
    stage 1 + s   … attends to the keys of group g − s
    stage 1 + R   every rank receives all heads of its own rows

U = 1 is ring, U = P is Ulysses. In *pieces*, each rank's heads come, compute and leave in turns one stage apart, so that
only the first arrival and the last departure are exposed. Rows that see, or are seen by, nothing do not travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np

from distattn.errors import PlanError
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.need import RowParts, analyse, rows_in, split_by_owner
from distattn.parallel.program import KV, KV_IN, Q_IN, Q_OUT, Program, ProgramBuilder, Q
from distattn.parallel.relay import Path, Stops, relay
from distattn.parallel.schedulers import double_ring, ring

PLACEMENTS = ("head_first", "context_first")


@dataclass(frozen=True)
class UspOptions:
    """How ranks are dealt to heads and to the sequence.

    head_ranks: ranks U that share the heads of a group; it divides ranks and query heads. None: their greatest common
    divisor, so that what heads cannot divide falls to the sequence. placement: "head_first", the ranks of a group are
    neighbours, "context_first", those of a ring are. pieces: turns in which a rank's heads go. groups_per_window: groups that
    form an inner ring (see double_ring); None: one flat ring.
    """

    head_ranks: int | None = None
    placement: str = "head_first"
    pieces: int = 1
    groups_per_window: int | None = None

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise PlanError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}")
        for name in ("head_ranks", "pieces", "groups_per_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"{name} must be at least 1, got {value}")


def variants(heads: int, kv_heads: int, num_ranks: int, ranks_per_node: int) -> list[UspOptions]:
    """Degrees strictly between ring and Ulysses, heads inside a node first; the default takes all heads inside a node."""
    common = gcd(heads, num_ranks)
    degrees = [x for x in range(common, 1, -1) if common % x == 0 and x < num_ranks]
    degrees.sort(key=lambda x: (x > ranks_per_node, -x))
    found = [UspOptions(x, pieces=pieces) for x in degrees for pieces in _pieces(heads // x)]
    if num_ranks > ranks_per_node:
        found += [UspOptions(x, "context_first", pieces) for x in degrees for pieces in _pieces(heads // x)]
    return found or [UspOptions(common)]


def _pieces(heads_per_rank: int) -> list[int]:
    """One turn, and four (or two) where heads divide so."""
    return [1] + [x for x in (4, 2) if heads_per_rank % x == 0][:1]


def plan(
    mask: Mask,
    layout: Layout,
    heads: int,
    kv_heads: int,
    options: UspOptions | None = None,
    key_layout: Layout | None = None,
) -> Program:
    """USP attention over any mask and layout."""
    options = options or UspOptions()
    share = _head_ranks(options, heads, layout.num_ranks)
    if share == 1 and options.groups_per_window is None:
        return ring.plan(mask, layout, heads, kv_heads, None, key_layout)
    builder = ProgramBuilder(layout, heads, kv_heads, key_layout)
    grid = _Grid.make(options, share, builder)
    groups = groups_of(options, heads, layout.num_ranks)
    queries, keys = layout.grouped(groups), None if key_layout is None else key_layout.grouped(groups)
    need = analyse(mask, queries, keys)
    window = options.groups_per_window
    path = ring.ring_path(need) if window is None else double_ring.double_ring_path(need, _checked(window, queries))
    ptr, ranges = rows_in(queries, mask.bands[:, :2])
    query_rows = builder.add_row_sets(ptr, ranges)
    query_slots = _add_queries(builder, grid, query_rows, split_by_owner(layout, ptr, ranges), int(path.due.max(initial=0)))
    stops = relay(need, path)
    _add_keys(builder, grid, stops, query_slots, query_rows, np.diagonal(need.area) > 0)
    return builder.build()


def groups_of(options: UspOptions, heads: int, num_ranks: int) -> np.ndarray:
    """Group of each rank, int64 [P]: the ranks that compute on the same rows."""
    share = _head_ranks(options, heads, num_ranks)
    ranks = np.arange(num_ranks)
    return ranks // share if options.placement == "head_first" else ranks % (num_ranks // share)


def _head_ranks(options: UspOptions, heads: int, num_ranks: int) -> int:
    share = options.head_ranks or gcd(heads, num_ranks)
    if num_ranks % share or heads % share:
        raise PlanError(
            f"head_ranks must divide the query heads and the ranks, got {share} for {heads} heads over {num_ranks} ranks"
        )
    return share


def _checked(window: int, groups: Layout) -> int:
    if groups.num_ranks % window:
        raise PlanError(f"groups_per_window must divide the groups, got {window} for {groups.num_ranks} groups")
    return window


@dataclass(frozen=True, eq=False)
class _Grid:
    """Who computes which heads. A *unit* is one turn of a member u of a group; units share KV heads that both use.

    rank [R, U]; unit_member, unit_turn, h0, h1 [n]: query heads; unit_keys [n]: which of the KV units it uses;
    key_member, key_turn, k0, k1 [m]: KV heads, which arrive with the first turn that uses them.
    """

    rank: np.ndarray
    unit_member: np.ndarray
    unit_turn: np.ndarray
    h0: np.ndarray
    h1: np.ndarray
    unit_keys: np.ndarray
    key_member: np.ndarray
    key_turn: np.ndarray
    k0: np.ndarray
    k1: np.ndarray

    @classmethod
    def make(cls, options: UspOptions, share: int, builder: ProgramBuilder) -> _Grid:
        heads, ranks = builder.heads, np.arange(builder.layout.num_ranks)
        pieces = min(options.pieces, heads // share)
        rank = ranks.reshape(-1, share) if options.placement == "head_first" else ranks.reshape(share, -1).T
        member, turn = (x.ravel() for x in np.meshgrid(np.arange(share), np.arange(pieces), indexing="ij"))
        width, group = heads // share, heads // builder.kv_heads
        h0, h1 = member * width + turn * width // pieces, member * width + (turn + 1) * width // pieces
        wanted = np.stack([member, h0 // group, (h1 - 1) // group + 1], 1)
        keys, first, unit_keys = np.unique(wanted, axis=0, return_index=True, return_inverse=True)
        return cls(rank, member, turn, h0, h1, unit_keys.reshape(-1), keys[:, 0], turn[first], keys[:, 1], keys[:, 2])


def _add_queries(builder: ProgramBuilder, grid: _Grid, rows: np.ndarray, parts: RowParts, last: int) -> np.ndarray:
    """Slots of each group's queries by unit [R, n], filled from their homes; results go back. last: last stage of the ring."""
    group, unit = _product(len(grid.rank), len(grid.h0))
    rank, zero = grid.rank[group, grid.unit_member[unit]], 0 * unit
    slots = builder.add_slots(np.stack([rank, zero + Q, grid.h0[unit], grid.h1[unit], rows[group]], 1))
    slots = slots.reshape(len(grid.rank), -1)
    sets = builder.add_row_sets(parts.ptr, parts.ranges)
    part, unit = _product(len(parts.owner), len(grid.h0))
    home, slot, turn, zero = 2 * parts.owner[part], slots[parts.row_set[part], unit], grid.unit_turn[unit], 0 * unit
    builder.add_moves(np.stack([zero + Q_IN, home, slot, sets[part], turn, turn + 1], 1))
    builder.add_moves(np.stack([zero + Q_OUT, slot, home, sets[part], turn + last + 2, turn + last + 3], 1))
    return slots


def _add_keys(
    builder: ProgramBuilder, grid: _Grid, stops: Stops, queries: np.ndarray, query_rows: np.ndarray, own: np.ndarray
) -> None:
    """KV slots of every stop by KV unit: filled from their homes at the roots, from the stop before elsewhere; and Attends.

    own: whether each group sees any of its own keys.
    """
    path: Path = stops.path
    rows = stops.add_row_sets(builder)
    stop, unit = _product(len(path.owner), len(grid.k0))
    rank, zero = grid.rank[path.holder[stop], grid.key_member[unit]], 0 * unit
    slots = builder.add_slots(np.stack([rank, zero + KV, grid.k0[unit], grid.k1[unit], rows[stop]], 1))
    slots = slots.reshape(len(path.owner), -1)
    moves = ~path.is_root[stop]
    stop, unit, zero = stop[moves], unit[moves], zero[moves]
    turn = 1 + grid.key_turn[unit]
    source = slots[path.source[stop], unit]
    issue, due = path.issue[stop] + turn, path.due[stop] + turn
    builder.add_moves(np.stack([zero + KV_IN, source, slots[stop, unit], rows[stop], issue, due], 1))

    roots = np.flatnonzero(path.is_root)
    sets = stops.row_set[roots]
    counts = np.diff(stops.ptr)[sets]
    flat = np.repeat(stops.ptr[sets] - np.append(0, np.cumsum(counts))[:-1], counts) + np.arange(counts.sum())
    parts = split_by_owner(builder.keys or builder.layout, np.append(0, np.cumsum(counts)), stops.ranges[flat])
    part_sets = builder.add_row_sets(parts.ptr, parts.ranges)
    part, unit = _product(len(parts.owner), len(grid.k0))
    turn, zero = grid.key_turn[unit], 0 * unit
    slot = slots[roots[parts.row_set[part]], unit]
    builder.add_moves(np.stack([zero + KV_IN, 2 * parts.owner[part] + 1, slot, part_sets[part], turn, turn + 1], 1))

    used = np.flatnonzero(~path.is_root | own[path.owner])
    stop, unit = _product(len(used), len(grid.h0))
    stop = used[stop]
    holder, stage = path.holder[stop], 1 + grid.unit_turn[unit] + path.due[stop]
    q, kv = queries[holder, unit], slots[stop, grid.unit_keys[unit]]
    builder.add_attends(np.stack([stage, q, kv, query_rows[holder], rows[stop], grid.h0[unit], grid.h1[unit]], 1))


def _product(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """All (row, column), row by row."""
    return np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows)
