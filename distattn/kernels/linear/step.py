"""Decoding: one token, one state, no chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from distattn.kernels.linear.protocol import Operands
from distattn.kernels.linear.reference import expand_gate, spread_heads, state_dtype, step_state


def step(x: Operands, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(o [B, 1, HV, V] in v's dtype, next state [B, HV, K, V] fp32/fp64) of one token.

    x: T = 1. state: what the last step, or a whole pass, left; None before the first token.
    """
    batch, _, value_heads, width = x.v.shape
    dtype = state_dtype(x.v.dtype)
    q, k = (spread_heads(part, value_heads)[:, 0].to(dtype) for part in (x.q, x.k))
    if state is None:
        state = k.new_zeros((*k.shape, width))
    decay = None if x.g is None else expand_gate(x.g, batch, 1)[:, 0].to(dtype).exp()
    beta = None if x.beta is None else x.beta[:, 0].to(dtype)
    state = step_state(state.to(dtype), k, x.v[:, 0].to(dtype), decay, beta)
    o = x.scale * torch.einsum("bhk,bhkv->bhv", q, state)
    return o[:, None].to(x.v.dtype), state
