"""Random masks and layouts for property tests, and a dense fp64 oracle. Not a test file."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers import SCHEDULERS
from distattn.parallel.schedulers.double_ring import DoubleRingOptions
from distattn.parallel.schedulers.ring import RingOptions
from distattn.parallel.schedulers.usp import UspOptions


def random_lengths(rng: np.random.Generator, total: int, longest: int = 14) -> list[int]:
    """Lengths from 1 to ``longest`` that sum to ``total``."""
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(min(rng.integers(1, longest + 1), total - sum(lengths))))
    return lengths


def random_mask(rng: np.random.Generator, n: int) -> Mask:
    """Any constructor, or a union of random bands (which leaves rows that see nothing)."""
    kind = int(rng.integers(9))
    if kind == 0:
        return Mask.causal(n)
    if kind == 1:
        return Mask.full(n, n)
    if kind == 2:
        return Mask.sliding_window(n, int(rng.integers(0, n)), int(rng.integers(0, 4)))
    if kind == 3:
        return Mask.documents(random_lengths(rng, n), causal=bool(rng.integers(2)))
    if kind == 4:
        return Mask.block_causal(random_lengths(rng, n), int(rng.integers(1, 4)))
    if kind == 5:
        return Mask.prefix_lm(n, int(rng.integers(0, n + 1)))
    if kind == 6:
        question = int(rng.integers(1, n))
        return Mask.share_question(question, random_lengths(rng, n - question))
    if kind == 7:
        return Mask.global_window(n, int(rng.integers(0, n)), int(rng.integers(0, 6)), int(rng.integers(0, 3)))
    mask = Mask.from_bands(np.zeros((0, 6), np.int64), n, n)
    for _ in range(int(rng.integers(1, 4))):
        q0, q1 = sorted(rng.integers(0, n + 1, 2).tolist())
        k0, k1 = sorted(rng.integers(0, n + 1, 2).tolist())
        lo = int(rng.integers(-n, n))
        if q0 < q1 and k0 < k1:
            mask = mask | Mask.from_bands([(q0, q1, k0, k1, lo, lo + int(rng.integers(0, n)))], n, n)
    return mask


def random_cross_mask(rng: np.random.Generator, n: int, num_keys: int) -> Mask:
    """Full, bottom-right causal, uneven sequences, or bands, over queries and keys of different rows."""
    kind = int(rng.integers(3))
    if kind == 0:
        return Mask.full(n, num_keys)
    if kind == 1:
        cut_q, cut_k = int(rng.integers(0, n + 1)), int(rng.integers(0, num_keys + 1))
        return Mask.from_cu_seqlens([0, cut_q, n], [0, cut_k, num_keys], causal=bool(rng.integers(2)))
    low = int(rng.integers(-n, num_keys))
    return Mask.from_bands([(0, n, 0, num_keys, low, low + int(rng.integers(0, num_keys)))], n, num_keys)


def random_layout(rng: np.random.Generator, n: int, ranks: int) -> Layout:
    """Any constructor, or random pieces in random order on random ranks (some may hold nothing)."""
    kind = int(rng.integers(6))
    if kind == 5:
        return Layout.balanced(Mask.documents(random_lengths(rng, n, 40)), ranks)
    if kind == 0:
        return Layout.contiguous(n, ranks)
    if kind == 1:
        return Layout.zigzag(n, ranks)
    if kind == 2:
        return Layout.per_document_zigzag(random_lengths(rng, n, 40), ranks, min_cut=1)
    if kind == 3:
        return Layout.striped(n, ranks, block=int(rng.integers(1, 4)))
    cuts = np.unique(np.concatenate([[0, n], rng.integers(0, n + 1, 6)])).tolist()
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for a, b in itertools.pairwise(cuts):
        held[int(rng.integers(ranks))].append((a, b))
    for ranges in held:
        rng.shuffle(ranges)
    return Layout.given(held)


def random_options(rng: np.random.Generator, name: str, heads: int, kv_heads: int, ranks: int) -> Any:
    """The default, one of those that auto tries, or one that it does not."""
    options = [None, *SCHEDULERS[name].variants(heads, kv_heads, ranks, int(rng.integers(1, 9)))]
    if name == "ring":
        options += [RingOptions(moves=moves, two_way=two_way) for moves in ("kv", "q") for two_way in (False, True)]
    if name == "double_ring":
        options += [DoubleRingOptions(x) for x in range(1, ranks + 1) if ranks % x == 0]
    if name == "usp":
        pieces = int(rng.integers(1, 6))
        for x in range(1, ranks + 1):
            if ranks % x == 0 and heads % x == 0:
                windows = [w for w in range(1, ranks // x + 1) if ranks // x % w == 0]
                options += [UspOptions(x, p, pieces, w) for p in ("head_first", "context_first") for w in (None, *windows)]
    return options[int(rng.integers(len(options)))]


def inputs(
    n: int,
    heads: int,
    kv_heads: int,
    head_dim: int = 4,
    value_dim: int = 4,
    batch: int = 1,
    seed: int = 0,
    num_keys: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v, do in fp64, [B, n, H, D]; k and v of num_keys rows where given."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, heads: int, dim: int) -> torch.Tensor:
        return torch.randn(batch, rows, heads, dim, dtype=torch.double, generator=generator)

    keys = n if num_keys is None else num_keys
    return draw(n, heads, head_dim), draw(keys, kv_heads, head_dim), draw(keys, kv_heads, value_dim), draw(n, heads, value_dim)


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, mask: Mask
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse, dq, dk, dv of dense attention by autograd; rows that see nothing give 0, and −inf for the LSE."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    allowed = torch.from_numpy(mask.dense())
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~allowed, -1e30), -1).masked_fill(~allowed, 0.0)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    out.backward(do)
    lse = torch.logsumexp(scores.masked_fill(~allowed, float("-inf")), -1).transpose(1, 2)
    grads = [x.grad if x.grad is not None else torch.zeros_like(x) for x in (q, k, v)]
    return out.detach(), lse.detach(), grads[0], grads[1], grads[2]
