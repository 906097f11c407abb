"""Which block of a tensor a rank holds, in the coordinates of the whole tensor."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from distattn.errors import CheckpointError


@dataclass(frozen=True)
class Block:
    """A rectangular part of a tensor: its first index along each dimension, and its shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def meet(self, other: Block) -> Block:
        """The part that both cover; a dimension of 0 where they are apart."""
        starts = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = [min(a, b) for a, b in zip(self._ends(), other._ends(), strict=True)]
        return Block(tuple(starts), tuple(max(0, end - start) for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: Block) -> tuple[slice, ...]:
        """Slices of this block in a tensor that holds ``outer``."""
        starts = [mine - theirs for mine, theirs in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape, strict=True))

    def _ends(self) -> list[int]:
        return [start + n for start, n in zip(self.offset, self.shape, strict=True)]


@dataclass(frozen=True)
class TensorInfo:
    """Global shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Part:
    """What one rank holds of a named tensor. values: shaped as the block, or without elements where it holds nothing."""

    name: str
    info: TensorInfo
    block: Block
    values: Tensor

    @property
    def num_held(self) -> int:
        """Elements that this rank holds."""
        return self.values.numel()

    def key(self) -> int:
        """The same positive int64 on every rank that holds this block; 0 where the rank holds nothing."""
        return short_digest(f"{self.name}{self.block}") if self.num_held else 0


def part_of(name: str, tensor: Tensor | Part) -> Part:
    """This rank's part of ``tensor``: values share its memory, without autograd.

    A plain tensor is held whole; what is a Part already stays it. CheckpointError: a DTensor with a placement other than
    Shard and Replicate.
    """
    if isinstance(tensor, Part):
        return tensor
    info = TensorInfo(tuple(tensor.shape), tensor.dtype)
    if not isinstance(tensor, DTensor):
        return Part(name, info, Block((0,) * tensor.ndim, info.shape), tensor.detach())
    with torch.no_grad():
        values = tensor.to_local()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # a rank outside the mesh
        return Part(name, info, Block((0,) * tensor.ndim, (0,) * tensor.ndim), values.new_empty(0))
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:
            raise CheckpointError(
                f"{name} has placement {placement}, which a checkpoint cannot hold: redistribute it to Shard or Replicate"
            )
        # As torch.chunk cuts: equal pieces rounded up, so that the last ranks may hold less or nothing.
        dim = placement.dim
        piece = -(-shape[dim] // tensor.device_mesh.size(axis))
        start = min(coordinate[axis] * piece, shape[dim])
        offset[dim], shape[dim] = offset[dim] + start, min(piece, shape[dim] - start)
    if tuple(shape) != tuple(values.shape):
        raise CheckpointError(
            f"{name}: this rank holds shape {list(values.shape)}, but placements {tensor.placements} of "
            f"{list(tensor.shape)} give {shape}"
        )
    return Part(name, info, Block(tuple(offset), tuple(shape)), values)


def short_digest(text: str) -> int:
    """A positive int64 that stands for ``text``."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little") >> 1 | 1
