"""gloo on CPU, 1 to 4 ranks: a short convolution over sharded documents against the unsharded one in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import InputError
from distattn.parallel.layout import Layout
from distattn.short_convolution import short_convolution
from distattn.testing import run_ranks


def plain(x: Tensor, weight: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each document by itself, by torch's convolution."""
    channels, width = weight.shape
    parts = []
    for document in x.split(list(lengths), 1):
        padded = torch.nn.functional.pad(document.transpose(1, 2), (width - 1, 0))
        parts.append(torch.nn.functional.conv1d(padded, weight[:, None], groups=channels).transpose(1, 2))
    return torch.cat(parts, 1)


def layouts(rows: int, world: int) -> list[Layout | None]:
    cuts = [min(r, rows) for r in range(world)] + [rows]  # shards of one row: shorter than the halo
    short = Layout.given([[(cuts[r], cuts[r + 1])] for r in range(world)])
    empty = Layout.given([[]] * (world - 1) + [[(0, rows)]])
    return [None, Layout.zigzag(rows, world), Layout.striped(rows, world, block=2), short, empty]


def run_grid(rank: int, world: int) -> list[float]:
    errors = []
    for lengths in ([23], [5, 1, 2, 15]):
        rows = sum(lengths)
        generator = torch.Generator().manual_seed(0)
        whole, weight, dy = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, rows, 3), (3, 4), (2, rows, 3))
        )
        want_x, want_w = whole.clone().requires_grad_(), weight.clone().requires_grad_()
        want = plain(want_x, want_w, lengths)
        want.backward(dy)
        for layout in layouts(rows, world):
            mine = torch.from_numpy((layout or Layout.contiguous(rows, world)).rows(rank))
            x, w = whole[:, mine].clone().requires_grad_(), weight.clone().requires_grad_()
            starts = np.concatenate([[0], np.cumsum(lengths)])
            y = short_convolution(x, w, group=dist.group.WORLD, layout=layout, cu_seqlens=starts)
            y.backward(dy[:, mine])
            assert x.grad is not None
            assert w.grad is not None
            assert want_x.grad is not None
            dist.all_reduce(w.grad)
            for found, wanted in ((y, want[:, mine]), (x.grad, want_x.grad[:, mine]), (w.grad, want_w.grad)):
                assert wanted is not None
                errors.append(float((found - wanted).abs().max()) if found.numel() else 0.0)
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_matches_the_unsharded_convolution(world: int) -> None:
    for errors in run_ranks(run_grid, world, timeout_s=250):
        assert len(errors) == 2 * 5 * 3
        assert max(errors) < 1e-12


def test_refusals() -> None:
    x = torch.zeros(1, 4, 3)
    with pytest.raises(InputError, match=r"x must be \[B, T, C\] and weight \[C, W\], got \[1, 4, 3\] and \[2, 4\]"):
        short_convolution(x, torch.zeros(2, 4))
    with pytest.raises(InputError, match="cu_seqlens ends at 5, but the layout has 4 rows"):
        short_convolution(x, torch.zeros(3, 4), layout=Layout.contiguous(4, 1), cu_seqlens=[0, 5])
