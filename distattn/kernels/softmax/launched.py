"""What backends made of vendor kernels share: tiles become launches, whose results are merged, copied or passed on.

Vendor kernels return (out, lse) in the input dtype and take the global (out, lse) in the backward, where they recompute
delta = Σ do∘out. A carry takes their results in fp32. Where nothing but the tiles of one call counts, no carry is needed: one
launch that holds all rows *is* the result, and launches that share no rows (or keys) are copied into place.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.merge import accumulation_dtype, empty_carry, finish, merge_partial
from distattn.kernels.protocol import Carry, Extras

Where = tuple[slice, slice, slice]
"""Batch entries, rows and heads of an arena."""


class Launch(NamedTuple):
    """Rows q0 … q1 and heads h0 … h1 of the query arena, and k0 … k1, kv0 … kv1 of the KV arena, every row of which sees a
    key; ``detail`` is what else the kernel needs to know."""

    q0: int
    q1: int
    k0: int
    k1: int
    h0: int
    h1: int
    kv0: int
    kv1: int
    detail: object

    @property
    def rows(self) -> Where:
        return slice(None), slice(self.q0, self.q1), slice(self.h0, self.h1)

    @property
    def keys(self) -> Where:
        return slice(None), slice(self.k0, self.k1), slice(self.kv0, self.kv1)


class Inputs(NamedTuple):
    """One launch: q, out, do [B, n, H, D]; k, v [B, m, Hk, D]; lse [B, H, n] contiguous, as the kernels keep it."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor | None = None
    lse: Tensor | None = None
    do: Tensor | None = None


