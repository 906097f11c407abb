"""Step times of disaggregated attention and of its paper's baseline, for ``distattn bench cad-simulation``.

    balanced baseline   documents go whole to data-parallel groups of c ranks, by work, as far as their memory allows; each
                        group cuts every document zigzag and gathers its keys; the best c counts (WLB-LLM, "ideal")
    disaggregated       tokens lie evenly, attention is planned over all ranks in two nano-batches, which take turns
    with a pipeline     one tick lasts as long as its slowest stage; disaggregated, all stages of a tick are one pool

A rank is a tensor-parallel group of 8 GPUs in one node; each GPU has an eighth of the heads and talks to its counterparts over
its own network card. Outside attention a layer takes what ``cad-layers`` measured, plus its tensor-parallel transfers. Gradient
exchange, embedding, loss and optimizer are the same in both and left out.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from distattn.bench.cad_layers import LayerTime, ModelShape
from distattn.mask import Mask
from distattn.parallel import kernel_time
from distattn.parallel.backward import derive_backward
from distattn.parallel.disaggregation.ticks import NanoTimes, nano_times, ping_pong
from distattn.parallel.hardware import Hardware
from distattn.parallel.program import Program
from distattn.parallel.schedulers.auto import choose_layout
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions, plan
from distattn.parallel.simulate import Prediction, predict

TENSOR_PARALLEL = 8
RANK_TOKENS = 131_072
MEMORY_SLACK = 1.2
"""How many more tokens than the mean a rank of the baseline may hold: packing by work needs some."""
_TILE = 128

Prices = tuple[kernel_time.Price | None, kernel_time.Price | None]


@dataclass(frozen=True)
class Setting:
    """A model on a cluster. hardware: of one GPU, a node being one rank; layer: of one GPU, without transfers; turns: how much
    longer computing takes in two nano-batches than in one; attention: how much longer it takes in a step than by its kernel's
    rates."""

    model: ModelShape
    hardware: Hardware
    layer: LayerTime
    tolerance: float = 0.05
    turns: float = 1.0
    attention: float = 1.0

    @property
    def heads(self) -> int:
        """Query heads of one GPU."""
        return self.model.heads // TENSOR_PARALLEL

    @property
    def kv_heads(self) -> int:
        """KV heads of one GPU."""
        return self.model.kv_heads // TENSOR_PARALLEL

    def linear_seconds(self, tokens: float, *, backward: bool) -> float:
        """Of one layer: its matrices, and gathering and scattering activations twice each in a direction."""
        moved = 4 * tokens * self.model.hidden * 2 * (TENSOR_PARALLEL - 1) / TENSOR_PARALLEL
        compute = self.layer.backward_s if backward else self.layer.forward_s
        return tokens * compute + moved / (self.hardware.inside_gb_per_second * 1e9)


def baseline_seconds(documents: Sequence[int], ranks: int, setting: Setting, price: Prices) -> tuple[float, int]:
    """(seconds of one layer, forward and backward, ranks that share a document): the best of all power-of-two group sizes."""
    found = []
    for context in (2**i for i in range(ranks.bit_length()) if not ranks % 2**i):
        groups = packed_by_work(documents, ranks // context, MEMORY_SLACK * sum(documents) / ranks * context, setting)
        if groups is not None:
            found.append((max(sum(group_seconds(group, context, setting, price)) for group in groups), context))
    return min(found)


def packed_by_work(documents: Sequence[int], groups: int, room: float, setting: Setting) -> list[list[int]] | None:
    """Documents dealt whole, the costliest first, each to the group with the least work that has room for its tokens; None
    where one has no place."""
    token_work = setting.model.linear_flops / (4 * setting.model.head_dim * setting.model.heads)
    heap = [(0.0, 0, index) for index in range(groups)]
    dealt: list[list[int]] = [[] for _ in range(groups)]
    for length in sorted(documents, reverse=True):
        full = []
        while heap and heap[0][1] + length > room:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        work, tokens, index = heapq.heappop(heap)
        dealt[index].append(length)
        heapq.heappush(heap, (work + length * (length + 1) / 2 + token_work * length, tokens + length, index))
        for entry in full:
            heapq.heappush(heap, entry)
    return dealt


def prices(documents: Sequence[int], setting: Setting) -> Prices:
    """Of attention over such documents, forward and backward, by one GPU."""
    mask, width, group = Mask.documents(documents), setting.model.head_dim, setting.heads // setting.kv_heads
    forward, backward = (
        scaled(kernel_time.price(mask, setting.hardware, setting.heads, width, backward=back, group=group), setting.attention)
        for back in (False, True)
    )
    return forward, backward


def scaled(price: kernel_time.Price | None, factor: float) -> kernel_time.Price | None:
    """A kernel that takes ``factor`` times as long, launches apart."""
    return price and replace(price, row_s=factor * price.row_s, pair_s=factor * price.pair_s)


def group_seconds(documents: Sequence[int], context: int, setting: Setting, prices: Prices) -> tuple[float, float]:
    """(forward, backward) of one layer on the ranks that share these documents; keys are gathered before attention begins."""
    lengths = np.array(documents, np.float64)
    # Each rank has two chunks of every document; a chunk is computed in whole tiles.
    chunk = np.ceil(lengths / (2 * context) / _TILE) * _TILE if context > 1 else lengths / 2
    rows, pairs = 2 * float(chunk.sum()), float((chunk * (lengths + 1)).sum())
    gathered = float(lengths.sum()) * (context - 1) / context * 2 * setting.kv_heads * setting.model.head_dim * 2
    latency = setting.hardware.between_latency_us * 1e-6 if context > 1 else 0.0
    travel = gathered / (setting.hardware.between_gb_per_second * 1e9) + latency
    seconds = []
    for backward in (False, True):
        attention = _attention_seconds(pairs, rows, setting, prices[backward], backward=backward)
        # The backward gathers keys again and scatters fp32 gradients, twice as wide.
        linear = setting.linear_seconds(float(lengths.sum()) / context, backward=backward)
        seconds.append(linear + attention + travel * (3 if backward else 1))
    return seconds[0], seconds[1]


def _attention_seconds(
    pairs: float, rows: float, setting: Setting, price: kernel_time.Price | None, *, backward: bool
) -> float:
    if price is None:
        flops = (10 if backward else 4) * setting.model.head_dim * setting.heads * pairs
        return flops / setting.hardware.flops_per_second(backward=backward)
    return price.call_s + setting.heads * (rows * price.row_s + pairs * price.pair_s)


@dataclass(frozen=True)
class CadStep:
    """Seconds of one layer, forward and backward; what of them waits for transfers; attention's busiest rank over the mean."""

    seconds: float
    exposed_seconds: float
    imbalance: float


