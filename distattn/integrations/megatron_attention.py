"""``CoreAttention``: the class that takes the place of ``core_attention`` in Megatron's self-attention.

    q, k, v [s, b, heads, d] or [t, heads, d]   ──▶ group of this call ──▶ placement (zigzag, documents) ──▶ plan (kept)
                                                ──▶ attention over the group's rows ──▶ [s, b, heads·d] or [t, heads, d]

Rotary embedding, projections and tensor parallelism are Megatron's. What this class cannot honour it refuses, at construction
where that is possible, else before any communication and alike on all ranks.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from distattn.attention import AttentionHandle, attention_begin, attention_finish
from distattn.errors import UnsupportedError
from distattn.integrations import megatron_refusals as refuse
from distattn.integrations.megatron_layout import (
    PER_DOCUMENT,
    PER_SEQUENCE,
    Placement,
    Window,
    host_lengths,
    packed_placement,
    sequence_placement,
)
from distattn.integrations.megatron_remat import KeptResults, attend
from distattn.integrations.megatron_schedule import KEEP, RECOMPUTE, Schedule, schedule_of_layer
from distattn.parallel.per_group import PerGroup
from distattn.planning import Plan, plan

_log = logging.getLogger(__name__)
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)
_CACHE_SIZE = 128


class CoreAttention(MegatronModule):
    """Exact attention over the rows of a context-parallel group, as Megatron-core 0.16 to 0.19 calls it.

    Arguments as Megatron passes them; schedule: of the layer's spec (see ``distattn.integrations.megatron_schedule``).
    softmax_scale: None is head_dim^−½, also under ``apply_query_key_layer_scaling``, which Megatron undoes in its softmax.

    Raises UnsupportedError for what it would have to ignore, ConfigError for a schedule that is unknown.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        model_comm_pgs: Any = None,
        schedule: str | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.pg_collection = pg_collection if pg_collection is not None else model_comm_pgs
        hierarchy = getattr(config, "hierarchical_context_parallel_sizes", None)
        self.schedule = schedule_of_layer(self.layer_number, cp_comm_type, config.cp_comm_type, schedule, hierarchy)
        self.name = f"{self.schedule.text} in layer {self.layer_number}"
        self.remat = _remat(config, self.schedule)
        refuse.refuse_construction(self.name, config, self.schedule, attn_mask_type, attention_type, attention_dropout)
        self.window: Window | None = None
        skipped: Any = config.window_attn_skip_freq
        if is_layer_window_attention(config.window_size, skipped, self.layer_number):
            assert config.window_size is not None
            self.window = (int(config.window_size[0]), int(config.window_size[1]))
        # Megatron's optimizer reads this attribute; qk_clip itself is refused.
        self.current_max_attn_logits = None
        self.softmax_offset = _offset(config, self._group_of("tp"))
        self._kept = KeptResults()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **arguments: Any,
    ) -> Tensor:
        """Attention of this rank's rows. Collective over the context-parallel group of the call.

        query [s, b, heads, d], key and value [s, b, groups, d or its own width], s this rank's zigzag rows; packed ("thd"):
        [t, heads, d] without b. attention_mask: None, the mask is made here from attn_mask_type (default: that of
        construction), the layer's window and the documents in packed_seq_params. Returns [s, b, heads · width], packed
        [t, heads, width].

        Raises UnsupportedError and InputError, alike on all ranks and before any communication.
        """
        packed, (q, k, v, made) = self._arranged(
            query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params, arguments
        )
        out = self._attend(q, k, v, made)
        return out.squeeze(0) if packed else out.transpose(0, 1).flatten(2)

    def begin(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> AttentionHandle:
        """First phase of ``forward`` for unpacked rows, see ``distattn.attention_begin``: what it sends travels on its own."""
        _, (q, k, v, made) = self._arranged(query, key, value, attention_mask, None, None, None, {})
        return attention_begin(q, k, v, made, scale=self.softmax_scale, sink=self.softmax_offset)

    @staticmethod
    def finish(handle: AttentionHandle) -> Tensor:
        """Last phase: [s, b, heads · width]."""
        out = attention_finish(handle)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1).flatten(2)

    def _arranged(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, mask_type: AttnMaskType | None,
        bias: Tensor | None, packed_seq_params: Any, arguments: dict[str, Any],
    ) -> tuple[bool, tuple[Tensor, Tensor, Tensor, Plan]]:  # fmt: skip
        """(whether packed, (q, k, v as [b, s, heads, d], plan)) of a call, or what refuses it."""
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        mask_type = self.attn_mask_type if mask_type is None else mask_type
        refuse.refuse_call(self.name, query, key, mask_type, packed, attention_mask, bias, arguments)
        group = self._call_group(packed_seq_params, packed)
        placement = self._placement(query.shape[0], group, packed_seq_params if packed else None)
        q, k, v = (x.unsqueeze(0) if packed else x.transpose(0, 1) for x in (query, key, value))
        return packed, (q, k, v, self._plan(q, v, placement, mask_type in _CAUSAL, group))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, made: Plan) -> Tensor:
        scale = q.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        keeps = self.remat == KEEP and self.training and is_checkpointing()
        second = keeps and torch.is_grad_enabled()
        kept = self._kept.pop(q, made) if second else None
        result, out, lse = attend(q, k, v, made, scale=scale, sink=self.softmax_offset, kept=kept)
        if keeps and not second:
            self._kept.push(q, made, out, lse)
        return result

    # Who takes part, and which rows they hold.

    def _group_of(self, axis: str) -> dist.ProcessGroup | None:
        return group_of(self.pg_collection, axis)

    def _call_group(self, packed_seq_params: Any, packed: bool) -> dist.ProcessGroup | None:
        """The context-parallel group of this call; None where that is this rank alone. Not kept: the next may be another."""
        static = self._group_of("cp")
        group = getattr(packed_seq_params, "cp_group", None)
        size = getattr(packed_seq_params, "local_cp_size", None)
        refuse.refuse_group(self.name, group, size, static, packed)
        if group is None and size is None:
            group = static
        return None if group is None or dist.get_world_size(group) == 1 else group

    def _placement(self, rows: int, group: dist.ProcessGroup | None, packed: Any) -> Placement:
        num_ranks = 1 if group is None else dist.get_world_size(group)
        if packed is None:
            return sequence_placement(rows, num_ranks)
        real = host_lengths(packed.cu_seqlens_q)
        padded = None if packed.cu_seqlens_q_padded is None else host_lengths(packed.cu_seqlens_q_padded)
        refuse.refuse_cross_documents(self.name, packed, host_lengths)
        order = PER_DOCUMENT if num_ranks == 1 else packed_order(self.schedule, self.name)
        placement = packed_placement(rows, num_ranks, real, padded, order)
        if placement.padded and num_ranks > 1:
            refuse.refuse_undeclared_loss(self.name, self.config, self.schedule)
        return placement

    def _plan(self, q: Tensor, v: Tensor, placement: Placement, causal: bool, group: dist.ProcessGroup | None) -> Plan:
        need = _Need(
            placement=placement,
            causal=causal,
            window=self.window,
            heads=q.shape[2],
            kv_heads=v.shape[2],
            head_dim=q.shape[3],
            value_dim=v.shape[3],
            dtype=q.dtype,
            schedule=self.schedule,
            deterministic=bool(self.config.deterministic_mode),
        )
        return _book_of(group).find(need, group, self.name)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: the sinks, one a local head."""
        state = {} if self.config.softmax_type != "learnable" else self.state_dict(prefix="", keep_vars=True)
        groups = {"tp_group": self._group_of("tp"), "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets, **groups)


def group_of(pg_collection: Any, axis: str) -> dist.ProcessGroup | None:
    """The ``tp`` or ``cp`` group that a module was given, else the one that Megatron was initialised with."""
    group: Any = getattr(pg_collection, axis, None)
    if group is None and axis == "cp":
        group = parallel_state.get_context_parallel_group(check_initialized=False)
    if group is None and axis == "tp":
        group = parallel_state.get_tensor_model_parallel_group(check_initialized=False)
    return group


def _remat(config: TransformerConfig, schedule: Schedule) -> str:
    """What to do inside Megatron's checkpoints, with a warning where they are of no use."""
    selective = config.recompute_granularity == "selective" and "core_attn" in (config.recompute_modules or [])
    chosen = schedule.remat
    if chosen not in (KEEP, RECOMPUTE):
        # Core attention under its own checkpoint: keeping (out, LSE) is what this layer holds without any.
        chosen = KEEP if selective and not config.fp8 else RECOMPUTE
    if selective:
        _log.warning(
            "recompute_modules holds core_attn, which saves no memory with distattn (it keeps no scores): drop it. Until then, "
            "remat=%s %s",
            chosen,
            "keeps output and LSE" if chosen == KEEP else "repeats attention and its communication in the backward pass",
        )
    return chosen


