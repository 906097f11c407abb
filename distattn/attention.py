"""``attention``: exact attention over rows that are spread over ranks, as one differentiable call.

    out = attention(q, k, v, plan)                            whole call: post, compute, wait
    handle = attention_begin(q, k, v, plan)                   split phase: post the inputs,
    attention_compute(handle);  out = attention_finish(handle)             … compute,        … wait for results

The whole call is a ``torch.library`` operator, so that it works at ``torch.compile`` boundaries and a selective checkpoint
policy can save its outputs. Under plain activation checkpointing the recomputation repeats attention *and its
communication*; with ``context_fn=distattn.checkpoint_contexts`` it repeats neither.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from distattn.errors import InputError
from distattn.kernels import Case
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.protocol import WholeBackend
from distattn.parallel.executor import POSTED, Execution, Kernel
from distattn.parallel.gradients import output_gradient_sums
from distattn.parallel.keep import as_fields, like_received, received
from distattn.planning import DTYPES, Plan, plan_of

_FEATURE_ALIGNMENT = 8
"""Head dimensions that a key bias has widened are padded to a multiple of this, as kernels want them."""


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, sink: Tensor | None = None,
    softcap: float | None = None, key_bias: Tensor | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float | None = None, sink: Tensor | None = None,
    softcap: float | None = None, key_bias: Tensor | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention of this rank's queries over the keys and values of all ranks of the plan. Collective.

        s = softcap · tanh((scale · q kᵀ + key_bias) / softcap)  where the mask allows, −inf elsewhere
        out = softmax([s, sink]) [v; 0]

    q [B, S_local, H, D], k [B, S_local, Hk, D], v [B, S_local, Hk, Dv]: one floating dtype, any strides; row i is global
    row ``plan.positions[i]``, and in cross attention row i of k, v and key_bias is key ``plan.key_positions[i]``. scale:
    default D^−½. sink [H]: a learnable logit per head that takes weight and gives none. softcap: positive, or None. key_bias
    [S_local] or [B, S_local, Hk]: a finite logit added for each key.

    Returns out [B, S_local, H, Dv] in q's dtype; with return_lse also lse [B, S_local, H] in fp32 (fp64), the sink
    included. Rows that see no key give out 0 and lse −inf (or the sink), and gradients 0. Everything is differentiable;
    q, k, v, out and lse are saved. If one rank runs the backward, all must.

    Raises InputError naming the argument, UnsupportedError if no kernel computes the case, and TransportError if a
    transfer fails or does not end in time.
    """
    call = _prepare(q, k, v, plan, scale, sink, softcap, key_bias, return_lse)
    numbers = (plan.handle, call.scale, softcap or 0.0, call.lse_gradient)
    if plan.keep:
        out, lse, _ = _attention_keep(call.q, call.k, call.v, *numbers)
    else:
        out, lse = _attention(call.q, call.k, call.v, *numbers)
    return _with_sink(out, lse, sink, return_lse)


_SAVED_OPERATORS = (
    "distattn::attention",
    "distattn::attention_keep",
    "distattn::linear_attention",
    "distattn::halo",
    "distattn::running_softmax",
    "distattn::memory_states",
    "distattn::agent_attention",
)


def checkpoint_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing: save what attention computed, softmax or linear, recompute the rest (torch.utils.checkpoint)."""
    saved = isinstance(op, torch._ops.OpOverload) and op.name() in _SAVED_OPERATORS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_contexts() -> tuple[Any, Any]:
    """For ``torch.utils.checkpoint.checkpoint(fn, *args, use_reentrant=False, context_fn=checkpoint_contexts)``: the
    recomputation repeats neither attention nor its communication."""
    return create_selective_checkpoint_contexts(checkpoint_policy)


@dataclass(frozen=True)
class _Call:
    """Validated arguments; q and k already carry the key bias as extra features."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    lse_gradient: bool


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None, sink: Tensor | None, softcap: float | None,
    key_bias: Tensor | None, return_lse: bool,
) -> _Call:  # fmt: skip
    """Check the arguments; the ranks that wait for one that refuses its own hear of it."""
    if not isinstance(plan, Plan):
        raise InputError(f"plan must come from distattn.plan, got {type(plan).__name__}")
    try:
        return _checked_call(q, k, v, plan, scale, sink, softcap, key_bias, return_lse)
    except InputError as error:
        if plan.transport is not None:
            call = f"call {plan.program.digest} {plan.transport.num_transfers}"
            plan.transport.board.post_notice("transport", call, f"rank {plan.rank} refused its input: {error}")
        raise


