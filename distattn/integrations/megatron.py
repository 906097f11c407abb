"""Megatron-core (0.16 to 0.19): distattn as the core attention of its layers.

    --spec distattn.integrations.megatron gpt_spec          stock Megatron: every layer of a dense GPT
    layer_spec("distattn:ring")                             code that builds its own GPTModel
    patch_spec(any_spec)                                    every core_attention in a spec of yours
    slime_spec(args, config, vp_stage)                      frameworks that call a function for the spec
    hybrid_spec(config, ["gated_delta", "softmax", …])      layers of linear attention between softmax layers
    pingpong_layer_spec()                                   two halves of the micro-batch in flight

Which schedule a layer runs is ``--cp-comm-type distattn:usp,head_ranks=2`` (one for all layers, or one a layer).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from distattn.errors import ConfigError, UnsupportedError
from distattn.integrations.megatron_attention import CoreAttention
from distattn.integrations.megatron_batches import install_thd_slicing, packed_params, slice_thd_batch
from distattn.integrations.megatron_layer import LISTS_ARE_SHIFTED, ListedLayer
from distattn.integrations.megatron_layout import thd_indices
from distattn.integrations.megatron_linear import LinearAttention, LinearAttentionSubmodules
from distattn.integrations.megatron_pingpong import PingPongLayer
from distattn.integrations.megatron_schedule import Schedule, parse_schedule
from distattn.kernels.linear import KINDS

__all__ = [
    "CoreAttention",
    "LinearAttention",
    "LinearAttentionSubmodules",
    "PingPongLayer",
    "Schedule",
    "gpt_spec",
    "hybrid_spec",
    "install_thd_slicing",
    "layer_spec",
    "linear_mixer_spec",
    "packed_params",
    "parse_schedule",
    "patch_spec",
    "pingpong_layer_spec",
    "slice_thd_batch",
    "slime_spec",
    "thd_indices",
]

SOFTMAX = "softmax"


def patch_spec(spec: Any, core_attention: Any = CoreAttention) -> Any:
    """A copy of a spec (ModuleSpec, TransformerBlockSubmodules, …) in which every ``core_attention`` is the one given.

    core_attention: a class, or a ModuleSpec such as ``ModuleSpec(CoreAttention, params={"schedule": "distattn:ring"})``.
    Raises UnsupportedError where the spec holds no core attention.
    """
    patched = _patched(spec, core_attention)
    if patched is spec:
        raise UnsupportedError(
            f"a spec of {type(spec).__name__} without core_attention",
            "patch_spec",
            "there is nothing in it to replace",
            "pass the spec of a layer or block with self-attention, such as layer_spec()",
        )
    return patched


def _patched(node: Any, core: Any) -> Any:
    """The node itself where nothing below it changes."""
    if isinstance(node, (list, tuple)):
        changed = [_patched(item, core) for item in node]
        same = all(a is b for a, b in zip(changed, node, strict=True))
        return node if same else tuple(changed) if isinstance(node, tuple) else changed
    if isinstance(node, functools.partial):
        keywords = {name: _patched(value, core) for name, value in node.keywords.items()}
        same = all(keywords[name] is node.keywords[name] for name in keywords)
        return node if same else functools.partial(node.func, *node.args, **keywords)
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    changes = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        new = core if field.name == "core_attention" else _patched(value, core)
        if new is not value:
            changes[field.name] = new
    if not changes:
        return node
    if LISTS_ARE_SHIFTED and getattr(node, "module", None) is TransformerLayer:
        changes["module"] = ListedLayer
    return dataclasses.replace(node, **changes)


def layer_spec(schedule: str | None = None, *, implementation: str = "auto", **options: Any) -> ModuleSpec:
    """The spec of one GPT layer with our core attention, repeated by Megatron for all layers.

    schedule: as in ``cp_comm_type``; a ``distattn:`` string there wins over it. None: what cp_comm_type says, else
    ``distattn:auto``. implementation: of everything else in the layer, ``local``, ``transformer_engine``, or ``auto`` for the
    latter where it is installed. options: of Megatron's own function for it, such as qk_layernorm, num_experts.

    Raises ConfigError for an unknown schedule or implementation.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if implementation not in ("auto", "local", "transformer_engine"):
        raise ConfigError(f"implementation={implementation!r} is unknown; it may be auto, local or transformer_engine")
    if implementation == "transformer_engine" or (implementation == "auto" and installed):
        spec = get_gpt_layer_with_transformer_engine_spec(**options)
    else:
        # Megatron's torch norm takes its kind from the config; the fused one of Apex is LayerNorm only.
        spec = get_gpt_layer_local_spec(**{"normalization": "RMSNorm", **options})
    return patch_spec(spec, _core(schedule))


