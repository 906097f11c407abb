"""CPU: sums that nothing was added to yet. A backend made of launches that mimics vendor kernels, on whole schedules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from distattn.kernels import BACKENDS, Case
from distattn.kernels.softmax.launched import Inputs, Launch, LaunchedBackend
from distattn.kernels.tiles import Piece, head_spans, windows
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.in_process import run_in_process
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers import SCHEDULERS
from tests.parallel.cases import inputs, oracle


class Launched(LaunchedBackend):
    """Dense attention of each launch, exact, and it counts how often sums were handed to it to be added to."""

    name = "launched"

    def __init__(self) -> None:
        self.added = 0

    def why_not(self, case: Case) -> str | None:
        return None

    def launches(self, tiles: np.ndarray, group: int) -> Sequence[Launch]:
        return [
            Launch(p.q0, p.q1, p.k0, p.k1, s.h0, s.h1, s.kv0, s.kv1, p)
            for p in windows(tiles)
            for s in head_spans(p.h0, p.h1, p.shift, group)
        ]

    def attend(self, *args: object, **settings: object) -> None:
        self.added += 1
        super().attend(*args, **settings)  # type: ignore[arg-type]

    def attend_backward(self, *args: object, **settings: object) -> None:
        self.added += 1
        super().attend_backward(*args, **settings)  # type: ignore[arg-type]

    def forward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        s = self._scores(launch, x, scale)
        return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), self._wide(launch, x.v)), torch.logsumexp(s, -1)

    def backward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
        assert x.out is not None
        assert x.lse is not None
        assert x.do is not None
        p = torch.exp(self._scores(launch, x, scale) - x.lse[..., None])
        delta = (x.do * x.out).sum(-1).transpose(1, 2)[..., None]
        ds = p * (torch.einsum("bqhd,bkhd->bhqk", x.do, self._wide(launch, x.v)) - delta)
        dq = scale * torch.einsum("bhqk,bkhd->bqhd", ds, self._wide(launch, x.k))
        dk = scale * torch.einsum("bhqk,bqhd->bkhd", ds, x.q)
        dv = torch.einsum("bhqk,bqhd->bkhd", p, x.do)
        return dq, *(y.unflatten(2, (x.k.shape[2], -1)).sum(3) for y in (dk, dv))

    def _wide(self, launch: Launch, y: Tensor) -> Tensor:
        return y.repeat_interleave((launch.h1 - launch.h0) // (launch.kv1 - launch.kv0), 2)

    def _scores(self, launch: Launch, x: Inputs, scale: float) -> Tensor:
        piece = launch.detail
        assert isinstance(piece, Piece)
        distance = torch.arange(piece.k0, piece.k1)[None, :] - torch.arange(piece.q0, piece.q1)[:, None]
        allowed = (distance >= piece.lo) & (distance <= piece.hi)
        s = scale * torch.einsum("bqhd,bkhd->bhqk", x.q, self._wide(launch, x.k))
        return s.masked_fill(~allowed, float("-inf"))


MASKS = {
    "causal": Mask.causal(48),
    "full": Mask.full(48, 48),
    "documents": Mask.documents([17, 1, 30]),
    "nothing seen": Mask.from_bands([(0, 20, 5, 30, -30, 30)], 48, 48),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strategy", SCHEDULERS)
@pytest.mark.parametrize("takes_parts", [False, True])
def test_schedules_over_launches_are_exact(mask: str, strategy: str, takes_parts: bool) -> None:
    tensors = inputs(48, 12, 6, 4, 4)
    for ranks in (1, 2, 3):
        for layout in (Layout.zigzag(48, ranks), Layout.contiguous(48, ranks)):
            program = SCHEDULERS[strategy].plan(MASKS[mask], layout, 12, 6)
            found = run_in_process(program, MASKS[mask], *tensors, backend=Launched(), poison=True, takes_parts=takes_parts)
            got = (found.out, found.lse, found.dq, found.dk, found.dv)
            for name, x, want in zip(("out", "lse", "dq", "dk", "dv"), got, oracle(*tensors, MASKS[mask]), strict=True):
                torch.testing.assert_close(x, want, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_written_whole_is_not_added_to() -> None:
    backend, mask = Launched(), Mask.full(32, 32)
    program = SCHEDULERS["ring"].plan(mask, Layout.contiguous(32, 2), 2, 2)
    backward = derive_backward(program, keep=True)
    run_in_process(program, mask, *inputs(32, 2, 2), backend=backend, backward_program=backward, poison=True)
    # Of two calls a rank the forward's second adds to the carry; in the backward dk and dv are new to each call.
    assert backend.added == 2


def test_backends_that_add_find_cleared_sums() -> None:
    mask, tensors = Mask.causal(32), inputs(32, 2, 2)
    program = SCHEDULERS["all_gather"].plan(mask, Layout.zigzag(32, 2), 2, 2)
    found = run_in_process(program, mask, *tensors, backend=BACKENDS["reference"], poison=True)
    assert found.dk is not None
    torch.testing.assert_close(found.dk, oracle(*tensors, mask)[3], atol=1e-10, rtol=0)
