"""The mask function and the attention function that transformers calls, and what they refuse.

    model.forward ──▶ mask_fn(mask_function, …) ──▶ LayerMask ──▶ attention_mask of every layer ──▶ attend(…)
                      once a kind of layer                        untouched by the model            plan, distattn.attention

Nothing becomes plain causal attention silently: what cannot be carried out as asked raises UnsupportedError, on every rank
before any communication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distattn.attention import attention
from distattn.errors import InputError, UnsupportedError
from distattn.integrations.refusals import refuse_dropout, refuse_torch_context_parallel
from distattn.integrations.transformers_batches import ShardedBatch, active_batch
from distattn.integrations.transformers_masks import (
    Parsed,
    Rule,
    Span,
    document_mask,
    evaluate,
    offset_rule,
    parse,
    runs,
    true_runs,
)
from distattn.mask import Mask
from distattn.planning import Plan, plan

NAME = "distattn"
PLAN = f'attn_implementation="{NAME}"'

_WITHOUT_EFFECT = (
    "position_ids", "use_cache", "cache_position", "num_items_in_batch", "shift_labels", "output_hidden_states",
    "output_router_logits", "output_attentions", "is_causal", "sliding_window", "s_aux", "softcap", "layer_idx",
)  # fmt: skip
"""Keywords that reach an attention call and are either honoured below or say nothing about attention."""

_ADVICE = {
    "attention_bias": "use a model without a bias on its attention scores",
    "position_bias": "use a model with rotary positions",
    "cu_seq_lens_q": "packed documents are read from position_ids: use return_flash_attn_kwargs=False in the collator",
    "cu_seq_lens_k": "packed documents are read from position_ids: use return_flash_attn_kwargs=False in the collator",
    "head_mask": "leave it out",
}

_RECURRENT = ("linear_attention", "recurrent", "mamba", "mamba2", "conv", "hybrid", "hybrid_sliding", "rwkv", "ssm")


class LayerMask:
    """What the layers of one kind allow, in place of transformers' attention_mask; plans are made once a shape.

    mask: over the rows that ``plan`` is for: one row of the batch, all rows one after another (flattened), or the stream of a
    sharded batch. shape: (batch, queries, keys) of the tensors on this rank. rule: None where the function is unknown. real:
    bool [B, Sk] where there is padding. A plain class: FSDP2 rebuilds the dataclasses that a layer is called with.
    """

    def __init__(
        self,
        mask: Mask,
        rule: Rule | None,
        shape: tuple[int, int, int],
        *,
        options: Registration,
        batch: ShardedBatch | None = None,
        flattened: bool = False,
        real: np.ndarray | None = None,
        packed: bool = False,
        cached: bool = False,
    ) -> None:
        self.mask, self.rule, self.shape, self.batch, self.flattened = mask, rule, shape, batch, flattened
        self._options, self._real, self._packed, self._cached = options, real, packed, cached
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._positions_checked = False

    def plan(self, query: Tensor, key: Tensor, value: Tensor) -> Plan:
        """For q, k, v [b, h, s, d]."""
        given = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], query.dtype)
        if given not in self._plans:
            heads, kv_heads, head_dim, value_dim, dtype = given
            shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
            if self.batch is not None:
                self._plans[given] = self.batch.plan(self.mask, **shape)
            else:
                options = self._options
                self._plans[given] = plan(
                    self.mask, kernel=options.kernel, deterministic=options.deterministic, strategy="ring", **shape
                )
        return self._plans[given]

    def check_positions(self, position_ids: Tensor | None) -> None:
        """Refuse positions that tell of documents, or of a shard, which this mask knows nothing of; looks once."""
        if self._positions_checked or self._cached:
            return
        self._positions_checked = True
        if self.batch is not None:
            own = self.batch.position_ids
            if position_ids is not own and (position_ids is None or not torch.equal(position_ids.to(own.device), own)):
                raise _unsupported(
                    "a sharded batch with position_ids of its own",
                    "rotary positions would be those of a shard",
                    "call model(**batch.inputs)",
                )
            return
        if position_ids is None or position_ids.dim() != 2:
            return
        _check_unsharded(position_ids.detach().cpu().numpy(), self._real, self._packed)


def _check_unsharded(positions: np.ndarray, real: np.ndarray | None, packed: bool) -> None:
    for row in range(len(positions) if real is None else len(real)):
        kept = positions[min(row, len(positions) - 1)]
        kept = kept if real is None else kept[real[row][: len(kept)]]
        steps = np.diff(kept) != 1
        if steps.any() and not packed:
            raise _unsupported(
                "a packed row (its position_ids begin anew) whose documents the model does not tell apart",
                "transformers looks for documents only where there is no attention_mask and no cache, and some models never do",
                "pass attention_mask=None and use_cache=False, or the batch through distattn.integrations.transformers.shard",
            )
        starts = kept[np.concatenate([[True], steps])] if len(kept) else kept
        if real is None and (starts != 0).any():
            raise _unsupported(
                f"a document that begins at position {int(starts[starts != 0][0])}",
                "position_ids like these are those of a shard, whose other tokens would be left out",
                "call the model inside `with batch:` of distattn.integrations.transformers.shard",
            )


@dataclass(frozen=True)
class Registration:
    """The two functions that are registered, and the options that ``register`` was given."""

    kernel: str = "auto"
    deterministic: bool = False
    unknown_masks: str = "refuse"

    def mask_function(
        self, *, batch_size: int, q_length: int | None = None, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0,
        mask_function: Callable[..., Any], attention_mask: Any = None, **kwargs: Any,
    ) -> LayerMask:  # fmt: skip
        """transformers' mask interface: what the layers of one kind allow, as a LayerMask."""
        if q_length is None:
            raise _unsupported(
                "this version of transformers", "it calls mask functions in another way than is known", "use 5.17 or newer"
            )
        _check_padding_mask(attention_mask)
        parsed = parse(mask_function)
        if parsed is None and self.unknown_masks == "refuse":
            raise _unsupported(
                "a mask function that is not transformers' own (an or_mask_function, and_mask_function or block_sequence_ids)",
                "it would be treated as causal",
                'use register(unknown_masks="evaluate"), which evaluates it for every pair of tokens',
            )
        shape = (batch_size, int(q_length), int(kv_length))
        offsets = (int(q_offset), int(kv_offset))
        batch = active_batch()
        if batch is not None:
            return self._sharded(batch, parsed, shape, offsets, attention_mask)
        return self._local(mask_function, parsed, shape, offsets, attention_mask)

    def _sharded(
        self, batch: ShardedBatch, parsed: Parsed | None, shape: tuple[int, int, int], offsets: tuple[int, int], padding: Any
    ) -> LayerMask:
        if parsed is None:
            raise _unsupported(
                "a mask function that is not transformers' own, on a sharded batch",
                "it may look up tensors that hold a shard only",
                "use masks of transformers' own (causal, windows, chunks), or one rank",
            )
        if padding is not None:
            raise _unsupported(
                "an attention_mask beside a sharded batch", "there is no padding left in it", "call model(**batch.inputs)"
            )
        if offsets != (0, 0) or shape[1] != shape[2]:
            raise _unsupported(
                "a KV cache on a sharded batch", "keys of other ranks would be missing", "generate outside of it, on one rank"
            )
        if shape[:2] != (1, batch.position_ids.shape[1]):
            raise InputError(
                f"the model was called with {list(shape[:2])} tokens inside `with batch:`, but this rank's inputs are "
                f"{list(batch.position_ids.shape)}: call model(**batch.inputs)"
            )
        return LayerMask(batch.mask(parsed.rule), parsed.rule, shape, options=self, batch=batch)

    def _local(
        self,
        mask_function: Callable[..., Any],
        parsed: Parsed | None,
        shape: tuple[int, int, int],
        offsets: tuple[int, int],
        padding: Tensor | None,
    ) -> LayerMask:
        batch, num_queries, num_keys = shape
        if padding is not None and (missing := num_keys + offsets[1] - padding.shape[-1]) > 0:
            padding = torch.nn.functional.pad(padding, (0, missing))  # as transformers does for static caches
        real = None if padding is None else padding.detach().cpu().numpy().astype(bool)
        varied = real is not None or parsed is None or parsed.document_ids is not None
        masks = []
        for row in range(batch if varied else 1):
            if parsed is None:
                masks.append(evaluate(mask_function, padding, row, (num_queries, num_keys, *offsets)))
            else:
                masks.append(_row_mask(parsed, row, (num_queries, num_keys), offsets, real))
        same = all(mask == masks[0] for mask in masks[1:])
        cached = offsets != (0, 0) or num_queries != num_keys
        whole = real is not None and not bool(real.all())
        return LayerMask(
            masks[0] if same else _side_by_side(masks),
            None if parsed is None else parsed.rule,
            shape,
            options=self,
            flattened=not same,
            real=real if whole else None,
            packed=parsed is None or parsed.document_ids is not None,
            cached=cached,
        )

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """transformers' attention interface: q [b, h, s, d], k and v [b, hk, sk, d]; returns (out [b, s, h, dv], None)."""
        mask = _checked_mask(attention_mask)
        _refuse(module, mask, dropout, kwargs)
        expected = ((mask.shape[0], mask.shape[1]), (mask.shape[0], mask.shape[2]))
        if ((query.shape[0], query.shape[2]), (key.shape[0], key.shape[2])) != expected:
            raise InputError(
                f"attention was called with queries {list(query.shape)} and keys {list(key.shape)}, but its mask is for "
                f"{mask.shape[0]} rows of {mask.shape[1]} queries and {mask.shape[2]} keys: cross attention, and caches "
                "that the mask does not know of, are not supported"
            )
        schedule = mask.plan(query, key, value)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if mask.flattened:
            q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
        out = attention(q, k, v, schedule, scale=scaling, sink=kwargs.get("s_aux"), softcap=kwargs.get("softcap") or None)
        return out.reshape(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def is_ours(function: Any) -> bool:
    """Whether a registered function is distattn's."""
    return isinstance(getattr(function, "__self__", None), Registration)


def why_not_shard(config: Any) -> str | None:
    """Why a model with this config cannot run on a sharded batch; None if nothing speaks against it."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = [*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())]
    found = sorted({kind for kind in kinds if kind in _RECURRENT})
    if found:
        return f"it has {', '.join(found)} layers, whose state would begin anew on every rank"
    if getattr(config, "output_router_logits", False):
        return "output_router_logits=True adds a loss that balances experts, which would be that of a shard"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder, whose cross attention is over another sequence"
    return None


def _unsupported(feature: str, reason: str, alternative: str) -> UnsupportedError:
    return UnsupportedError(feature, PLAN, reason, alternative)


def _check_padding_mask(attention_mask: Any) -> None:
    if attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        return
    raise _unsupported(
        f"an attention_mask that is {_kind_of(attention_mask)}", "it is none of tokens", "pass ones and zeros [B, S], or None"
    )


def _kind_of(mask: Any) -> str:
    shape = f" of shape {list(mask.shape)}" if hasattr(mask, "shape") else ""
    return f"a {type(mask).__name__}{shape}"


def _checked_mask(mask: Any) -> LayerMask:
    if isinstance(mask, LayerMask):
        return mask
    if mask is None:
        raise _unsupported(
            "a layer without a mask",
            "either the model makes none for it (cross attention, a paged cache), or the mask function is not registered, and "
            "padding and documents would be ignored",
            "call distattn.integrations.transformers.register(), or use another attn_implementation for this model",
        )
    raise _unsupported(
        f"a mask over pairs of tokens, {_kind_of(mask)}",
        "it cannot be cut over ranks and grows with the square of the length",
        "pass attention_mask [B, S] of ones and zeros, or position_ids for packed documents",
    )


def _refuse(module: torch.nn.Module, mask: LayerMask, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise for everything that would be ignored otherwise."""
    if not is_ours(ALL_ATTENTION_FUNCTIONS.get(NAME)):
        raise _unsupported(
            "a wrapper around it, such as DeepSpeed's UlyssesSPAttentionHF",
            "the sequence would be sharded twice",
            "let DeepSpeed wrap another implementation, or none",
        )
    refuse_torch_context_parallel(PLAN)
    refuse_dropout(dropout, PLAN, "set config.attention_dropout = 0.0")
    for name, value in kwargs.items():
        if value is not None and name not in _WITHOUT_EFFECT:
            advice = _ADVICE.get(name, "leave it out, or use another attn_implementation")
            raise _unsupported(f"the argument {name}", "it would be ignored without a word", advice)
    if kwargs.get("output_attentions"):
        raise _unsupported("output_attentions=True", "the weights are never formed", 'use attn_implementation="eager"')
    _check_rule(mask, kwargs)
    if mask.batch is not None and mask.batch.num_ranks > 1:
        reason = why_not_shard(getattr(module, "config", None))
        if reason is not None:
            raise _unsupported("this model on several context ranks", reason, "run it on one rank")
    if mask.batch is not None and kwargs.get("use_cache"):
        raise _unsupported("use_cache=True on a sharded batch", "a shard's keys alone would be kept", "pass use_cache=False")
    mask.check_positions(kwargs.get("position_ids"))


def _check_rule(mask: LayerMask, kwargs: dict[str, Any]) -> None:
    """The layer's own words on its mask must be what the mask function said."""
    if mask.rule is None:
        return
    window, causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
    if window is not None and mask.rule.window not in (window, window + 1) and not mask.rule.chunk:
        made = f"for a window of {mask.rule.window}" if mask.rule.window else "without one"
        raise _unsupported(
            f"a layer with a window of {window} tokens whose mask was made {made}",
            "one of the two would be ignored",
            "make config.layer_types and config.sliding_window agree",
        )
    if causal is not None and bool(causal) != (mask.rule.hi == 0):
        raise _unsupported(
            f"is_causal={causal} for a mask that is {'causal' if mask.rule.hi == 0 else 'not causal'}",
            "one of the two would be ignored",
            "set config.is_causal instead",
        )


def _row_mask(parsed: Parsed, row: int, shape: tuple[int, int], offsets: tuple[int, int], real: np.ndarray | None) -> Mask:
    """Of one row of the batch, over the indices of its queries and keys."""
    num_queries, num_keys = shape
    query_offset, key_offset = offsets
    if parsed.document_ids is not None:
        ids = parsed.document_ids[min(row, len(parsed.document_ids) - 1)].detach().cpu().numpy()
        first = np.arange(len(ids))
        if parsed.position_ids is not None:
            first = parsed.position_ids[min(row, len(parsed.position_ids) - 1)].detach().cpu().numpy()
        spans = [Span(a, b, int(first[a])) for a, b in runs(np.diff(ids) == 0).tolist()]
        return document_mask(parsed.rule, spans, spans, num_queries, num_keys)
    rule = offset_rule(parsed.rule, query_offset, key_offset)
    left, keys = 0, [Span(0, num_keys, key_offset)]
    if real is not None:
        seen = real[row][key_offset : key_offset + num_keys]
        left = int(np.argmax(real[row])) if real[row].any() else len(real[row])
        keys = [Span(a, b, a + key_offset - left) for a, b in true_runs(seen).tolist()]
    queries = [Span(0, num_queries, query_offset - left)] * len(keys)
    return document_mask(rule, queries, keys, num_queries, num_keys)


def _side_by_side(masks: list[Mask]) -> Mask:
    """Rows of a batch as one sequence, each seeing its own keys alone."""
    num_queries, num_keys = masks[0].shape
    bands = []
    for i, mask in enumerate(masks):
        dq, dk = i * num_queries, i * num_keys
        bands.append(mask.bands + np.array([dq, dq, dk, dk, dk - dq, dk - dq]))
    return Mask(num_queries * len(masks), num_keys * len(masks), np.concatenate(bands))
