"""How states cross the borders of shards: ``BoundaryOp``, one class a kind of transition.

A shard turns the state that enters it into the state that leaves: x ← A x + B, its *map*. Maps compose,
(A_r, B_r) ∘ (A_l, B_l) = (A_r A_l, A_r B_l + B_r), so that exchanges may apply them in any grouping. Gradients travel the other
way through the transposed maps: dx_in = Aᵀ dx_out + D.

====================  ===================  =====================  ==============================================
kind                  A                    state                  used by
====================  ===================  =====================  ==============================================
identity              1                    [B, H, K, V]           linear attention
scalar                [B, H]               [B, H, K, V]           lightning, retention, simple GLA, Mamba-2
diagonal              [B, H, K]            [B, H, K, V]           GLA
dense                 [B, H, K, K]         [B, H, K, V]           delta rules
block                 [B, H, 2, 2, K, K]   [B, H, 2, K, V]        a memory with momentum
softmax               none                 [B, H, 2 + V]          running softmax: (m, u, w), result w / u
halo                  shift [B, H]         [B, H, W − 1, V]       short convolutions: the last W − 1 rows
====================  ===================  =====================  ==============================================

Columns of the state (V) never mix, so exchanges may cut along them whatever A is; heads never mix either.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distattn.errors import UnsupportedError


class Map(NamedTuple):
    """One shard's effect on the state. transition: see the table; None where there is none, or where nothing enters."""

    transition: Tensor | None
    offset: Tensor


class StateShape(NamedTuple):
    """Sizes of a state, whole: [batch, heads, rows, columns] in most kinds; dtype and device of states and wire."""

    batch: int
    heads: int
    rows: int
    columns: int
    dtype: torch.dtype
    device: torch.device


class BoundaryOp(Protocol):
    """States and maps of one kind. h: heads, v: columns of the part that is meant."""

    name: str

    def state_size(self, shape: StateShape, h: int, v: int) -> tuple[int, ...]: ...

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...] | None:
        """None where maps have no transition to send."""
        ...

    def cut(self, state: Tensor, h: slice, v: slice) -> Tensor:
        """These heads and columns of a state or offset."""
        ...

    def join(self, columns: list[Tensor]) -> Tensor:
        """The inverse of cutting along columns."""
        ...

    def apply(self, right: Map, state: Tensor) -> Tensor: ...

    def compose(self, right: Map, left: Map) -> Map: ...

    def adjoint(self, transition: Tensor | None) -> Tensor | None: ...


class Affine:
    """x ← A x + B with states [B, H, K, V]: the part that all kinds of A share. By itself the identity."""

    name = "identity"

    def state_size(self, shape: StateShape, h: int, v: int) -> tuple[int, ...]:
        return shape.batch, h, shape.rows, v

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...] | None:
        return None

    def cut(self, state: Tensor, h: slice, v: slice) -> Tensor:
        return state[:, h, ..., v]

    def join(self, columns: list[Tensor]) -> Tensor:
        return torch.cat(columns, -1) if len(columns) > 1 else columns[0]

    def follow(self, transition: Tensor | None, x: Tensor) -> Tensor:
        """A x."""
        return x

    def apply(self, right: Map, state: Tensor) -> Tensor:
        return self.follow(right.transition, state) + right.offset

    def compose(self, right: Map, left: Map) -> Map:
        return Map(self._product(right.transition, left.transition), self.apply(right, left.offset))

    def adjoint(self, transition: Tensor | None) -> Tensor | None:
        return transition

    def _product(self, right: Tensor | None, left: Tensor | None) -> Tensor | None:
        return None


class Scalar(Affine):
    """A: one factor a head."""

    name = "scalar"

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...]:
        return shape.batch, h

    def apply(self, right: Map, state: Tensor) -> Tensor:
        assert right.transition is not None
        return torch.addcmul(right.offset, right.transition[..., None, None], state)

    def follow(self, transition: Tensor | None, x: Tensor) -> Tensor:
        assert transition is not None
        return transition[..., None, None] * x

    def _product(self, right: Tensor | None, left: Tensor | None) -> Tensor:
        assert right is not None
        assert left is not None
        return right * left


class Diagonal(Scalar):
    """A: one factor a row of the state."""

    name = "diagonal"

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...]:
        return shape.batch, h, shape.rows

    def apply(self, right: Map, state: Tensor) -> Tensor:
        assert right.transition is not None
        return torch.addcmul(right.offset, right.transition[..., None], state)

    def follow(self, transition: Tensor | None, x: Tensor) -> Tensor:
        assert transition is not None
        return transition[..., None] * x