def _offset(config: TransformerConfig, tp_group: dist.ProcessGroup | None) -> Tensor | None:
    """The sink of each local head: zeros for ``off-by-one``, a parameter for ``learnable``."""
    if config.softmax_type == "vanilla":
        return None
    size = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    heads = config.num_attention_heads // size
    device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
    if config.softmax_type == "off-by-one":
        return torch.zeros(heads, device=device, dtype=config.params_dtype)
    whole = torch.zeros(config.num_attention_heads, device=device, dtype=config.params_dtype)
    if config.perform_initialization:
        # Of all heads on every rank, from the generator that all share: the same model at any tensor parallelism.
        initialise: Any = config.init_method
        initialise(whole)
    offset = torch.nn.Parameter(whole[rank * heads : (rank + 1) * heads].clone())
    for name, value in {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}.items():
        setattr(offset, name, value)
    return offset


def packed_order(schedule: Schedule, name: str) -> str:
    """What Megatron cut in zigzag where documents are packed: from the schedule, the release, or the run's arguments.

    From 0.19 on, ``--dataloader-inter-document-masking`` cuts the whole sequence, and tensors look alike: where neither the
    schedule nor ``megatron.training`` says so, UnsupportedError.
    """
    if schedule.packed is not None:
        return schedule.packed
    if tuple(int(part) for part in megatron_version.split(".")[:2]) < (0, 19):
        return PER_DOCUMENT
    training = sys.modules.get("megatron.training.global_vars")
    arguments = getattr(training, "_GLOBAL_ARGS", None)
    if arguments is not None:
        return PER_SEQUENCE if getattr(arguments, "dataloader_inter_document_masking", False) else PER_DOCUMENT
    raise UnsupportedError(
        "packed documents over several context ranks",
        f"{name} on Megatron-core {megatron_version}",
        "it cuts either each document or the whole sequence in zigzag, and nothing here says which",
        "add packed=document or packed=sequence to the schedule, such as distattn:ring,packed=document",
    )


