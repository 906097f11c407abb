"""Context parallel for a plain torch model: its ``scaled_dot_product_attention`` runs on our schedules.

    parallel = parallelize(model, r"blocks\\.\\d+\\.attention", group, heads=8, kv_heads=2, head_dim=64)
    batch = parallel.shard_batch({"tokens": tokens, "positions": positions, "labels": labels}, mask)
    with batch:  loss_sum = …model(batch["tokens"], batch["positions"])…;  (loss_sum / num_tokens).backward()
    parallel.sum_gradients()

Nothing is patched globally: calls are taken over while a chosen module's ``forward`` runs, in the thread that runs it.
Whatever else in the model would mix tokens (attention outside of those modules, recurrent layers, convolutions) raises, as does
a chosen module that never calls attention.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode

from distattn.attention import attention
from distattn.errors import InputError, PlanError, UnsupportedError
from distattn.integrations.refusals import refuse_cache, refuse_dropout, refuse_tensor_mask, refuse_torch_context_parallel
from distattn.mask import Mask
from distattn.planning import Plan, plan

__all__ = ["ContextParallel", "ShardedBatch", "local_block_mask", "parallelize"]

_NAME = "distattn.integrations.torch_parallel"
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


def parallelize(
    model: nn.Module,
    modules: str | Sequence[nn.Module],
    group: dist.ProcessGroup | DeviceMesh | None,
    *,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int,
    strategy: str = "auto",
    options: Any = None,
    kernel: str = "auto",
    deterministic: bool = False,
    timeout_s: float | None = None,
) -> ContextParallel:
    """Run the attention of ``modules`` of ``model`` over the ranks of ``group``. Not collective.

    modules: the submodules whose forwards call ``scaled_dot_product_attention``, or a regular expression that matches their
    whole names in ``model.named_modules()``. group: a process group, a mesh of one dimension, or None for one rank. heads,
    kv_heads, head_dim: of those calls; the layout of rows is chosen for them. The rest is as for ``distattn.plan``.

    A copy (``copy.deepcopy``) of the model calls the original: parallelize after copying, and after FSDP2's ``fully_shard``.
    Raises InputError where no module matches or one is parallelized already, and UnsupportedError for nn.MultiheadAttention.
    """
    chosen = _choose(model, modules)
    settings = {
        "heads": heads, "kv_heads": heads if kv_heads is None else kv_heads, "head_dim": head_dim, "group": _group(group),
        "strategy": strategy, "options": options, "kernel": kernel, "deterministic": deterministic, "timeout_s": timeout_s,
    }  # fmt: skip
    return ContextParallel(model, chosen, settings)


class ContextParallel:
    """A model whose attention runs over the ranks of a group; made by ``parallelize``."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], settings: dict[str, Any]) -> None:
        self.model, self.group = model, settings["group"]
        self._settings = settings
        self._batch: ShardedBatch | None = None
        self._modules = [*modules.values(), model]
        for name, module in modules.items():
            _surround(module, functools.partial(_Attention, self, name))
        _surround(model, _Outside)

    def shard_batch(self, tensors: Mapping[str, Tensor], mask: Mask, *, dim: int = 1) -> ShardedBatch:
        """This rank's rows of tensors that every rank holds whole. Collective.

        tensors: of S rows in ``dim``, or in their only dimension; labels and positions among them. The label of a row is
        looked up before sharding, since the next row may be another rank's. mask: S × S, what attention allows, in place of any
        that the model would make; its calls say ``is_causal`` exactly if the mask lets nobody see later tokens.
        """
        made = plan(mask, **self._settings)
        local = {name: made.shard(x, dim if x.ndim > 1 else 0) for name, x in tensors.items()}
        return ShardedBatch(self, made, local)

    def sum_gradients(self, parameters: Sequence[nn.Parameter] | None = None) -> None:
        """Add up the gradients of the model, or of these parameters, over the group; a missing one counts as 0. Collective.

        Divide the loss by the number of tokens of all ranks beforehand. Not for FSDP2, which reduces gradients itself: shard
        over data × context ranks there, with ``set_gradient_divide_factor(1.0)``.
        """
        if self.group is None:
            return
        for parameter in self.model.parameters() if parameters is None else parameters:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.group)

    def remove(self) -> None:
        """Give the modules their own attention back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        """One call of ``scaled_dot_product_attention``, [B, H, S_local, D] as torch has it, from the module ``name``."""
        where = f"{_NAME} in {name}"
        refuse_tensor_mask(given.get("attn_mask"), where, "give the mask to shard_batch, as a distattn.Mask")
        refuse_dropout(given.get("dropout_p") or 0.0, where)
        if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
            raise InputError(f"{where}: query is {list(query.shape)}; query, key and value must be [B, H, S, D]")
        refuse_cache(query.shape[2], key.shape[2], where)
        made = self._plan(where, query, key, value, bool(given.get("is_causal")))
        if key.shape[1] != query.shape[1] and not given.get("enable_gqa"):
            raise InputError(f"{where}: {query.shape[1]} query and {key.shape[1]} KV heads need enable_gqa=True")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = attention(q, k, v, made, scale=given.get("scale"))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    def _plan(self, where: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Plan:
        """The batch's plan, or one of the same rows for other heads."""
        if self._batch is None:
            raise InputError(
                f"{where}: no batch is entered; run forward and backward (which may compute the forward again) inside "
                "`with batch:`, of shard_batch"
            )
        if is_causal != self._batch.causal:
            of_mask = "hides later tokens" if self._batch.causal else "shows later tokens"
            reason = f"the mask of shard_batch {of_mask}, and the call says otherwise"
            raise UnsupportedError(f"is_causal={is_causal}", where, reason, "make the call and the mask say the same")
        made = self._batch.plan
        shape = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if query.shape[2] != made.num_local_rows:
            raise InputError(f"{where}: query has {query.shape[2]} rows; this rank has {made.num_local_rows} of the batch's")
        if shape == (made.heads, made.kv_heads, made.head_dim, made.value_dim):
            return made
        settings = {**self._settings, **dict(zip(("heads", "kv_heads", "head_dim", "value_dim"), shape))}
        return plan(made.mask, layout=made.layout, **settings)

    def enter(self, batch: ShardedBatch) -> None:
        if self._batch is not None:
            raise InputError("a batch is entered already; leave it first")
        self._batch = batch

    def leave(self) -> None:
        self._batch = None


