"""Ping-pong: two nano-batches take turns, so that what one sends to other ranks travels while the other computes.

    computed     C(0)    C(1)      A(0)      A(1)    │ C(0) of the next layer …
    travelling   O(1)    QKV(0)    QKV(1)    O(0)    │ O(1)

C is what needs no other rank: the end of one layer and the beginning of the next. A is attention. One such row is a *phase*.
The backward goes through phases in exact reverse, since autograd runs the nodes of split-phase calls in the reverse of the
order in which they were made (DistCA, arXiv 2510.18121, §4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distattn.attention import AttentionHandle, attention_begin, attention_compute, attention_finish
from distattn.errors import InputError, PlanError
from distattn.mask import Mask
from distattn.parallel.disaggregation.halves import Arrangement, arrange, check_cut, first_mask, own_mask, second_half
from distattn.parallel.layout import Layout
from distattn.parallel.schedulers.auto import choose_layout
from distattn.planning import Plan, plan

PhaseRunner = Callable[..., Any]
"""``run(function, *args) -> function(*args)``, perhaps under activation checkpointing."""


@dataclass(frozen=True, eq=False)
class NanoBatches:
    """One nano-batch or two, with the plans of their attention.

    starts: row of the stream, as arranged, at which each plan's rows begin. carried: int64 [n], local rows of the first
    nano-batch whose keys the second's queries see; in the second's plan they come before its own rows, on every rank. order:
    int64, row of the stream of each row as arranged; None where nothing was rearranged. reason: why there are one or two,
    where that was chosen.
    """

    plans: tuple[Plan, ...]
    starts: tuple[int, ...]
    carried: Tensor
    order: Tensor | None = None
    reason: str = ""

    @classmethod
    def of(cls, *plans: Plan) -> NanoBatches:
        """Nano-batches that do not see each other: one alone, or two, such as two sequences of a step."""
        if not 1 <= len(plans) <= 2:
            raise InputError(f"ping-pong takes one nano-batch or two, got the plans of {len(plans)}")
        return cls(plans, (0,) * len(plans), torch.zeros(0, dtype=torch.int64))

    @cached_property
    def positions(self) -> tuple[Tensor, ...]:
        """Row of the stream of each local row of each nano-batch: int64 [S_local], for RoPE, labels and losses."""
        skipped = (0, len(self.carried))
        rows = (x.positions[n:] + start for x, n, start in zip(self.plans, skipped, self.starts))
        return tuple(rows if self.order is None else (self.order[part] for part in rows))

    def describe(self) -> str:
        """Both plans, in lines, after the reason for their number."""
        lines = [self.reason] if self.reason else []
        return "\n".join(lines + [f"nano-batch {i}\n{x.describe()}" for i, x in enumerate(self.plans)])

    def select_carried(self, x: Tensor) -> Tensor:
        """Of the first nano-batch's x [B, S_local, …], the rows that the second sees: [B, n, …]."""
        if x.device not in self._carried_on:
            rows, count = self.carried, len(self.carried)
            first = int(rows[0]) if count else 0
            in_a_row = torch.equal(rows, torch.arange(first, first + count))
            self._carried_on[x.device] = slice(first, first + count) if in_a_row else rows.to(x.device)
        return x[:, self._carried_on[x.device]]

    @cached_property
    def _carried_on(self) -> dict[torch.device, slice | Tensor]:
        return {}


