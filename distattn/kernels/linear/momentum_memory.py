"""A linear memory that learns by gradient descent with momentum and decay, in chunks: plain torch, fp32 or fp64, every device.

e_t = k_t M₀ − v_t                        M₀: the memory before t's chunk, so that a chunk's rows are worked on at once
S_t = η_t S_{t−1} − 2 θ_t k_tᵀ e_t        η = e^momentum, θ = rate: a step against the gradient of ‖k_t M₀ − v_t‖²
M_t = α_t M_{t−1} + S_t                   α = e^decay
o_t = q_t M_t

Inside a chunk, from (M, S) at its first row and with b, m the running products of α, η:

n_i = η_i n_{i−1} + θ_i 1_i    g_i = α_i g_{i−1} + n_i    f_i = α_i f_{i−1} + m_i
O  = b ⊙ (Q M) + f ⊙ (Q S) − 2 ((Q Kᵀ) ⊙ g) E
M' = b_C M + f_C S − 2 (g_C ⊙ K)ᵀ E        S' = m_C S − 2 (n_C ⊙ K)ᵀ E

Linear memory of Titans (arXiv 2501.00663, §3.1 and 3.2). States are [..., n, K, V]: (M, S), or (M, S, M₀) where a piece of a
stream may begin or end inside a chunk. B batch, N chunks, H heads, C rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """What the rates of a chunk's rows come to. Every entry is at most a sum of C rates.

    keep b [B, N, H, C], carry f [B, N, H, C], slow m_C [B, N, H], write g [B, N, H, C, C] (row, then row that wrote), push n_C
    [B, N, H, C].
    """

    keep: Tensor
    carry: Tensor
    slow: Tensor
    write: Tensor
    push: Tensor

    def steps(self) -> Steps:
        """Of whole chunks."""
        return Steps(self.keep[..., -1], self.carry[..., -1], self.slow, self.write[..., -1, :], self.push)


class Steps(NamedTuple):
    """b_C, f_C, m_C [B, N, H], g_C, n_C [B, N, H, C]: how states pass whole chunks."""

    keep: Tensor
    carry: Tensor
    slow: Tensor
    write: Tensor
    push: Tensor

    def part(self, chunks: slice) -> Steps:
        return Steps(*(x[:, chunks] for x in self))


def coefficients(decay: Tensor, momentum: Tensor, rate: Tensor, filled: Tensor) -> Coefficients:
    """decay, momentum: natural logarithms ≤ 0, −∞ allowed, and rate, [B, N, H, C] each, 0 where not filled; filled: bool
    [N, C], rows that there are. Differentiable; nothing above 0 is exponentiated, no sum subtracted from another."""
    through, slowed = _reach(decay), _reach(momentum)
    moved = through * filled[:, None, None, :]  # rows that are not there do not add S to M again
    m = momentum.cumsum(-1).exp()
    return Coefficients(
        keep=decay.cumsum(-1).exp(),
        carry=(moved @ m[..., None])[..., 0],
        slow=m[..., -1],
        write=(moved @ slowed) * rate[..., None, :],
        push=slowed[..., -1, :] * rate,
    )


def _reach(logs: Tensor) -> Tensor:
    """[..., i, j]: e^{Σ logs_l over j < l ≤ i}, 0 for i < j."""
    size = logs.shape[-1]
    after = torch.ones(size, size, dtype=torch.bool, device=logs.device).tril(-1)
    sums = logs[..., :, None].expand(*logs.shape, size).masked_fill(~after, 0.0).cumsum(-2)
    return sums.exp().tril()


def start_of(states: Tensor) -> Tensor:
    """M₀."""
    return states[..., -1 if states.shape[-3] == 3 else 0, :, :]


def read(q: Tensor, k: Tensor, v: Tensor, c: Coefficients, states: Tensor) -> Tensor:
    """O [B, N, H, C, V] from the states at the chunks' first rows; q, k [B, N, H, C, K], v [B, N, H, C, V]. Differentiable."""
    errors = k @ start_of(states) - v
    past = c.keep[..., None] * (q @ states[..., 0, :, :]) + c.carry[..., None] * (q @ states[..., 1, :, :])
    return past - 2 * ((q @ k.mT) * c.write) @ errors


# Runs over groups of pieces: chunk s of every piece that has one, for all s in turn. counts[s]: how many have, the longest
# piece first. Chunks lie in that order: s by s, piece by piece. closes: bool [N], whether a chunk's last row is there.