# Plans are kept: a layer call replans nothing, and costs no look into the group's store.


class _Need(NamedTuple):
    """Everything that a plan depends on, but its group."""

    placement: Placement
    causal: bool
    window: Window | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    schedule: Schedule
    deterministic: bool


class _Book:
    """Plans of one group, latest last. All its ranks make the same calls, so that all find or miss alike."""

    def __init__(self) -> None:
        self.plans: OrderedDict[_Need, Plan] = OrderedDict()
        self.settled: dict[tuple, str] = {}

    def find(self, need: _Need, group: dist.ProcessGroup | None, name: str) -> Plan:
        if need in self.plans:
            self.plans.move_to_end(need)
            return self.plans[need]
        # The choice among strategies takes a second or more: it is made for the first batch of a length and then stands.
        kind = (need.placement.layout.num_rows, *need[1:])
        strategy = self.settled.get(kind, need.schedule.strategy)
        made = plan(
            need.placement.mask(causal=need.causal, window=need.window),
            heads=need.heads,
            kv_heads=need.kv_heads,
            head_dim=need.head_dim,
            value_dim=need.value_dim,
            group=group,
            strategy=strategy,
            layout=need.placement.layout,
            kernel=need.schedule.kernel,
            dtype=need.dtype,
            deterministic=need.deterministic,
            options=need.schedule.options,
        )
        if made.rank == 0 and kind not in self.settled:
            _log.info("%s plans over %d context ranks:\n%s", name, made.num_ranks, made.describe())
        self.settled[kind] = made.strategy
        self.plans[need] = made
        if len(self.plans) > _CACHE_SIZE:
            self.plans.popitem(last=False)
        return made


_books: PerGroup[_Book] = PerGroup()
_alone = _Book()


def _book_of(group: dist.ProcessGroup | None) -> _Book:
    return _alone if group is None else _books.setdefault(group, _Book())
