"""``linear_attention``: linear attention over rows that are spread over ranks, as one differentiable call.

forward     states of this rank's pieces ─▶ exchange in flight ─▶ ┐
            outputs inside the pieces ─────────────────────────▶ add what the states that arrived contribute
backward    the same with gradients of states, from the last piece of a document to its first

Only states cross ranks, and they wait for nothing but the states before them. The call is a ``torch.library`` operator, so
that it works at ``torch.compile`` boundaries, and ``distattn.checkpoint_contexts`` saves its outputs: a checkpointed layer
repeats neither the kernels nor the exchange.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distattn.errors import InputError, UnsupportedError
from distattn.kernels.linear import KINDS, Operands, step
from distattn.kernels.linear.protocol import CONSTANT, NONE, SCALAR, VECTOR, Gradients, nothing_kept
from distattn.kernels.linear.reference import state_dtype
from distattn.linear_planning import LinearPlan, LinearRequest, linear_plan_of, plan_linear
from distattn.parallel.agreement import board_of
from distattn.parallel.exchanges import ExchangeRun, LoweredExchange, Map
from distattn.parallel.exchanges.runner import stack_links
from distattn.parallel.hardware import Hardware
from distattn.parallel.layout import Layout
from distattn.parallel.per_group import PerGroup
from distattn.parallel.transport.base import Message

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kind: str,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: str = "auto",
    cu_seqlens: Tensor | np.ndarray | Sequence[int] | None = None,
    layout: Layout | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_owner_only: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
    options: Any = None,
    topology: Hardware | str | None = None,
    timeout_s: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention of this rank's rows after all rows before them in their documents, on any rank. Collective.

        S_t = e^{decay_t} ⊙ S_{t−1} + k_tᵀ v_t                                    linear, lightning, retention, simple_gla, gla
        S_t = (I − β_t k_tᵀ k_t) (e^{decay_t} ⊙ S_{t−1}) + β_t k_tᵀ v_t           delta, gated_delta, kda
        o_t = scale · q_t S_t

    q, k [B, T_local, H, K], v [B, T_local, HV, V] of one floating dtype, any strides; H divides HV, and head h of q and k
    serves HV/H heads of v. The delta rule expects keys of length at most 1. decay: natural log, ≤ 0: none for linear and
    delta; [HV] for lightning and retention (default there: log(1 − 2^{−5−h})); [B, T_local, HV] or [HV] for simple_gla and
    gated_delta; [B, T_local, HV, K] for gla and kda. beta [B, T_local, HV]: the delta family's write strength.

    group: None is one rank, without torch.distributed. layout: which rows each rank holds; None cuts the stream into equal
    shares in the order of ranks. cu_seqlens [D+1]: where documents of the *whole* stream begin, alike on every rank and for
    all batch entries; None is one document. Passing it on the CPU saves a synchronisation per new tensor.

    initial_state [N, HV, K, V], N = B · D, passed alike by all ranks: the state before each document; its gradient appears on
    the rank that holds the document's first row, and is zero on the others. With output_final_state the second result is the
    state after each document, [N, HV, K, V] in fp32 (fp64), on every rank, where the gradients of all ranks' uses are summed;
    with state_owner_only too, only of the documents that end on this rank, [B · D_own, HV, K, V]. A document without tokens
    passes its state through, on rank 0.

    exchange: "auto", "serial", "all_gather", "all_scan" or "two_level"; options: that exchange's dataclass. kernel: "auto" or
    a backend's name. topology: hardware (or its name) that "auto" is for. timeout_s: longest wait for a transfer.

    Returns (o [B, T_local, HV, V] in v's dtype, final state or None). Everything is differentiable, decay, beta and
    initial_state included. Saved for backward: the inputs, the states (and dense transitions) at this rank's borders, and what
    Triton's kernels keep: of a gate a row its running sums in fp32, without one the states that walks begin with, where those
    take at most a quarter of what q, k and v do. If one rank runs the backward, all must, those without rows too.

    Raises InputError naming the argument, UnsupportedError for an unknown kind or where no kernel computes the case,
    PlanError for the exchange, AgreementError where ranks made different calls, TransportError if a transfer fails.
    """
    plan, decay, initial = _prepare(
        q, k, v, kind, decay, beta, group, exchange, cu_seqlens, layout, initial_state, output_final_state, state_owner_only,
        kernel, options, topology, timeout_s,
    )  # fmt: skip
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    o, final, *_ = _linear_attention(q, k, v, decay, beta, initial, plan.handle, factor)
    return o, final.flatten(0, 1) if output_final_state else None


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    *,
    kind: str,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One more token on one rank, for decoding: ``linear_attention`` of T = 1 from ``state`` on, without chunks or plans.

    state [B, HV, K, V]: what the step before, or a final state, left; None before the first token. The rest as there, T = 1.
    Returns (o [B, 1, HV, V], next state in fp32, or fp64). Raises InputError and UnsupportedError as there.
    """
    decay = _checked(q, k, v, kind, decay, beta)
    if q.shape[1] != 1:
        raise InputError(f"a step takes one token, q has {q.shape[1]}: use linear_attention with initial_state")
    return step(Operands(q, k, v, decay, beta, q.shape[-1] ** -0.5 if scale is None else float(scale)), state)


# Arguments.

_GATE_SHAPES = {NONE: "None", CONSTANT: "[HV]", SCALAR: "[B, T, HV]", VECTOR: "[B, T, HV, K]"}
_calls: PerGroup[int] = PerGroup()
_documents_of = WeakTensorKeyDictionary()


def _prepare_eagerly(
    q: Tensor, k: Tensor, v: Tensor, kind: str, decay: Tensor | None, beta: Tensor | None, group: dist.ProcessGroup | None,
    exchange: str, cu_seqlens: Tensor | np.ndarray | Sequence[int] | None, layout: Layout | None,
    initial_state: Tensor | None, final: bool, owner_only: bool, kernel: str, options: Any, topology: Hardware | str | None,
    timeout_s: float | None,
) -> tuple[LinearPlan, Tensor | None, Tensor | None]:  # fmt: skip
    """(plan, decay, initial state) of a call; the ranks that wait for one that refuses its arguments hear of it."""
    try:
        decay = _checked(q, k, v, kind, decay, beta)
        request = LinearRequest(
            kind=kind,
            gate=_gate(decay),
            batch=q.shape[0],
            rows=q.shape[1],
            heads=q.shape[2],
            value_heads=v.shape[2],
            key_dim=q.shape[3],
            value_dim=v.shape[3],
            dtype=q.dtype,
            device=q.device,
            num_ranks=1 if group is None else dist.get_world_size(group),
            exchange=exchange,
            initial=initial_state is not None,
            final=final,
            owner_only=owner_only,
            cu_seqlens=_host_documents(cu_seqlens),
            layout=layout,
            options=options,
            kernel=kernel,
            topology=topology,
            timeout_s=timeout_s,
        )
        plan = plan_linear(request, group)
        initial = _checked_state(initial_state, plan)
    except InputError as error:
        if group is not None:
            rank = dist.get_rank(group)
            board_of(group).post_notice("transport", f"linear {_number(group)}", f"rank {rank} refused its input: {error}")
        raise
    if group is not None:
        _number(group)
    return plan, decay, initial


def _prepare(*args: Any, **options: Any) -> tuple[LinearPlan, Tensor | None, Tensor | None]:
    """Plans are host work: nothing to trace. Disabled only where something compiles, since that imports the compiler."""
    if torch.compiler.is_compiling():
        apart: Any = torch.compiler.disable(_prepare_eagerly)
        return apart(*args, **options)
    return _prepare_eagerly(*args, **options)


def _number(group: dist.ProcessGroup) -> int:
    """How many calls this group has made: the same on all ranks at the same call."""
    _calls[group] = _calls.get(group, 0) + 1
    return _calls[group]


def _gate(decay: Tensor | None) -> str:
    return NONE if decay is None else {1: CONSTANT, 3: SCALAR, 4: VECTOR}.get(decay.ndim, f"{decay.ndim} dimensions")


def _checked(q: Tensor, k: Tensor, v: Tensor, kind: str, decay: Tensor | None, beta: Tensor | None) -> Tensor | None:
    """Shapes and dtypes; the decay, with retention's default filled in."""
    if kind not in KINDS:
        raise UnsupportedError(f"kind={kind!r} is unknown; it may be {', '.join(KINDS)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or (name != "v" and x.shape != q.shape) or x.shape[:2] != q.shape[:2]:
            raise InputError(
                f"q and k must have shape [B, T, H, K] and v [B, T, HV, V]; got {list(q.shape)}, {list(k.shape)} "
                f"and {list(v.shape)}"
            )
        if x.dtype != q.dtype or x.dtype not in _DTYPES or x.device != q.device:
            raise InputError(
                f"{name} is {x.dtype} on {x.device}; q, k and v must share a device and one of {', '.join(map(str, _DTYPES))}"
            )
    if 0 in (q.shape[0], *q.shape[2:], *v.shape[2:]) or v.shape[2] % q.shape[2]:
        raise InputError(
            f"the heads of v must be a multiple of those of q and k, and no size but T may be 0; got {list(q.shape)} and "
            f"{list(v.shape)}"
        )
    heads = v.shape[2]
    if kind == "retention" and decay is None:
        decay = torch.log1p(-torch.exp2(-5 - torch.arange(heads, device=q.device, dtype=state_dtype(q.dtype))))
    _check_rates(q, heads, kind, decay, beta)
    return decay


def _check_rates(q: Tensor, heads: int, kind: str, decay: Tensor | None, beta: Tensor | None) -> None:
    """decay and beta against the kind."""
    rows = (*q.shape[:2], heads)
    shapes = {NONE: None, CONSTANT: (heads,), SCALAR: rows, VECTOR: (*rows, q.shape[3])}
    gate = _gate(decay)
    if gate not in KINDS[kind].gates or (decay is not None and tuple(decay.shape) != shapes[gate]):
        allowed = " or ".join(_GATE_SHAPES[form] for form in KINDS[kind].gates)
        given = "None" if decay is None else list(decay.shape)
        raise InputError(f"decay of kind={kind!r} must be {allowed} with B, T, HV, K = {(*rows, q.shape[3])}, got {given}")
    if KINDS[kind].delta != (beta is not None):
        needs = "needs beta [B, T, HV]" if KINDS[kind].delta else "takes no beta"
        raise InputError(f"kind={kind!r} {needs}")
    if beta is not None and tuple(beta.shape) != rows:
        raise InputError(f"beta must have shape {list(rows)}, got {list(beta.shape)}")
    for name, x in (("decay", decay), ("beta", beta)):
        if x is not None and (not x.is_floating_point() or x.device != q.device):
            raise InputError(f"{name} must be floating and on {q.device}, got {x.dtype} on {x.device}")


def _host_documents(cu_seqlens: Tensor | np.ndarray | Sequence[int] | None) -> bytes | None:
    """cu_seqlens as int64 bytes. A tensor is read once, however many layers pass it."""
    if cu_seqlens is None:
        return None
    if not isinstance(cu_seqlens, Tensor):
        return np.asarray(cu_seqlens, np.int64).reshape(-1).tobytes()
    version = cu_seqlens._version
    known = _documents_of.get(cu_seqlens)
    if known is None or known[0] != version:
        known = (version, cu_seqlens.detach().to("cpu", torch.int64).reshape(-1).numpy().tobytes())
        _documents_of[cu_seqlens] = known
    return known[1]


def _checked_state(state: Tensor | None, plan: LinearPlan) -> Tensor | None:
    """The initial state as [B, D, HV, K, V] in the dtype of states."""
    if state is None:
        return None
    shape = plan.state_shape
    wanted = (shape.batch * plan.num_documents, shape.heads, shape.rows, shape.columns)
    if tuple(state.shape) != wanted or not state.is_floating_point() or state.device != shape.device:
        raise InputError(
            f"initial_state must be floating, on {shape.device}, of shape {list(wanted)} (batch × documents, heads, K, V); got "
            f"{state.dtype} on {state.device}, {list(state.shape)}"
        )
    return state.to(shape.dtype).unflatten(0, (shape.batch, plan.num_documents))


# The operator. Plans travel as handles, since operators take tensors and numbers only. Its last three outputs are for the
# backward: the states that entered late pieces, their transitions, and what the kernels kept.


@torch.library.custom_op("distattn::linear_attention", mutates_args=())
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, initial: Tensor | None, plan: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = linear_plan_of(plan)
    nothing = _no_states(made)
    if not made.pieces.num_rows:
        _travel(made, made.forward, {}, "forward").finish()
        returned = _returned(made, nothing, initial)
        return v.new_empty(v.shape), returned, nothing.clone(), _no_transition(made), nothing_kept(v.device)
    entering = _entering(made, initial)
    running = made.backend.forward_begin(Operands(q, k, v, g, beta, scale), made.pieces, entering)
    transition = _no_transition(made) if running.transition is None else running.transition
    travel = _travel(made, made.forward, _maps(made, made.pieces.emit, running.emitted, transition), "forward")
    running.intra()
    late = stack_links(made.numbers[made.pieces.late], travel.finish(), nothing.clone())
    o, final = running.finish(late)
    return o, _returned(made, final, initial), late, transition, running.kept


@_linear_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, initial: Tensor | None, plan: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = linear_plan_of(plan)
    s = made.state_shape
    tail = (s.heads, s.rows, s.columns)
    final = v.new_empty((s.batch, made.returned_documents, *tail), dtype=s.dtype)
    late = v.new_empty((s.batch, len(made.pieces.late), *tail), dtype=s.dtype)
    transition = v.new_empty(_transition_shape(made), dtype=s.dtype)
    number = made.backend.num_kept(Operands(q, k, v, g, beta, scale), made.pieces) if made.pieces.num_rows else 0
    return v.new_empty(v.shape), final, late, transition, v.new_empty(number, dtype=torch.float32)


@torch.library.custom_op("distattn::linear_attention_backward", mutates_args=())
def _linear_attention_backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    initial: Tensor | None, late: Tensor, transition: Tensor, kept: Tensor, plan: int, scale: float, with_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = linear_plan_of(plan)
    own = _own_gradients(made, dfinal)
    if not made.pieces.num_rows:
        _travel(made, made.backward, {}, "backward").finish()
        dtype = state_dtype(q.dtype)
        rates = (g if with_dg else None, beta)
        dg, dbeta = (q.new_empty(0) if x is None else torch.zeros_like(x, dtype=dtype) for x in rates)
        grads = Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dg, dbeta, _no_states(made))
        return *grads[:3], dg, dbeta, _initial_gradient(made, initial, grads, own)
    pieces = made.pieces
    dleft = _no_states(made)
    if len(pieces.final):
        places = np.searchsorted(made.own_documents, made.documents_of(pieces.final))
        dleft = own.index_select(1, made.index("final", places))
    x = Operands(q, k, v, g, beta, scale, with_dg)
    running = made.backend.backward_begin(x, pieces, _entering(made, initial), late, do.to(v.dtype), dleft, kept)
    maps = _maps(made, pieces.late, running.emitted, transition, adjoint=True)
    travel = _travel(made, made.backward, maps, "backward")
    running.intra()
    grads = running.finish(stack_links(made.numbers[pieces.emit], travel.finish(), _no_states(made)))
    dg, dbeta = (q.new_empty(0) if x is None else x for x in (grads.dg, grads.dbeta))
    return grads.dq, grads.dk, grads.dv, dg, dbeta, _initial_gradient(made, initial, grads, own)


