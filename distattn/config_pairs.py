"""Keys of a run's configuration that do not go together, each refusal with the reason and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distattn.errors import ConfigError

if TYPE_CHECKING:
    from distattn.config import Config, ParallelConfig, TrainConfig


def check_servers(parallel: ParallelConfig) -> None:
    """``parallel.servers`` needs the strategy that has servers, and somebody who holds rows."""
    if not parallel.servers:
        return
    if parallel.strategy != "disaggregated":
        raise ConfigError(
            f"parallel.servers={parallel.servers} is not possible with parallel.strategy={parallel.strategy}: only "
            "disaggregated attention has servers; set parallel.strategy=disaggregated, or parallel.servers=0."
        )
    if parallel.servers >= parallel.context:
        raise ConfigError(
            f"parallel.servers={parallel.servers} leaves none of the parallel.context={parallel.context} ranks to hold rows: "
            f"set it to {parallel.context - 1} or less, or raise parallel.context."
        )


def check_keeping(parallel: ParallelConfig) -> None:
    """``parallel.keep_bytes`` is the limit of ``parallel.backward=auto``, and of nothing else."""
    if (parallel.backward == "auto") != (parallel.keep_bytes > 0):
        raise ConfigError(
            f"parallel.keep_bytes={parallel.keep_bytes} does not go with parallel.backward={parallel.backward}: auto needs "
            "a limit greater than 0, resend and keep need none (0)."
        )


def check_offload(train: TrainConfig) -> None:
    """``train.activation_offload`` moves the inputs of checkpointed blocks, so there must be some."""
    if train.activation_offload and train.activation_checkpointing == "none":
        raise ConfigError(
            "train.activation_offload=true does not go with train.activation_checkpointing=none: it moves what checkpointed "
            "blocks keep to host memory; set train.activation_checkpointing=selective or full."
        )


def check_nano_batches(config: Config) -> None:
    """``train.nano_batches`` of 2 or 0 takes softmax layers, FSDP2, and no checkpointing that repeats attention."""
    train = config.train
    if train.nano_batches == 1:
        return
    given = f"train.nano_batches={train.nano_batches}"
    if train.nano_batches not in (0, 2):
        raise ConfigError(f"{given} is not allowed: 1, 2 halves that take turns, or 0 for what is predicted to be faster.")
    if train.engine != "fsdp":
        raise ConfigError(
            f"train.engine={train.engine} is not possible with {given}: its weights are gathered block by "
            "block, and the halves go from the middle of one block to the middle of the next; set train.engine=fsdp."
        )
    if train.activation_checkpointing == "full":
        raise ConfigError(
            f"train.activation_checkpointing=full is not possible with {given}: it would repeat attention in the "
            "middle of another half's; take selective, which recomputes everything else."
        )
    if config.model.num_softmax_layers < config.model.num_layers:
        raise ConfigError(
            f"model.layers={config.model.layers} is not possible with {given}: linear layers carry a state from "
            "one half of a sequence to the other; set train.nano_batches=1."
        )
    if config.data.seq_len < 2:
        raise ConfigError(f"data.seq_len={config.data.seq_len} is not possible with {given}: two halves need 2 tokens or more.")
