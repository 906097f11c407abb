"""Work lists of the Hopper kernels under a block plan: ranges of columns from the plan's lists, made on the device.

    host      tiles, whatever the plan lists     ─▶ lines: rows of one plan block, row heads of one plan head;
                                                    uses: the list of a line, and the part of a tile where it counts
    device    uses ⨯ entries of their lists      ─▶ ranges: cut to the tile, sorted by line, FULL before boundary, neighbours
                                                    in one; a line without ranges loses its heads, so that it is skipped

What comes out is read by the kernels like that of ``triton_worklist``, whose tables have room for as many ranges as the plan's
lists have for entries: nothing waits for the device. It is kept with the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.block_plan import BlockLists, BlockOperand
from distattn.kernels.protocol import T_SHIFT
from distattn.kernels.softmax.triton_backend import heads_alike
from distattn.kernels.softmax.triton_worklist import WorkList, build_for_plan, expand, order_of_blocks, table_bytes

PROGRAM_ROWS = 128
"""Query rows of a program: of one head, or half of them of each of two."""
MAX_RANGES = 1 << 23
"""A range takes 32 bytes, and five times as many while they are made."""
LINE_BITS = 31
FULL, BOUNDARY, EMPTY = range(3)


@dataclass(frozen=True)
class _Lines:
    """What a table of tiles asks of any plan: on the device, int64.

    lines [L, 5]: row0, row1, h0, h1, cost of a line, in the order of programs. uses [M, 12]: line, list, start, stop, lo, hi,
    h0, h1, shift, column offset, row0, row1 of a use, line by line. most_uses: of one list.
    """

    lines: Tensor
    uses: Tensor
    most_uses: int
    num_heads: int
    num_long: int
    costs: np.ndarray


def takes_plan(operand: BlockOperand, tiles: np.ndarray, group: int) -> bool:
    """Whether these kernels compute under the plan; it is the portable ones' otherwise.

    They take blocks of 128, or of 64 where query heads go in pairs, one plan for the batch, KV heads that follow one plan head
    each, and tiles of one slot.
    """
    key = ("taken", *_tables(tiles, operand), operand.heads, group)
    if key not in operand.plan.work_lists:
        operand.plan.work_lists[key] = _takes_plan(operand, tiles, group)
    return operand.plan.work_lists[key]


def _takes_plan(operand: BlockOperand, tiles: np.ndarray, group: int) -> bool:
    plan, offsets = operand.plan, operand.offsets_of(tiles)
    if plan.block_q != plan.block_k or plan.batch != 1 or not len(tiles):
        return False
    if heads_alike(tiles, operand, group) % pack_of(operand):
        return False
    heads, shifts = np.unique(offsets[:, 2]), np.unique(tiles[:, T_SHIFT])
    if len(heads) > 1 or len(shifts) > 1 or (heads[0] - shifts[0]) % group or operand.heads // plan.heads % group:
        return False
    num_entries = len(plan.full.blocks) + len(plan.partial.blocks)
    found = (_lines_of(tiles, operand, x, plan.device) for x in (0, group))
    return all(x is None or x.most_uses * num_entries <= MAX_RANGES for x in found)


def pack_of(operand: BlockOperand) -> int:
    """Query heads a program: two under blocks of 64, one for each consumer."""
    return PROGRAM_ROWS // operand.plan.block_q


def plan_work(
    tiles: np.ndarray, operand: BlockOperand, block_columns: int, group: int, device: torch.device
) -> WorkList | None:
    """``query_work`` (group 0) or ``key_work`` under a plan that ``takes_plan``; None if the tiles are empty."""
    plan = operand.plan.to(device)
    key = ("work", *_tables(tiles, operand), operand.heads, block_columns, group)
    if key not in plan.work_lists:
        static = _lines_of(tiles, operand, group, device)
        lists = plan.transposed if group else (plan.full, plan.partial)
        size = plan.block_q if group else plan.block_k
        plan.work_lists[key] = None if static is None else _work(static, lists, size, block_columns, max(1, group))
    return plan.work_lists[key]


def _tables(tiles: np.ndarray, operand: BlockOperand) -> tuple[bytes, bytes]:
    return table_bytes(tiles), table_bytes(operand.offsets_of(tiles))


def _lines_of(tiles: np.ndarray, operand: BlockOperand, group: int, device: torch.device) -> _Lines | None:
    plan = operand.plan
    size, num_rows = (plan.block_k, plan.num_keys) if group else (plan.block_q, plan.num_queries)
    return _lines(*_tables(tiles, operand), plan.heads, operand.heads, size, -(-num_rows // size), group, str(device))


@lru_cache(maxsize=64)
def _lines(
    table: bytes, offset_table: bytes, plan_heads: int, model_heads: int, size: int, num_lists: int, group: int, device: str
) -> _Lines | None:
    """Layers and steps replay the same tables, whatever their plans."""
    tiles, offsets = np.frombuffer(table, np.int64).reshape(-1, 9), np.frombuffer(offset_table, np.int64).reshape(-1, 3)
    blocks, ranges = build_for_plan(tiles, offsets, size, group)
    if not len(blocks):
        return None
    # Rows are query heads, or KV heads: of the arena, and so many more in the model.
    own_heads, shift = model_heads // plan_heads, int(offsets[0, 2])
    if group:
        own_heads, shift = own_heads // group, (shift - int(tiles[0, T_SHIFT])) // group
    row0, row1, begin, row, end, h0, h1, cost = blocks.T
    first = (h0 + shift) // own_heads
    block, step = expand((h1 - 1 + shift) // own_heads - first + 1)
    plan_head = first[block] + step
    own0 = np.maximum(h0[block], plan_head * own_heads - shift)
    own1 = np.minimum(h1[block], (plan_head + 1) * own_heads - shift)
    own_cost = cost[block] * (own1 - own0) // (h1 - h0)[block]
    order, num_long = order_of_blocks(own0, own1, own_cost)
    block, plan_head, own0, own1, own_cost = (x[order] for x in (block, plan_head, own0, own1, own_cost))
    lines = np.stack((row0[block], row1[block], own0, own1, own_cost), 1)
    line, step = expand((end - begin)[block])
    the_list = (plan_head * num_lists + row[block] // size)[line]
    of_use = ranges[begin[block][line] + step]
    uses = np.concatenate((np.stack((line, the_list), 1), of_use[:, :8], lines[line, :2]), 1)
    costs = own_cost / (own1 - own0)
    most_uses, num_heads = int(np.bincount(the_list).max()), int((own1 - own0).max())
    lines_there, uses_there = (torch.from_numpy(x).to(device) for x in (lines, uses))
    return _Lines(lines_there, uses_there, most_uses, num_heads, num_long, costs)


def _work(static: _Lines, lists: tuple[BlockLists, BlockLists], size: int, block_columns: int, group: int) -> WorkList:
    """size: columns of the plan's blocks. group: query heads of a row head, at most."""
    line, the_list, start, stop, lo, hi, h0, h1, shift, column, row0, row1 = static.uses.T
    use, block, inside = _entries(lists, the_list, static.most_uses)
    first = block.long() * size - column[use]
    start = torch.maximum(start[use], first)
    stop = torch.minimum(stop[use], first + size)
    seen_by_all = (start - row1[use] + 1 >= lo[use]) & (stop - 1 - row0[use] <= hi[use])
    kind = torch.where(seen_by_all & ((stop - start) % block_columns == 0), FULL, BOUNDARY)
    kind = kind.masked_fill(~inside | (start >= stop), EMPTY)
    # Where a line has no more ranges, the next one begins; what lies behind all lists comes last.
    num_lines = len(static.lines)
    place = torch.where(inside, line[use], num_lines) * 3 + kind
    order = ((place << LINE_BITS) | start.clamp(min=0)).sort(stable=True).indices
    use, place, start, stop = _in_one(*(x[order] for x in (use, place, start, stop)), 3 * num_lines)
    bounds = torch.searchsorted(place, torch.arange(3 * num_lines + 1, device=place.device))
    steps = -(-(stop - start) // block_columns) * (h1 - h0)[use].clamp(max=group)
    steps = steps.masked_fill((place % 3 == EMPTY) | (place >= 3 * num_lines), 0)
    to_end = torch.nn.functional.pad(steps.flip(0).cumsum(0).flip(0), (0, 1))
    steps = to_end[:-1] - to_end[bounds[(place + 1).clamp(max=3 * num_lines)]]
    ranges = torch.stack((start, stop, *(x[use] for x in (lo, hi, h0, h1, shift)), steps), 1)
    full, boundary, end = bounds[:-1].view(num_lines, 3).T
    row0, row1, own0, own1, _ = static.lines.T
    own1 = torch.where(full < end, own1, own0)
    blocks = torch.stack((row0, row1, full, boundary, end, own0, own1, torch.zeros_like(end)), 1)
    # A line more, as every reader of ranges may look at the one behind its last.
    ranges = torch.nn.functional.pad(ranges, (0, 0, 0, 1)).int()
    # Rows that the plan leaves without a key are not counted on the host: none are promised.
    return WorkList(blocks.int(), ranges, num_lines, static.num_heads, 0, static.num_long, static.costs)


def _entries(lists: tuple[BlockLists, BlockLists], the_list: Tensor, most_uses: int) -> tuple[Tensor, Tensor, Tensor]:
    """(use, listed block, whether there is one) for every entry of the list of every use, full and partial, int64 [T]."""
    found = []
    for x in lists:
        if not len(x.blocks):
            continue
        counts, starts = (y.flatten()[the_list].long() for y in (x.counts, x.starts))
        ends = counts.cumsum(0)
        at = torch.arange(most_uses * len(x.blocks), device=ends.device)
        use = torch.searchsorted(ends, at, right=True)
        inside, use = use < len(ends), use.clamp(max=len(ends) - 1)
        entry = (starts[use] + at - (ends - counts)[use]).clamp(0, len(x.blocks) - 1)
        found.append((use, x.blocks[entry], inside))
    if not found:
        nothing = torch.zeros(1, dtype=torch.int64, device=the_list.device)
        return nothing, nothing, nothing.bool()
    use, block, inside = zip(*found)
    return torch.cat(use), torch.cat(block), torch.cat(inside)


def _in_one(use: Tensor, place: Tensor, start: Tensor, stop: Tensor, nowhere: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neighbouring FULL ranges of a use as one, so that fewer are read; what is left over at the end is ``nowhere``."""
    joins = torch.zeros_like(use, dtype=torch.bool)
    joins[1:] = (use[1:] == use[:-1]) & (place[1:] == place[:-1]) & (place[1:] % 3 == FULL) & (start[1:] == stop[:-1])
    run = (~joins).cumsum(0) - 1
    index = torch.arange(len(run), device=run.device)
    first = torch.searchsorted(run, index).clamp(max=len(run) - 1)
    last = torch.searchsorted(run, index, right=True) - 1
    past = index > run[-1]
    return use[first], torch.where(past, nowhere, place[first]), start[first], stop[last]
