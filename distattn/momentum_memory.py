"""``momentum_memory``: a memory that learns each document at test time, over rows that are spread over ranks: Titans' operator.

e_t = k_t M₀ − v_t        S_t = η_t S_{t−1} − 2 θ_t k_tᵀ e_t        M_t = α_t M_{t−1} + S_t        o_t = q_t M_t

M₀ is the memory before t's chunk: chunks of C rows, counted from the start of the document, are part of the model. All of it
is linear in (M, S), so that a piece of a document is one affine map of them, a 2 × 2 block, and any exchange moves it. Where a
border between ranks lies inside a chunk, M₀ travels with them.

write_memory        states before every chunk, the exchange included  ─▶ WrittenMemory
WrittenMemory.read  what each row's query finds: local, as often as wanted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distattn.errors import InputError
from distattn.kernels.linear.momentum_memory import (
    Coefficients,
    Steps,
    coefficients,
    differentiate,
    read,
    run_back,
    run_states,
    start_of,
    transitions,
)
from distattn.kernels.linear.reference import state_dtype
from distattn.momentum_memory_planning import MemoryPlan, MemoryRequest, Run, memory_plan_of, plan_memory
from distattn.parallel.exchanges import ExchangeRun, LoweredExchange, Map
from distattn.parallel.hardware import Hardware, find_hardware
from distattn.parallel.layout import Layout
from distattn.parallel.reduction import reduce_over_ranks
from distattn.parallel.transport.collective import group_device


@dataclass(frozen=True, eq=False)
class WrittenMemory:
    """The memory at every row of this rank. final_state: see ``write_memory``; the rest is what ``read`` needs."""

    plan: MemoryPlan
    final_state: Tensor | None
    _k: Tensor
    _v: Tensor
    _coefficients: Coefficients
    _states: Tensor
    _dtype: torch.dtype

    def read(self, q: Tensor) -> Tensor:
        """q_t M_t: what is written at each row is read there. q [B, T_local, H, K]; returns [B, T_local, H, V]. Differentiable,
        not collective. Raises InputError."""
        return self._back(read(self._chunked(q), self._k, self._v, self._coefficients, self._states))

    def read_before(self, q: Tensor) -> Tensor:
        """q_t M₀: the memory before t's chunk, the same shapes."""
        return self._back(self._chunked(q) @ start_of(self._states))

    def _chunked(self, q: Tensor) -> Tensor:
        batch, heads, key_dim, _ = self.plan.request.shape
        wanted = (batch, self.plan.request.rows, heads, key_dim)
        if tuple(q.shape) != wanted or not q.is_floating_point() or q.device != self._k.device:
            raise InputError(
                f"q must be floating, on {self._k.device}, of shape {list(wanted)} as k is; got {q.dtype} on {q.device}, "
                f"{list(q.shape)}"
            )
        return _to_chunks(q, self.plan)

    def _back(self, o: Tensor) -> Tensor:
        """[B, N, H, C, V] to rows."""
        return o.transpose(2, 3).flatten(1, 2).index_select(1, self.plan.table("rows")).to(self._dtype)