def run_states(
    k: Tensor, v: Tensor | None, steps: Steps, closes: Tensor, state: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(states before each chunk [B, N, H, n, K, V], states after each piece [B, P, H, n, K, V]) from those before each piece.

    v: None for a run of what is linear in the state alone.
    """
    entered = [state[:, :0]]
    left = state.clone()
    at = 0
    for count in counts:
        here = slice(at, at + count)
        state = state[:, :count]
        entered.append(state)
        state = _advance(k[:, here], None if v is None else v[:, here], steps.part(here), closes[here], state)
        left[:, :count] = state
        at += count
    return torch.cat(entered, 1), left


def _advance(k: Tensor, v: Tensor | None, x: Steps, closes: Tensor, state: Tensor) -> Tensor:
    memory, speed = state[..., 0, :, :], state[..., 1, :, :]
    errors = k @ start_of(state)
    if v is not None:
        errors = errors - v
    after = x.keep[..., None, None] * memory + x.carry[..., None, None] * speed - 2 * k.mT @ (x.write[..., None] * errors)
    slowed = x.slow[..., None, None] * speed - 2 * k.mT @ (x.push[..., None] * errors)
    parts = [after, slowed]
    if state.shape[-3] == 3:
        parts.append(torch.where(closes[:, None, None, None], after, start_of(state)))
    return torch.stack(parts, -3)


def transitions(k: Tensor, steps: Steps, closes: Tensor, parts: int, counts: Sequence[int]) -> Tensor:
    """What each piece does to the state that enters it: [B, P, H, n, n, K, K], block row first."""
    batch, _, heads, _, rows = k.shape
    width = parts * rows
    unit = torch.eye(width, dtype=k.dtype, device=k.device).view(parts, rows, width)
    unit = unit.expand(batch, counts[0] if counts else 0, heads, parts, rows, width)
    _, left = run_states(k, None, steps, closes, unit, counts)
    return left.unflatten(-1, (parts, rows)).transpose(-2, -3).contiguous()


class Back(NamedTuple):
    """Gradients on the way back: of the states before each piece [B, P, H, n, K, V], of the states after each chunk
    [B, N, H, 2, K, V], and of each chunk's errors [B, N, H, C, V]."""

    entering: Tensor
    after: Tensor
    errors: Tensor


def run_back(k: Tensor, steps: Steps, closes: Tensor, given: Tensor, leaving: Tensor, counts: Sequence[int]) -> Back:
    """given: gradients of the states before each chunk, of their own uses; leaving: of the states after each piece."""
    current = leaving.clone()
    after: list[Tensor] = [leaving[:, :0, :, :2]]
    errors: list[Tensor] = [k.new_empty((*k.shape[:1], 0, *k.shape[2:4], leaving.shape[-1]))]
    at = sum(counts)
    for count in reversed(counts):
        here = slice(at - count, at)
        at -= count
        came, missed, before = _retreat(k[:, here], steps.part(here), closes[here], given[:, here], current[:, :count])
        after.append(came)
        errors.append(missed)
        current[:, :count] = before
    return Back(current, torch.cat(after[::-1], 1), torch.cat(errors[::-1], 1))


def _retreat(k: Tensor, x: Steps, closes: Tensor, given: Tensor, came: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk: gradients of (M', S'), of E, and of the state before."""
    memory, speed = came[..., 0, :, :], came[..., 1, :, :]
    stays = None
    if came.shape[-3] == 3:
        closed = closes[:, None, None, None]
        memory = memory + torch.where(closed, start_of(came), 0.0)
        stays = torch.where(closed, 0.0, start_of(came))
    errors = -2 * (x.write[..., None] * (k @ memory) + x.push[..., None] * (k @ speed))
    start = k.mT @ errors
    earlier = [x.keep[..., None, None] * memory, x.slow[..., None, None] * speed + x.carry[..., None, None] * memory]
    if stays is None:
        earlier[0] = earlier[0] + start
    else:
        earlier.append(start + stays)
    return torch.stack([memory, speed], -3), errors, torch.stack(earlier, -3) + given


def differentiate(k: Tensor, v: Tensor, steps: Steps, states: Tensor, back: Back) -> tuple[Tensor, Tensor, Steps]:
    """(dk, dv, gradients of the steps) of all chunks, from the states before them and what came back."""
    memory, speed = back.after[..., 0, :, :], back.after[..., 1, :, :]
    start = start_of(states)
    errors = k @ start - v
    dk = back.errors @ start.mT
    dk -= 2 * (steps.write[..., None] * (errors @ memory.mT) + steps.push[..., None] * (errors @ speed.mT))
    dsteps = Steps(
        keep=(memory * states[..., 0, :, :]).sum((-1, -2)),
        carry=(memory * states[..., 1, :, :]).sum((-1, -2)),
        slow=(speed * states[..., 1, :, :]).sum((-1, -2)),
        write=-2 * ((k @ memory) * errors).sum(-1),
        push=-2 * ((k @ speed) * errors).sum(-1),
    )
    return dk, -back.errors, dsteps