class LaunchedBackend(ABC):
    """Forward and backward over launches. A subclass says what the launches are and runs one."""

    needs_out = True

    @abstractmethod
    def launches(self, tiles: np.ndarray, group: int) -> Sequence[Launch]:
        """Tiles int64 [N, 9] as launches that compute exactly their pairs, with ``group`` query heads a KV head."""

    @abstractmethod
    def forward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        """(out [B, n, H, Dv], lse [B, H, n])."""

    @abstractmethod
    def backward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
        """(dq, dk, dv), of the shapes of q, k and v."""

    def backward_into(
        self, launch: Launch, x: Inputs, into: Sequence[Tensor], scale: float, softcap: float | None
    ) -> None:  # fmt: skip
        """``backward`` into given views of the shapes of q, k and v, in the input dtype. Here: computed, then copied."""
        for view, gradient in zip(into, self.backward(launch, x, scale, softcap)):
            view.copy_(gradient[..., : view.shape[-1]])

    def prepare(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors [B, N, H, ·] as the kernel takes them; wider ones are cut to size again afterwards."""
        return list(tensors)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, *, group: int, scale: float,
        softcap: float | None, extras: Extras | None = None,
    ) -> None:  # fmt: skip
        assert extras is None
        width = v.shape[-1]
        q, k, v = self.prepare(q, k, v)
        for launch in self.launches(tiles, group):
            out, lse = self.forward(launch, _inputs(launch, q, k, v), scale, softcap)
            part = Carry(*(x[launch.rows] for x in carry))
            merge_partial(part, out[..., :width], lse.transpose(1, 2), all_seen=True)

    def each_result(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, *, group: int, scale: float, softcap: float | None
    ) -> Iterator[tuple[Launch, Tensor, Tensor]]:
        """Each launch with its out [B, n, H, Dv], in the input dtype and in memory of its own, and lse [B, n, H]."""
        width = v.shape[-1]
        q, k, v = self.prepare(q, k, v)
        for launch in self.launches(tiles, group):
            out, lse = self.forward(launch, _inputs(launch, q, k, v), scale, softcap)
            yield launch, out[..., :width], lse.transpose(1, 2)

    def attend_backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, delta: Tensor,
        tiles: np.ndarray, dq: Tensor, dk: Tensor, dv: Tensor, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> None:  # fmt: skip
        assert extras is None
        assert out is not None
        self._add_gradients(self.launches(tiles, group), (q, k, v, out, do), lse, (dq, dk, dv), scale, softcap)

    def attend_whole(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, *, group: int, scale: float, softcap: float | None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert extras is None
        launches = self.launches(tiles, group)
        batch, rows, heads, _ = q.shape
        if not _are_apart(x.rows for x in launches):
            carry = empty_carry(batch, rows, heads, v.shape[-1], dtype=q.dtype, device=q.device)
            self.attend(q, k, v, tiles, carry, group=group, scale=scale, softcap=softcap)
            return finish(carry, q.dtype)
        width = v.shape[-1]
        q, k, v = self.prepare(q, k, v)
        if len(launches) == 1 and _holds(launches[0].rows, q):
            out, lse = self.forward(launches[0], _inputs(launches[0], q, k, v), scale, softcap)
            return out[..., :width], lse.transpose(1, 2)
        out = q.new_zeros(batch, rows, heads, width)
        lse = torch.full((batch, rows, heads), float("-inf"), dtype=accumulation_dtype(q.dtype), device=q.device)
        for launch in launches:
            part, part_lse = self.forward(launch, _inputs(launch, q, k, v), scale, softcap)
            out[launch.rows].copy_(part[..., :width])
            lse[launch.rows].copy_(part_lse.transpose(1, 2))
        return out, lse

    def attend_backward_whole(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None,
        tiles: np.ndarray, *, group: int, scale: float, softcap: float | None, extras: Extras | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert extras is None
        assert dlse is None
        launches = self.launches(tiles, group)
        if len(launches) == 1 and _holds(launches[0].rows, q) and _holds(launches[0].keys, k):
            q_in, k_in, v_in, out, do = self.prepare(q, k, v, out.to(q.dtype), do.to(q.dtype))
            found = self.backward(launches[0], _inputs(launches[0], q_in, k_in, v_in, out, lse, do), scale, softcap)
            dq, dk, dv = (gradient[..., : x.shape[-1]] for gradient, x in zip(found, (q, k, v)))
            return dq, dk, dv
        # What nothing else is added to needs no wider sum.
        apart = [_are_apart([x.rows for x in launches]), *[_are_apart([x.keys for x in launches])] * 2]
        sums = [
            torch.zeros_like(x, dtype=None if alone else accumulation_dtype(x.dtype), memory_format=torch.contiguous_format)
            for x, alone in zip((q, k, v), apart)
        ]
        self._add_gradients(launches, (q, k, v, out, do), lse, sums, scale, softcap)
        dq, dk, dv = (x.to(q.dtype) for x in sums)
        return dq, dk, dv

    def writes_rows_once(self, tiles: np.ndarray, group: int) -> bool:
        """Whether no two launches share a row of a head."""
        return _are_apart(x.rows for x in self.launches(tiles, group))

    def writes_all_rows(self, q: Tensor, tiles: np.ndarray, group: int) -> bool:
        """Whether one launch takes all rows and heads of the query arena."""
        launches = self.launches(tiles, group)
        return len(launches) == 1 and _holds(launches[0].rows, q)

    def fills(self, q: Tensor, k: Tensor, tiles: np.ndarray, group: int) -> bool:
        """Whether one launch takes all rows and heads of both arenas."""
        launches = self.launches(tiles, group)
        return len(launches) == 1 and _holds(launches[0].rows, q) and _holds(launches[0].keys, k)

    def _add_gradients(
        self, launches: Sequence[Launch], tensors: Sequence[Tensor], lse: Tensor, into: Sequence[Tensor], scale: float,
        softcap: float | None,
    ) -> None:  # fmt: skip
        for launch, gradients in self._each_gradient(launches, tensors, lse, scale, softcap):
            for gradient, arena, where in zip(gradients, into, (launch.rows, launch.keys, launch.keys)):
                arena[where].add_(gradient)

    def each_gradient(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, tiles: np.ndarray, *, group: int,
        scale: float, softcap: float | None,
    ) -> Iterator[tuple[Launch, tuple[Tensor, ...]]]:  # fmt: skip
        """Each launch with what it gives dq, dk and dv, in the input dtype and in memory of its own."""
        return self._each_gradient(self.launches(tiles, group), (q, k, v, out, do), lse, scale, softcap)

    def gradients_into(
        self, into: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor,
        launches: Sequence[Launch], scale: float, softcap: float | None,
    ) -> None:  # fmt: skip
        """What launches give dq, dk and dv [B, N, H, ·], written to their places there; no two of them share one."""
        q, k, v, out, do = self.prepare(q, k, v, out.to(q.dtype), do.to(q.dtype))
        for launch in launches:
            views = [x[where] for x, where in zip(into, (launch.rows, launch.keys, launch.keys))]
            self.backward_into(launch, _inputs(launch, q, k, v, out, lse, do), views, scale, softcap)

    def _each_gradient(
        self, launches: Sequence[Launch], tensors: Sequence[Tensor], lse: Tensor, scale: float, softcap: float | None
    ) -> Iterator[tuple[Launch, tuple[Tensor, ...]]]:
        q, k, v, out, do = tensors
        widths = (q.shape[-1], k.shape[-1], v.shape[-1])
        q, k, v, out, do = self.prepare(q, k, v, out.to(q.dtype), do.to(q.dtype))
        for launch in launches:
            gradients = self.backward(launch, _inputs(launch, q, k, v, out, lse, do), scale, softcap)
            yield launch, tuple(gradient[..., :width] for gradient, width in zip(gradients, widths))


def _inputs(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None, lse: Tensor | None = None,
    do: Tensor | None = None,
) -> Inputs:  # fmt: skip
    """One launch's views. The slice of the LSE is copied: the kernels read it as contiguous, whatever its strides."""
    rows, keys = launch.rows, launch.keys
    return Inputs(
        q[rows],
        k[keys],
        v[keys],
        None if out is None else out[rows],
        None if lse is None else lse[rows].transpose(1, 2).contiguous(),
        None if do is None else do[rows],
    )


def _holds(where: Where, arena: Tensor) -> bool:
    """Whether these are all rows and heads of an arena."""
    _, rows, heads = where
    return (rows.start, rows.stop, heads.start, heads.stop) == (0, arena.shape[1], 0, arena.shape[2])


def _are_apart(places: Iterable[Where]) -> bool:
    """Whether no two share a row of a head. Places of different heads count as apart only if their heads are disjoint."""
    ranges = sorted((heads.start, heads.stop, rows.start, rows.stop) for _, rows, heads in places)
    for (h0, h1, _, stop), (next_h0, next_h1, start, _) in itertools.pairwise(ranges):
        same_heads = (h0, h1) == (next_h0, next_h1)
        if (same_heads and start < stop) or (not same_heads and next_h0 < h1):
            return False
    return True
