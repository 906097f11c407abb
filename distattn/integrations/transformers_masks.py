"""From the mask functions that transformers composes to a ``Mask``, without evaluating them pair by pair.

    and_masks(sliding_window_overlay(W), causal_mask_function)        Rule(lo=1−W, hi=0)
    … remapped to position_ids, and'ed with packed_sequence_mask      + documents, from the ids that it carries
    attention_mask [B, S] of ones and zeros                           + which keys are real

A function is recognised by its code object, and what transformers' own functions mean is checked once against their values.
One that is not recognised is never guessed: it is refused, or evaluated in blocks where ``register`` was told to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils

from distattn.bands import UNBOUNDED
from distattn.errors import UnsupportedError
from distattn.mask import Mask

MAX_EVALUATED_PAIRS = 1 << 30
"""Most (query, key) pairs of an unknown mask function that are evaluated for one forward."""

_BLOCK = 128


@dataclass(frozen=True)
class Rule:
    """What a layer allows within a document: ``lo ≤ key − query ≤ hi`` in positions and, with chunk > 0, equal
    ``position // chunk``."""

    lo: int = -UNBOUNDED
    hi: int = UNBOUNDED
    chunk: int = 0

    @property
    def window(self) -> int:
        """Keys that a causal window holds, the query's own included; 0 where there is no window."""
        return 0 if self.lo == -UNBOUNDED else 1 - self.lo


@dataclass(frozen=True)
class Span:
    """Keys or queries ``start … end`` of one row whose positions count up by one. chunk_start: position of the first, from
    which chunks are counted."""

    start: int
    end: int
    chunk_start: int = 0


@dataclass(frozen=True)
class Parsed:
    """A mask function taken apart. document_ids, position_ids: int64 [B, S] where packing was found, else None."""

    rule: Rule
    document_ids: Tensor | None = None
    position_ids: Tensor | None = None


def parse(mask_function: Callable[..., Any]) -> Parsed | None:
    """The rule and the packing in a composed mask function; None if it holds a function that isn't transformers' own."""
    try:
        return _parse(mask_function, Parsed(Rule()))
    except _Unknown:
        return None


def check_transformers() -> None:
    """UnsupportedError where transformers' own mask functions mean something else than is assumed here."""
    _codes()


def document_mask(rule: Rule, queries: Sequence[Span], keys: Sequence[Span], num_queries: int, num_keys: int) -> Mask:
    """Queries of span i see keys of span i, as the rule says; a key's index minus a query's is their distance."""
    bands = []
    for q, k in zip(queries, keys, strict=True):
        bands += _span_bands(rule, q, k)
    return Mask(num_queries, num_keys, np.array(bands, np.int64).reshape(-1, 6))


def _span_bands(rule: Rule, q: Span, k: Span) -> list[list[int]]:
    if not rule.chunk:
        return [[q.start, q.end, k.start, k.end, rule.lo, rule.hi]]
    zero_q, zero_k = q.start - q.chunk_start, k.start - k.chunk_start  # where position 0 would lie
    first, last = q.chunk_start // rule.chunk, (q.chunk_start + q.end - q.start - 1) // rule.chunk
    bands = []
    for c in range(first, last + 1):
        q0, q1 = max(q.start, zero_q + c * rule.chunk), min(q.end, zero_q + (c + 1) * rule.chunk)
        k0, k1 = max(k.start, zero_k + c * rule.chunk), min(k.end, zero_k + (c + 1) * rule.chunk)
        if q0 < q1 and k0 < k1:
            bands.append([q0, q1, k0, k1, rule.lo, rule.hi])
    return bands


def offset_rule(rule: Rule, query_offset: int, key_offset: int) -> Rule:
    """The rule on indices where query i has position i + query_offset and key j has j + key_offset."""
    shift = query_offset - key_offset
    return replace(
        rule,
        lo=rule.lo if rule.lo == -UNBOUNDED else rule.lo + shift,
        hi=rule.hi if rule.hi == UNBOUNDED else rule.hi + shift,
    )


