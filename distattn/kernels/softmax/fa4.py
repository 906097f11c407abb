"""Softmax attention by FlashAttention-4 (the package flash-attn-4): bf16 and fp16, compute capability 9.0 and newer.

Its windows are aligned to the bottom right corner, as FlashAttention 2's, so a clipped tile is one launch. Neighbours of one
window, such as packed documents, go together into one launch with cumulative lengths. It returns the LSE and takes the global
one in the backward, where it computes delta = Σ do∘out from the global out. Partial results are bf16 or fp16; they are merged,
and gradients are summed, in fp32. Each kind of launch (full, causal, window; one piece or packed) is compiled at its first
use, for seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.protocol import TILE_COLUMNS, Case, why_no_extras
from distattn.kernels.softmax.launched import Inputs, Launch, LaunchedBackend
from distattn.kernels.tiles import UNBOUNDED, Piece, head_spans, windows

MODULE = "flash_attn.cute.interface"
INSTALL = "pip install 'distattn[fa4]'"
MAX_HEAD_DIM = 256
MAX_SHARED_WINDOWS = 8
"""Windows that are tried for each piece beside its own; masks have one or two, striped layouts one for every tile."""

# The functions that take a given LSE are no public part of the package, so a version may change them.
_WINDOW = {"softmax_scale", "causal", "softcap", "window_size_left", "window_size_right"}
_PACKED = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
_ARGUMENTS = {
    "_flash_attn_fwd": {"q", "k", "v", "return_lse"} | _WINDOW | _PACKED,
    "_flash_attn_bwd": {"q", "k", "v", "out", "dout", "lse", "dq", "dk", "dv"} | _WINDOW | _PACKED,
}


class Window(NamedTuple):
    """Key j is seen from query i, both counted from the corner, when −left ≤ j − i − (keys − queries) ≤ right; None is no
    bound."""

    left: int | None
    right: int | None


class Packed(NamedTuple):
    """Pieces of one window, one after another in rows and in keys.

    edges_q, edges_k: where each piece begins, counted from the first one's corner, and where the last one ends.
    """

    window: Window
    edges_q: tuple[int, ...]
    edges_k: tuple[int, ...]


class Fa4Backend(LaunchedBackend):
    """FlashAttention-4's kernels: soft-cap, windows, grouped KV heads, packed documents in one launch."""

    name = "fa4"

    def why_not(self, case: Case) -> str | None:
        if case.device_type != "cuda":
            return f"runs on cuda, not on {case.device_type}"
        if case.dtype not in (torch.bfloat16, torch.float16):
            return f"computes bf16 and fp16, not {case.dtype}"
        if case.lse_gradient:
            return "recomputes delta from out, which leaves out the gradient that comes through the LSE"
        if case.deterministic:
            return "adds up dq in no fixed order"
        if reason := why_no_extras(case):
            return reason
        if not torch.cuda.is_available():
            return "finds no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < (9, 0):
            return "needs a GPU of compute capability 9.0 or newer"
        widest = MAX_HEAD_DIM if capability < (10, 0) else 128
        if case.head_dim % 8 or case.value_dim % 8 or max(case.head_dim, case.value_dim) > widest:
            return f"takes head dimensions that are multiples of 8 up to {widest}, not {case.head_dim} and {case.value_dim}"
        return why_not_usable()

    def launches(self, tiles: np.ndarray, group: int) -> tuple[Launch, ...]:
        """Remembered, since layers and steps replay the same tables."""
        tiles = np.ascontiguousarray(tiles, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))
        return _launches(tiles.tobytes(), group)

    def forward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        function, settings = _interface()._flash_attn_fwd, _settings(launch, x.q.device, scale, softcap)
        if "cu_seqlens_q" not in settings:
            out, lse, *_ = function(x.q, x.k, x.v, return_lse=True, **settings)
            return out, lse
        found = [function(*entry, return_lse=True, **settings)[:2] for entry in zip(x.q, x.k, x.v)]
        out, lse = (_stacked(parts) for parts in zip(*found))
        return out, lse

    def backward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
        function, settings = _interface()._flash_attn_bwd, _settings(launch, x.q.device, scale, softcap)
        assert x.out is not None
        assert x.lse is not None
        assert x.do is not None
        given = (x.q, x.k, x.v, x.out, x.do, x.lse)
        if "cu_seqlens_q" not in settings:
            return function(*given, **settings)[:3]
        return tuple(_stacked(parts) for parts in zip(*(function(*entry, **settings)[:3] for entry in zip(*given))))

    def backward_into(
        self, launch: Launch, x: Inputs, into: Sequence[Tensor], scale: float, softcap: float | None
    ) -> None:  # fmt: skip
        function, settings = _interface()._flash_attn_bwd, _settings(launch, x.q.device, scale, softcap)
        assert x.out is not None
        assert x.lse is not None
        assert x.do is not None
        given = (x.q, x.k, x.v, x.out, x.do, x.lse, *into)
        for *entry, dq, dk, dv in [given] if "cu_seqlens_q" not in settings else zip(*given):
            function(*entry, dq=dq, dk=dk, dv=dv, **settings)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Batch entries as one tensor; packed rows have no batch dimension, so each entry was a call of its own."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(tuple(parts))


