"""``attn_implementation="distattn"`` for Hugging Face transformers: exact attention over ranks for the models of others.

    from distattn.integrations import transformers as adapter

    adapter.register()
    model = AutoModelForCausalLM.from_pretrained(…, attn_implementation="distattn")   # one rank: nothing more to do
    with adapter.shard(batch, group=context_group) as part:                           # several ranks share a sequence
        loss = model(**part.inputs).loss

docs/transformers.md says which models, masks and trainers are supported, and what is refused.
"""

from __future__ import annotations

from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from distattn.errors import UnsupportedError
from distattn.integrations.transformers_attention import NAME, PLAN, Registration, is_ours, why_not_shard
from distattn.integrations.transformers_batches import ShardedBatch, shard
from distattn.integrations.transformers_masks import check_transformers
from distattn.kernels import BACKENDS

__all__ = ["ShardedBatch", "check_model", "register", "shard"]


def register(*, kernel: str = "auto", deterministic: bool = False, unknown_masks: str = "refuse") -> None:
    """Make ``attn_implementation="distattn"`` known to transformers: its attention and its mask function, always both.

    Process-wide, as transformers' registry is; call it again to change the options. kernel, deterministic: as for
    ``distattn.plan``, for calls outside sharded batches, which bring their own. unknown_masks: "refuse" a mask that is composed
    with a function of somebody else's, or "evaluate" it for every pair of tokens (on one rank, up to 2^30 pairs).

    Raises UnsupportedError where something else has taken the name, DeepSpeed has replaced attention functions, or this
    transformers' mask functions mean something else than those that distattn knows.
    """
    if kernel != "auto" and kernel not in BACKENDS:
        raise UnsupportedError(f"kernel={kernel!r} is unknown; it may be auto, {', '.join(BACKENDS)}")
    if unknown_masks not in ("refuse", "evaluate"):
        raise UnsupportedError(f"unknown_masks={unknown_masks!r} is not allowed; it may be refuse or evaluate")
    _check_registry()
    check_transformers()
    ours = Registration(kernel, deterministic, unknown_masks)
    AttentionInterface.register(NAME, ours.attend)
    AttentionMaskInterface.register(NAME, ours.mask_function)


def check_model(model: Any, num_ranks: int) -> None:
    """Raise UnsupportedError for a model that cannot be trained over ``num_ranks`` context ranks, with the reason.

    The same is checked in every attention call; this says it before the first batch.
    """
    config = model.config
    used = getattr(config.get_text_config(), "_attn_implementation", None)
    if used != NAME:
        raise UnsupportedError(
            f'a model with attn_implementation="{used}"', "shard", "it knows nothing of the tokens of other ranks",
            f'call register(), then model.set_attn_implementation("{NAME}")',
        )  # fmt: skip
    reason = why_not_shard(config) or (
        "it carries a recurrent state, which would begin anew on every rank" if getattr(model, "_is_stateful", False) else None
    )
    if num_ranks > 1 and reason is not None:
        raise UnsupportedError(f"{type(model).__name__} over {num_ranks} context ranks", PLAN, reason, "run it on one rank")


def _check_registry() -> None:
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        for name in registry:
            function = registry[name]
            if name == NAME and not is_ours(function):
                raise UnsupportedError(
                    f'attn_implementation="{NAME}" as it is taken by {_origin(function)}', "register()",
                    "one of the two would never run", "register distattn first, and let nothing replace it",
                )  # fmt: skip
            if _origin(function).startswith("deepspeed"):
                raise UnsupportedError(
                    f'attn_implementation="{name}" replaced by DeepSpeed\'s sequence parallelism', "register()",
                    "the sequence would be sharded twice", "don't call UlyssesSPAttentionHF.register_with_transformers",
                )  # fmt: skip


def _origin(function: Any) -> str:
    return str(getattr(function, "__module__", None) or type(function).__module__)
