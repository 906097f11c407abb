"""Whether what a rank receives in the forward stays until the backward, or is sent again.

    resend   forward q, k, v →        ← out     backward q, dO, k, v →     ← dq, dk, dv     nothing stays
    keep     forward q, k, v →        ← out     backward dO →              ← dq, dk, dv     received q, k, v stay

Keeping saves a third of the transfers and costs memory for every call between its forward and its backward: layers times
micro-batches in flight. Both are the same derived backward (``derive_backward``); no scheduler knows which it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distattn.errors import PlanError
from distattn.parallel.lowering import HOME_KV, HOME_Q, Lowered
from distattn.parallel.program import KV, SLOT_H0, SLOT_H1, SLOT_KIND, SLOT_RANK, SLOT_ROWS, Program

MODES = ("resend", "keep", "auto")
FIELDS = ("q", "k", "v")


def kept_bytes(program: Program, head_dim: int, value_dim: int, element_bytes: int) -> np.ndarray:
    """Bytes of received q, k and v that one call keeps on each rank, batch 1: int64 [P]."""
    slots = program.slots[2 * program.num_ranks :]
    width = np.where(slots[:, SLOT_KIND] == KV, head_dim + value_dim, head_dim)
    held = program.row_counts[slots[:, SLOT_ROWS]] * (slots[:, SLOT_H1] - slots[:, SLOT_H0]) * width * element_bytes
    total = np.zeros(program.num_ranks, np.int64)
    np.add.at(total, slots[:, SLOT_RANK], held)
    return total


def check_mode(mode: str, limit: int | None) -> None:
    """PlanError for a mode that there is not, or a limit that does not go with it."""
    if mode not in MODES:
        raise PlanError(f"backward={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if mode == "auto" and limit is None:
        raise PlanError('backward="auto" needs keep_bytes: how many received bytes one call may keep on a rank, batch 1')
    if limit is not None and (mode != "auto" or limit < 0):
        raise PlanError(f'keep_bytes={limit} must not be negative, and belongs to backward="auto", not {mode!r}')


def choose_mode(
    program: Program, mode: str, limit: int | None, *, head_dim: int, value_dim: int, element_bytes: int
) -> tuple[bool, str]:
    """(whether to keep, why): the same on every rank, for it rests on the busiest one."""
    if program.num_ranks == 1:
        return False, "nothing is received on one rank"
    worst = int(kept_bytes(program, head_dim, value_dim, element_bytes).max())
    size = f"{worst / 1e6:.4g} MB of received q, k and v at most a rank and call, batch 1"
    if limit is None:
        return mode == "keep", f"{mode}: {size} {'stay' if mode == 'keep' else 'are sent again'}"
    if worst <= limit:
        return True, f"keep: {size} stay, within keep_bytes={limit}"
    return False, f"resend: {size} would be more than keep_bytes={limit}"


def received(lowered: Lowered, fields: dict[str, list[Tensor | None]]) -> list[Tensor]:
    """What a finished forward, lowered to keep it, holds of other ranks' q, k and v."""
    return [tensor for name, i in _kept(lowered) if (tensor := fields[name][i]) is not None]


def as_fields(lowered: Lowered, tensors: Sequence[Tensor]) -> dict[str, list[Tensor | None]]:
    """``received`` as the fields that the backward's ``Execution`` is given."""
    fields: dict[str, list[Tensor | None]] = {name: [None] * len(lowered.arenas) for name in FIELDS}
    for (name, i), tensor in zip(_kept(lowered), tensors, strict=True):
        fields[name][i] = tensor
    return fields


def like_received(lowered: Lowered, q: Tensor, v: Tensor) -> list[Tensor]:
    """Empty tensors of the shapes of ``received``, for shape inference."""
    width = {"q": q.shape[-1], "k": q.shape[-1], "v": v.shape[-1]}
    shapes = [(q.shape[0], lowered.arenas[i].num_rows, lowered.arenas[i].num_heads, width[name]) for name, i in _kept(lowered)]
    return [q.new_empty(torch.Size(shape)) for shape in shapes]


def _kept(lowered: Lowered) -> list[tuple[str, int]]:
    """(field, arena) of each kept tensor; the same for the forward and its backward, whose arenas are alike."""
    arenas = [(i, arena.kind) for i, arena in enumerate(lowered.arenas) if i not in (HOME_Q, HOME_KV)]
    return [(name, i) for i, kind in arenas for name in (("k", "v") if kind == KV else ("q",))]
