"""A pass that is one kernel call on its rank: attention() then passes a backend's own result on, without a carry. Plan only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distattn
from distattn import planning
from distattn.kernels import BACKENDS
from distattn.kernels.merge import empty_carry, finish
from distattn.kernels.softmax import ReferenceBackend
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers import ring

CALLS: list[str] = []


class WholeReference(ReferenceBackend):
    """The reference with the calls of a backend that can finish in one."""

    name = "whole_reference"

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, **settings: Any) -> tuple[Tensor, Tensor]:
        CALLS.append("forward")
        batch, rows, heads, _ = q.shape
        carry = empty_carry(batch, rows, heads, v.shape[-1], dtype=q.dtype, device=q.device)
        self.attend(q, k, v, tiles, carry, **settings)
        out, lse = finish(carry, q.dtype)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse.transpose(1, 2).contiguous().transpose(1, 2)

    def attend_backward_whole(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, tiles: np.ndarray,
        **settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        CALLS.append("backward")
        delta = (do * out).sum(-1) - (0 if dlse is None else dlse)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        self.attend_backward(q, k, v, None, lse, do, delta, tiles, dq, dk, dv, **settings)
        return dq, dk, dv


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setitem(BACKENDS, "whole_reference", WholeReference())


MASKS = {
    "documents": distattn.Mask.documents([30, 1, 26]),
    "shared": distattn.Mask.share_question(20, [17, 20]),
    "empty_rows": distattn.Mask.causal(57) & distattn.Mask.from_bands([[5, 50, 0, 57, -(1 << 40), 1 << 40]], 57, 57),
}


def results(mask: distattn.Mask, kernel: str, return_lse: bool, softcap: float | None) -> list[Tensor]:
    plan = distattn.plan(mask, heads=4, kv_heads=2, head_dim=8, kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 57, heads, 8) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    sink = torch.zeros(4, dtype=torch.float64, requires_grad=True) if return_lse else None
    found = distattn.attention(q, k, v, plan, softcap=softcap, sink=sink, return_lse=return_lse)  # type: ignore[call-overload]
    out, *lse = found if isinstance(found, tuple) else (found,)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + sum(torch.sin(x).sum() for x in lse)
    inputs = [q, k, v] + ([sink] if sink is not None else [])
    return [out, *lse, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("name", MASKS)
def test_the_result_is_that_of_a_carry(name: str, softcap: float | None, return_lse: bool) -> None:
    got = results(MASKS[name], "whole_reference", return_lse, softcap)
    assert CALLS == ["forward", "backward"]
    for x, y in zip(got, results(MASKS[name], "reference", return_lse, softcap)):
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lengths", "whole"), [([28, 29], True), ([30, 27], False)])
def test_a_rank_whose_documents_are_all_at_home_needs_no_carry(lengths: list[int], whole: bool) -> None:
    mask, layout = distattn.Mask.documents(lengths), Layout.contiguous(57, 2)
    alone = distattn.plan(mask, heads=4, kv_heads=2, head_dim=8, kernel="whole_reference")
    program = ring.plan(mask, layout, 4, 2)
    for rank in range(2):
        made = replace(alone, layout=layout, program=program, rank=rank, handle=10**6 + rank)
        assert (made.only_tiles is not None) == whole, "a document over both ranks has keys to send"
        if not whole:
            continue
        planning._plans[made.handle] = made
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, 57, heads, 8) for heads in (4, 2, 2)]
        inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        found = []
        for used, rows in ((made, made.positions), (alone, torch.arange(57))):
            q, k, v = (x[:, rows].requires_grad_() for x in inputs)
            out = distattn.attention(q, k, v, used)
            assert isinstance(out, Tensor)
            grads = torch.autograd.grad(out, (q, k, v), inputs[0][:, rows])
            here = slice(None) if used is made else made.positions
            found.append([x[:, here] for x in (out, *grads)])
        for x, y in zip(*found):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert (["forward", "backward"] * 4 if whole else []) == CALLS


def test_a_mask_that_allows_nothing_takes_no_call() -> None:
    found = results(distattn.Mask.from_bands([], 57, 57), "whole_reference", False, None)
    assert CALLS == []
    assert all(not x.any() for x in found)