class ShardedBatch(AbstractContextManager["ShardedBatch"]):
    """This rank's rows of a batch: ``batch[name]``; ``batch.plan`` has ``positions``, ``gather`` and ``describe``.

    Entered (``with batch:``) while the model runs forward and backward on it.
    """

    def __init__(self, parallel: ContextParallel, made: Plan, tensors: dict[str, Tensor]) -> None:
        self.plan, self.tensors = made, tensors
        self.causal = (made.mask - Mask.causal(made.mask.num_queries)).area == 0
        self._parallel = parallel

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"the batch has no {name!r}; it has {', '.join(self.tensors)}")
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __enter__(self) -> ShardedBatch:
        self._parallel.enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._parallel.leave()


def local_block_mask(plan: Plan, device: str | torch.device = "cpu", block_size: int = 128) -> BlockMask:
    """FlexAttention's BlockMask of this rank's rows, in the plan's order, over all keys in global order.

    For code that gathers keys and values itself and calls ``flex_attention``. Its tables have a row a block of local queries:
    ranks share what the whole BlockMask would take. Raises MaskError as ``Mask.to_flex`` does.
    """
    rows = plan.layout.rows(plan.rank)
    begins = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    parts = []
    for begin, end in zip(begins, [*begins[1:], len(rows)]):
        first, last = int(rows[begin]), int(rows[end - 1]) + 1
        # The band of keys minus queries moves against the queries.
        parts.append(plan.mask[first:last, :].bands + np.array([begin, begin, 0, 0, -begin, -begin]))
    bands = np.concatenate([np.zeros((0, 6), np.int64), *parts])
    return Mask(len(rows), plan.mask.num_keys, bands).to_flex(device, block_size)