def _checked_call(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None, sink: Tensor | None, softcap: float | None,
    key_bias: Tensor | None, return_lse: bool,
) -> _Call:  # fmt: skip
    _check_inputs(q, k, v, plan)
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap must be positive or None, got {softcap}")
    if sink is not None and tuple(sink.shape) != (plan.heads,):
        raise InputError(f"sink must have one logit a query head, shape ({plan.heads},), got {tuple(sink.shape)}")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if key_bias is not None:
        q, k = _augment(q, k, key_bias, factor)
    return _Call(q, k, v, factor, return_lse or sink is not None)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """Shapes, dtypes and devices against the plan."""
    expected = {
        "q": (q, plan.num_local_rows, plan.heads, plan.head_dim),
        "k": (k, plan.num_local_keys, plan.kv_heads, plan.head_dim),
        "v": (v, plan.num_local_keys, plan.kv_heads, plan.value_dim),
    }
    for name, (x, rows, heads, width) in expected.items():
        if x.ndim != 4 or tuple(x.shape[1:]) != (rows, heads, width) or x.shape[0] != q.shape[0]:
            batch = q.shape[0] if name != "q" and q.ndim == 4 else "B"
            raise InputError(
                f"{name} must have shape [{batch}, {rows}, {heads}, {width}] (rows of rank {plan.rank}, heads and head "
                f"dimension of the plan), got {list(x.shape)}"
            )
        if x.dtype != q.dtype or x.dtype not in DTYPES:
            raise InputError(f"{name} is {x.dtype}; q, k and v must share one of {', '.join(map(str, DTYPES))}")
        if plan.dtype is not None and x.dtype != plan.dtype:
            raise InputError(f"{name} is {x.dtype}, but the plan was made for {plan.dtype}")
        if x.device != q.device:
            raise InputError(f"{name} is on {x.device}, q is on {q.device}; all inputs must be on one device")