@_linear_attention_backward.register_fake
def _(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    initial: Tensor | None, late: Tensor, transition: Tensor, kept: Tensor, plan: int, scale: float, with_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = state_dtype(q.dtype)
    wanted = (g if with_dg else None, beta)
    rates = [q.new_empty(0) if x is None else torch.empty_like(x, dtype=dtype) for x in wanted]
    start = q.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), rates[0], rates[1], start


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.plan, ctx.scale = inputs
    ctx.made = linear_plan_of(ctx.plan)  # keeps the plan alive until the backward has run
    ctx.final_shape = output[1].shape
    ctx.set_materialize_grads(False)  # of what was kept nobody wants zeros
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple:
    q, k, v, g, beta, initial, late, transition, kept = ctx.saved_tensors
    do = v.new_zeros(v.shape) if do is None else do
    dfinal = late.new_zeros(ctx.final_shape) if dfinal is None else dfinal
    with_dg = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dbeta, dinitial = _linear_attention_backward(
        do, dfinal, q, k, v, g, beta, initial, late, transition, kept, ctx.plan, ctx.scale, with_dg
    )
    return (
        dq,
        dk,
        dv,
        None if g is None or not with_dg else dg.to(g.dtype),
        None if beta is None else dbeta.to(beta.dtype),
        None if initial is None else dinitial,
        None,
        None,
    )


