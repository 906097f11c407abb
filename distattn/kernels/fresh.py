"""Tiles into carries and gradients that nothing was added to yet: what can be written need not be cleared, read and added to.

A vendor kernel's partial result comes in the input dtype anyway, so that taking it over loses nothing. Other backends add to
sums, which are cleared here for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from distattn.kernels.merge import merge_partial
from distattn.kernels.protocol import Backend, Carry
from distattn.kernels.selection import SplitBackend
from distattn.kernels.softmax.launched import Launch, LaunchedBackend


def clear_carry(carry: Carry) -> None:
    """Rows that have seen nothing."""
    for x, value in zip(carry, (0.0, float("-inf"), 0.0)):
        x.fill_(value)


def attend_fresh(backend: Backend, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, carry: Carry, **settings: Any) -> None:
    """``backend.attend`` into a carry of any content, of which nothing is left."""
    forward = backend.forward if isinstance(backend, SplitBackend) else backend
    if isinstance(forward, LaunchedBackend) and forward.writes_rows_once(tiles, settings["group"]):
        out, lse = forward.attend_whole(q, k, v, tiles, **settings)
        merge_partial(carry, out, lse.to(carry.m.dtype), fresh=True, all_seen=True)
        return
    clear_carry(carry)
    backend.attend(q, k, v, tiles, carry, **settings)


def results_of_launches(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, tiles: np.ndarray, *, whole: bool, **settings: Any
) -> Iterator[tuple[Launch, Tensor, Tensor]] | None:
    """Out and lse of each launch, in the input dtype, of a backend that works in launches; None of other backends.

    whole: None, too, unless one launch has all rows; else unless no two share one.
    """
    forward = backend.forward if isinstance(backend, SplitBackend) else backend
    if not isinstance(forward, LaunchedBackend):
        return None
    group = settings["group"]
    fits = forward.writes_all_rows(q, tiles, group) if whole else forward.writes_rows_once(tiles, group)
    return forward.each_result(q, k, v, tiles, **settings) if fits else None


def whole_gradients(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, tiles: np.ndarray,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """What these tiles alone give dq, dk and dv, in the input dtype, from a backend that has it so in one launch; else None."""
    backward = backend.backward if isinstance(backend, SplitBackend) else backend
    if isinstance(backward, LaunchedBackend) and out is not None and backward.fills(q, k, tiles, settings["group"]):
        return backward.attend_backward_whole(q, k, v, out, lse, do, None, tiles, **settings)
    return None


def gives_input_dtype(backend: Backend) -> bool:
    """Whether the backend's gradients come in the input dtype, so that sums of one of them lose nothing in it."""
    return isinstance(backend.backward if isinstance(backend, SplitBackend) else backend, LaunchedBackend)


def gradients_of_launches(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, tiles: np.ndarray,
    **settings: Any,
) -> Iterator[tuple[Launch, tuple[Tensor, ...]]] | None:  # fmt: skip
    """What each launch of a backend that works in launches gives dq, dk and dv, in the input dtype; None of other backends."""
    backward = backend.backward if isinstance(backend, SplitBackend) else backend
    if isinstance(backward, LaunchedBackend) and out is not None:
        return backward.each_gradient(q, k, v, out, lse, do, tiles, **settings)
    return None


def launches_of_heads(
    backend: Backend, q: Tensor, k: Tensor, tiles: np.ndarray, *, group: int, taken: Sequence[slice]
) -> tuple[LaunchedBackend, Sequence[Launch]] | None:
    """The backward's backend and launches, where each of them takes all rows and keys, of KV heads of its own that are not
    ``taken`` either; else None."""
    backward = backend.backward if isinstance(backend, SplitBackend) else backend
    if not isinstance(backward, LaunchedBackend):
        return None
    launches = backward.launches(tiles, group)
    everything = (0, q.shape[1], 0, k.shape[1])
    if not launches or any((x.q0, x.q1, x.k0, x.k1) != everything for x in launches):
        return None
    heads = sorted([(x.kv0, x.kv1) for x in launches] + [(x.start, x.stop) for x in taken])
    if any(stop > start for (_, stop), (start, _) in itertools.pairwise(heads)):
        return None
    return backward, launches


def attend_backward_fresh(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor, do: Tensor, delta: Tensor,
    tiles: np.ndarray, sums: tuple[Tensor, Tensor, Tensor], fresh: tuple[bool, bool, bool], **settings: Any,
) -> None:  # fmt: skip
    """``backend.attend_backward`` into (dq, dk, dv), where of those that are ``fresh`` no content is left."""
    gradients = whole_gradients(backend, q, k, v, out, lse, do, tiles, **settings)
    if gradients is not None:
        for into, gradient, new in zip(sums, gradients, fresh):
            into.copy_(gradient) if new else into.add_(gradient)
        return
    for into, new in zip(sums, fresh):
        if new:
            into.zero_()
    backend.attend_backward(q, k, v, out, lse, do, delta, tiles, *sums, **settings)
