"""``LinearAttention``: a layer of linear attention in Megatron, over rows in its zigzag and documents as it packs them.

    [q, k, v | gate | decay | β] = x W_in                    by key head: tensor ranks hold whole heads
    o = linear_attention(silu(conv([q, k, v])), decay, β)    states cross context ranks, nothing else does
    y = (norm(o) · silu(gate)) W_out

It takes the place of ``self_attention`` in a TransformerLayer, or of ``mixer`` in a MambaLayer. Every parameter belongs to
heads, so that a tensor-parallel run needs no reduction of its own. The gates are those of ``distattn.models.linear_mixer``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor, nn

from distattn.errors import ConfigError, UnsupportedError
from distattn.integrations.megatron_attention import group_of, packed_order
from distattn.integrations.megatron_layout import PER_DOCUMENT, Placement, host_lengths, packed_placement, sequence_placement
from distattn.integrations.megatron_refusals import refuse_group
from distattn.integrations.megatron_schedule import LINEAR, PREFIX, Schedule, parse_schedule
from distattn.integrations.refusals import refuse_bias, refuse_tensor_mask
from distattn.kernels.linear import KINDS
from distattn.linear import linear_attention
from distattn.models.config import GATE_RANK
from distattn.short_convolution import short_convolution

_GATE_TEMPERATURE = 16.0
_STEP_SHIFT = 5.0


@dataclass
class LinearAttentionSubmodules:
    """Projections, as Megatron's specs name them."""

    in_proj: Any = ColumnParallelLinear
    out_proj: Any = RowParallelLinear