_linear_attention.register_autograd(_differentiate, setup_context=_save)


# States at the borders.


def _no_states(made: LinearPlan) -> Tensor:
    s = made.state_shape
    return torch.empty((s.batch, 0, s.heads, s.rows, s.columns), dtype=s.dtype, device=s.device)


def _transition_shape(made: LinearPlan) -> tuple[int, ...]:
    size = made.op.transition_size(made.state_shape, made.state_shape.heads)
    return (0,) if size is None else (size[0], len(made.pieces.maps), *size[1:])


def _no_transition(made: LinearPlan) -> Tensor:
    return torch.empty(_transition_shape(made), dtype=made.state_shape.dtype, device=made.state_shape.device)


def _entering(made: LinearPlan, initial: Tensor | None) -> Tensor:
    """Initial states of the pieces that begin documents."""
    if initial is None:
        return _no_states(made)
    return initial.index_select(1, made.index("enter", made.documents_of(made.pieces.enter)))


def _maps(
    made: LinearPlan, members: np.ndarray, emitted: Tensor, transition: Tensor, *, adjoint: bool = False
) -> dict[int, Map]:
    """The map of each piece that hands a state on; those that nothing enters have no transition."""
    dense = made.op.name == "dense"
    row = {int(piece): i for i, piece in enumerate(made.pieces.maps)}
    factors = transition if dense or not row or made.op.name == "identity" else transition.exp()
    maps = {}
    for i, piece in enumerate(members.tolist()):
        through = factors[:, row[piece]] if piece in row and made.op.name != "identity" else None
        if adjoint and through is not None:
            through = made.op.adjoint(through)
        maps[int(made.numbers[piece])] = Map(through, emitted[:, i])
    return maps