def cut_in_two(mask: Mask, *, at: int | None = None, strategy: str = "auto", **arguments: Any) -> NanoBatches:
    """Two nano-batches of one stream with as many tokens, each spread over all ranks. Collective, as ``plan``.

    Documents go whole to one nano-batch or the other where that leaves both with nearly the same tokens; else one document is
    cut. Exact for any mask under which no row before a cut sees a row behind it: documents and causal masks of all kinds, one
    giant document too. The second nano-batch's plan begins with those rows of the first that it sees (of a document that is
    cut), for their keys; their queries see nothing there.

    mask: square. at: rows [0, at) and [at, n) instead, in the stream's order. strategy, arguments: those of ``plan``, without
    layout and key_layout. Raises PlanError where the stream cannot be cut, and what ``plan`` raises.
    """
    for name in ("layout", "key_layout"):
        if name in arguments:
            raise PlanError(f"cut_in_two chooses where rows lie: leave {name} out, or make two plans and use NanoBatches.of")
    if mask.num_queries != mask.num_keys or mask.num_queries < 2:
        shape = f"{mask.num_queries} × {mask.num_keys}"
        raise PlanError(f"only a stream of 2 or more rows, queries and keys alike, can be cut in two; the mask is {shape}")
    found = arrange(mask) if at is None else Arrangement(mask, check_cut(mask, at), None)
    if found is None:
        raise PlanError(
            "this mask cannot be cut in two: rows of the first half see rows of the second, and there is no row that no pair "
            "crosses; run it without ping-pong, or use two sequences as nano-batches (NanoBatches.of)"
        )
    first = plan(first_mask(found), strategy=strategy, **arguments)
    own = _own_layout(own_mask(found), first, strategy, arguments)
    later = second_half(found, first.layout, own)
    second = plan(later.mask, strategy=strategy, layout=later.layout, **arguments)
    carried = np.flatnonzero(first.layout.rows(first.rank) >= later.seen)
    order = None if found.order is None else torch.from_numpy(found.order)
    return NanoBatches((first, second), (0, later.seen), torch.from_numpy(carried), order)


def _own_layout(own: Mask, first: Plan, strategy: str, arguments: dict[str, Any]) -> Layout:
    """Where the second nano-batch's own rows lie: chosen as the first's were."""
    options = arguments.get("options") if strategy != "auto" else None
    sizes = {"heads": first.heads, "kv_heads": first.kv_heads}
    return choose_layout(own, first.num_ranks, first.strategy, **sizes, options=options).layout


class Phase(nn.Module):
    """From the attention of one layer to that of the next, for all nano-batches: the unit to shard with ``fully_shard``.

    after: ``after(out, *kept, info) -> x``, with attention's lse behind its out if asked for, None in the first phase. before:
    ``before(x, info) -> (q, k, v, *kept)``, None in the last. run: how what needs no other rank is called; attention is never
    part of it, so that no checkpointing repeats it.
    """

    def __init__(self, after: nn.Module | None, before: nn.Module | None) -> None:
        super().__init__()
        self.after, self.before = after, before
        self.run: PhaseRunner = _run_plainly

    def forward(self, flows: list[tuple[Tensor, ...]], calls: _Calls) -> list[tuple[Tensor, ...]]:
        """flows: of each nano-batch (x,), or where attention is under way (token, *kept); the same comes out."""
        produced = []
        for i, flow in enumerate(flows):
            arrived = flow if self.after is None else (*calls.finish(i, flow[0]), *flow[1:])
            results = self.run(self._compute, calls.infos[i], *arrived)
            if self.before is not None:
                calls.begin(i, *results[:3])
                results = results[3:]
            produced.append(results)
        if self.before is None:
            return produced
        return [(token, *kept) for token, kept in zip(calls.compute(), produced, strict=True)]

    def _compute(self, info: Any, *arrived: Tensor) -> tuple[Tensor, ...]:
        x = arrived[0] if self.after is None else self.after(*arrived, info)
        return (x,) if self.before is None else self.before(x, info)


