"""CPU: sums that nothing was added to yet. A backend made of launches that mimics vendor kernels, on whole schedules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distattn.kernels import BACKENDS, Case
from distattn.kernels.softmax.launched import Inputs, Launch, LaunchedBackend
from distattn.kernels.tiles import Piece, head_spans, windows
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.cost import Shape, count
from distattn.parallel.executor import Execution
from distattn.parallel.in_process import run_in_process
from distattn.parallel.layout import Layout
from distattn.parallel.program import ATTEND_STAGE
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.transport.base import Message
from distattn.parallel.transport.mailbox import MailboxEndpoint
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


class Rounding(Launched):
    """Computes in fp32 and gives results in the input dtype, as vendor kernels do."""

    def forward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(launch, self._in_fp32(x), scale, softcap)
        return out.to(x.q.dtype), lse

    def backward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
        return tuple(g.to(x.q.dtype) for g in super().backward(launch, self._in_fp32(x), scale, softcap))

    def _in_fp32(self, x: Inputs) -> Inputs:
        return Inputs(*(None if y is None else y.float() for y in x))  # type: ignore[arg-type]


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
    # The forward's second result is merged into the first; in the backward dk and dv are new to each call.
    assert backend.added == 0


def test_work_at_home_that_fills_the_wait_for_keys_makes_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two parts have heads of their own, and are put together as kernels left them."""
    tensors, mask = inputs(48, 6, 6, 4, 4), Mask.causal(48)
    program = SCHEDULERS["ring"].plan(mask, Layout.zigzag(48, 2), 6, 6)
    assert (derive_backward(program).attends[:, ATTEND_STAGE] == 0).sum() == 2, "a part of each rank's own work comes first"
    monkeypatch.setattr(Execution, "_clear", lambda self, arena: pytest.fail(f"arena {arena} of sums was begun"))
    backend = Launched()
    found = run_in_process(program, mask, *tensors, backend=backend, poison=True, takes_parts=True)
    assert backend.added == 0
    for x, want in zip((found.dq, found.dk, found.dv), oracle(*tensors, mask)[2:], strict=True):
        torch.testing.assert_close(x, want, atol=1e-10, rtol=0)


class _Counted(TorchDispatchMode):
    """Counts operators that are kernels on a device: all but views and empty memory."""

    def __init__(self) -> None:
        super().__init__()
        self.started: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.started[name] += 1
        return func(*args, **(kwargs or {}))


class _Trivial(Launched):
    """Computes nothing: what is counted is what the executor starts besides kernels."""

    def forward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        return x.q.new_empty((*x.q.shape[:-1], x.v.shape[-1])), x.q.new_empty((x.q.shape[0], x.q.shape[2], x.q.shape[1]))

    def backward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
        return x.q.new_empty(x.q.shape), x.k.new_empty(x.k.shape), x.v.new_empty(x.v.shape)

    def backward_into(
        self, launch: Launch, x: Inputs, into: Sequence[Tensor], scale: float, softcap: float | None
    ) -> None:  # fmt: skip
        pass


def test_a_call_starts_little_besides_kernels_and_transfers() -> None:
    """Both passes of a causal ring of two: nothing is cleared, summed in fp32 or rounded in a pass of its own."""
    mask = Mask.causal(64)
    program = SCHEDULERS["ring"].plan(mask, Layout.zigzag(64, 2), 6, 6)
    tensors = inputs(64, 6, 6, 4, 4)
    with _Counted() as counted:
        run_in_process(program, mask, *tensors, backend=_Trivial(), takes_parts=True)
    names = ("zero_", "fill_", "copy_", "mul_", "addcmul_", "add_")
    # Copies: twelve of the mailbox, four of the merge, which is one kernel on a GPU. Added: what the other rank's keys gave.
    assert {name: n for name in names if (n := counted.started[name])} == {"copy_": 16, "addcmul_": 2, "add_": 4}


def test_a_short_wait_for_keys_cuts_no_work() -> None:
    """Of a window that reaches few rows of another rank: putting parts together would take longer than the wait."""
    mask = Mask.sliding_window(256, 4)
    program = SCHEDULERS["ring"].plan(mask, Layout.contiguous(256, 2), 6, 6)
    near, far = derive_backward(program), derive_backward(program, ranks_per_node=1)
    assert len(near.attends) == len(far.attends) == len(program.attends)
    whole = SCHEDULERS["ring"].plan(Mask.causal(256), Layout.zigzag(256, 2), 64, 8)
    near, far = derive_backward(whole), derive_backward(whole, ranks_per_node=1)
    # Eight KV heads come quickly within a node, and slowly from another.
    assert (len(near.attends), len(far.attends)) == (len(whole.attends), len(whole.attends) + 2)


def test_backends_that_add_find_cleared_sums() -> None:
    mask, tensors = Mask.causal(32), inputs(32, 2, 2)
    program = SCHEDULERS["all_gather"].plan(mask, Layout.zigzag(32, 2), 2, 2)
    found = run_in_process(program, mask, *tensors, backend=BACKENDS["reference"], poison=True)
    assert found.dk is not None
    torch.testing.assert_close(found.dk, oracle(*tensors, mask)[3], atol=1e-10, rtol=0)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
def test_gradients_of_one_kernel_travel_in_its_dtype(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes, and the same result to the last bit as through fp32; what is counted is what is sent."""
    mask = Mask.full(32, 32)
    tensors = [x.bfloat16() for x in inputs(32, 4, 4, 8, 8)]
    program = SCHEDULERS[strategy].plan(mask, Layout.contiguous(32, 2), 4, 4)
    sent: list[int] = []
    post = MailboxEndpoint.post

    def counted(self: MailboxEndpoint, message: Message) -> Any:
        sent[-1] += message.send.numel()
        return post(self, message)

    monkeypatch.setattr(MailboxEndpoint, "post", counted)
    found = []
    for reduce_dtype in (None, torch.float32):
        sent.append(0)
        found.append(run_in_process(program, mask, *tensors, backend=Rounding(), poison=True, reduce_dtype=reduce_dtype))
    for name in ("dq", "dk", "dv"):
        assert torch.equal(getattr(found[0], name).bfloat16(), getattr(found[1], name).bfloat16()), name
    shape = Shape(8, 8, "bfloat16", needs_out=True, narrow=True)
    assert sent[0] == sum(int(count(p, mask, shape).traffic.sum()) for p in (program, derive_backward(program)))
    assert sent[0] < sent[1]