class _Mode(TorchFunctionMode):
    """Refuses to be entered where torch shards the sequence itself."""

    def __enter__(self) -> _Mode:
        refuse_torch_context_parallel(_NAME)
        super().__enter__()
        return self


class _Attention(_Mode):
    """While the forward of a chosen module runs: its attention is ours."""

    def __init__(self, parallel: ContextParallel, name: str) -> None:
        super().__init__()
        self._parallel, self._name, self._called = parallel, name, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._called = True
            return self._parallel.attend(self._name, **dict(zip(_SDPA_ARGUMENTS, args)), **kwargs)
        _refuse_mixing(func, args, kwargs, f"{_NAME} in {self._name}")
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and not self._called:
            reason = "its attention, if it has any, would see this rank's tokens only"
            raise UnsupportedError(
                f"the module {self._name}, which ran without calling scaled_dot_product_attention", _NAME, reason,
                "choose the modules that call it (a compiled call or another function cannot be seen)",
            )  # fmt: skip


class _Outside(_Mode):
    """While the model's forward runs: nothing outside of the chosen modules may mix tokens."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            reason = "it would see this rank's tokens only"
            raise UnsupportedError(
                "scaled_dot_product_attention outside of the chosen modules", _NAME, reason, "add its module to modules"
            )
        _refuse_mixing(func, args, kwargs, _NAME)
        return func(*args, **kwargs)


def _refuse_mixing(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Raise for functions other than attention that look at more than one token."""
    name = getattr(func, "__name__", "")
    if func is F.multi_head_attention_forward or name == "_native_multi_head_attention":
        reason = "it hides its call of scaled_dot_product_attention"
        raise UnsupportedError("nn.MultiheadAttention", where, reason, "project q, k and v yourself and call it")
    if name == "flex_attention":
        raise UnsupportedError("flex_attention", where, "only scaled_dot_product_attention is taken over", "call that one")
    if name in _RECURRENT:
        reason = "its state would start anew on every rank"
        raise UnsupportedError(f"a recurrent layer ({name})", where, reason, "see distattn.linear_attention")
    if name in _CONVOLUTIONS:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if any(size > 1 for size in weight.shape[2:]):
            reason = "its window ends at the border of a rank's rows"
            raise UnsupportedError(f"a convolution ({name})", where, reason, "see distattn.short_convolution")


def _surround(module: nn.Module, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    """Run the module's forward inside a fresh ``mode()``."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return inner(*args, **kwargs)

    module.forward = forward


def _choose(model: nn.Module, modules: str | Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Names and modules to take over."""
    named = dict(model.named_modules())
    if isinstance(modules, str):
        chosen = {name: module for name, module in named.items() if name and re.fullmatch(modules, name)}
    else:
        names = {id(module): name for name, module in named.items()}
        if any(id(module) not in names for module in modules):
            raise InputError("modules holds one that is not a submodule of the model")
        chosen = {names[id(module)]: module for module in modules}
    if not chosen or "" in chosen:
        shown = ", ".join(name for name in named if name)
        raise InputError(f"modules={modules!r} must choose at least one submodule by its whole name, of {shown[:500]}")
    for name, module in {**chosen, "": model}.items():
        if isinstance(module, nn.MultiheadAttention):
            _refuse_mixing(F.multi_head_attention_forward, (), {}, f"{_NAME} in {name}")
        if "forward" in module.__dict__:
            raise InputError(f"the forward of {name or 'the model'} is replaced already; remove() what did it first")
    return chosen


def _group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise PlanError(f"the mesh has dimensions {group.mesh_dim_names}; pass one of them, as mesh['context']")
        return group.get_group()
    return group