def evaluate(mask_function: Callable[..., Any], padding: Tensor | None, row: int, shape: tuple[int, int, int, int]) -> Mask:
    """The mask of an unknown function for one batch row, every pair evaluated, block by block.

    padding: bool [B, Sk], or None; shape: (queries, keys, query offset, key offset). UnsupportedError where there are too many
    pairs, or the function cannot be evaluated.
    """
    num_queries, num_keys, query_offset, key_offset = shape
    if num_queries * num_keys > MAX_EVALUATED_PAIRS:
        raise UnsupportedError(
            f"a mask function that distattn does not know was to be evaluated for {num_queries}x{num_keys} pairs, and at most "
            f"{MAX_EVALUATED_PAIRS} are: use transformers' own mask functions for sequences of this length"
        )

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        entry = b * 0 + row
        allowed = mask_function(entry, h, q + query_offset, k + key_offset)
        return allowed if padding is None else allowed & padding[entry, k + key_offset]

    rows, columns = -(-num_queries // _BLOCK), -(-num_keys // _BLOCK)
    device = "cpu" if padding is None else padding.device
    counts = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
    indices = torch.arange(columns, dtype=torch.int32, device=device).expand(1, 1, rows, columns).contiguous()
    every = BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(num_queries, num_keys), compute_q_blocks=False
    )
    return Mask.from_flex(every)


def runs(equal_to_next: np.ndarray) -> np.ndarray:
    """[start, end) of the runs of a row, int64 [N, 2]; equal_to_next: bool [S − 1], whether neighbours belong together."""
    cuts = np.flatnonzero(~equal_to_next) + 1
    edges = np.concatenate([[0], cuts, [len(equal_to_next) + 1]])
    return np.stack([edges[:-1], edges[1:]], 1)


def true_runs(flags: np.ndarray) -> np.ndarray:
    """[start, end) of the runs of True, int64 [N, 2]."""
    padded = np.concatenate([[False], flags, [False]]).astype(np.int8)
    change = np.diff(padded)
    return np.stack([np.flatnonzero(change == 1), np.flatnonzero(change == -1)], 1)


class _Unknown(Exception):
    """A function that is not transformers' own."""


def _parse(function: Any, found: Parsed) -> Parsed:
    code: Any = getattr(function, "__code__", None)
    if code not in _codes():
        raise _Unknown
    kind = _codes()[code]
    cells: dict[str, Any] = {
        name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)
    }
    rule = found.rule
    if kind == "and":
        for part in cells["mask_functions"]:
            found = _parse(part, found)
        return found
    if kind == "causal":
        return replace(found, rule=replace(rule, hi=min(rule.hi, 0)))
    if kind == "window":
        return replace(found, rule=replace(rule, lo=max(rule.lo, 1 - int(cells["sliding_window"]))))
    if kind == "both_window":
        width = int(cells["sliding_window"])
        return replace(found, rule=replace(rule, lo=max(rule.lo, -width), hi=min(rule.hi, width)))
    if kind == "chunk":
        size = int(cells["chunk_size"])
        if rule.chunk not in (0, size):
            raise _Unknown
        return replace(found, rule=replace(rule, chunk=size))
    if kind == "packed":
        return replace(found, document_ids=cells["packed_sequence_mask"])
    if kind == "remap":
        return replace(_parse(cells["mask_function"], found), position_ids=cells["position_ids"])
    return found  # everything


@functools.cache
def _codes() -> dict[CodeType, str]:
    """Code object → what the function does; UnsupportedError if this transformers' functions do something else."""
    m = masking_utils
    zeros = torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(1, 8, dtype=torch.int64)
    samples: list[tuple[str, Any, Rule | None]] = [
        ("causal", m.causal_mask_function, Rule(hi=0)),
        ("everything", m.bidirectional_mask_function, Rule()),
        ("window", m.sliding_window_overlay(3), Rule(lo=-2)),
        ("both_window", m.sliding_window_bidirectional_overlay(2), Rule(lo=-2, hi=2)),
        ("chunk", m.chunked_overlay(3, zeros), Rule(chunk=3)),
        ("and", m.and_masks(m.causal_mask_function, m.sliding_window_overlay(3)), Rule(lo=-2, hi=0)),
        ("packed", m.packed_sequence_mask_function(table), None),
    ]
    # Not in transformers 5.17, which counts chunks of packed rows from the beginning of the row.
    if (remap := getattr(m, "remap_positions_for_packed_sequence", None)) is not None:
        samples.append(("remap", remap(m.causal_mask_function, table), None))
    q, k = torch.arange(8)[:, None], torch.arange(8)[None, :]
    for kind, function, rule in samples:
        if rule is None:
            continue
        means = torch.as_tensor(function(0, 0, q, k)).expand(8, 8).numpy()
        ours = document_mask(rule, [Span(0, 8)], [Span(0, 8)], 8, 8).dense()
        if not np.array_equal(means, ours):
            raise UnsupportedError(
                f"transformers' {kind} mask function allows other pairs than distattn expects of it: use a version of "
                "transformers that this distattn was tested with (5.24)"
            )
    return {function.__code__: kind for kind, function, _ in samples}