def cad_seconds(documents: Sequence[int], ranks: int, setting: Setting, price: Prices) -> CadStep:
    """Planned over all ranks, in two nano-batches of equal tokens that take turns or in one, whichever is faster; steady state
    of many layers."""
    return min(_in_turns(documents, ranks, setting, price), _in_one(documents, ranks, setting, price), key=lambda x: x.seconds)


def _in_turns(documents: Sequence[int], ranks: int, setting: Setting, price: Prices) -> CadStep:
    forward, backward, imbalance = [], [], 1.0
    for half in dealt_by_tokens(documents, 2):
        mask, program = _planned(half, ranks, setting)
        there, ratio = layer_times(program, mask, setting, price)
        back, _ = layer_times(derive_backward(program), mask, setting, price)
        forward.append(there)
        backward.append(back)
        imbalance = max(imbalance, ratio)
    seconds = exposed = 0.0
    for nanos, back in ((forward, False), (backward, True)):
        few, many = (ping_pong((nanos[0], nanos[1]), layers, backward=back) for layers in (2, 3))
        seconds += many[-1].end - few[-1].end
        exposed += sum(t.exposed_seconds for t in many) - sum(t.exposed_seconds for t in few)
    return CadStep(seconds, exposed, imbalance)


def _in_one(documents: Sequence[int], ranks: int, setting: Setting, price: Prices) -> CadStep:
    """Attention hides of its transfers what it can behind its own work."""
    mask, program = _planned(documents, ranks, setting)
    seconds = exposed = 0.0
    imbalance = 1.0
    for direction in (program, derive_backward(program)):
        found = predicted(direction, mask, setting, price)
        seconds += setting.linear_seconds(float(program.layout.counts.max()), backward=direction.backward) + found.seconds
        exposed += found.exposed_communication_seconds
        imbalance = max(imbalance, found.cost.imbalance)
    return CadStep(seconds, exposed, imbalance)


def _planned(documents: Sequence[int], ranks: int, setting: Setting) -> tuple[Mask, Program]:
    mask, options = Mask.documents(documents), DisaggregatedOptions(tolerance=setting.tolerance)
    sizes = {"heads": setting.heads, "kv_heads": setting.kv_heads}
    layout = choose_layout(mask, ranks, "disaggregated", **sizes, options=options).layout
    return mask, plan(mask, layout, setting.heads, setting.kv_heads, options)


def predicted(program: Program, mask: Mask, setting: Setting, price: Prices) -> Prediction:
    """Of one layer's attention in one piece."""
    # The baseline has no tiles to look at, so that both pay the mask's mean price.
    hardware = replace(setting.hardware, kernels=())
    return predict(program, mask, hardware, setting.model.head_dim, price=price[program.backward])


def dealt_by_tokens(documents: Sequence[int], parts: int) -> list[list[int]]:
    """Whole documents in parts of nearly equal tokens: the longest first, each to the part with the fewest."""
    heap = [(0, index) for index in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for length in sorted(documents, reverse=True):
        tokens, index = heapq.heappop(heap)
        dealt[index].append(length)
        heapq.heappush(heap, (tokens + length, index))
    return dealt


def layer_times(program: Program, mask: Mask, setting: Setting, price: Prices) -> tuple[NanoTimes, float]:
    """Of one layer by rank, as one of two nano-batches, and attention's busiest rank over the mean."""
    prediction = predicted(program, mask, setting, price)
    linear = np.array([setting.linear_seconds(n, backward=program.backward) for n in program.layout.counts.tolist()])
    times = nano_times(program, prediction, linear)
    times = replace(times, linear=setting.turns * times.linear, attention=setting.turns * times.attention)
    return times, prediction.cost.imbalance
