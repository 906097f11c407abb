"""The step's sequences as tensors on this rank, each with the plan of its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distattn.config import Config
from distattn.data import IGNORED_LABEL, PackedSequence
from distattn.mask import Mask
from distattn.models import Decoder
from distattn.nano_choice import choose_nano_batches
from distattn.parallel.schedulers.disaggregated import DisaggregatedOptions
from distattn.pingpong import NanoBatches, cut_in_two
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

    def loss(self, model: Decoder, chunk_tokens: int) -> Tensor:
        """Summed loss of this rank's rows. Collective."""
        return model.loss(self.tokens, self.positions, self.labels, self.plan, chunk_tokens=chunk_tokens)[0]


@dataclass(frozen=True)
class NanoMicroBatch:
    """This rank's rows of one packed sequence in two halves, or in one piece, each as in ``MicroBatch``; labels and flops are
    of all."""

    tokens: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    nano: NanoBatches
    num_labels: int
    flops: float

    def loss(self, model: Decoder, chunk_tokens: int) -> Tensor:
        """Summed loss of this rank's rows, the halves in turns. Collective."""
        return model.nano_loss(self.tokens, self.positions, self.labels, self.nano, chunk_tokens=chunk_tokens)[0]


def make_mask(config: Config, sequence: PackedSequence) -> Mask:
    """Causal within each document, and within ``model.sliding_window`` keys (the query's own included) where that is set."""
    mask = Mask.documents(sequence.lengths)
    window = config.model.sliding_window
    return mask & Mask.sliding_window(sequence.seq_len, window - 1) if window else mask


def make_plan(config: Config, mesh: Mesh, sequence: PackedSequence) -> Plan:
    """The schedule of a sequence's attention. Collective over the context group."""
    return plan(make_mask(config, sequence), **_plan_arguments(config, mesh))


def make_nano_batches(config: Config, mesh: Mesh, sequence: PackedSequence) -> NanoBatches:
    """The schedules of both halves of a sequence, or where ``train.nano_batches`` is 0, of one or two as predicted. Collective
    over the context group."""
    return _nano_batches(make_mask(config, sequence), config, mesh)


def _nano_batches(mask: Mask, config: Config, mesh: Mesh, **how: Any) -> NanoBatches:
    if config.train.nano_batches == 2:
        return cut_in_two(mask, **_plan_arguments(config, mesh), **how)
    model = config.model
    flops = model.flops_per_token(0, 1) / 3 / model.num_layers  # forward, the output projection spread over the layers
    return choose_nano_batches(mask, linear_flops=flops, layers=model.num_layers, **_plan_arguments(config, mesh), **how)


def plan_ahead(config: Config, mesh: Mesh, sequence: PackedSequence) -> None:
    """Leave the plans of a sequence for the call above that asks for them. Waits for no rank; for another thread."""
    mask = make_mask(config, sequence)
    if config.train.nano_batches == 1:
        plan(mask, **_plan_arguments(config, mesh), ahead=True)
    else:
        _nano_batches(mask, config, mesh, ahead=True)


def _plan_arguments(config: Config, mesh: Mesh) -> dict[str, Any]:
    return {
        "heads": config.model.num_heads,
        "kv_heads": config.model.num_kv_heads,
        "head_dim": config.model.head_dim,
        "group": mesh.context_group,
        "strategy": config.parallel.strategy,
        "options": _options(config),
        "kernel": config.kernel,
        "dtype": compute_dtype(config, mesh.device),
        "timeout_s": config.train.timeout_seconds,
        "backward": config.parallel.backward,
        "keep_bytes": config.parallel.keep_bytes or None,
    }


def _options(config: Config) -> DisaggregatedOptions | None:
    """The strategy's options where the configuration sets any."""
    return DisaggregatedOptions(servers=config.parallel.servers) if config.parallel.servers else None


def make_batch(config: Config, mesh: Mesh, sequence: PackedSequence) -> MicroBatch:
    """Read this rank's rows of a sequence, and no others. Collective over the context group."""
    schedule = make_plan(config, mesh, sequence)
    tokens, labels, positions, num_labels = _read(sequence, schedule.positions, mesh.device)
    return MicroBatch(tokens, labels, positions, schedule, num_labels, _flops(config, mesh, sequence, schedule.mask.area))


def make_nano_batch(config: Config, mesh: Mesh, sequence: PackedSequence) -> NanoMicroBatch:
    """``make_batch`` in two halves, or one or two as predicted. Collective over the context group."""
    nano = make_nano_batches(config, mesh, sequence)
    tokens, labels, positions, counts = zip(*(_read(sequence, rows, mesh.device) for rows in nano.positions), strict=True)
    area = sum(half.mask.area for half in nano.plans)
    return NanoMicroBatch(tokens, labels, positions, nano, sum(counts), _flops(config, mesh, sequence, area))


def _read(sequence: PackedSequence, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """(tokens [1, n], labels [1, n], positions [n], number of labels) of some rows."""
    tokens, labels, positions = (torch.from_numpy(part) for part in sequence.read(rows.numpy()))
    num_labels = int((labels != IGNORED_LABEL).sum())
    tokens, labels, positions = (x.to(device, non_blocking=True) for x in (tokens[None], labels[None], positions))
    return tokens, labels, positions, num_labels


def _flops(config: Config, mesh: Mesh, sequence: PackedSequence, area: int) -> float:
    return config.model.flops_per_token(area, sequence.seq_len) * sequence.seq_len / mesh.context


def step_indices(step: int, global_batch: int, mesh: Mesh) -> range:
    """Numbers of the sequences that this rank's data group reads in a step (counted from 1): a pure function of both."""
    each = global_batch // mesh.data
    first = (step - 1) * global_batch + mesh.data_rank * each
    return range(first, first + each)
