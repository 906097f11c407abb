"""distattn: attention for training at 64K to millions of tokens of context, on schedules that are data.

mask = distattn.Mask.documents([30_000, 2_000, 500, 98_000])
plan = distattn.plan(mask, heads=32, kv_heads=8, head_dim=128, group=context_group, strategy="ring")
out = distattn.attention(q, k, v, plan)        # [B, S_local, H, D] in and out
"""

from distattn import errors
from distattn.attention import (
    attention,
    attention_begin,
    attention_compute,
    attention_finish,
    checkpoint_contexts,
    checkpoint_policy,
)
from distattn.linear import linear_attention, linear_attention_step
from distattn.mask import Mask
from distattn.parallel.layout import Layout
from distattn.planning import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "Layout",
    "Mask",
    "Plan",
    "attention",
    "attention_begin",
    "attention_compute",
    "attention_finish",
    "checkpoint_contexts",
    "checkpoint_policy",
    "errors",
    "linear_attention",
    "linear_attention_step",
    "plan",
]
