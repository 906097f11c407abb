"""A softmax-weighted mean of all rows so far, in time linear in the rows: plain torch, any floating dtype, every device.

l_t = log Σ_{i ≤ t} e^{s_i}        o_t = Σ_{i ≤ t} e^{s_i − l_t} v_i        over the rows since the last reset
Y_i = Σ_{t ≥ i} e^{s_i − l_t} x_t  up to the next reset: the backward

Chunks of rows are worked on at once; their last rows are rows of a shorter scan, and so on. No exponent is above 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 16


class Level(NamedTuple):
    """Rows of one level, padded to whole chunks. segment: int64 [N, C], which rows belong together; after: bool [N, C], rows
    that what lies before their chunk reaches; before: bool [N, C], rows that reach what lies behind their chunk."""

    segment: Tensor
    after: Tensor
    before: Tensor


def cut_levels(resets: np.ndarray, *, backward: bool, device: torch.device) -> list[Level]:
    """The levels of a scan, and of its backward, over rows of which some begin anew: bool [T], T ≥ 1."""
    levels = []
    while True:
        chunks = -(-len(resets) // CHUNK)
        padded = np.ones(chunks * CHUNK, bool)
        padded[: len(resets)] = resets
        segment = np.cumsum(padded).reshape(chunks, CHUNK)
        after = np.zeros((chunks, CHUNK), bool)
        after[1:] = segment[1:] == segment[:-1, -1:]
        before = np.zeros((chunks, CHUNK), bool)
        before[:-1] = segment[:-1] == segment[:-1, -1:]
        levels.append(Level(*(torch.from_numpy(x).to(device) for x in (segment, after, before))))
        if chunks == 1:
            return levels
        resets = np.logical_or.reduce(padded.reshape(chunks, CHUNK), axis=1)
        if backward:
            # A chunk's own share stops at its first reset, so what ends the way is a reset in the chunk before.
            resets = np.concatenate([[True], resets[:-1]])


def scan(s: Tensor, v: Tensor, levels: list[Level]) -> tuple[Tensor, Tensor]:
    """(l [B, T, H], o [B, T, H, V]) of s [B, T, H] and v [B, T, H, V] in fp32 or fp64. s may be −∞: a row that is not seen;
    where nothing is seen l is −∞ and o is 0. levels: ``cut_levels`` of these rows."""
    level, rows = levels[0], s.shape[1]
    score, value = _chunked(s, level), _chunked(v, level)  # [B, N, H, C], [B, N, H, C, V]
    seen = score[..., None, :].masked_fill(~_reach(level)[:, None], -torch.inf)
    l = seen.logsumexp(-1)
    o = (seen - finite(l)[..., None]).exp() @ value
    if len(levels) > 1:
        l_end, o_end = scan(l[..., -1], o[..., -1, :], levels[1:])
        l_in = torch.cat([torch.full_like(l_end[:, :1], -torch.inf), l_end[:, :-1]], 1)[..., None]
        l_in = l_in.expand(l.shape).masked_fill(~level.after[:, None], -torch.inf)
        o_in = torch.cat([torch.zeros_like(o_end[:, :1]), o_end[:, :-1]], 1)[..., None, :]
        l, o = merge(l, o, l_in, o_in)
    return _flat(l, rows), _flat(o, rows)


def merge(l: Tensor, o: Tensor, l_in: Tensor, o_in: Tensor) -> tuple[Tensor, Tensor]:
    """(l, o) of both together; nothing with nothing is nothing."""
    both = torch.logaddexp(l, l_in)
    reference = finite(both)
    return both, (l - reference).exp()[..., None] * o + (l_in - reference).exp()[..., None] * o_in


def gather(s: Tensor, l: Tensor, x: Tensor, levels: list[Level]) -> Tensor:
    """Y [B, T, H, X] of s, l [B, T, H] and x [B, T, H, X]; levels: ``cut_levels`` for the backward."""
    level, rows = levels[0], s.shape[1]
    score, reference = _chunked(s, level), _chunked(finite(l), level)
    given = _chunked(x, level)
    weight = score[..., :, None] - reference[..., None, :]  # [B, N, H, from i, to t]
    y = weight.masked_fill(~_reach(level).transpose(-1, -2)[:, None], -torch.inf).exp() @ given
    if len(levels) > 1:
        ends = l[:, CHUNK - 1 :: CHUNK][:, : len(level.segment) - 1]
        border = torch.cat([l[:, :1], ends], 1)  # l before each chunk; nothing reaches the first
        share = (border[..., None] - reference).masked_fill(~level.after[:, None], -torch.inf).exp()
        beyond = gather(border, border, torch.einsum("bnhc,bnhcx->bnhx", share, given), levels[1:])
        out = (score[:, :-1] - finite(border)[:, 1:, :, None]).masked_fill(~level.before[:-1, None], -torch.inf).exp()
        y[:, :-1] += out[..., None] * beyond[:, 1:, :, None]
    return _flat(y, rows)


def _reach(level: Level) -> Tensor:
    """Which rows of a chunk see which: bool [N, C, C]."""
    size = level.segment.shape[1]
    lower = torch.ones(size, size, dtype=torch.bool, device=level.segment.device).tril()
    return (level.segment[:, :, None] == level.segment[:, None, :]) & lower


def _chunked(x: Tensor, level: Level) -> Tensor:
    """[B, T, H, …] as [B, N, H, C, …]."""
    chunks, size = level.segment.shape
    missing = chunks * size - x.shape[1]
    if missing:
        x = torch.cat([x, x.new_zeros((x.shape[0], missing, *x.shape[2:]))], 1)
    return x.unflatten(1, (chunks, size)).transpose(2, 3)


def _flat(x: Tensor, rows: int) -> Tensor:
    return x.transpose(2, 3).flatten(1, 2)[:, :rows]


def finite(l: Tensor) -> Tensor:
    """As a reference of exponents: where nothing is seen any number will do."""
    return l.masked_fill(l.isneginf(), 0.0)
