"""``Plan.describe``: what was planned and why, in lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from distattn.errors import UnsupportedError
from distattn.kernels import Case, choose_backend
from distattn.parallel.cost import Shape, count
from distattn.parallel.schedulers import find_scheduler
from distattn.parallel.transport.collective import group_device

if TYPE_CHECKING:
    from distattn.planning import Plan


def describe(plan: Plan) -> str:
    """What was planned and why, in lines: mask, layout, strategy, kernel, and each rank's work and bytes."""
    device = "cpu" if plan.group is None else group_device(plan.group).type
    if plan.group is None and torch.cuda.is_available():
        device = "cuda"
    dtype = plan.dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    case = Case(device, dtype, plan.head_dim, plan.value_dim, plan.heads, plan.kv_heads, deterministic=plan.deterministic)
    try:
        backend, why = choose_backend(case, plan.kernel, plan.tables(case))
        kernel = f"{backend.name} ({why})"
    except UnsupportedError as error:
        kernel = f"none: {error}"
    name = str(dtype).removeprefix("torch.")
    cost = count(plan.program, plan.mask, Shape(plan.head_dim, plan.value_dim, name))
    sent, work = cost.bytes_sent_per_rank / 1e6, cost.flops_per_rank / 1e9
    mask, certify = plan.mask, find_scheduler(plan.strategy).certificate
    lines = {
        "mask": f"{mask.num_queries} × {mask.num_keys}, {mask.area} pairs in {len(mask.bands)} bands",
        "layout": f"{plan.layout.name} over {plan.num_ranks} ranks ({plan.reasons['layout']})",
        "keys": "" if plan.program.keys is None else f"{plan.program.keys.name} over {plan.num_ranks} ranks",
        "strategy": f"{plan.strategy} ({plan.reasons['strategy']})",
        "transport": plan.reasons.get("transport", ""),
        "kernel": kernel,
        "shape": f"{plan.heads}:{plan.kv_heads} heads of {plan.head_dim} (values {plan.value_dim}), {name} on {device}",
        "stages": f"{plan.program.num_stages} forward, {plan.backward_program.num_stages} backward",
        "backward": plan.reasons["backward"],
        "sent": f"{_per_rank(sent)} MB a rank, forward, batch 1",
        "candidates": plan.reasons.get("candidates", ""),
        "work": f"{_per_rank(work)} GFLOP a rank, forward, batch 1; imbalance {cost.imbalance:.3f} (max/mean)",
        "balance": certify(plan.mask, plan.layout, plan.heads, plan.kv_heads, plan.options).describe() if certify else "",
    }
    shown = ((word, line) for word, text in lines.items() for line in text.splitlines())
    return "\n".join(f"{word:10} {line}" for word, line in shown)


def _per_rank(values: np.ndarray) -> str:
    if len(values) > 8:
        return f"{values.min():.4g} to {values.max():.4g}"
    return ", ".join(f"{x:.4g}" for x in values.tolist())
