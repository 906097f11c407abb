"""What is checked before any process starts, each refusal one sentence that names the key, the value and the remedy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from distattn.config import Config
from distattn.data import TokenCache
from distattn.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from distattn.kernels import choose_backend
from distattn.kernels.protocol import Case
from distattn.parallel.schedulers import find_scheduler
from distattn.training.checkpoint import published_steps
from distattn.training.checkpoint_format import CheckpointReader
from distattn.training.run_dir import RunDir
from distattn.training.sharding import compute_dtype

# fp32 weights and AdamW's two moments.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
_SPARE_BYTES = 16 << 20


class Ranks(NamedTuple):
    """How a run is spread: ``data · context`` processes on devices of one type."""

    data: int
    context: int
    device_type: str


def choose_ranks(config: Config, world: int | None = None) -> Ranks:
    """Ranks of the run. ``world`` is the number that exists already; None where we start them on this machine."""
    device = config.train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda is not possible: torch sees no GPU here; use train.device=cpu or auto.")
    context, data = config.parallel.context, config.parallel.data
    if world is not None:
        _require_world(world, data, context)
        return _divide_batch(config, Ranks(world // context, context, device))
    if device == "cuda":
        devices = torch.cuda.device_count()
        wanted = context * max(data, 1)
        if wanted > devices:
            raise ConfigError(
                f"parallel.context={context} × parallel.data={max(data, 1)} needs {wanted} GPUs and this machine has "
                f"{devices}: lower them, or set train.device=cpu."
            )
        data = data or devices // context
    return _divide_batch(config, Ranks(data or 1, context, device))


def _require_world(world: int, data: int, context: int) -> None:
    if data and world != data * context:
        raise ConfigError(
            f"parallel.context={context} × parallel.data={data} needs {context * data} ranks, but WORLD_SIZE is {world}: "
            "start that many, or set parallel.data=0 to use those that are there."
        )
    if world % context:
        raise ConfigError(
            f"parallel.context={context} does not divide the {world} ranks of WORLD_SIZE: choose a divisor of {world}."
        )


def _divide_batch(config: Config, ranks: Ranks) -> Ranks:
    if config.train.global_batch % ranks.data:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} does not divide over {ranks.data} data ranks: make it a "
            f"multiple of {ranks.data}, or set parallel.data to a divisor of it."
        )
    return ranks


def attention_servers(config: Config, ranks: Ranks) -> tuple[int, ...]:
    """Ranks that hold no tokens and only compute attention for others: the last ``parallel.servers`` of each context group,
    a context group being ``parallel.context`` ranks in a row."""
    servers, context = config.parallel.servers, ranks.context
    return tuple(first + i for first in range(0, ranks.data * context, context) for i in range(context - servers, context))


def node_counts(config: Config, nodes: int, ranks_per_node: int) -> tuple[int, ...]:
    """Numbers of nodes, ``nodes`` and fewer, largest first, on which the run computes the same steps: the global batch is
    dealt to the data ranks that there are. One number alone where ``parallel.data`` fixes it."""
    context, data, batch = config.parallel.context, config.parallel.data, config.train.global_batch
    counts = []
    for count in range(nodes, 0, -1):
        groups, rest = divmod(count * ranks_per_node, context)
        if groups and not rest and batch % groups == 0 and data in (0, groups):
            counts.append(count)
    return tuple(counts)


def check_heads(config: Config, ranks: Ranks) -> None:
    """The strategy can split the model's heads over the context ranks."""
    strategy = config.parallel.strategy
    if strategy == "auto":
        return  # it passes over those that cannot
    reason = find_scheduler(strategy).why_not(config.model.num_heads, ranks.context)
    if reason:
        raise ConfigError(
            f"parallel.strategy={strategy} is not possible with parallel.context={ranks.context} and "
            f"model.num_heads={config.model.num_heads}: {reason}."
        )


def check_kernel(config: Config, ranks: Ranks) -> None:
    """Some kernel, or the one that is asked for, computes this model's attention on these devices."""
    model = config.model
    dtype = compute_dtype(config, torch.device(ranks.device_type))
    case = Case(ranks.device_type, dtype, model.head_dim, model.head_dim, model.num_heads, model.num_kv_heads)
    try:
        choose_backend(case, config.kernel)
    except UnsupportedError as error:
        raise ConfigError(f"kernel={config.kernel} is not possible here: {error}") from error


def check_vocabulary(config: Config, cache: TokenCache) -> None:
    """The model's vocabulary covers the tokenizer's."""
    if cache.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is too small for data.tokenizer={config.data.tokenizer}, which has "
            f"{cache.vocab_size} tokens: set model.vocab_size={cache.vocab_size} or more."
        )


def check_resumed_data(config: Config, cache: TokenCache, run: RunDir) -> None:
    """A run that resumes gets the tokenizer and the text that its checkpoints were trained with."""
    meta = _newest_meta(run)
    if meta.get("tokenizer_digest", cache.tokenizer_digest) != cache.tokenizer_digest:
        raise DataError(
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer that the checkpoints in {run.path} were trained "
            "with: give that one back, or set another run.dir."
        )
    if meta.get("data_digest", cache.digest) != cache.digest:
        raise DataError(
            f"data.source={config.data.source} holds another text than when the run in {run.path} began: give that one "
            "back, or set another run.dir."
        )


def _newest_meta(run: RunDir) -> dict[str, object]:
    """What the newest readable checkpoint says of itself; damaged ones are reported when they are loaded."""
    for step in reversed(published_steps(run.checkpoints)):
        try:
            return CheckpointReader(run.checkpoints / f"step-{step}").meta
        except CheckpointError:
            continue
    return {}


def check_space(config: Config, run: RunDir) -> None:
    """Room for the checkpoints that are kept, and for the one that is written while they still exist."""
    size = config.model.num_parameters() * _CHECKPOINT_BYTES_PER_PARAMETER
    missing = max(config.checkpoint.keep + 1 - len(published_steps(run.checkpoints)), 1)
    needed = missing * size + _SPARE_BYTES
    free = shutil.disk_usage(_existing_parent(run.path)).free
    if free < needed:
        raise ConfigError(
            f"run.dir={run.path} has no space left for {missing} checkpoints ({needed / 1e6:,.0f} MB needed, "
            f"{free / 1e6:,.0f} MB free): free some, lower checkpoint.keep={config.checkpoint.keep}, or set run.dir to a "
            "disk with room."
        )


def _existing_parent(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return path
