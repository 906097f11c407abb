"""Ping-pong in a Megatron layer: two halves of the micro-batch take turns, so that what one sends to other context ranks
travels while the other computes.

    computed     norm, qkv of half 0    of half 1    attention of 0    of 1    output, MLP of 0    of 1
    travelling                          QKV(0)       QKV(1)            O(0)    O(1)

The backward goes through the same in reverse, since autograd runs the nodes of split-phase calls so.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from distattn.attention import attention_compute
from distattn.errors import UnsupportedError
from distattn.integrations.megatron_attention import CoreAttention
from distattn.integrations.megatron_layer import ListedLayer
from distattn.integrations.megatron_schedule import KEEP
from distattn.integrations.refusals import refuse_bias, refuse_unknown_arguments


class PingPongLayer(ListedLayer):
    """A TransformerLayer whose attention is split in phases over two halves of the micro-batch; the same results.

    In training the micro-batch must have an even number of sequences, unpacked. In evaluation it is a TransformerLayer.
    Raises UnsupportedError for what a layer has beside self-attention and MLP.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        core = getattr(self.self_attention, "core_attention", None)
        name = f"ping-pong in layer {self.layer_number}"
        selective = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
        for given, feature, alternative in (
            (not isinstance(core, CoreAttention), "an attention of another class", "use pingpong_layer_spec()"),
            (not isinstance(self.cross_attention, IdentityOp), "cross attention", "use layer_spec()"),
            (getattr(config, "attention_output_gate", False), "attention_output_gate", "use layer_spec()"),
            (getattr(config, "multi_latent_attention", False), "multi-latent attention", "use patch_spec()"),
            (getattr(config, "fused_single_qkv_rope", False), "fused_single_qkv_rope", "turn it off"),
            (getattr(config, "fine_grained_activation_offloading", False), "activation offloading", "turn it off"),
            (getattr(config, "fp32_residual_connection", False), "fp32_residual_connection", "turn it off"),
            (
                bool({"core_attn", "layernorm"} & set(selective)),
                "recomputation of core_attn or layernorm",
                "drop these modules",
            ),
            (getattr(core, "remat", None) == KEEP, "remat=keep_out_lse", "use remat=recompute"),
        ):
            if given:
                raise UnsupportedError(feature, name, "the layer is taken apart around its core attention", alternative)
        self._name = name

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, dim] to the same, and context as it is. Collective over the context-parallel group."""
        if not self.training:
            keywords = {"context": context, "rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params, **others}
            plain: Any = super().forward
            return plain(hidden_states, attention_mask, **keywords)
        others.pop("dynamic_inference_decode_only", None)
        refuse_bias(others.pop("attention_bias", None), self._name)
        refuse_unknown_arguments(others, self._name)
        if packed_seq_params is not None or hidden_states.shape[1] % 2:
            raise UnsupportedError(
                "a packed micro-batch" if packed_seq_params is not None else f"a micro-batch of {hidden_states.shape[1]}",
                self._name,
                "its two halves are sequences",
                "pass an even --micro-batch-size without packing, or use layer_spec()",
            )
        attention: Any = self.self_attention
        core = attention.core_attention
        begun = []
        for half in hidden_states.chunk(2, 1):
            query, key, value = self._before(half, rotary_pos_emb)
            begun.append((core.begin(query, key, value, attention_mask), half))
        for handle, _ in begun:
            attention_compute(handle)
        return torch.cat([self._after(core.finish(handle), half) for handle, half in begun], 1), context

    def _before(self, hidden: Tensor, rotary_pos_emb: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, rotated."""
        attention: Any = self.self_attention
        query, key, value = attention.get_query_key_value_tensors(self.input_layernorm(hidden), None)
        frequencies: Any = self.config.no_rope_freq
        if rotary_pos_emb is None or (frequencies and frequencies[self.layer_number - 1]):
            return query, key, value
        angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
        options = {"config": self.config, "cp_group": attention.pg_collection.cp, "mscale": _concentration(self.config)}
        return apply_rotary_pos_emb(query, angles[0], **options), apply_rotary_pos_emb(key, angles[1], **options), value

    def _after(self, context: Tensor, residual: Tensor) -> Tensor:
        """From attention's output to the layer's."""
        attention: Any = self.self_attention
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden = add(attention.linear_proj(context), residual, self.hidden_dropout)
        mlp: Any = self._forward_mlp
        return mlp(hidden)


def _concentration(config: TransformerConfig) -> float:
    """YaRN's factor of cos and sin, as Megatron's attention takes it."""
    return megatron_attention._yarn_get_concentration_factor_from_config(config)
