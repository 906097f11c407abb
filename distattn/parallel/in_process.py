"""Run a program of any number of ranks in this process: global tensors in, global tensors out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distattn.kernels.protocol import Backend
from distattn.mask import Mask
from distattn.parallel.backward import derive_backward
from distattn.parallel.executor import Execution, Kernel
from distattn.parallel.gradients import output_gradient_sums
from distattn.parallel.lowering import lower
from distattn.parallel.program import Program
from distattn.parallel.transport.mailbox import Mailbox


@dataclass(frozen=True)
class InProcessResult:
    """Global results: out [B, S, H, Dv], lse [B, S, H]; dq, dk, dv like q, k, v in fp32 (fp64), or None without ``do``."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def run_in_process(
    program: Program,
    mask: Mask,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor | None = None,
    *,
    backend: Backend,
    dlse: Tensor | None = None,
    backward_program: Program | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    reduce_dtype: torch.dtype | None = None,
    poison: bool = False,
    takes_parts: bool = False,
) -> InProcessResult:
    """All ranks of ``program`` in lockstep through a mailbox, forward and, given ``do``, backward.

    q [B, S, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]: global tensors; do like out, dlse [B, S, H].
    backward_program: default ``derive_backward(program)``; with ``keep`` the forward keeps what it receives.
    reduce_dtype: in which gradient sums travel, default fp32 (fp64). poison: fresh memory holds NaN, so that reading what was
    never written shows in the result. takes_parts: messages travel in parts, as on NCCL.
    Raises TransportError if a message is missing or left over.
    """
    backward = backward_program or (derive_backward(program) if do is not None else None)
    keep = backward is not None and backward.keep
    kernel = Kernel(backend, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    box = Mailbox(program.num_ranks, takes_parts=takes_parts)
    rows, keys = (
        [torch.from_numpy(layout.rows(rank)).to(q.device) for rank in range(program.num_ranks)]
        for layout in (program.layout, program.key_layout)
    )
    local = [{"q": q[:, r], "k": k[:, s], "v": v[:, s]} for r, s in zip(rows, keys)]
    forward = [
        Execution(lower(program, mask, rank, keep=keep), box.endpoint(rank), kernel, home, poison=poison)
        for rank, home in enumerate(local)
    ]
    _lockstep(forward, box)
    results = [x.result() for x in forward]
    out, lse = (_scatter(rows, parts) for parts in zip(*results))
    if do is None or backward is None:
        return InProcessResult(out, lse)
    passes = []
    for rank, home in enumerate(local):
        r, (out_local, lse_local) = rows[rank], results[rank]
        delta = output_gradient_sums(out_local, do[:, r], None if dlse is None else dlse[:, r])
        home = home | {"do": do[:, r], "lse": lse_local, "delta": delta}
        if backend.needs_out:
            home["out"] = out_local
        lowered = lower(backward, mask, rank)
        kept = forward[rank].fields if keep else None
        endpoint = box.endpoint(rank)
        passes.append(Execution(lowered, endpoint, kernel, home, kept=kept, reduce_dtype=reduce_dtype, poison=poison))
    _lockstep(passes, box)
    dq, dk, dv = zip(*(x.result() for x in passes))
    dq, dk, dv = _scatter(rows, dq), _scatter(keys, dk), _scatter(keys, dv)
    return InProcessResult(out, lse, dq, dk, dv)


def _lockstep(executions: Iterable[Execution], box: Mailbox) -> None:
    """Every rank posts a time's messages before any rank waits for the next time's."""
    running = [x.steps() for x in executions]
    while running:
        running = [steps for steps in running if next(steps, None) is not None]
    box.check_empty()


def _scatter(rows: list[Tensor], parts: tuple[Tensor, ...]) -> Tensor:
    """Local results of all ranks in global row order."""
    return torch.cat(parts, 1)[:, torch.argsort(torch.cat(rows))]
