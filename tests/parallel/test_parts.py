"""All ranks in one process: messages in parts, sent from the tensors themselves and taken as they arrive, as on NCCL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.errors import TransportError
from distattn.kernels import BACKENDS
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.in_process import run_in_process
from distattn.parallel.layout import Layout
from distattn.parallel.lowering import lower
from distattn.parallel.schedulers import SCHEDULERS, ring
from distattn.parallel.transport.base import Message, Parts
from distattn.parallel.transport.mailbox import Mailbox
from tests.parallel.cases import inputs, oracle, random_layout, random_mask, random_options


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.integers(2, 6),
    n=st.integers(3, 40),
    name=st.sampled_from(sorted(SCHEDULERS)),
    heads=st.sampled_from([(12, 3), (12, 12), (6, 1), (7, 7)]),
    keep=st.booleans(),
    batch=st.integers(1, 2),
)
def test_matches_the_oracle(seed: int, ranks: int, n: int, name: str, heads: tuple[int, int], keep: bool, batch: int) -> None:
    """The mailbox keeps what it is given until it is collected, so that an early write to it shows."""
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, n)
    layout = random_layout(rng, n, ranks)
    if layout.num_rows != n:
        mask = Mask.causal(layout.num_rows)
    q, k, v, do = inputs(layout.num_rows, *heads, head_dim=4, value_dim=6, batch=batch, seed=seed)
    program = SCHEDULERS[name].plan(mask, layout, *heads, random_options(rng, name, *heads, ranks))
    backward = derive_backward(program, keep=keep)
    result = run_in_process(
        program, mask, q, k, v, do, backend=BACKENDS["reference"], backward_program=backward, poison=True, takes_parts=True
    )
    for field, want in zip(("out", "lse", "dq", "dk", "dv"), oracle(q, k, v, do, mask), strict=True):
        torch.testing.assert_close(getattr(result, field), want, atol=1e-10, rtol=0, msg=lambda m, x=field: f"{x}: {m}")


def test_equal_chunks_take_turns() -> None:
    """What a full ring receives is not copied into place: its arena has room for one chunk, and every chunk fills it."""
    mask = Mask.full(64, 64)
    program = ring.plan(mask, Layout.contiguous(64, 4), 2, 2)
    arenas = lower(program, mask, 1).arenas
    assert [arena.turns for arena in arenas] == [False, False, True]
    assert arenas[2].num_rows == 16
    assert not any(arena.turns for arena in lower(program, mask, 1, keep=True).arenas)


def test_parts_that_do_not_fit_are_an_error() -> None:
    box = Mailbox(2, takes_parts=True)
    nothing = torch.empty(0, dtype=torch.uint8)

    def message(sends: list[int], receives: list[int]) -> Message:
        parts = Parts(*([(1 - rank, nothing.new_zeros(size)) for size in sizes] for rank, sizes in ((0, sends), (1, receives))))
        return Message(0, 1, nothing, nothing, [0, 0], [0, 0], lambda: "at stage 1", parts)

    box.endpoint(0).post(message([4, 4], []))
    waiting = box.endpoint(1).post(message([], [8]))
    with pytest.raises(TransportError, match="of 8 bytes from rank 0 in 1 parts there was 8 bytes in 2 parts"):
        waiting.wait()