@lru_cache(maxsize=1024)
def _launches(table: bytes, group: int) -> tuple[Launch, ...]:
    found = []
    for window, chain in _chains(np.frombuffer(table, dtype=np.int64).reshape(-1, len(TILE_COLUMNS))):
        first, last = chain[0], chain[-1]
        edges_q, edges_k = (0, *(p.q1 - first.q0 for p in chain)), (0, *(p.k1 - first.k0 for p in chain))
        packed = Packed(window, edges_q, edges_k)
        found += [
            Launch(first.q0, last.q1, first.k0, last.k1, *span, detail=packed)
            for span in head_spans(first.h0, first.h1, first.shift, group)
        ]
    return tuple(found)


def chains(tiles: np.ndarray) -> list[list[Piece]]:
    """The pieces of each launch, of all its heads."""
    return [chain for _, chain in _chains(tiles)]


def _chains(tiles: np.ndarray) -> list[tuple[Window, list[Piece]]]:
    """Pieces of one window and the same heads that go on where the last one ended, in rows and in keys."""
    pieces = windows(tiles)
    own = Counter(_window(piece) for piece in pieces)
    shared = sorted((w for w, uses in own.items() if uses > 1), key=_tightest_first)[:MAX_SHARED_WINDOWS]
    found: list[tuple[Window, list[Piece]]] = []
    goes_on: tuple[object, ...] = ()
    for piece in sorted(pieces, key=lambda p: (*p[-3:], p.q0, p.k0)):
        window = next((w for w in shared if _fits(piece, w)), _window(piece))
        if goes_on == (window, piece[-3:], piece.q0, piece.k0):
            found[-1][1].append(piece)
        else:
            found.append((window, [piece]))
        goes_on = (window, piece[-3:], piece.q1, piece.k1)
    return found


def _window(piece: Piece) -> Window:
    corner = piece.k1 - piece.q1
    left = None if piece.lo <= -UNBOUNDED else corner - piece.lo
    right = None if piece.hi >= UNBOUNDED else piece.hi - corner
    return Window(left, right)


def _tightest_first(window: Window) -> list[int]:
    return [UNBOUNDED if bound is None else bound for bound in window]


def _fits(piece: Piece, window: Window) -> bool:
    """Whether the window hides from the piece what its own bounds do: a clipped piece lost those that hide nothing."""
    own = _window(piece)
    enough = (piece.k1 - piece.k0 - 1, piece.q1 - piece.q0 - 1)
    return all(
        mine == bound or (mine is None and bound is not None and bound >= least)
        for mine, bound, least in zip(own, window, enough)
    )


def _settings(launch: Launch, device: torch.device, scale: float, softcap: float | None) -> dict[str, Any]:
    """Arguments that the forward and the backward share."""
    x = cast(Packed, launch.detail)
    causal = x.window == Window(None, 0)
    left, right = (None, None) if causal else x.window
    settings: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "softcap": softcap or 0.0,
        "window_size_left": left,
        "window_size_right": right,
    }
    if len(x.edges_q) > 2:
        for side, edges in (("q", x.edges_q), ("k", x.edges_k)):
            settings[f"cu_seqlens_{side}"] = _on_device(edges, device)
            settings[f"max_seqlen_{side}"] = int(np.diff(edges).max())
    return settings


@lru_cache(maxsize=1024)
def _on_device(edges: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(edges, dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
def why_not_usable() -> str | None:
    """Why the package cannot be used here, as half a sentence; imports it, which takes seconds, once."""
    try:
        found = importlib.util.find_spec("flash_attn") and importlib.util.find_spec(MODULE)
        module = _interface() if found else None
    except Exception as error:  # whatever a package raises that finds another one of a version it cannot use
        return f"needs a working flash-attn-4, whose import fails ({type(error).__name__}: {error}): {INSTALL}"
    if module is None:
        return f"needs the package flash-attn-4: {INSTALL}"
    for function, arguments in _ARGUMENTS.items():
        missing = arguments - set(inspect.signature(getattr(module, function, str)).parameters)
        if missing:
            return f"finds a flash-attn-4 whose {function} takes no {', '.join(sorted(missing))}: {INSTALL}"
    return None


@lru_cache(maxsize=1)
def _interface() -> Any:
    return importlib.import_module(MODULE)
