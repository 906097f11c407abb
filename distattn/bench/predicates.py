"""The masks of LongCA-bench as FlexAttention's users write them: a function (b, h, q_idx, kv_idx) → allowed.

The same draws as in ``distattn.bench.masks``; the tests compare both, pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.bench.masks import (
    WINDOW,
    BlockPattern,
    block_documents,
    document_lengths,
    global_width,
    prefix_of_documents,
    prefix_of_sequence,
)

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Documents(NamedTuple):
    """By token, int32 [tokens]: the number of its document and the first token of it. num: how many there are."""

    of: Tensor
    start: Tensor
    num: int

    @staticmethod
    def make(lengths: list[int], device: str) -> Documents:
        counts = torch.tensor(lengths)
        of = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        start = (torch.cumsum(counts, 0) - counts)[of]
        return Documents(of.to(device, torch.int32), start.to(device, torch.int32), len(lengths))


def predicate(name: str, tokens: int, seed: int, device: str) -> Predicate | None:
    """The predicate of a mask of ``LONGCA_MASKS``; None where everything is allowed."""
    return _PREDICATES[name](tokens, seed, device)


def block_predicate(pattern: BlockPattern, group: int, device: str) -> Predicate:
    """The predicate of blocks that differ by KV head, for ``group`` query heads a KV head."""
    kept = torch.from_numpy(pattern.kept).to(device)
    row, column = (
        torch.repeat_interleave(torch.arange(len(edges) - 1), torch.from_numpy(edges).diff()).to(device, torch.int32)
        for edges in (pattern.edges_q, pattern.edges_k)
    )
    return lambda b, h, i, j: kept[h // group, row[i], column[j]]


def _full(tokens: int, seed: int, device: str) -> None:
    return None


def _causal(tokens: int, seed: int, device: str) -> Predicate:
    return lambda b, h, i, j: i >= j


def _full_document(tokens: int, seed: int, device: str) -> Predicate:
    owner = Documents.make(document_lengths(tokens, seed), device).of
    return lambda b, h, i, j: owner[i] == owner[j]


def _causal_document(tokens: int, seed: int, device: str) -> Predicate:
    owner = Documents.make(document_lengths(tokens, seed), device).of
    return lambda b, h, i, j: (i >= j) & (owner[i] == owner[j])


def _sliding_window(tokens: int, seed: int, device: str) -> Predicate:
    return lambda b, h, i, j: (i - j <= WINDOW) & (j - i <= WINDOW)


def _sliding_window_causal(tokens: int, seed: int, device: str) -> Predicate:
    return lambda b, h, i, j: (i >= j) & (i - j <= WINDOW)


def _share_question(tokens: int, seed: int, device: str) -> Predicate:
    owner = Documents.make(document_lengths(tokens, seed), device).of
    return lambda b, h, i, j: (i >= j) & ((owner[i] == owner[j]) | (owner[j] == 0))


def _global_sliding_window(tokens: int, seed: int, device: str) -> Predicate:
    width = global_width(tokens, seed)
    return lambda b, h, i, j: (i < width) | (j < width) | ((i - j <= width) & (j - i <= width))


def _causal_blockwise(tokens: int, seed: int, device: str) -> Predicate:
    owner, _, num = Documents.make(document_lengths(tokens, seed), device)
    return lambda b, h, i, j: (i >= j) & ((owner[i] == owner[j]) | (owner[i] == num - 1))


def _prefix_lm_causal(tokens: int, seed: int, device: str) -> Predicate:
    prefix = prefix_of_sequence(tokens, seed)
    return lambda b, h, i, j: (i >= j) | ((i < prefix) & (j < prefix))


def _prefix_lm_document(tokens: int, seed: int, device: str) -> Predicate:
    owner, start, _ = Documents.make(document_lengths(tokens, seed), device)
    prefix = prefix_of_documents(tokens, seed)

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        in_prefix = (i - start[i] < prefix) & (j - start[j] < prefix)
        return (owner[i] == owner[j]) & ((i >= j) | in_prefix)

    return allowed


def _block_causal_document(tokens: int, seed: int, device: str) -> Predicate:
    lengths, block = block_documents(tokens, seed)
    owner, start, _ = Documents.make(lengths, device)

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (owner[i] == owner[j]) & ((i - start[i]) // block >= (j - start[j]) // block)

    return allowed


_PREDICATES: Mapping[str, Callable[[int, int, str], Predicate | None]] = {
    "full": _full,
    "causal": _causal,
    "full_document": _full_document,
    "causal_document": _causal_document,
    "sliding_window": _sliding_window,
    "sliding_window_causal": _sliding_window_causal,
    "share_question": _share_question,
    "global_sliding_window": _global_sliding_window,
    "causal_blockwise": _causal_blockwise,
    "prefix_lm_causal": _prefix_lm_causal,
    "prefix_lm_document": _prefix_lm_document,
    "block_causal_document": _block_causal_document,
}