class _Calls:
    """The attention calls of all nano-batches in one layer. A plain class: FSDP2 takes other containers apart."""

    def __init__(self, nano: NanoBatches, infos: Sequence[Any], options: dict[str, Any]) -> None:
        self.nano, self.infos, self.options = nano, infos, options
        self.handles: list[AttentionHandle | None] = [None] * len(nano.plans)
        self._keys: tuple[Tensor, Tensor] | None = None

    def begin(self, i: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        nano = self.nano
        if len(nano.carried) and i == 0:
            self._keys = nano.select_carried(k), nano.select_carried(v)
        if len(nano.carried) and i == 1:
            assert self._keys is not None
            q = torch.cat([q.new_zeros((q.shape[0], len(nano.carried), *q.shape[2:])), q], 1)
            k, v = (torch.cat([first, own], 1) for first, own in zip(self._keys, (k, v)))
            self._keys = None
        self.handles[i] = attention_begin(q, k, v, nano.plans[i], **self.options)

    def compute(self) -> list[Tensor]:
        """Launch every call; the tokens that lead to ``finish``."""
        tokens = []
        for handle in self.handles:
            assert handle is not None
            attention_compute(handle)
            assert handle.token is not None
            tokens.append(handle.token)
        return tokens

    def finish(self, i: int, token: Tensor) -> tuple[Tensor, ...]:
        """(out,) or (out, lse) of the nano-batch's own rows."""
        handle = self.handles[i]
        assert handle is not None
        handle.token = token
        found = attention_finish(handle)
        self.handles[i] = None
        skipped = len(self.nano.carried) if i == 1 else 0
        return tuple(part[:, skipped:] for part in (found if isinstance(found, tuple) else (found,)))


class PingPong(nn.Module):
    """A stack of attention layers that one nano-batch goes through, or two in turns, with the same results.

        layers: for each, ``before(x, info) -> (q, k, v, *kept)`` and ``after(out, *kept, info) -> x``

    before: everything up to q, k, v [B, S_local, heads, D], with whatever ``after`` needs besides attention's output, such as
    the residual stream, as tensors. after: from out [B, S_local, H, Dv] to the layer's result. info: whatever they want to know
    of the nano-batch (rotary angles, say), but nothing that needs a gradient.

    ``phases`` holds the units to shard: ``fully_shard`` each, and then the model with ``ignored_params`` set to theirs. Weights
    are then gathered once a phase and direction, not once a nano-batch.
    """

    def __init__(self, layers: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        if not layers:
            raise InputError("ping-pong needs at least one layer, got none")
        befores = [*(before for before, _ in layers), None]
        afters = [None, *(after for _, after in layers)]
        self.phases = nn.ModuleList(Phase(after, before) for after, before in zip(afters, befores, strict=True))

    def forward(self, xs: Sequence[Tensor], infos: Sequence[Any], nano: NanoBatches, **options: Any) -> list[Tensor]:
        """The last layer's results, of each nano-batch. Collective over the plans' group: ranks without rows call it too.

        xs: [B, S_local, …] of each nano-batch, rows as in ``nano.positions``; infos: for its ``before`` and ``after``; options:
        scale, softcap and return_lse of ``attention``; the last makes it ``after(out, lse, *kept, info)``, for a sink of the
        layer's own (``apply_sink``). Run one ``backward()`` from one root that both results lead to. Raises InputError.
        """
        count = len(nano.plans)
        if len(xs) != count or len(infos) != count:
            raise InputError(f"there are {count} nano-batches, but {len(xs)} inputs and {len(infos)} infos: give one of each")
        for i, (x, rows) in enumerate(zip(xs, nano.positions, strict=True)):
            if x.ndim < 2 or x.shape[1] != len(rows):
                raise InputError(f"nano-batch {i}'s x must be [B, {len(rows)}, …], its rows on this rank, got {list(x.shape)}")
        unknown = sorted(options.keys() - {"scale", "softcap", "return_lse"})
        if unknown:
            raise InputError(
                f"ping-pong takes scale, softcap and return_lse of attention, not {', '.join(unknown)}: what differs from "
                "layer to layer, such as a sink, belongs into its modules"
            )
        calls = _Calls(nano, infos, options)
        flows = [(x,) for x in xs]
        for phase in self.phases:
            flows = phase(flows, calls)
        return [x for (x,) in flows]

    def set_runner(self, run: PhaseRunner) -> None:
        """Call what needs no other rank by ``run(function, *args)``, such as
        ``functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)``: attention is not repeated."""
        for phase in self.phases:
            assert isinstance(phase, Phase)
            phase.run = run


def _run_plainly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
