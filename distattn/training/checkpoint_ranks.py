"""How the ranks that share a checkpoint agree: small collectives from the main thread, the group's store from others.

A background thread never calls a collective: it would meet the training step's on the same group, in another order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from distattn.bounded_store import BoundedStore
from distattn.errors import CheckpointError

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.005, 0.5


class CheckpointRanks:
    """The ranks of one checkpoint manager; one rank needs no process group."""

    def __init__(self, rank: int, world: int, group: dist.ProcessGroup | None, *, timeout_s: float) -> None:
        """Collective over ``group`` (None: the default group where ``world`` is more than 1).

        timeout_s: the longest that the group's store may take for a post or a look.
        """
        self.rank, self.world = rank, world
        if world == 1:
            self._store: BoundedStore | dist.Store = dist.HashStore()
            return
        if not dist.is_initialized():
            raise CheckpointError(f"a checkpoint of {world} ranks needs torch.distributed: call init_process_group first")
        group = group if group is not None else dist.group.WORLD
        assert group is not None
        if (dist.get_rank(group), dist.get_world_size(group)) != (rank, world):
            raise CheckpointError(
                f"rank {rank} of {world} was given for checkpoints, but the process group says rank "
                f"{dist.get_rank(group)} of {dist.get_world_size(group)}: they must be the same"
            )
        self._group = group
        # Gloo takes CPU tensors; a group of NCCL alone takes only those of the rank's GPU.
        on_cpu = "gloo" in dist.get_backend_config(group)
        self._device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        # A number of this manager's own: no key of an earlier manager on the same store may be taken for one of ours.
        token = int(self.gather(np.array([time.time_ns()]))[0, 0])
        # A clone has its own connection: one shared with other threads would make them wait for each other.
        store = group.get_group_store().clone()  # pyright: ignore[reportAttributeAccessIssue]: missing in torch's stubs
        self._store = BoundedStore(dist.PrefixStore(f"distattn/checkpoint/{token}", store), limit_s=timeout_s)

    def gather(self, row: np.ndarray) -> np.ndarray:
        """Collective: every rank's int64 [n] (n alike on all ranks), as [world, n]."""
        if self.world == 1:
            return row[None]
        mine = torch.from_numpy(np.ascontiguousarray(row, np.int64)).to(self._device)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(rows, mine, group=self._group)
        return torch.stack(rows).cpu().numpy()

    def gather_texts(self, text: str) -> list[str]:
        """Collective: every rank's text."""
        if self.world == 1:
            return [text]
        # Bytes as int64, since gather carries no other type: these are sentences and short lists.
        data = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)
        sizes = self.gather(np.array([data.size]))[:, 0]
        if not sizes.max():
            return [""] * self.world
        padded = np.zeros(sizes.max(), np.int64)
        padded[: data.size] = data
        rows = self.gather(padded).astype(np.uint8)
        return [row[:size].tobytes().decode("utf-8") for row, size in zip(rows, sizes, strict=True)]

    def post(self, key: str, value: dict[str, Any]) -> None:
        """Store a JSON value for the other ranks' threads."""
        self._store.set(key, json.dumps(value))

    def collect(self, keys: Sequence[str], timeout_s: float) -> list[dict[str, Any]]:
        """Wait until other ranks' threads have posted all ``keys``; TimeoutError names those that are missing."""
        deadline, pause = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        while not self._store.check(list(keys)):
            if time.monotonic() > deadline:
                raise TimeoutError(", ".join(key for key in keys if not self._store.check([key])))
            time.sleep(pause)
            pause = min(pause * 1.5, _LAST_PAUSE_S)
        return [json.loads(self._store.get(key)) for key in keys]
