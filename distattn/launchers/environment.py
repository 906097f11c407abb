"""What a rank finds in its environment: who it is, and where the others meet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from distattn.errors import ConfigError

STORE_VARIABLE = "DISTATTN_STORE"
PREPARED_VARIABLE = "DISTATTN_PREPARED"
"""Set where the process that started the ranks has checked the run and holds its lock."""


def joined_by_environment(env: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher (ours, torchrun, a Slurm script) has already made this process a rank."""
    env = os.environ if env is None else env
    return bool(env.get("RANK")) and bool(env.get("WORLD_SIZE"))


def init_from_environment(device_type: str = "cpu", *, timeout_s: float = 600.0) -> tuple[int, int]:
    """Join the ranks that the environment describes; returns (rank, world size).

    Without RANK and WORLD_SIZE this is (0, 1), and no process group is made. Ranks meet in the file that DISTATTN_STORE
    names (one host, no port), or else at MASTER_ADDR and MASTER_PORT. device_type "cpu" takes gloo; "cuda" takes GPU
    LOCAL_RANK, NCCL for GPU tensors and gloo for CPU tensors. timeout_s: after so long, a collective is an error.
    ConfigError: a variable is missing or no number, or there are fewer GPUs than local ranks.
    """
    if not os.environ.get("RANK") and not os.environ.get("WORLD_SIZE"):
        return 0, 1
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < world:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE is {world}: ranks count from 0 to WORLD_SIZE − 1")
    device = None
    if device_type == "cuda":
        device = torch.device("cuda", _local_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    elif device_type != "cpu":
        raise ConfigError(f"device_type is {device_type!r}; it must be 'cpu' or 'cuda'")
    path = os.environ.get(STORE_VARIABLE)
    if not path:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not: ranks need MASTER_ADDR and MASTER_PORT (as "
                f"torchrun sets them), or {STORE_VARIABLE}, a file that they share; unset RANK and WORLD_SIZE to start "
                "ranks here"
            )
    # Transfers start beside kernels that fill the device only if they come first where blocks are placed.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        store=dist.FileStore(path, world) if path else None,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
    )
    return rank, world


def _local_gpu(present: int) -> int:
    index = _number("LOCAL_RANK")
    if index >= present:
        raise ConfigError(f"LOCAL_RANK is {index}, and this host shows {present} GPUs: start at most one rank a GPU")
    return index


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}, but a rank needs RANK, WORLD_SIZE and (on GPUs) LOCAL_RANK as whole numbers")
    return int(text)
