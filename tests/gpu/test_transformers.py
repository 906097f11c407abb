"""Hugging Face models with ``attn_implementation="distattn"`` on GPUs: bf16 within twice eager's own error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from distattn.integrations import transformers as adapter
from distattn.testing import run_ranks
from tests.integrations.transformers_models import batch_of, reference, tiny

KINDS = ("llama", "qwen3", "gemma3", "gpt_oss")
CASES = ("packed", "left")
WIDE = {"hidden_size": 128, "head_dim": 64, "initializer_range": 0.06}
"""A head size that GPU kernels have, and weights so small that bf16 gives some digits of the logits."""


def errors(kind: str, case: str, group: dist.ProcessGroup | None) -> tuple[float, float]:
    """(norm of the error of our bf16 logits, of eager's), against eager in fp32, on this process's GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    batch = {key: value.to(device) for key, value in batch_of(case, length=700).items()}
    model = tiny(kind, **WIDE, max_position_embeddings=1024).to(device)
    exact = reference(model, batch)[0]
    model = model.to(torch.bfloat16)
    eager = reference(model, batch)[0]
    model.set_attn_implementation("distattn")
    model.zero_grad()
    with adapter.shard(batch, group=group) as part:
        out = model(**part.inputs)
    out.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    ours = part.gather(out.logits.detach())
    assert float((eager - exact).norm()) < 0.2 * float(exact.norm())
    return float((ours - exact).norm()), float((eager - exact).norm())


def cases(rank: int, world: int) -> list[tuple[str, str, float, float]]:
    adapter.register()
    group: Any = dist.group.WORLD
    return [(kind, case, *errors(kind, case, group)) for kind in KINDS for case in CASES]


def check(found: list[tuple[str, str, float, float]]) -> None:
    for kind, case, ours, eager in found:
        assert ours <= 2 * eager, (kind, case)


@pytest.mark.gpu
def test_one_gpu() -> None:
    adapter.register()
    check([(kind, case, *errors(kind, case, None)) for kind in KINDS for case in CASES])


@pytest.mark.gpu(2)
def test_two_gpus() -> None:
    check(run_ranks(cases, 2, backend="nccl", timeout_s=120)[0])
