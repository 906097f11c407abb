"""The ranks of a run as a grid of data × context, passed as an object.

Ranks of a context group are neighbours (rank = data_rank · context + context_rank): they share one sequence and talk in
every layer, so they get the fastest links. Parameters are sharded over all ranks, which is why there is a flat mesh too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """This rank's place. context_group is None for one context rank; all_ranks is None without torch.distributed."""

    data: int
    context: int
    rank: int
    device: torch.device
    context_group: dist.ProcessGroup | None = None
    all_ranks: DeviceMesh | None = None

    @property
    def world(self) -> int:
        return self.data * self.context

    @property
    def data_rank(self) -> int:
        return self.rank // self.context

    @property
    def context_rank(self) -> int:
        return self.rank % self.context

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks in fp64, of values of any real dtype and shape; the same bits on every rank. Collective."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over all ranks, as ``sum``. Collective."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        total = values.detach().to(self.device, torch.float64, copy=True)
        if self.world > 1:
            dist.all_reduce(total, op)
        return total


def build_mesh(data: int, context: int, rank: int, device: torch.device) -> Mesh:
    """The mesh of the initialised default process group, which has ``data · context`` ranks. Collective."""
    if not dist.is_initialized():
        assert data * context == 1, "several ranks need torch.distributed"
        return Mesh(data, context, rank, device)
    own_group = None
    if context > 1:
        for first in range(0, data * context, context):  # every rank takes part in making every group
            group = dist.new_group(list(range(first, first + context)))
            if first <= rank < first + context:
                assert isinstance(group, dist.ProcessGroup)
                own_group = group
    flat = init_device_mesh(device.type, (data * context,), mesh_dim_names=("all_ranks",))
    return Mesh(data, context, rank, device, own_group, flat)
