"""Linear attention one token at a time: what every kernel and every exchange is compared with.

S ← e^{g_t} ⊙ S                                       decay (rows of S, for a vector gate)
S ← S − β_t k_tᵀ (k_t S)                              delta family: erase what k_t finds
S ← S + k_tᵀ v_t,  or S + β_t k_tᵀ v_t                write
o_t = scale · q_t S
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distattn.kernels.linear.protocol import Operands


def recurrent(x: Operands, lengths: Sequence[int], initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(o [B, T, HV, V] in v's dtype, final states [B, N, HV, K, V]) of N documents that lie one after another.

    lengths: tokens of each document, zero allowed, T in all. initial [B, N, HV, K, V], default zeros. States are fp32, or fp64
    for fp64 inputs. Differentiable by autograd.
    """
    batch, rows, value_heads, width = x.v.shape
    dtype = state_dtype(x.v.dtype)
    q, k, v = spread_heads(x.q, value_heads).to(dtype), spread_heads(x.k, value_heads).to(dtype), x.v.to(dtype)
    decay = None if x.g is None else expand_gate(x.g, batch, rows).to(dtype).exp()
    if initial is None:
        initial = v.new_zeros((batch, len(lengths), value_heads, q.shape[-1], width))
    outputs, finals, t = [], [], 0
    for document, length in enumerate(lengths):
        state = initial[:, document].to(dtype)
        for t in range(t, t + length):  # noqa: B020 - t runs on through all documents
            beta = None if x.beta is None else x.beta[:, t].to(dtype)
            state = step_state(state, k[:, t], v[:, t], None if decay is None else decay[:, t], beta)
            outputs.append(x.scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        t += length > 0
        finals.append(state)
    o = torch.stack(outputs, 1) if outputs else v.new_zeros((batch, 0, value_heads, width))
    return o.to(x.v.dtype), torch.stack(finals, 1)


def step_state(state: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor | None) -> Tensor:
    """The state [B, HV, K, V] after one token: k [B, HV, K], v [B, HV, V], decay factors [B, HV, 1 or K], beta [B, HV]."""
    if decay is not None:
        state = decay.unsqueeze(-1) * state
    if beta is not None:
        v = beta.unsqueeze(-1) * (v - torch.einsum("bhk,bhkv->bhv", k, state))
    return state + k.unsqueeze(-1) * v.unsqueeze(-2)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spread_heads(x: Tensor, value_heads: int) -> Tensor:
    """[B, T, H, K] to [B, T, HV, K]: head h serves HV/H value heads."""
    return x if x.shape[2] == value_heads else x.repeat_interleave(value_heads // x.shape[2], 2)


def expand_gate(g: Tensor, batch: int, rows: int) -> Tensor:
    """A gate of any form as [B, T, HV, 1] or [B, T, HV, K]."""
    if g.ndim == 1:
        g = g.expand(batch, rows, -1)
    return g.unsqueeze(-1) if g.ndim == 3 else g
