"""Work lists of the Hopper kernels under block plans, made on the CPU: every pair once, as the plan and the tiles say."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from distattn.kernels.block_plan import BlockOperand, BlockPlan
from distattn.kernels.softmax import hopper_plan
from distattn.kernels.softmax.hopper_plan import plan_work, takes_plan
from distattn.kernels.softmax.triton_worklist import WorkList, build, order_of_blocks
from tests.kernels.oracle import ODD, Sizes, table, visible
from tests.kernels.oracle import UNBOUNDED as U

CPU = torch.device("cpu")
DOCUMENTS = ((0, 300), (300, 900), (900, 903))


class Plan(NamedTuple):
    """Plan heads, the query heads that they spread over, offsets of all tiles, the share of blocks that is listed."""

    heads: int
    model_heads: int
    offsets: tuple[int, int, int]
    density: float
    block: int = 128
    batch: int = 1


# name → (tiles, sizes, the plan)
CASES: dict[str, tuple[np.ndarray, Sizes, Plan]] = {
    "causal": (table((0, 1000, 0, 1000, -U, 0, 0, 4, 0)), Sizes(1000, 1000, 4, 2, 2), Plan(2, 4, (0, 0, 0), 0.4)),
    "all": (table((0, 1000, 0, 1000, -U, U, 0, 4, 0)), Sizes(1000, 1000, 4, 2, 2), Plan(1, 4, (0, 0, 0), 1.0)),
    "none": (table((0, 1000, 0, 1000, -U, U, 0, 4, 0)), Sizes(1000, 1000, 4, 2, 2), Plan(1, 4, (0, 0, 0), 0.0)),
    "window": (table((0, 1000, 0, 1000, -300, 40, 0, 4, 0)), Sizes(1000, 1000, 4, 2, 2), Plan(2, 4, (0, 0, 0), 0.6)),
    "shared_rows": (
        table((0, 640, 0, 300, -U, U, 0, 4, 0), (100, 700, 300, 900, 11, 450, 0, 4, 0)),
        Sizes(830, 901, 4, 2, 2), Plan(2, 4, (200, 77, 0), 0.5),
    ),
    "slot": (
        table((0, 640, 0, 300, -U, U, 0, 3, 1), (100, 700, 300, 900, 11, 450, 0, 3, 1)),
        Sizes(830, 901, 3, 2, 2), Plan(3, 6, (200, 77, 1), 0.5),
    ),
    "documents": (
        table(*((a, b, a, b, -U, 0, 0, 4, 0) for a, b in DOCUMENTS)), Sizes(1000, 1000, 4, 4, 1), Plan(4, 4, (0, 0, 0), 0.6),
    ),
}  # fmt: skip


PAIRS = ("causal", "all", "none", "window", "shared_rows")
"""Tables in which query heads of one KV head go in pairs, as blocks of 64 need them."""


def operand_of(tiles: np.ndarray, sizes: Sizes, given: Plan) -> tuple[BlockOperand, np.ndarray]:
    """(a random plan as an operand, what it and the tiles show: [query heads, queries, keys])."""
    plan_heads, heads, offsets, density, block, batch = given
    generator = torch.Generator().manual_seed(0)
    num_queries, num_keys = sizes.queries + offsets[0], sizes.keys + offsets[1]
    listed = torch.rand(batch, plan_heads, -(-num_queries // block), -(-num_keys // block), generator=generator) < density
    full = torch.rand(listed.shape, generator=generator) < 0.6
    plan = BlockPlan.from_blocks(listed, full, num_queries=num_queries, num_keys=num_keys, block_q=block, block_k=block)
    head = (np.arange(sizes.heads) + offsets[2]) * plan_heads // heads
    row, column = (np.arange(sizes.queries) + offsets[0]) // block, (np.arange(sizes.keys) + offsets[1]) // block
    shown = visible(tiles, sizes.queries, sizes.keys, sizes.heads) * listed[0].numpy()[head][:, row][:, :, column]
    return BlockOperand(plan, heads, np.tile(np.array(offsets), (len(tiles), 1))), shown


def covered(work: WorkList, sizes: Sizes, block_columns: int, *, by_key: bool) -> np.ndarray:
    """[query heads, rows, columns]: how often the list computes each pair; what the kernels rely on is asserted on the way."""
    rows, columns = (sizes.keys, sizes.queries) if by_key else (sizes.queries, sizes.keys)
    seen = np.zeros((sizes.heads, rows, columns), np.int64)
    ranges = work.ranges.numpy()
    for row0, row1, full, boundary, end, h0, h1, _ in work.blocks.tolist():
        for head in range(h0, h1):
            assert full < end, "a block that runs has a range to begin with"
            for whole, first, last in ((True, full, boundary), (False, boundary, end)):
                steps = 0
                for start, stop, lo, hi, q0, q1, shift, _ in ranges[first:last].tolist():
                    assert start < stop
                    group = range(head * sizes.group - shift, (head + 1) * sizes.group - shift)
                    heads = [h for h in group if q0 <= h < q1] if by_key else [head]
                    steps += -(-(stop - start) // block_columns) * len(heads)
                    diagonal = np.arange(start, stop)[None, :] - np.arange(row0, row1)[:, None]
                    inside = (diagonal >= lo) & (diagonal <= hi)
                    if whole:
                        assert inside.all(), "no test is made in FULL ranges"
                        assert (stop - start) % block_columns == 0
                    for h in heads:
                        seen[h, row0:row1, start:stop] += inside
                assert first == last or ranges[first, 7] == steps
    return seen


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_every_pair_of_the_plan_and_the_tiles_once(name: str, block: int) -> None:
    tiles, sizes, given = CASES[name]
    operand, shown = operand_of(tiles, sizes, given._replace(block=block))
    assert takes_plan(operand, tiles, sizes.group) == (block == 128 or name in PAIRS)
    by_query, by_key = plan_work(tiles, operand, block, 0, CPU), plan_work(tiles, operand, 64, sizes.group, CPU)
    assert by_query is not None
    assert by_key is not None
    np.testing.assert_array_equal(covered(by_query, sizes, block, by_key=False), shown)
    np.testing.assert_array_equal(covered(by_key, sizes, 64, by_key=True).transpose(0, 2, 1), shown)
    assert plan_work(tiles, operand, block, 0, CPU) is by_query, "kept with the plan"
    if name in PAIRS:
        assert (by_query.blocks[:, 5:7] % 2 == by_query.blocks[0, 5] % 2).all(), "no pair of heads is cut"


def test_neighbouring_blocks_become_one_range() -> None:
    tiles, sizes, given = CASES["all"]
    work = plan_work(tiles, operand_of(tiles, sizes, given)[0], 128, 0, CPU)
    assert work is not None
    for row0, _, full, boundary, end, *_ in work.blocks.tolist():
        # Full and partial blocks are listed apart, but are one here, where no call tests positions; 1000 = 7 · 128 + 104.
        found = sorted(x[:2] for x in work.ranges[full:end].tolist())
        assert found == [[0, 896], [896, 1000]], row0
        assert boundary == full + 1


def test_tiles_that_show_nothing_have_no_work() -> None:
    tiles = table((0, 200, 0, 200, -U, -300, 0, 2, 0))
    operand, _ = operand_of(tiles, Sizes(200, 200, 2, 2, 1), Plan(1, 2, (0, 0, 0), 1.0))
    assert takes_plan(operand, tiles, 1)
    assert plan_work(tiles, operand, 128, 0, CPU) is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("slot", {"block": 64}),
        ("documents", {"block": 64}),
        ("causal", {"batch": 2}),
        ("causal", {"heads": 4}),
        ("slot", {"offsets": (200, 77, 0)}),
    ],
    ids=["blocks_of_64_and_three_heads", "blocks_of_64_and_no_groups", "of_a_batch", "of_query_heads", "not_of_kv_groups"],
)
def test_other_plans_are_left_to_the_portable_kernels(name: str, change: dict[str, Any]) -> None:
    tiles, sizes, given = CASES[name]
    assert takes_plan(operand_of(tiles, sizes, given)[0], tiles, sizes.group)
    assert not takes_plan(operand_of(tiles, sizes, given._replace(**change))[0], tiles, sizes.group)


def test_tables_of_too_many_ranges_are_left_to_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, sizes, given = CASES["causal"]
    operand, _ = operand_of(tiles, sizes, given)
    assert takes_plan(operand, tiles, sizes.group)
    monkeypatch.setattr(hopper_plan, "MAX_RANGES", 10)
    assert not takes_plan(operand_of(tiles, sizes, given)[0], tiles, sizes.group)


def test_blocks_of_a_head_run_together() -> None:
    """Neighbours in time share keys in L2, also where each head has tiles of its own; long blocks go before them."""
    rows = [(h, i) for h in range(3) for i in range(4)]
    tiles = table(*((128 * i, 128 * (i + 1), 0, 128 * (1 + (i + h) % 4), -U, U, h, h + 1, 0) for h, i in rows))
    blocks, _ = build(tiles, 128, 128)
    assert (np.diff(blocks[:, 7]) <= 0).all(), "few blocks are all long: by cost alone"
    h0, cost = np.repeat(np.arange(40), 100), np.tile(np.arange(100), 40)
    cost[7], cost[1234] = 10_000, 9_000
    order, num_long = order_of_blocks(h0, h0 + 1, cost)
    assert num_long == 2
    assert order[:2].tolist() == [7, 1234]
    assert (np.diff(h0[order[2:]]) >= 0).all()
    assert all((np.diff(cost[order[2:]][h0[order[2:]] == h]) <= 0).all() for h in range(40))


def test_odd_sizes_of_the_other_kernels_hold_here_too() -> None:
    for name in ("window_260", "causal_130"):
        tiles, sizes = ODD[name]
        operand, shown = operand_of(tiles, sizes, Plan(1, sizes.heads, (0, 0, 0), 0.7))
        work = plan_work(tiles, operand, 128, 0, CPU)
        assert work is not None
        np.testing.assert_array_equal(covered(work, sizes, 128, by_key=False), shown, name)
