"""The masks of LongCA-bench (arXiv 2510.17896), as it describes them: every area is exact and no S×S array exists.

Where its code and its description differ, this is the description: a window reaches both ways as far as it says, the leading
rows and columns of a global window see and are seen by everything, and a prefix of p has p tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from distattn.bands import UNBOUNDED
from distattn.bench.lengths import draw
from distattn.mask import Mask

WINDOW = 1024
BLOCK = 1024
MAX_BLOCKS_A_DOCUMENT = 8


def document_lengths(tokens: int, seed: int) -> list[int]:
    """Lengths of the histogram that the benchmark takes for a sequence of ``tokens``, which they fill."""
    if tokens <= 12 * 1024:
        return draw("pile", tokens, seed)
    return draw("prolong64k" if tokens <= 64 * 1024 else "prolong512k", tokens, seed)


def _uniform(low: int, high: int, seed: int) -> int:
    """From low to high, both included."""
    return int(np.random.default_rng(seed).integers(low, max(low, high), endpoint=True))


def global_width(tokens: int, seed: int) -> int:
    """Leading positions of the global window, and how far it reaches."""
    return min(tokens, _uniform(1, tokens // 3 - 1, seed))


def prefix_of_sequence(tokens: int, seed: int) -> int:
    """The bidirectional prefix of a sequence."""
    return _uniform(1, tokens, seed)


def prefix_of_documents(tokens: int, seed: int) -> int:
    """The bidirectional prefix that all documents have; shorter ones are bidirectional as a whole."""
    return _uniform(1, document_lengths(tokens, seed)[0], seed)


def block_documents(tokens: int, seed: int) -> tuple[list[int], int]:
    """(lengths, block) of documents of 1 to 8 blocks, the last one clipped."""
    generator, lengths, left = np.random.default_rng(seed), [], tokens
    while left:
        lengths.append(min(BLOCK * int(generator.integers(1, MAX_BLOCKS_A_DOCUMENT, endpoint=True)), left))
        left -= lengths[-1]
    return lengths, BLOCK


def _full(tokens: int, seed: int) -> Mask:
    return Mask.full(tokens, tokens)


def _causal(tokens: int, seed: int) -> Mask:
    return Mask.causal(tokens)


def _full_document(tokens: int, seed: int) -> Mask:
    return Mask.documents(document_lengths(tokens, seed), causal=False)


def _causal_document(tokens: int, seed: int) -> Mask:
    return Mask.documents(document_lengths(tokens, seed))


def _sliding_window(tokens: int, seed: int) -> Mask:
    return Mask.sliding_window(tokens, WINDOW, WINDOW)


def _sliding_window_causal(tokens: int, seed: int) -> Mask:
    return Mask.sliding_window(tokens, WINDOW)


def _share_question(tokens: int, seed: int) -> Mask:
    question, *answers = document_lengths(tokens, seed)
    return Mask.share_question(question, answers)


def _global_sliding_window(tokens: int, seed: int) -> Mask:
    width = global_width(tokens, seed)
    return Mask.global_window(tokens, width, width, width)


def _causal_blockwise(tokens: int, seed: int) -> Mask:
    """Documents that see themselves; the last sees all."""
    lengths = document_lengths(tokens, seed)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    bands = np.stack([starts, ends, starts, ends, np.full_like(ends, -UNBOUNDED), np.zeros_like(ends)], 1)
    bands[-1, 2] = 0
    return Mask.from_bands(bands, tokens, tokens)


def _prefix_lm_causal(tokens: int, seed: int) -> Mask:
    return Mask.prefix_lm(tokens, prefix_of_sequence(tokens, seed))


def _prefix_lm_document(tokens: int, seed: int) -> Mask:
    lengths = np.array(document_lengths(tokens, seed))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    middles = starts + np.minimum(prefix_of_documents(tokens, seed), lengths)
    far = np.full_like(ends, UNBOUNDED)
    prefixes = np.stack([starts, middles, starts, middles, -far, far], 1)
    rest = np.stack([middles, ends, starts, ends, -far, np.zeros_like(ends)], 1)
    return Mask.from_bands(np.concatenate([prefixes, rest[middles < ends]]), tokens, tokens)


def _block_causal_document(tokens: int, seed: int) -> Mask:
    return Mask.block_causal(*block_documents(tokens, seed))


LONGCA_MASKS: Mapping[str, Callable[[int, int], Mask]] = {
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
"""The 12 static masks: (tokens, seed) → Mask over as many queries as keys."""

KEPT = 0.2
"""Share of the key blocks that each row of a block pattern keeps; the benchmark has 0.1 to 1."""
UNIFORM_BLOCK = 128
SPARSE_KEPT = 0.1
"""The same of the plans whose rate is set against the dense one."""
VARIABLE_BLOCK = 512
SMALLEST_BLOCK = 128


class BlockPattern(NamedTuple):
    """Blocks that attend, by KV head: ``kept`` bool [kv_heads, query blocks, key blocks]; edges int64, from 0 to the end."""

    edges_q: np.ndarray
    edges_k: np.ndarray
    kept: np.ndarray


def _uniform_block(tokens: int, kv_heads: int, seed: int) -> BlockPattern:
    return _equal_blocks(tokens, kv_heads, seed, UNIFORM_BLOCK, KEPT)


def _plan_of_128(tokens: int, kv_heads: int, seed: int) -> BlockPattern:
    return _equal_blocks(tokens, kv_heads, seed, 128, SPARSE_KEPT)


def _plan_of_64(tokens: int, kv_heads: int, seed: int) -> BlockPattern:
    return _equal_blocks(tokens, kv_heads, seed, 64, SPARSE_KEPT)


def _equal_blocks(tokens: int, kv_heads: int, seed: int, size: int, kept: float) -> BlockPattern:
    edges = np.append(np.arange(0, tokens, size), tokens)
    generator = np.random.default_rng(seed)
    return BlockPattern(edges, edges, _top_blocks(generator, kv_heads, len(edges) - 1, len(edges) - 1, kept))


def _variable_block(tokens: int, kv_heads: int, seed: int) -> BlockPattern:
    """Blocks of at least 128 tokens whose other tokens are cut at sorted uniform places."""
    generator = np.random.default_rng(seed)
    num_blocks = max(1, tokens // VARIABLE_BLOCK)
    edges = []
    for _ in range(2):
        spare = tokens - num_blocks * SMALLEST_BLOCK
        cuts = np.sort(generator.integers(0, spare, num_blocks - 1, endpoint=True))
        sizes = SMALLEST_BLOCK + np.diff(np.concatenate([[0], cuts, [spare]]))
        edges.append(np.concatenate([[0], np.cumsum(sizes)]))
    return BlockPattern(edges[0], edges[1], _top_blocks(generator, kv_heads, num_blocks, num_blocks))


def _top_blocks(generator: np.random.Generator, kv_heads: int, num_q: int, num_k: int, kept: float = KEPT) -> np.ndarray:
    """The key blocks of highest uniform score in each row."""
    order = generator.random((kv_heads, num_q, num_k)).argsort(-1)
    return order.argsort(-1) < max(1, int(kept * num_k))


LONGCA_BLOCK_PATTERNS: Mapping[str, Callable[[int, int, int], BlockPattern]] = {
    "uniform_block": _uniform_block,
    "variable_block": _variable_block,
}
"""The two dynamic masks: (tokens, KV heads, seed) → blocks of each KV head; all its query heads follow it."""

SPARSE_PLANS: Mapping[str, Callable[[int, int, int], BlockPattern]] = {
    "block_plan_128": _plan_of_128,
    "block_plan_64": _plan_of_64,
}
"""Block plans that keep a tenth of the blocks of each row, by the size of their blocks; not of LongCA-bench."""

PLAN_SIZES: Mapping[str, int] = {"uniform_block": UNIFORM_BLOCK, "block_plan_128": 128, "block_plan_64": 64}
"""Patterns whose blocks are of one size, so that they make a block plan."""