class LinearAttention(MegatronModule):
    """One layer of a linear kind: hidden [s, b, dim] of this context rank to (the same, None).

    kind: one of ``distattn.linear_attention``. exchange: how states cross context ranks. num_heads, num_value_heads, head_dim,
    value_head_dim, conv_width: None takes Megatron's linear_num_key_heads and its siblings. The rest as Megatron passes it;
    of cp_comm_type only ``distattn:linear,…`` and ``packed=…`` concern this layer.

    Raises ConfigError for a kind or exchange that is unknown, UnsupportedError where heads do not divide by tensor ranks.
    """

    def __init__(
        self,
        config: Any,
        submodules: LinearAttentionSubmodules | None = None,
        layer_number: int = 1,
        kind: str = "gated_delta",
        exchange: str = "auto",
        num_heads: int | None = None,
        num_value_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        conv_width: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if kind not in KINDS:
            raise ConfigError(f"kind={kind!r} is unknown; a linear layer may be {', '.join(KINDS)}")
        self.kind, self.layer_number, self.pg_collection = kind, max(1, layer_number), pg_collection
        self.schedule = _schedule(config, self.layer_number, cp_comm_type, exchange)
        self.name = f"{self.schedule.text} ({kind}) in layer {self.layer_number}"
        ranks = 1 if (group := self._group_of("tp")) is None else dist.get_world_size(group)
        heads = num_heads or config.linear_num_key_heads
        value_heads = num_value_heads or config.linear_num_value_heads
        _check_heads(self.name, heads, value_heads, ranks)
        self.heads, self.values_each = heads // ranks, value_heads // heads
        self.key_dim = head_dim or config.linear_key_head_dim
        self.value_dim = value_head_dim or config.linear_value_head_dim
        self.widths = self._widths()
        parts = submodules or LinearAttentionSubmodules()
        shared: dict[str, Any] = {"config": config, "is_expert": False, "bias": False, "tp_group": group}
        self.in_proj = build_module(
            parts.in_proj,
            config.hidden_size,
            heads * sum(self.widths),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **shared,
        )
        self.out_proj = build_module(
            parts.out_proj,
            value_heads * self.value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **shared,
        )
        self.conv_weight: Tensor | None
        self.norm_weight: Tensor
        self.decay_weight: Tensor | None
        self.rate: Tensor | None
        self.rate_bias: Tensor | None
        self._make_parameters(conv_width or config.linear_conv_kernel_dim or 1)

    def _widths(self) -> list[int]:
        """Columns of the input projection for each key head: q, k and v; gate; decay; β."""
        n = self.values_each
        decay = {"simple_gla": n, "gated_delta": n, "gla": n * GATE_RANK, "kda": n * GATE_RANK}.get(self.kind, 0)
        beta = n if KINDS[self.kind].delta else 0
        return [2 * self.key_dim + n * self.value_dim, n * self.value_dim, decay, beta]

    def _make_parameters(self, conv_width: int) -> None:
        """Weights of heads, from fixed values: the same on all ranks without a generator."""
        made: dict[str, Tensor | None] = dict.fromkeys(("conv_weight", "decay_weight", "rate", "rate_bias"))
        heads = self.heads * self.values_each
        made["norm_weight"] = torch.ones(heads, self.value_dim)
        if conv_width > 1:
            # At first it passes the row itself.
            made["conv_weight"] = torch.zeros(self.heads * self.widths[0], conv_width)
            made["conv_weight"][:, -1] = 1
        if self.kind in ("gla", "kda"):
            made["decay_weight"] = torch.zeros(heads, GATE_RANK, self.key_dim)
        if self.kind in ("gated_delta", "kda"):
            made["rate"], made["rate_bias"] = torch.ones(heads), torch.ones(heads)
        on_cpu = self.config.use_cpu_initialization
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        self.of_heads = [name for name, value in made.items() if value is not None]
        for name, value in made.items():
            parameter = None if value is None else nn.Parameter(value.to(device, self.config.params_dtype))
            self.register_parameter(name, parameter)
            if parameter is not None:
                for attribute, setting in {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}.items():
                    setattr(parameter, attribute, setting)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        inference_context: Any = None,
        inference_params: Any = None,
        packed_seq_params: Any = None,
        attention_bias: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [s, b, dim] (its sequence-parallel share of it), rows of this context rank; packed: b = 1. Collective
        over the context-parallel group. Rotary embeddings are not used. Raises UnsupportedError for a mask or a cache."""
        refuse_tensor_mask(attention_mask, self.name, "pack documents instead; the layer is causal within each")
        refuse_bias(attention_bias, self.name, "leave it out")
        if inference_context is not None or inference_params is not None:
            reason = "its states are not part of Megatron's cache"
            raise UnsupportedError("inference", self.name, reason, "use distattn.linear_attention_step in your own decoding")
        mixed = self.in_proj(hidden_states)[0].transpose(0, 1)  # [b, s, local heads · columns]
        group, placement, documents = self._stream(mixed.shape[1], packed_seq_params)
        qkv, gate, decay, beta = mixed.unflatten(-1, (self.heads, -1)).split(self.widths, -1)
        qkv = qkv.flatten(2)
        if self.conv_weight is not None:
            qkv = short_convolution(
                qkv, self.conv_weight.to(qkv.dtype), group=group, layout=placement.layout, cu_seqlens=documents
            )
        keys = [self.key_dim, self.key_dim, self.values_each * self.value_dim]
        q, k, v = F.silu(qkv).unflatten(-1, (self.heads, -1)).split(keys, -1)
        if KINDS[self.kind].delta:
            q, k = (F.normalize(_widen(x), dim=-1).to(x.dtype) for x in (q, k))
        out, _ = linear_attention(
            q,
            k,
            self._by_value_head(v),
            kind=self.kind,
            decay=self._log_decay(decay),
            beta=_widen(beta.flatten(2)).sigmoid() if self.widths[3] else None,
            group=group,
            exchange=self.schedule.exchange,
            layout=placement.layout,
            cu_seqlens=documents,
            kernel=self.schedule.kernel,
        )
        out = F.rms_norm(out, (self.value_dim,), None, self.config.layernorm_epsilon) * self.norm_weight.to(out.dtype)
        out = out * F.silu(self._by_value_head(gate))
        return self.out_proj(out.flatten(2).transpose(0, 1).contiguous())

    def _by_value_head(self, x: Tensor) -> Tensor:
        """[b, s, key heads, its values' columns] to [b, s, value heads, columns]."""
        return x.unflatten(-1, (self.values_each, -1)).flatten(2, 3)

    def _log_decay(self, raw: Tensor) -> Tensor | None:
        """In the form that the kind takes; fp32 (fp64). raw [b, s, local key heads, columns]."""
        heads = self.heads * self.values_each
        wide = torch.float64 if raw.dtype == torch.float64 else torch.float32
        first = self._first_head() if self.kind in ("lightning", "retention") else 0
        head = torch.arange(first, first + heads, device=raw.device, dtype=wide)
        if self.kind == "retention":
            return torch.log1p(-torch.exp2(-5 - head))
        if self.kind == "lightning":
            depth = (self.layer_number - 1) / max(self.config.num_layers - 1, 1)
            return -torch.exp2(-8 * (head + 1) / self._all_heads()) * (1 - depth + 1e-5)
        if not self.widths[2]:
            return None
        gate = _widen(self._by_value_head(raw))  # [b, s, value heads, 1 or GATE_RANK]
        if self.decay_weight is None:
            gate = gate.squeeze(-1)
        else:
            gate = torch.einsum("bthr,hrk->bthk", gate, self.decay_weight.to(gate.dtype))
        if self.rate is None or self.rate_bias is None:
            return F.logsigmoid(gate) / _GATE_TEMPERATURE
        # −A_h · softplus(x W + bias), A_h spread over 1 … 16 by head, whichever tensor rank holds it.
        place = (self._first_head() + torch.arange(heads, device=raw.device, dtype=wide)) / max(self._all_heads() - 1, 1)
        rate, bias = torch.exp2(place * math.log2(16)) * self.rate.to(wide), self.rate_bias.to(wide)
        if gate.ndim == 4:
            rate, bias = rate.unsqueeze(-1), bias.unsqueeze(-1)
        return -rate * F.softplus(gate + bias - _STEP_SHIFT)

    def _first_head(self) -> int:
        group = self._group_of("tp")
        return 0 if group is None else dist.get_rank(group) * self.heads * self.values_each

    def _all_heads(self) -> int:
        group = self._group_of("tp")
        return self.heads * self.values_each * (1 if group is None else dist.get_world_size(group))

    def _group_of(self, axis: str) -> dist.ProcessGroup | None:
        return group_of(self.pg_collection, axis)

    def _stream(self, rows: int, packed_seq_params: Any) -> tuple[dist.ProcessGroup | None, Placement, Any]:
        """(group, placement, cu_seqlens) of this call."""
        packed = getattr(packed_seq_params, "qkv_format", None) == "thd"
        static = self._group_of("cp")
        group = getattr(packed_seq_params, "cp_group", None)
        size = getattr(packed_seq_params, "local_cp_size", None)
        refuse_group(self.name, group, size, static, packed)
        if group is None and size is None:
            group = static
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        num_ranks = 1 if group is None else dist.get_world_size(group)
        if packed_seq_params is None or not packed:
            return group, sequence_placement(rows, num_ranks), None
        real = host_lengths(packed_seq_params.cu_seqlens_q)
        room = packed_seq_params.cu_seqlens_q_padded
        order = PER_DOCUMENT if num_ranks == 1 else packed_order(self.schedule, self.name)
        placement = packed_placement(rows, num_ranks, real, None if room is None else host_lengths(room), order)
        return group, placement, placement.documents

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None, **unused: Any
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: all parameters are cut by head."""
        own = {name: getattr(self, name) for name in self.of_heads}
        groups = {"tp_group": self._group_of("tp"), "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        sharded = make_sharded_tensors_for_checkpoint(own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups)
        for name in ("in_proj", "out_proj"):
            sharded |= sharded_state_dict_default(getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata)
        return sharded


def _schedule(config: TransformerConfig, layer_number: int, forwarded: str | None, exchange: str) -> Schedule:
    """What cp_comm_type says of a linear layer, else the exchange of its spec."""
    configured = config.cp_comm_type
    named = configured[min(layer_number, len(configured)) - 1] if isinstance(configured, list) else forwarded
    if named is None or not named.startswith(f"{PREFIX}{LINEAR}"):
        # Of the schedule of softmax layers, how documents are packed concerns this one too.
        packed = parse_schedule(named).packed if named is not None and named.startswith(PREFIX) else None
        named = f"{PREFIX}{LINEAR},exchange={exchange}" + (f",packed={packed}" if packed else "")
    return parse_schedule(named)


def _check_heads(name: str, heads: int, value_heads: int, ranks: int) -> None:
    if heads % ranks or value_heads % heads:
        raise UnsupportedError(
            f"{heads} key heads and {value_heads} value heads over {ranks} tensor ranks",
            name,
            "each tensor rank holds whole key heads, each with as many value heads",
            "choose key heads that are a multiple of the tensor ranks, and value heads that are a multiple of key heads",
        )


def _widen(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is: for gates and norms."""
    return x if x.dtype == torch.float64 else x.float()