def momentum_memory(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """``write_memory(k, v, **options)`` and one ``read(q)``: (o [B, T_local, H, V] in v's dtype, final state or None)."""
    memory = write_memory(k, v, **options)
    return memory.read(q), memory.final_state


def write_memory(
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor,
    momentum: Tensor,
    rate: Tensor,
    chunk: int = 64,
    group: dist.ProcessGroup | None = None,
    exchange: str = "auto",
    layout: Layout | None = None,
    cu_seqlens: np.ndarray | Sequence[int] | None = None,
    initial_state: Tensor | None = None,
    seen: np.ndarray | Sequence[int] | None = None,
    output_final_state: bool = False,
    options: Any = None,
    topology: Hardware | str | None = None,
    timeout_s: float | None = None,
) -> WrittenMemory:
    """Learn this rank's rows after all rows before them in their documents, on any rank. Collective; differentiable.

        e_t = k_t M₀ − v_t;  S_t = e^{momentum_t} S_{t−1} − 2 rate_t k_tᵀ e_t;  M_t = e^{decay_t} M_{t−1} + S_t

    k [B, T_local, H, K], v [B, T_local, H, V] in any floating dtype; states are fp32 (fp64 for fp64). decay, momentum: natural
    logarithms ≤ 0, −∞ allowed; rate ≥ 0; each [B, T_local, H]. As with any gradient descent steps may be too long: for equal
    keys, where Σ rate · ‖k‖² over a chunk exceeds about 1 − e^momentum. chunk: rows that learn from one memory M₀, counted
    from the start of each document. group, exchange, layout, options, topology, timeout_s: as for ``linear_attention``;
    cu_seqlens too, on the host.

    initial_state [N, H, 3, K, V], N = B · D, or 1 for the same before all: (M, S, M₀) before each document, passed alike by all
    ranks; its gradient appears on the rank that holds the document's first row. seen [D], on the host: rows that it has seen;
    where that is a multiple of chunk, as 0 is, which None stands for, a chunk begins and M takes the place of M₀. With
    output_final_state, ``final_state`` is the same after each document, in fp32 (fp64), on every rank, and the gradients of
    all ranks' uses are summed. A document without rows passes its state on.

    Saved for backward: k, v, the rates, and a state a chunk. If one rank runs the backward, all must. Titans' memory with
    linear M (arXiv 2501.00663, §3.1 and 3.2).

    Raises InputError naming the argument, PlanError for the exchange, AgreementError where ranks made different calls,
    TransportError if a transfer fails.
    """
    dtype = _checked(k, v, {"decay": decay, "momentum": momentum, "rate": rate}, chunk)
    plan = _prepare(
        k, v, dtype, chunk, group, exchange, layout, cu_seqlens, seen, output_final_state, options, topology, timeout_s
    )
    found = coefficients(_to_chunks(decay, plan), _to_chunks(momentum, plan), _to_chunks(rate, plan), plan.table("filled"))
    keys, values = _to_chunks(k, plan), _to_chunks(v, plan)
    initial = _checked_state(initial_state, plan)
    states, final, _ = _memory_states(keys, values, *found.steps(), initial, plan.handle)
    returned = final.flatten(0, 1) if output_final_state else None
    return WrittenMemory(plan, returned, keys, values, found, states, v.dtype)


def momentum_memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    *,
    decay: Tensor,
    momentum: Tensor,
    rate: Tensor,
    seen: int,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """One more row on one rank, for decoding: ``momentum_memory`` of T = 1 from ``state`` on; differentiable.

    q, k [B, 1, H, K], v [B, 1, H, V]; decay, momentum, rate [B, 1, H]. state [B, H, 3, K, V]: what the step before, or a final
    state, left; None before the first row. seen: rows that it has seen. Returns (o [B, 1, H, V] in v's dtype, next state in
    fp32, or fp64). Raises InputError.
    """
    dtype = _checked(k, v, {"decay": decay, "momentum": momentum, "rate": rate}, chunk)
    if k.shape[1] != 1 or q.shape != k.shape:
        raise InputError(f"a step takes one row, q and k [B, 1, H, K]; got {list(q.shape)} and {list(k.shape)}")
    if seen < 0 or (state is None and seen):
        raise InputError(f"seen={seen} is not possible: it counts the rows behind state, and there are none before the first")
    given, (q, k, v) = v.dtype, (x[:, 0].to(dtype) for x in (q, k, v))
    wanted = (*k.shape[:2], 3, k.shape[2], v.shape[2])
    if state is None:
        state = k.new_zeros(wanted)
    if tuple(state.shape) != wanted:
        raise InputError(f"state must be [B, H, 3, K, V] = {list(wanted)}, got {list(state.shape)}")
    memory, speed, start = state.to(dtype).unbind(2)
    start = start if seen % chunk else memory
    errors = torch.einsum("bhk,bhkv->bhv", k, start) - v
    kept, slowed, step = (x[:, 0, :, None, None].to(dtype) for x in (decay.exp(), momentum.exp(), rate))
    speed = slowed * speed - 2 * step * k[..., None] * errors[..., None, :]
    memory = kept * memory + speed
    o = torch.einsum("bhk,bhkv->bhv", q, memory)
    return o[:, None].to(given), torch.stack([memory, speed, start], 2)


# Arguments.


def _checked(k: Tensor, v: Tensor, rates: dict[str, Tensor], chunk: int) -> torch.dtype:
    """The dtype of states."""
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or 0 in (k.shape[0], *k.shape[2:], v.shape[3]):
        raise InputError(
            f"k must be [B, T, H, K] and v [B, T, H, V], where only T may be 0; got {list(k.shape)} and {list(v.shape)}"
        )
    dtype = torch.promote_types(k.dtype, v.dtype)
    for name, x in (("k", k), ("v", v), *rates.items()):
        if not x.is_floating_point() or x.device != k.device:
            raise InputError(f"{name} must be floating and on {k.device}, got {x.dtype} on {x.device}")
        if name in rates and x.shape != k.shape[:3]:
            raise InputError(f"{name} must be [B, T, H] = {list(k.shape[:3])}, got {list(x.shape)}")
    if chunk < 1:
        raise InputError(f"chunk must be at least 1 row, got {chunk}")
    return state_dtype(dtype)


def _checked_state(state: Tensor | None, plan: MemoryPlan) -> Tensor | None:
    """The initial state as [B, D, H, parts, K, V], or [1, 1, …] for all documents; M₀ is M where a chunk begins."""
    if state is None:
        return None
    shape = plan.state_shape
    wanted = (shape.batch * plan.num_documents, shape.heads, 3, shape.rows, shape.columns)
    if tuple(state.shape) not in (wanted, (1, *wanted[1:])) or not state.is_floating_point() or state.device != shape.device:
        raise InputError(
            f"initial_state must be floating, on {shape.device}, of shape {list(wanted)} (batch × documents or 1, heads, 3, K, "
            f"V); got {state.dtype} on {state.device}, {list(state.shape)}"
        )
    shared = state.shape[0] < wanted[0]
    if shared and plan.seen.any():
        raise InputError(
            f"one initial_state for all documents begins each of them, but seen is {plan.seen.tolist()}: pass one for each"
        )
    memory, speed, start = state.to(shape.dtype).unflatten(0, (1, 1) if shared else (shape.batch, plan.num_documents)).unbind(3)
    if plan.parts == 2:
        return torch.stack([memory, speed], 3)
    if not shared:
        start = torch.where(plan.table("aligned")[:, None, None, None], memory, start)
    return torch.stack([memory, speed, memory if shared else start], 3)


def _host_counts(given: np.ndarray | Sequence[int] | None) -> bytes | None:
    return None if given is None else np.asarray(given, np.int64).reshape(-1).tobytes()


def _prepare_eagerly(
    k: Tensor, v: Tensor, dtype: torch.dtype, chunk: int, group: dist.ProcessGroup | None, exchange: str, layout: Layout | None,
    cu_seqlens: np.ndarray | Sequence[int] | None, seen: np.ndarray | Sequence[int] | None, final: bool,
    options: Any, topology: Hardware | str | None, timeout_s: float | None,
) -> MemoryPlan:  # fmt: skip
    hardware = topology
    if not isinstance(hardware, Hardware):
        on_gpu = k.device.type == "cuda" or (group is not None and group_device(group).type == "cuda")
        hardware = find_hardware(hardware or ("h100" if on_gpu else "cpu"))
    batch, rows, heads, key_dim = k.shape
    request = MemoryRequest(
        shape=(batch, heads, key_dim, v.shape[3]),
        rows=rows,
        dtype=dtype,
        device=k.device,
        chunk=chunk,
        exchange=exchange,
        final=final,
        documents=_host_counts(cu_seqlens),
        seen=_host_counts(seen),
        layout=layout,
        options=options,
        hardware=hardware,
        timeout_s=timeout_s,
    )
    return plan_memory(request, group)


def _prepare(*args: Any) -> MemoryPlan:
    """Plans are host work: nothing to trace. Disabled only where something compiles, since that imports the compiler."""
    if torch.compiler.is_compiling():
        apart: Any = torch.compiler.disable(_prepare_eagerly)
        return apart(*args)
    return _prepare_eagerly(*args)


def _to_chunks(x: Tensor, plan: MemoryPlan) -> Tensor:
    """Rows [B, T, H, ...] as chunks [B, N, H, C, ...] in the dtype of states, 0 where there is no row."""
    x = x.to(plan.request.dtype)
    padded = torch.cat([x, x.new_zeros((x.shape[0], 1, *x.shape[2:]))], 1)
    return padded.index_select(1, plan.table("grid")).unflatten(1, (-1, plan.request.chunk)).transpose(2, 3)


# The operator. Its results are the states before each chunk [B, N, H, parts, K, V], final states [B, D, H, 3, K, V], and, for
# the backward, the transitions of pieces that continue their document and go on.


@torch.library.custom_op("distattn::memory_states", mutates_args=())
def _memory_states(
    k: Tensor, v: Tensor, keep: Tensor, carry: Tensor, slow: Tensor, write: Tensor, push: Tensor, initial: Tensor | None,
    plan: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = memory_plan_of(plan)
    steps = Steps(keep, carry, slow, write, push)
    closes = made.table("closes")
    early, through, ending = made.runs

    def run(part: Run, state: Tensor) -> tuple[Tensor, Tensor]:
        at = part.chunks
        return run_states(k[:, at], v[:, at], steps.part(at), closes[at], state, part.counts)

    before, left = run(early, _entering(made, initial, early))
    _, ahead = run(through, _no_states(made, len(through.pieces)))
    at = through.chunks
    transition = transitions(k[:, at], steps.part(at), closes[at], made.parts, through.counts)
    maps = {piece: Map(None, left[:, i]) for i, piece in enumerate(early.pieces.tolist()) if made.emits[piece]}
    maps |= {piece: Map(transition[:, i], ahead[:, i]) for i, piece in enumerate(through.pieces.tolist())}
    states = _travel(made, made.forward, maps, "forward")
    between, _ = run(through, _stacked(made, states, through))
    last, ended = run(ending, _stacked(made, states, ending))
    final = _final(made, initial, {**_by_piece(early, left), **_by_piece(ending, ended)})
    return torch.cat([before, between, last], 1), final, transition


@_memory_states.register_fake
def _(
    k: Tensor, v: Tensor, keep: Tensor, carry: Tensor, slow: Tensor, write: Tensor, push: Tensor, initial: Tensor | None,
    plan: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = memory_plan_of(plan)
    batch, heads, rows, columns = made.request.shape
    documents = made.num_documents if made.request.final else 0
    return (
        k.new_empty((batch, k.shape[1], heads, made.parts, rows, columns)),
        k.new_empty((batch, documents, heads, 3, rows, columns)),
        k.new_empty((batch, len(made.runs[1].pieces), heads, made.parts, made.parts, rows, rows)),
    )


@torch.library.custom_op("distattn::memory_states_backward", mutates_args=())
def _memory_states_backward(
    dstates: Tensor, dfinal: Tensor, k: Tensor, v: Tensor, keep: Tensor, carry: Tensor, slow: Tensor, write: Tensor,
    push: Tensor, states: Tensor, transition: Tensor, shared: bool, plan: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The last result: gradients of the states before each document, [B, D, H, parts, K, V], or shared [1, 1, …]."""
    made = memory_plan_of(plan)
    steps = Steps(keep, carry, slow, write, push)
    closes = made.table("closes")
    early, through, ending = made.runs
    dfinal = _summed(made, dfinal)

    def run(part: Run, leaving: Tensor) -> Any:
        at = part.chunks
        return run_back(k[:, at], steps.part(at), closes[at], dstates[:, at], leaving, part.counts)

    ends = run(ending, _leaving(made, dfinal, {}, ending))
    behind = run(through, _no_states(made, len(through.pieces)))
    maps = {piece: Map(None, ends.entering[:, i]) for i, piece in enumerate(ending.pieces.tolist())}
    for i, piece in enumerate(through.pieces.tolist()):
        maps[piece] = Map(made.op.adjoint(transition[:, i]), behind.entering[:, i])
    came = _travel(made, made.backward, maps, "backward")
    between = run(through, _stacked(made, came, through))
    first = run(early, _leaving(made, dfinal, came, early))
    back = type(first)(first.entering, *(torch.cat(parts, 1) for parts in zip(first[1:], between[1:], ends[1:], strict=True)))
    dk, dv, dsteps = differentiate(k, v, steps, states, back)
    empty = made.index("empty", made.empty_documents if made.request.final else np.zeros(0, np.int64))
    passed = dfinal.index_select(1, empty)[:, :, :, : made.parts]
    if shared:
        dinitial = torch.cat([first.entering, passed], 1).sum((0, 1), keepdim=True)
    else:
        dinitial = _no_states(made, made.num_documents)
        dinitial.index_copy_(1, made.index("early", made.documents[early.pieces]), first.entering)
        dinitial.index_copy_(1, empty, passed)
    return dk, dv, dsteps.keep, dsteps.carry, dsteps.slow, dsteps.write, dsteps.push, dinitial


@_memory_states_backward.register_fake
def _(
    dstates: Tensor, dfinal: Tensor, k: Tensor, v: Tensor, keep: Tensor, carry: Tensor, slow: Tensor, write: Tensor,
    push: Tensor, states: Tensor, transition: Tensor, shared: bool, plan: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = memory_plan_of(plan)
    batch, heads, rows, columns = made.request.shape
    before = (1, 1) if shared else (batch, made.num_documents)
    dinitial = k.new_empty((*before, heads, made.parts, rows, columns))
    dk, dv, dkeep, dcarry, dslow, dwrite, dpush = (x.new_empty(x.shape) for x in (k, v, keep, carry, slow, write, push))
    return dk, dv, dkeep, dcarry, dslow, dwrite, dpush, dinitial


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial, ctx.plan = inputs
    states, _, transition = output
    ctx.made = memory_plan_of(ctx.plan)  # keeps the plan alive until the backward has run
    ctx.initial = initial is not None
    ctx.shared = initial is not None and initial.shape[:2] != (ctx.made.request.shape[0], ctx.made.num_documents)
    ctx.save_for_backward(*tensors, states, transition)


def _differentiate(ctx: Any, dstates: Tensor, dfinal: Tensor, _: Tensor) -> tuple:
    *gradients, dinitial = _memory_states_backward(dstates, dfinal, *ctx.saved_tensors, ctx.shared, ctx.plan)
    return *gradients, dinitial if ctx.initial else None, None


_memory_states.register_autograd(_differentiate, setup_context=_save)


# States at the borders.


def _no_states(made: MemoryPlan, count: int) -> Tensor:
    """Zeros: [B, count, H, parts, K, V]."""
    s = made.state_shape
    return torch.zeros((s.batch, count, s.heads, made.parts, s.rows, s.columns), dtype=s.dtype, device=s.device)


def _entering(made: MemoryPlan, initial: Tensor | None, run: Run) -> Tensor:
    if initial is None:
        return _no_states(made, len(run.pieces))
    return _of_documents(made, initial, made.index("early", made.documents[run.pieces]))


def _of_documents(made: MemoryPlan, initial: Tensor, documents: Tensor) -> Tensor:
    if initial.shape[1] == 1 != made.num_documents or initial.shape[0] != made.state_shape.batch:
        return initial.expand(made.state_shape.batch, len(documents), *initial.shape[2:])
    return initial.index_select(1, documents)


def _leaving(made: MemoryPlan, dfinal: Tensor, came: dict[int, Tensor], run: Run) -> Tensor:
    """Gradients of what leaves each piece: to the next one, or as a final state."""
    given = _no_states(made, len(run.pieces))
    for i, piece in enumerate(run.pieces.tolist()):
        if made.emits[piece]:
            given[:, i] = came[piece]
        elif made.request.final:
            given[:, i] = dfinal[:, int(made.documents[piece])]
    return given


def _stacked(made: MemoryPlan, states: dict[int, Tensor], run: Run) -> Tensor:
    return torch.stack([states[piece] for piece in run.pieces.tolist()], 1) if len(run.pieces) else _no_states(made, 0)


def _by_piece(run: Run, states: Tensor) -> dict[int, Tensor]:
    return {piece: states[:, i] for i, piece in enumerate(run.pieces.tolist())}


def _travel(made: MemoryPlan, lowered: LoweredExchange, maps: dict[int, Map], way: str) -> dict[int, Tensor]:
    """What enters this rank's pieces, by local number."""
    run = ExchangeRun(
        lowered, made.op, made.state_shape, {int(made.numbers[piece]): held for piece, held in maps.items()}, made.transport,
        label=f"momentum memory {way}",
    )  # fmt: skip
    run.start()
    states = run.finish()
    return {piece: states[int(number)] for piece, number in enumerate(made.numbers) if int(number) in states}


def _final(made: MemoryPlan, initial: Tensor | None, left: dict[int, Tensor]) -> Tensor:
    """Final states of all documents on every rank: each is given by the rank that has it, 0 by the others."""
    if not made.request.final:
        return _no_states(made, 0)
    found = _no_states(made, made.num_documents)
    for piece, state in left.items():
        if not made.emits[piece]:
            found[:, int(made.documents[piece])] = state
    if initial is not None and len(made.empty_documents):
        empty = made.index("empty", made.empty_documents)
        found.index_copy_(1, empty, _of_documents(made, initial, empty))
    return _summed(made, found)


def _summed(made: MemoryPlan, x: Tensor) -> Tensor:
    """Over ranks."""
    if made.transport is None or not made.request.final:
        return x
    return reduce_over_ranks(made.transport, x, lambda shares: shares.sum(0), "final states of a momentum memory")