def _travel(made: LinearPlan, lowered: LoweredExchange, maps: dict[int, Map], way: str) -> ExchangeRun:
    run = ExchangeRun(lowered, made.op, made.state_shape, maps, made.transport, label=f"{made.exchange} {way}")
    run.start()
    return run


def _returned(made: LinearPlan, final: Tensor, initial: Tensor | None) -> Tensor:
    """Final states of the documents that the call returns here, from those of this rank's pieces: [B, D, HV, K, V]."""
    if not made.request.final:
        return _no_states(made)
    s = made.state_shape
    own = torch.zeros((s.batch, len(made.own_documents), s.heads, s.rows, s.columns), dtype=s.dtype, device=s.device)
    places = np.searchsorted(made.own_documents, made.documents_of(made.pieces.final))
    own.index_copy_(1, made.index("final", places), final)
    if initial is not None and len(made.empty_documents):
        empty = np.searchsorted(made.own_documents, made.empty_documents)
        passed = initial.index_select(1, made.index("empty", made.empty_documents))
        own.index_copy_(1, made.index("empty places", empty), passed)
    if made.request.owner_only:
        return own
    every = own.new_empty((s.batch, made.num_documents, *own.shape[2:]))
    every[:, made.index("own", made.own_documents)] = own
    if made.transport is None:
        return every
    counts = np.bincount(made.owner, minlength=made.layout.num_ranks).tolist()
    parts = _swap(made, [own] * made.layout.num_ranks, [(s.batch, n, *own.shape[2:]) for n in counts], "final states")
    for rank, part in enumerate(parts):
        if rank != made.rank:
            every[:, made.index(f"of {rank}", np.flatnonzero(made.owner == rank))] = part
    return every


