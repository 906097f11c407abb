"""transformers' Trainer over context ranks: its data-parallel machinery, with every batch cut over a group of neighbours.

    ranks  0 1 2 3 │ 4 5 6 7      context_ranks=4: ranks 0…3 read the same samples and share their tokens, 4…7 the next
           └ group ┘ └ group ┘    loss = world · Σ own token losses / labels of the step;  DDP averages gradients over all ranks

Accelerate's own context and sequence parallelism stay off: they shard behind the model's back, and refuse windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from distattn.errors import UnsupportedError
from distattn.integrations.transformers import check_model, register
from distattn.integrations.transformers_batches import ShardedBatch, labels_of, shard

_WHO = "ContextParallelTrainer"
_SUMS_GRADIENTS = (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)


class ContextParallelTrainer(transformers.Trainer):
    """A Trainer whose batches are cut over ``context_ranks`` neighbouring processes; everything else is as usual.

    The model has ``attn_implementation="distattn"``. context_ranks: divides the number of processes; 0 is all of them.
    strategy, kernel: as for ``distattn.plan``. Batch sizes count per context group. Losses, in training and in evaluation, are
    means over all labels of a step; documents (position_ids) never predict across their ends. Evaluation gives losses only.

    Raises UnsupportedError for what would be wrong: Accelerate's cp, sp or tp, DeepSpeed, several GPUs in one process, label
    smoothing, losses of one's own, models whose loss is not the causal one.
    """

    def __init__(self, *args: Any, context_ranks: int = 0, strategy: str = "auto", kernel: str = "auto", **kwargs: Any) -> None:
        register(kernel=kernel)
        super().__init__(*args, **kwargs)
        self._strategy, self._kernel = strategy, kernel
        world = self.args.world_size
        self._context = context_ranks or world
        if world % self._context:
            raise UnsupportedError(
                f"context_ranks={context_ranks} for {world} processes", _WHO, "it must divide their number", "choose a divisor"
            )
        self._check()
        self._mesh: DeviceMesh | None = None
        self._group: dist.ProcessGroup | None = None
        if world > 1:
            shape = (world // self._context, self._context)
            self._mesh = init_device_mesh(self.args.device.type, shape, mesh_dim_names=("dp_replicate", "cp"))
            self._group = self._mesh.get_group("cp") if self._context > 1 else None

    def get_train_dataloader(self) -> Any:
        with self._data_mesh():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._data_mesh():
            return super().get_eval_dataloader(eval_dataset)

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of a step: ranks of a context group read the same."""
        return super().get_total_train_batch_size(args) // self._context

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The next batches, and the labels that they hold over all processes, none of them counted twice."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        return batches, self._count_labels(batches, device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's share of the loss, times the number of processes, which gradients are averaged over."""
        if self.args.world_size > 1 and model.training and not isinstance(model, _SUMS_GRADIENTS):
            raise UnsupportedError(
                "a model whose gradients are not summed over the processes", _WHO,
                "Accelerate leaves out DDP where evaluate() came before train()", "evaluate with another trainer, or later",
            )  # fmt: skip
        part = self._shard(inputs, num_items_in_batch)
        with part:
            outputs = cast(Any, model)(**part.inputs)
        loss = outputs["loss"] * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The mean loss of one batch, alike on all ranks of its group."""
        if not prediction_loss_only:
            raise UnsupportedError(
                "logits of evaluation (compute_metrics, predict)", _WHO, "each rank has those of its own tokens only",
                "set prediction_loss_only=True in TrainingArguments, or use part.gather of a ShardedBatch",
            )  # fmt: skip
        part = self._shard(self._prepare_inputs(inputs), None)
        with torch.no_grad(), self.compute_loss_context_manager(), part:
            loss = model(**part.inputs)["loss"]
        return part.sum(loss), None, None

    def _shard(self, inputs: dict[str, Any], num_items: Any) -> ShardedBatch:
        return shard(inputs, group=self._group, num_items=num_items, strategy=self._strategy, kernel=self._kernel)

    def _count_labels(self, batches: list[Any], device: torch.device) -> torch.Tensor:
        count = torch.tensor(sum(labels_of(batch) for batch in batches), dtype=torch.int64, device=device)
        if self.args.world_size > 1:
            dist.all_reduce(count)
            count //= self._context
        return count.clamp(min=1)

    @contextmanager
    def _data_mesh(self) -> Iterator[None]:
        """While a loader is made: Accelerate gives the ranks of its "cp" dimension the same batches."""
        state: Any = self.accelerator.state
        before, state.device_mesh = state.device_mesh, self._mesh
        try:
            yield
        finally:
            state.device_mesh = before

    def _check(self) -> None:
        check_model(self.model, self._context)
        found = _why_not(self)
        if found is not None:
            raise UnsupportedError(found[0], _WHO, *found[1:])


def _why_not(trainer: transformers.Trainer) -> tuple[str, str, str] | None:
    """(feature, reason, alternative) of the first thing that would make the training wrong."""
    args: Any = trainer.args
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for size in ("cp_size", "sp_size", "tp_size"):
        if parallelism is not None and getattr(parallelism, size, 1) > 1:
            return (
                f"ParallelismConfig({size}={getattr(parallelism, size)})",
                "the sequence would be sharded twice",
                "leave it at 1",
            )
    known = int(getattr(trainer.accelerator, "num_processes", args.world_size))
    there = dist.get_world_size() if dist.is_initialized() else args.world_size
    if not known == there == args.world_size:
        what = f"{there} processes of which Accelerate knows {known} and TrainingArguments {args.world_size}"
        return what, "samples and losses would be counted wrongly", "start them by torchrun or accelerate launch"
    if args.n_gpu > 1:
        return (
            "several GPUs in one process (DataParallel)",
            "it splits batches by threads",
            "start one process a GPU, by torchrun",
        )
    if getattr(trainer, "is_deepspeed_enabled", False):
        return "DeepSpeed", "it scales losses and gradients in its own way", "use DDP or FSDP, or distattn's own train.engine"
    if args.label_smoothing_factor:
        return "label_smoothing_factor", "the smoother shifts labels within a shard", "set it to 0"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func", "it would be given a shard's labels", "use the model's own loss"
    if LOSS_MAPPING.get(str(getattr(trainer.model, "loss_type", None))) is not ForCausalLMLoss:
        return (
            "a model whose loss is not that of causal language models",
            "labels are shifted for that one",
            "use a causal model",
        )
    return None