def _augment(q: Tensor, k: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k with feature columns whose product is the bias: [q, 1…] · [k, bias/scale…].

    In 16 bits the bias is split into three parts that sum to it in fp32; gradients flow through the first. The head
    dimension is padded with zeros.
    """
    batch, rows, kv_heads, width = k.shape
    if tuple(key_bias.shape) not in ((rows,), (batch, rows, kv_heads)):
        raise InputError(f"key_bias must have shape [{rows}] or [{batch}, {rows}, {kv_heads}], got {list(key_bias.shape)}")
    if scale == 0:
        raise InputError("key_bias needs a scale other than 0")
    if key_bias.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(key_bias.isfinite().all()):
        raise InputError("key_bias must be finite; hide keys with the mask instead of a bias of -inf")
    if key_bias.ndim == 1:
        key_bias = key_bias[None, :, None].expand(batch, rows, kv_heads)
    bias = key_bias.to(accumulation_dtype(k.dtype)) / scale
    parts = [bias.to(k.dtype)]
    if k.dtype.itemsize == 2:
        rest = (bias - parts[0].to(bias.dtype)).detach()
        parts.append(rest.to(k.dtype))
        parts.append((rest - parts[1].to(bias.dtype)).to(k.dtype))
    padding = -(width + len(parts)) % _FEATURE_ALIGNMENT
    ones = q.new_ones((*q.shape[:-1], len(parts)))
    zeros = k.new_zeros((*k.shape[:-1], padding))
    q = torch.cat([q, ones, q.new_zeros((*q.shape[:-1], padding))], -1)
    return q, torch.cat([k, torch.stack(parts, -1), zeros], -1)


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """out · σ(lse − sink): what a key of logit ``sink`` [H] and value 0 would have left of attention's out [B, S, H, Dv] with
    lse [B, S, H]. For a layer that gets both, as in ping-pong; ``attention`` takes ``sink`` itself."""
    return (out * torch.sigmoid(lse - sink.to(lse.dtype)).unsqueeze(-1)).to(out.dtype)


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    if sink is not None:
        out = apply_sink(out, lse, sink)
        lse = torch.logaddexp(lse, sink.to(lse.dtype).expand_as(lse))
    return (out, lse) if return_lse else out


# The operator. Plans travel as handles, since operators take tensors and numbers only.


def _kernel(plan: Plan, q: Tensor, v: Tensor, scale: float, softcap: float, lse_gradient: bool) -> Kernel:
    case = Case(
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        heads=plan.heads,
        kv_heads=plan.kv_heads,
        softcap=softcap != 0,
        lse_gradient=lse_gradient,
        deterministic=plan.deterministic,
        block_plan=plan.sparse is not None,
    )
    return Kernel(plan.backend(case), scale, softcap or None, plan.extras)


def _forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Execution:
    return Execution(plan.lowered, plan.transport, kernel, {"q": q, "k": k, "v": v}, label=plan.strategy)


def _backward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, kernel: Kernel,
    kept: Sequence[Tensor] = (),
) -> Execution:  # fmt: skip
    do = do.to(q.dtype)
    home = {"q": q, "k": k, "v": v, "do": do, "lse": lse}
    if kernel.backend.needs_out:
        # Such a backend makes the sums itself, and they are passes over long tensors: what it gets is not read.
        home |= {"out": out, "delta": lse}
    else:
        home["delta"] = output_gradient_sums(out, do, dlse)
    lowered = plan.lowered_backward
    fields = as_fields(lowered, kept) if plan.keep else None
    return Execution(lowered, plan.transport, kernel, home, label=plan.strategy, kept=fields, reduce_dtype=plan.reduce_dtype)


@torch.library.custom_op("distattn::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, softcap: float, lse_gradient: bool
) -> tuple[Tensor, Tensor]:
    made = plan_of(plan)
    kernel = _kernel(made, q, v, scale, softcap, lse_gradient)
    if made.only_tiles is not None and isinstance(kernel.backend, WholeBackend):
        out, lse = kernel.backend.attend_whole(q, k, v, made.only_tiles, **_numbers(made, kernel))
        return out.contiguous(), lse.contiguous()
    execution = _forward(made, q, k, v, kernel)
    execution.run()
    out, lse = execution.result()
    return out, lse


def _numbers(plan: Plan, kernel: Kernel) -> dict[str, Any]:
    return {"group": plan.lowered.group, "scale": kernel.scale, "softcap": kernel.softcap, "extras": kernel.extras}


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, softcap: float, lse_gradient: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("distattn::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor], plan: int,
    scale: float, softcap: float, lse_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = plan_of(plan)
    kernel = _kernel(made, q, v, scale, softcap, lse_gradient)
    dlse_or_none = dlse if lse_gradient else None
    if made.only_tiles is not None and isinstance(kernel.backend, WholeBackend):
        dq, dk, dv = kernel.backend.attend_backward_whole(
            q, k, v, out, lse, do.to(q.dtype), dlse_or_none, made.only_tiles, **_numbers(made, kernel)
        )
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    execution = _backward(made, q, k, v, out, lse, do, dlse_or_none, kernel, kept)
    execution.run()
    dq, dk, dv = execution.result()
    return _apart(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


def _apart(*results: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The results in memory of their own, as an operator's must be: dk and dv may have arrived in one message."""
    seen: set[int] = set()
    own = []
    for result in results:
        storage = result.untyped_storage()._cdata
        own.append(result.clone() if storage in seen else result)
        seen.add(storage)
    return own[0], own[1], own[2]


@_attention_backward.register_fake
def _(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: Sequence[Tensor], plan: int,
    scale: float, softcap: float, lse_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, do: Tensor, dlse: Tensor) -> tuple:
    return *_attention_backward(do, dlse, *ctx.saved_tensors, (), *ctx.numbers), None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


# The same where ranks keep what they received, which is a result too: checkpointing that saves results saves it.


@torch.library.custom_op("distattn::attention_keep", mutates_args=())
def _attention_keep(
    q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, softcap: float, lse_gradient: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    made = plan_of(plan)
    execution = _forward(made, q, k, v, _kernel(made, q, v, scale, softcap, lse_gradient))
    execution.run()
    out, lse = execution.result()
    return out, lse, received(made.lowered, execution.fields)


@_attention_keep.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, plan: int, scale: float, softcap: float, lse_gradient: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    return out, lse, like_received(plan_of(plan).lowered, q, v)


def _save_kept(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, *ctx.numbers = inputs
    out, lse, kept = output
    ctx.save_for_backward(q, k, v, out, lse, *kept)


def _differentiate_kept(ctx: Any, do: Tensor, dlse: Tensor, _: Any) -> tuple:
    q, k, v, out, lse, *kept = ctx.saved_tensors
    gradients = _attention_backward(do, dlse, q, k, v, out, lse, kept, *ctx.numbers)
    return *gradients, None, None, None, None


_attention_keep.register_autograd(_differentiate_kept, setup_context=_save_kept)


# Split phase: three autograd nodes. Autograd runs them in the exact reverse of their creation order, so the backward
# posts in Finish, computes in Compute and waits in Begin: nothing needs forcing.


class AttentionHandle:
    """One attention call in flight, from ``attention_begin`` to ``attention_finish``."""

    def __init__(self, plan: Plan, kernel: Kernel, sink: Tensor | None, return_lse: bool, lse_gradient: bool) -> None:
        self.plan, self.kernel = plan, kernel
        self.sink, self.return_lse, self.lse_gradient = sink, return_lse, lse_gradient
        self.forward: _Phases | None = None
        self.backward: _Phases | None = None
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self.token: Tensor | None = None


class _Phases:
    """An execution advanced in three phases. Phase borders are the same on all ranks, so their posts stay in one order."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._steps: Generator[tuple[str, int], None, None] = execution.steps()
        next(self._steps)  # up to the posts of time 0

    def compute(self) -> None:
        """Everything but the waits after the last work of any rank."""
        last = self.execution.lowered.last_work
        for what, time in self._steps:
            if time == last and what != POSTED:
                return

    def finish(self) -> tuple[Tensor, ...]:
        for _ in self._steps:
            pass
        return self.execution.result()


def attention_begin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
) -> AttentionHandle:
    """First phase of ``attention``, same arguments: posts the inputs and returns at once. Collective.

    What one micro-batch sends can fly while another computes. Every rank must call the phases in the same order. Run one
    ``backward()`` from one root: it then goes through the phases in reverse.
    """
    call = _prepare(q, k, v, plan, scale, sink, softcap, key_bias, return_lse)
    kernel = _kernel(plan, call.q, call.v, call.scale, softcap or 0.0, call.lse_gradient)
    handle = AttentionHandle(plan, kernel, sink, return_lse, call.lse_gradient)
    handle.inputs = (call.q.detach(), call.k.detach(), call.v.detach())
    handle.token = _Begin.apply(call.q, call.k, call.v, handle)
    return handle


def attention_compute(handle: AttentionHandle) -> None:
    """Second, optional phase: computes, and sends results off without waiting for any."""
    _check_handle(handle)
    handle.token = _Compute.apply(handle.token, handle)


def attention_finish(handle: AttentionHandle) -> Tensor | tuple[Tensor, Tensor]:
    """Last phase: waits for the results and returns what ``attention`` returns. A handle can be finished once."""
    _check_handle(handle)
    assert handle.inputs is not None
    out, lse = _Finish.apply(handle.token, handle, *handle.inputs)
    handle.token = handle.inputs = None
    return _with_sink(out, lse, handle.sink, handle.return_lse)


def _check_handle(handle: AttentionHandle) -> None:
    if handle.token is None:
        raise InputError("this handle is finished; attention_begin makes a new one for each call")


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, handle: AttentionHandle) -> Tensor:
        ctx.handle, ctx.dtype = handle, q.dtype
        handle.forward = _Phases(_forward(handle.plan, q.detach(), k.detach(), v.detach(), handle.kernel))
        return q.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        phases = ctx.handle.backward
        ctx.handle.backward = None
        return *(x.to(ctx.dtype) for x in phases.finish()), None


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, handle: AttentionHandle) -> Tensor:
        ctx.handle = handle
        assert handle.forward is not None
        handle.forward.compute()
        return token.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.handle.backward.compute()
        return grad, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, handle: AttentionHandle, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.handle = handle
        assert handle.forward is not None
        out, lse = handle.forward.finish()
        kept = received(handle.plan.lowered, handle.forward.execution.fields) if handle.plan.keep else ()
        handle.forward = None
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor | None) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        handle: AttentionHandle = ctx.handle
        q, k, v, out, lse, *kept = ctx.saved_tensors
        dlse = dlse if handle.lse_gradient else None
        execution = _backward(handle.plan, q, k, v, out, lse, do, dlse, handle.kernel, kept)
        handle.backward = _Phases(execution)
        return do.new_zeros(()), None, None, None, None