def _own_gradients(made: LinearPlan, dfinal: Tensor) -> Tensor:
    """Gradients of the final states that this rank owns, of all ranks' uses: [B, D_own, HV, K, V]. The way back of
    ``_returned``."""
    if not made.request.final or made.request.owner_only or made.transport is None:
        return dfinal
    owned = [np.flatnonzero(made.owner == rank) for rank in range(made.layout.num_ranks)]
    give = [dfinal.index_select(1, made.index(f"of {rank}", documents)) for rank, documents in enumerate(owned)]
    parts = _swap(made, give, [tuple(give[made.rank].shape)] * made.layout.num_ranks, "gradients of final states")
    parts[made.rank] = give[made.rank]
    return torch.stack(parts).sum(0)


def _initial_gradient(made: LinearPlan, initial: Tensor | None, grads: Gradients, own: Tensor) -> Tensor:
    """On the rank that holds each document's first row; 0 elsewhere."""
    if initial is None:
        return torch.empty(0, dtype=made.state_shape.dtype, device=made.state_shape.device)
    found = torch.zeros_like(initial)
    if len(made.pieces.enter):
        found.index_copy_(1, made.index("enter", made.documents_of(made.pieces.enter)), grads.dentering)
    if made.request.final and len(made.empty_documents):
        empty = made.index("empty places", np.searchsorted(made.own_documents, made.empty_documents))
        found.index_copy_(1, made.index("empty", made.empty_documents), own.index_select(1, empty))
    return found


def _swap(made: LinearPlan, give: list[Tensor], take: list[tuple[int, ...]], what: str) -> list[Tensor]:
    """One exchange of whole tensors: ``give[r]`` to rank r, and from rank r one of shape ``take[r]``."""
    assert made.transport is not None
    dtype, me = made.state_shape.dtype, made.rank
    send = torch.cat([x.reshape(-1) for rank, x in enumerate(give) if rank != me] or [give[me].new_empty(0)])
    sizes = [0 if rank == me else math.prod(size) for rank, size in enumerate(take)]
    receive = send.new_empty(sum(sizes))
    message = Message(
        0, 1, send.view(torch.uint8), receive.view(torch.uint8),
        [0 if rank == me else x.numel() * dtype.itemsize for rank, x in enumerate(give)],
        [n * dtype.itemsize for n in sizes], lambda: f"for {what} of linear attention",
    )  # fmt: skip
    made.transport.post(message).wait()
    parts = receive.split(sizes)
    return [part.view(size) if rank != me else part for rank, (part, size) in enumerate(zip(parts, take, strict=True))]
