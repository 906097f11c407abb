"""What each rank does in ``test_deepspeed.py``."""

from __future__ import annotations

import os

# Before DeepSpeed is imported, which looks for its device then.
os.environ["DS_ACCELERATOR"] = "cpu"

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from distattn import Mask
from distattn.config import Config
from distattn.data import open_cache
from distattn.errors import TrainingError
from distattn.integrations import deepspeed
from distattn.training.mesh import build_mesh
from distattn.training.run_dir import RunDir
from distattn.training.trainer import StopRequest, Trainer

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of every step."""


class Stopped(StopRequest):
    """Asks to stop when the trainer looks for the n-th time."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    @property
    def received(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]: computed here
        self._looks -= 1
        return self._looks < 0


def train(rank: int, config: Config, last_step: int | None = None) -> tuple[Curve, list[float | None], list[str]]:
    """Train to the end, or up to ``last_step``; the steps so far, the loss by position, and what the trainer remarked."""
    run = RunDir(config.run.dir)
    run.create()
    mesh = build_mesh(config.parallel.data, config.parallel.context, rank, torch.device("cpu"))
    stop = StopRequest() if last_step is None else Stopped(last_step)
    trainer = Trainer(config, run, mesh, open_cache(config.data), stop)
    assert trainer.run() == (last_step is None)
    if dist.is_initialized():
        dist.barrier()
    by_position = [] if trainer.evaluations is None or not trainer.evaluations.records else (
        trainer.evaluations.records[-1]["position_loss"]
    )  # fmt: skip
    return [(line["loss"], line["grad_norm"]) for line in run.read_metrics()], by_position, trainer.remarks


def poisoned(rank: int, config: Config) -> tuple[str, bool]:
    """What a step with a gradient that is not finite says, and whether the weights stayed as they were."""
    run = RunDir(config.run.dir)
    run.create()
    mesh = build_mesh(config.parallel.data, config.parallel.context, rank, torch.device("cpu"))
    trainer = Trainer(config, run, mesh, open_cache(config.data), StopRequest())
    before = {name: part.values.clone() for name, part in trainer.engine.state().items() if name.startswith("model.")}
    backward = trainer.engine.backward

    def poison(loss: Tensor) -> None:
        if rank == 0:
            loss.register_hook(lambda gradient: gradient * math.inf)
        backward(loss)

    trainer.engine.backward = poison  # type: ignore[method-assign]
    try:
        trainer.run()
    except TrainingError as error:
        after = trainer.engine.state()
        return str(error), all(torch.equal(values, after[name].values) for name, values in before.items())
    return "nothing was raised", False


def train_all(
    rank: int, world: int, configs: list[Config], resumed: list[tuple[Config, Config]], bad: list[Config]
) -> tuple[list[Any], list[Any], list[Any]]:
    """Runs; runs that stop after two steps under the first config and go on under the second; poisoned ones."""
    curves = [train(rank, config) for config in configs]
    continued = []
    for before, after in resumed:
        train(rank, before, last_step=2)
        continued.append(train(rank, after))
    return curves, continued, [poisoned(rank, config) for config in bad]


ATTENTIONS: dict[str, tuple[deepspeed.LocalAttention, int, tuple[int, int], dict[str, Any]]] = {
    "causal, [s, b, h, d]": (deepspeed.LocalAttention(strategy="ring"), 1, (6, 2), {}),
    "full, one KV head, [b, s, h, d]": (deepspeed.LocalAttention(causal=False, strategy="all_gather"), 0, (5, 1), {}),
    "window, scale, soft-cap": (
        deepspeed.LocalAttention(window=(7, 0), scale=0.4, softcap=3.0, strategy="disaggregated"), 1, (3, 3), {},
    ),
    "documents, RoPE": (deepspeed.LocalAttention(), 0, (4, 2), {"cu_seqlens": torch.tensor([0, 11, 12, 30]), "rotate": 4}),
    "RoPE, [s, b, h, d]": (deepspeed.LocalAttention(), 1, (4, 4), {"rotate": 8}),
}  # fmt: skip
"""name → (rule, batch_dim_idx, (heads, KV heads), further arguments); rotate: how many features."""
ROWS = 30


def tensors(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the result, [b, S, h, d], whole, alike on every rank."""
    _, _, (heads, kv_heads), _ = ATTENTIONS[name]
    generator = torch.Generator().manual_seed(7)
    q, k, v, do = (
        torch.randn(2, ROWS, h, 8, dtype=torch.float64, generator=generator) for h in (heads, kv_heads, kv_heads, heads)
    )
    return q, k, v, do


def angles(width: int, batch_dim_idx: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) as DeepSpeed takes them: with the first two dimensions exchanged."""
    turns = torch.outer(torch.arange(ROWS, dtype=torch.float64), 100.0 ** -torch.arange(0, width, 2) / width)
    table = torch.cat([turns, turns], -1)
    table = table[:, None, None] if batch_dim_idx == 0 else table[None, :, None]
    return table.cos(), table.sin()


def attend_all(rank: int, world: int) -> list[list[np.ndarray]]:
    """Of each case this rank's rows of the result and of the three gradients, as [b, s, h, d]."""
    unit = deepspeed.ContextParallelUnit(world)
    results = []
    for name, (rule, batch_dim_idx, _, extra) in ATTENTIONS.items():
        layer = deepspeed.DistributedAttention(rule, unit.context_group, gather_idx=1 - batch_dim_idx)
        *qkv, do = (x.chunk(world, 1)[rank] for x in tensors(name))
        if batch_dim_idx == 1:
            qkv, do = [x.transpose(0, 1) for x in qkv], do.transpose(0, 1)
        qkv = [x.detach().requires_grad_() for x in qkv]
        rotary = angles(extra["rotate"], batch_dim_idx) if "rotate" in extra else None
        out = layer(*qkv, batch_dim_idx, rotary, cu_seqlens=extra.get("cu_seqlens"))
        out.backward(do)
        own = [out.detach(), *(x.grad for x in qkv if x.grad is not None)]
        results.append([(x if batch_dim_idx == 0 else x.transpose(0, 1)).numpy() for x in own])
    return results


def expected(name: str) -> list[Tensor]:
    """The whole result and gradients by torch alone."""
    rule, _, (heads, kv_heads), extra = ATTENTIONS[name]
    *qkv, do = tensors(name)
    q, k, v = leaves = [x.requires_grad_() for x in qkv]
    if "rotate" in extra:
        cos, sin = (x for x in angles(extra["rotate"], 0))
        q, k = (turn(x, cos.transpose(0, 1), sin.transpose(0, 1)) for x in (q, k))
    allowed = torch.ones(ROWS, ROWS, dtype=torch.bool)
    if rule.causal:
        allowed = allowed.tril()
    if rule.window != (-1, -1):
        allowed = allowed.triu(-rule.window[0])
    if "cu_seqlens" in extra:
        allowed &= torch.from_numpy(
            Mask.from_cu_seqlens(extra["cu_seqlens"].numpy(), extra["cu_seqlens"].numpy(), False).dense()
        )
    k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (rule.scale or 8**-0.5)
    if rule.softcap:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    out = torch.einsum("bhqk,bkhd->bqhd", F.softmax(scores.masked_fill(~allowed, -math.inf), -1), v)
    out.backward(do)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first features, by complex numbers."""
    width = cos.shape[-1]
    half = width // 2
    turned = torch.complex(x[..., :half], x[..., half:width]) * torch.complex(cos[..., :half], sin[..., :half])
    return torch.cat([turned.real, turned.imag, x[..., width:]], -1)