def _core(schedule: str | None) -> Any:
    if schedule is None:
        return CoreAttention
    parse_schedule(schedule, (1, 1))  # a wrong one is an error here, not in the middle of building a model
    return ModuleSpec(module=CoreAttention, params={"schedule": schedule})


def pingpong_layer_spec(schedule: str | None = None, **options: Any) -> ModuleSpec:
    """``layer_spec`` with two halves of the micro-batch in flight, see ``PingPongLayer``; arguments as there.

    schedule: None: what cp_comm_type says, else ``distattn:disaggregated``, which sends most.
    """
    return dataclasses.replace(layer_spec(schedule or "distattn:disaggregated", **options), module=PingPongLayer)


def slime_spec(args: Any, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The block spec of this pipeline stage, for frameworks that call a function: dense and MoE layers alike.

    args.transformer_impl: ``local`` leaves Transformer Engine out, where it is installed.
    """
    wanted = getattr(args, "transformer_impl", "transformer_engine") == "transformer_engine"
    engine = wanted and importlib.util.find_spec("transformer_engine") is not None
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=engine, normalization=config.normalization, vp_stage=vp_stage
    )
    return patch_spec(spec)


def linear_mixer_spec(kind: str = "gated_delta", exchange: str = "auto", **sizes: Any) -> ModuleSpec:
    """A linear mixer, for ``self_attention`` of a TransformerLayer or ``mixer`` of a MambaLayer.

    kind, exchange, sizes: as for ``LinearAttention``.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown; a linear layer may be {', '.join(KINDS)}")
    params = {"kind": kind, "exchange": exchange, **sizes}
    return ModuleSpec(module=LinearAttention, params=params, submodules=LinearAttentionSubmodules())


def hybrid_spec(
    config: TransformerConfig,
    layers: Sequence[str],
    *,
    schedule: str | None = None,
    exchange: str = "auto",
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **options: Any,
) -> TransformerBlockSubmodules:
    """The block spec of this pipeline stage of a GPT whose layers differ.

    layers: for each of config.num_layers, ``softmax`` or a kind of linear attention. schedule: of softmax layers; exchange: of
    linear ones. options: of ``layer_spec``; projections and norms of linear layers are Megatron's local ones.

    Raises ConfigError where layers do not fit the config.
    """
    allowed = (SOFTMAX, *KINDS)
    if len(layers) != config.num_layers or any(kind not in allowed for kind in layers):
        raise ConfigError(
            f"layers must name each of the {config.num_layers} layers as one of {', '.join(allowed)}; got {list(layers)}"
        )
    softmax = layer_spec(schedule, **options)
    local = layer_spec(schedule, **{**options, "implementation": "local"})
    specs = []
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    for kind in layers[offset : offset + get_num_layers_to_build(config, vp_stage, pp_rank)]:
        if kind == SOFTMAX:
            specs.append(softmax)
            continue
        # The map names layers of softmax attention after Transformer Engine's; these have no counterpart there.
        parts: Any = local.submodules
        changes: dict[str, Any] = {"self_attention": linear_mixer_spec(kind, exchange), "sharded_state_dict_keys_map": {}}
        specs.append(dataclasses.replace(local, submodules=dataclasses.replace(parts, **changes)))
    norm: Any = WrappedTorchNorm
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


gpt_spec = layer_spec()
"""For ``--spec distattn.integrations.megatron gpt_spec``: Megatron takes the object as it is."""
