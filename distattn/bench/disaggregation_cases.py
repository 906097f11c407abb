"""What ``distattn bench disaggregation`` compares: mixes of document lengths, and engines that spread them over ranks.

    data_parallel        documents whole, as many tokens on every rank         no transfers, attention unbalanced
    wlb                  documents dealt by their work to groups of c ranks,   WLB-LLM's way (OSDI'25), the best c that was
                         per-document zigzag in each group                     measured: work even, tokens not
    ring, all_gather     per-document zigzag over all ranks
    disaggregated        tasks go where there is time; with ping-pong: in two halves in turns; contiguous: every rank holds the
                         tokens that come to it, without a choice of where rows lie
    auto                 what distattn chooses by itself: strategy, layout, and one nano-batch or two

All compute the same model on the same packed stream under the same mask: only where rows lie and what is sent differs.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from distattn.bench.lengths import DISTRIBUTIONS, draw
from distattn.errors import ConfigError
from distattn.models import ModelConfig
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions

MIXES = ("uniform", "wlb", "prolong512k", "long_and_short", "giant")
"""Every document an eighth of a rank's tokens; two corpora; one document of a rank's tokens among short ones; one of all."""

WLB_TOKENS = 1.25
"""How many tokens a rank of the packing by work may hold, over the mean: what its memory must have room for."""

SHAPES = {
    "8b": ModelConfig(
        vocab_size=256, dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336, tie_embeddings=True
    ),
    "tiny": ModelConfig(vocab_size=64, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64, tie_embeddings=True),
}  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """One way to spread a stream. layout: None leaves it to the plan; nano_batches: 2 is ping-pong, 0 as predicted."""

    name: str
    strategy: str
    layout: Layout | None = None
    options: Any = None
    nano_batches: int = 1


class RefusedError(Exception):
    """A mix that an engine cannot hold; the message says why."""


def make_lengths(mix: str, ranks: int, tokens: int, seed: int = 0) -> list[int]:
    """Documents that fill ``ranks · tokens`` tokens. ConfigError lists the mixes."""
    total = ranks * tokens
    if mix == "uniform":
        return [max(tokens // 8, 1)] * (total // max(tokens // 8, 1))
    if mix == "long_and_short":
        short = max(tokens // 32, 1)
        return [tokens, *[short] * ((total - tokens) // short)]
    if mix == "giant":
        return [total]
    if mix in DISTRIBUTIONS:
        return draw(mix, total, seed)
    raise ConfigError(f"unknown mix {mix!r}: choose from {', '.join([*MIXES, *sorted(DISTRIBUTIONS.keys() - set(MIXES))])}")


def engine_names(ranks: int) -> list[str]:
    """Those that there are for so many ranks, in the order of the table."""
    degrees = [c for c in range(1, ranks + 1) if ranks % c == 0]
    servers = ["disaggregated_servers"] if ranks > 2 else []
    return [
        "auto", "disaggregated_ping_pong", "disaggregated", "data_parallel", *(f"wlb_cp{c}" for c in degrees), "ring",
        "all_gather", "disaggregated_contiguous", "disaggregated_contiguous_ping_pong", "disaggregated_ping_pong_keep",
        *servers,
    ]  # fmt: skip


def make_engine(name: str, lengths: list[int], ranks: int, tokens: int, shape: ModelConfig) -> Engine:
    """Raises RefusedError where the engine cannot hold these documents, ConfigError for a name that there is not."""
    if name not in engine_names(ranks):
        raise ConfigError(f"unknown engine {name!r}: for {ranks} ranks there are {', '.join(engine_names(ranks))}")
    align = 128 if tokens >= 2048 else 8  # a kernel's tile, or something for tests
    if name == "auto":
        return Engine(name, "auto", nano_batches=0)
    if name == "data_parallel":
        return Engine(name, "all_gather", data_parallel_layout(lengths, ranks, tokens))
    if name.startswith("wlb_cp"):
        degree = int(name.removeprefix("wlb_cp"))
        return Engine(name, "all_gather", wlb_layout(lengths, ranks, degree, shape, min_cut=align))
    if name in ("ring", "all_gather"):
        return Engine(name, name, Layout.per_document_zigzag(lengths, ranks, min_cut=align))
    servers = 1 if name.endswith("servers") else 0
    placed = "contiguous" not in name
    options = DisaggregatedOptions(align=align, servers=servers, head_dim=shape.head_dim, place_rows=placed)
    return Engine(name, "disaggregated", options=options, nano_batches=2 if "ping_pong" in name or servers else 1)


def data_parallel_layout(lengths: list[int], ranks: int, tokens: int) -> Layout:
    """Whole documents, longest first, each to the rank with the fewest tokens."""
    if max(lengths) > tokens:
        raise RefusedError(f"a document of {max(lengths):,} tokens does not fit a rank of {tokens:,}")
    return _whole_documents(lengths, _deal(np.array(lengths, np.float64), np.array(lengths), ranks, np.inf), ranks)


def wlb_layout(lengths: list[int], ranks: int, degree: int, shape: ModelConfig, *, min_cut: int = 128) -> Layout:
    """Documents, those with the most work first, each to the group of ``degree`` ranks with the least work that has room."""
    sizes = np.array(lengths, np.int64)
    work = np.array([document_work(length, shape) for length in lengths])
    room = WLB_TOKENS * sizes.sum() / (ranks // degree)
    group = _deal(work, sizes, ranks // degree, room)
    starts = np.cumsum(sizes) - sizes
    ranges: list[list[tuple[int, int]]] = []
    for i in range(ranks // degree):
        chosen = np.flatnonzero(group == i)
        local = Layout.per_document_zigzag(sizes[chosen], degree, min_cut=min_cut)
        ranges += [_to_stream(local.rank_ranges(r), sizes[chosen], starts[chosen]) for r in range(degree)]
    return Layout.given(ranges, name=f"by work, {degree} ranks a group")


def document_work(length: int, shape: ModelConfig) -> float:
    """Forward FLOPs of one layer for a document: attention 4·d·H a pair, and twice the weights a token."""
    return 4 * shape.num_heads * shape.head_dim * length * (length + 1) / 2 + linear_work(shape) * length


def linear_work(shape: ModelConfig) -> float:
    """Forward FLOPs of one layer for a token outside attention: twice the weights."""
    width, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return 2 * shape.dim * (2 * width + 2 * keys + 3 * shape.ffn_dim)


def _deal(weight: np.ndarray, sizes: np.ndarray, bins: int, room: float) -> np.ndarray:
    """Heaviest first, each to the lightest bin that has room for its size: the bin of each, int64."""
    chosen, held = np.zeros(len(sizes), np.int64), np.zeros(bins)
    heap = [(0.0, b) for b in range(bins)]
    for i in np.argsort(-weight, kind="stable").tolist():
        passed_over = []
        while heap and held[heap[0][1]] + sizes[i] > room:
            passed_over.append(heapq.heappop(heap))
        if not heap:
            raise RefusedError(f"a document of {int(sizes[i]):,} tokens finds no group with room for it, {room:,.0f} each")
        load, b = heap[0]
        chosen[i] = b
        held[b] += sizes[i]
        heapq.heapreplace(heap, (load + float(weight[i]), b))
        for entry in passed_over:
            heapq.heappush(heap, entry)
    return chosen


def _whole_documents(lengths: list[int], rank: np.ndarray, ranks: int) -> Layout:
    stops = np.cumsum(lengths)
    starts = stops - lengths
    ranges = [list(zip(starts[rank == r].tolist(), stops[rank == r].tolist(), strict=True)) for r in range(ranks)]
    return Layout.given(ranges, name="whole documents")


def _to_stream(ranges: np.ndarray, sizes: np.ndarray, starts: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of rows of some documents put one after another, as ranges of the stream where those documents begin at starts."""
    edges = np.concatenate([[0], np.cumsum(sizes)])
    found = []
    for first, stop in ranges.tolist():
        document = int(np.searchsorted(edges, first, "right")) - 1
        while first < stop:
            end = min(stop, int(edges[document + 1]))
            shift = int(starts[document] - edges[document])
            found.append((first + shift, end + shift))
            first, document = end, document + 1
    return found