class Dense(Affine):
    """A: a K × K matrix a head."""

    name = "dense"

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...]:
        return shape.batch, h, shape.rows, shape.rows

    def follow(self, transition: Tensor | None, x: Tensor) -> Tensor:
        assert transition is not None
        return transition @ x

    def adjoint(self, transition: Tensor | None) -> Tensor | None:
        return None if transition is None else transition.transpose(-1, -2)

    def _product(self, right: Tensor | None, left: Tensor | None) -> Tensor:
        assert right is not None
        assert left is not None
        return right @ left


class Block(Affine):
    """A: a block of K × K matrices over states that are stacked, 2 × 2 by default: [B, H, 2, K, V]; shape.rows is K."""

    name = "block"

    def __init__(self, parts: int = 2) -> None:
        self.parts = parts

    def state_size(self, shape: StateShape, h: int, v: int) -> tuple[int, ...]:
        return shape.batch, h, self.parts, shape.rows, v

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...]:
        return shape.batch, h, self.parts, self.parts, shape.rows, shape.rows

    def follow(self, transition: Tensor | None, x: Tensor) -> Tensor:
        assert transition is not None
        return torch.einsum("bhijkl,bhjlv->bhikv", transition, x)

    def adjoint(self, transition: Tensor | None) -> Tensor | None:
        return None if transition is None else transition.permute(0, 1, 3, 2, 5, 4)

    def _product(self, right: Tensor | None, left: Tensor | None) -> Tensor:
        assert right is not None
        assert left is not None
        return torch.einsum("bhijkl,bhjmln->bhimkn", right, left)


class Halo(Affine):
    """A: rows move up by the shard's length, and out at the top. The map of a shard of n rows keeps its last W − 1 of them:
    offset, at the end, zeros before; a negative shift (the adjoint) moves down."""

    name = "halo"

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...]:
        return shape.batch, h

    def follow(self, transition: Tensor | None, x: Tensor) -> Tensor:
        assert transition is not None
        rows = x.shape[-2]
        source = torch.arange(rows, device=x.device) + transition.to(torch.int64)[..., None]
        inside = (source >= 0) & (source < rows)
        index = source.clamp(0, rows - 1)[..., None].expand(x.shape)
        return torch.where(inside[..., None], x.gather(-2, index), x.new_zeros(()))

    def adjoint(self, transition: Tensor | None) -> Tensor | None:
        return None if transition is None else -transition

    def _product(self, right: Tensor | None, left: Tensor | None) -> Tensor:
        assert right is not None
        assert left is not None
        return right + left


class Softmax:
    """Partial softmax: (m, u, w) with m a maximum, u = Σ e^{s − m}, w = Σ e^{s − m} v; (−∞, 0, 0) is empty."""

    name = "softmax"

    def state_size(self, shape: StateShape, h: int, v: int) -> tuple[int, ...]:
        return shape.batch, h, 2 + v

    def transition_size(self, shape: StateShape, h: int) -> tuple[int, ...] | None:
        return None

    def cut(self, state: Tensor, h: slice, v: slice) -> Tensor:
        state = state[:, h]
        return torch.cat([state[..., :2], state[..., 2:][..., v]], -1)

    def join(self, columns: list[Tensor]) -> Tensor:
        return torch.cat([columns[0][..., :2], *(part[..., 2:] for part in columns)], -1)

    def apply(self, right: Map, state: Tensor) -> Tensor:
        return merge_softmax(state, right.offset)

    def compose(self, right: Map, left: Map) -> Map:
        return Map(None, merge_softmax(left.offset, right.offset))

    def adjoint(self, transition: Tensor | None) -> Tensor | None:
        raise UnsupportedError(
            "the softmax state has no transposed map of its own; its gradients with respect to (u, w) travel by the scalar "
            "operator, whose factor for a shard is e^{m that enters − m that leaves}"
        )


def merge_softmax(a: Tensor, b: Tensor) -> Tensor:
    """Both together; empty with empty is empty, without NaN."""
    m = torch.maximum(a[..., :1], b[..., :1])
    reference = torch.where(m.isneginf(), 0.0, m)
    rest = (a[..., :1] - reference).exp() * a[..., 1:] + (b[..., :1] - reference).exp() * b[..., 1:]
    return torch.cat([m, rest], -1)


OPERATORS: dict[str, BoundaryOp] = {op.name: op for op in (Affine(), Scalar(), Diagonal(), Dense(), Block(), Softmax(), Halo())}
