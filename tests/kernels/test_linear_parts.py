"""Pieces of the delta rules cut into parts (plan only): where they are cut, which sets they are in, and folds of their maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distattn.kernels.linear import Pieces
from distattn.kernels.linear.triton_parts import MIN_PART_CHUNKS, Parts, count_parts, parts_of

NONE = np.zeros(0, np.int64)


def pieces_of(lengths: list[int], enter: list[int], late: list[int], emit: list[int], final: list[int]) -> Pieces:
    return Pieces(np.array(lengths), *(np.array(members, np.int64) for members in (enter, late, emit, final)))  # pyright: ignore


def test_parts_are_whole_chunks_of_pieces_that_cross() -> None:
    whole = pieces_of([10, 7, 3, 9], [1, 3], [0], [0, 3], [1])
    parts = Parts.of(whole, 3, 4)
    # 10 rows are chunks of 4, 4, 2; 9 rows of 4, 4, 1. Pieces 1 and 2 cross nothing.
    assert parts.pieces.lengths.tolist() == [4, 4, 2, 7, 3, 4, 4, 1]
    assert parts.piece.tolist() == [0, 0, 0, 1, 2, 3, 3, 3]
    assert parts.first.tolist() == [0, 3, 4, 5, 8]
    assert parts.several.tolist() == [0, 3]
    assert parts.pieces.enter.tolist() == [5]
    assert parts.pieces.late.tolist() == [0, 1, 2, 6, 7]
    assert parts.pieces.emit.tolist() == [0, 1, 2, 5, 6, 7]
    assert parts.pieces.final.tolist() == []
    assert parts.of_pieces(np.array([1, 3])).tolist() == [3, 5, 6, 7]
    assert [parts.row("late", part) for part in range(8)] == [0, 1, 2, -1, -1, -1, 3, 4]
    assert parts.mask("x", np.array([1, 2]), 4, torch.device("cpu")).tolist() == [-1, 0, 0, -1]
    assert parts_of(whole, 3, 4) is parts_of(whole, 3, 4)


def test_what_nobody_waits_for_is_not_handed_on() -> None:
    parts = Parts.of(pieces_of([16, 3], [], [0], [], [0, 1]), 2, 4)
    assert parts.pieces.late.tolist() == [0, 1]
    assert parts.pieces.emit.tolist() == [0]
    assert parts.pieces.final.tolist() == [1]


@pytest.mark.parametrize(
    ("programs", "wanted", "longest", "count"), [(64, 264, 1024, 4), (264, 264, 1024, 1), (1, 264, 1024, 8), (300, 264, 9, 1)]
)
def test_how_many(programs: int, wanted: int, longest: int, count: int) -> None:
    assert count_parts(programs, wanted, longest) == count
    assert count_parts(programs, wanted, 2 * MIN_PART_CHUNKS) <= 2


def test_folds_are_the_walk_of_the_whole() -> None:
    """x ← M x + B through four parts, forward and transposed, of a piece that is late and emits and of one that starts anew."""
    parts = Parts.of(pieces_of([16, 16], [], [0], [0, 1], []), 4, 4)
    shape = (2, 1, 3)  # batch, heads, rows
    generator = torch.Generator().manual_seed(0)

    def random(number: int, columns: int) -> torch.Tensor:
        return torch.randn((shape[0], number, shape[1], shape[2], columns), generator=generator, dtype=torch.float64)

    offsets, maps = random(len(parts.pieces.emit), 2), random(len(parts.pieces.maps), 3)
    entering = random(1, 2)[:, 0]
    x, starts = entering, []
    for part in range(4):
        starts.append(x)
        x = maps[:, part] @ x + offsets[:, part]
    found, left = parts.fold(0, entering, offsets, maps)
    assert left is not None
    torch.testing.assert_close(left, x)
    assert all(torch.equal(found[part], starts[part]) for part in range(4))
    _, from_zero = parts.fold(0, None, offsets, maps)
    assert from_zero is not None
    torch.testing.assert_close(parts.map_of(0, maps) @ entering + from_zero, x)
    _, fresh = parts.fold(1, None, offsets, maps)
    x = offsets[:, 4]
    for part in range(5, 8):
        x = maps[:, part - 1] @ x + offsets[:, part]
    assert fresh is not None
    torch.testing.assert_close(fresh, x)

    back, leaving = random(len(parts.pieces.late), 2), random(1, 2)[:, 0]
    y, ends = leaving, {}
    for part in reversed(range(4)):
        ends[part] = y
        y = maps[:, part].transpose(-1, -2) @ y + back[:, part]
    found, entered = parts.fold_back(0, leaving, back, maps)
    assert entered is not None
    torch.testing.assert_close(entered, y)
    assert all(torch.equal(found[part], ends[part]) for part in range(4))
    ends, entered = parts.fold_back(1, leaving, back, maps)
    assert entered is None, "nothing enters a piece that starts anew"
    assert sorted(ends) == [4, 5, 6, 7]
