"""The step's sequences as tensors on this rank, each with the plan of its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distattn.config import Config
from distattn.data import IGNORED_LABEL, PackedSequence
from distattn.mask import Mask
from distattn.planning import Plan, plan
from distattn.training.mesh import Mesh
from distattn.training.sharding import compute_dtype


@dataclass(frozen=True)
class MicroBatch:
    """This rank's rows of one packed sequence.

    tokens, labels: int64 [1, T_local]; positions: int64 [T_local], counted from the start of each document; plan: of the
    whole sequence over the context group; num_labels: of this rank; flops: model FLOPs of the whole sequence, forward and
    backward, divided by the context ranks that share it.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    plan: Plan
    num_labels: int
    flops: float


def make_mask(config: Config, sequence: PackedSequence) -> Mask:
    """Causal within each document, and within ``model.sliding_window`` keys (the query's own included) where that is set."""
    mask = Mask.documents(sequence.lengths)
    window = config.model.sliding_window
    return mask & Mask.sliding_window(sequence.seq_len, window - 1) if window else mask


def make_plan(config: Config, mesh: Mesh, sequence: PackedSequence) -> Plan:
    """The schedule of a sequence's attention. Collective over the context group."""
    return plan(
        make_mask(config, sequence),
        heads=config.model.num_heads,
        kv_heads=config.model.num_kv_heads,
        head_dim=config.model.head_dim,
        group=mesh.context_group,
        strategy=config.parallel.strategy,
        kernel=config.kernel,
        dtype=compute_dtype(config, mesh.device),
        timeout_s=config.train.timeout_seconds,
    )


def make_batch(config: Config, mesh: Mesh, sequence: PackedSequence) -> MicroBatch:
    """Read this rank's rows of a sequence, and no others. Collective over the context group."""
    schedule = make_plan(config, mesh, sequence)
    rows = schedule.positions.cpu().numpy()
    tokens, labels, positions = (torch.from_numpy(part) for part in sequence.read(rows))
    num_labels = int((labels != IGNORED_LABEL).sum())
    num_tokens = sequence.seq_len
    flops = config.model.flops_per_token(schedule.mask.area, num_tokens) * num_tokens / mesh.context
    device = mesh.device
    return MicroBatch(
        tokens[None].to(device, non_blocking=True),
        labels[None].to(device, non_blocking=True),
        positions.to(device, non_blocking=True),
        schedule,
        num_labels,
        flops,
    )


def step_indices(step: int, global_batch: int, mesh: Mesh) -> range:
    """Numbers of the sequences that this rank's data group reads in a step (counted from 1): a pure function of both."""
    each = global_batch // mesh.data
    first = (step - 1) * global_batch + mesh.data_rank * each
    return range(first, first + each)
