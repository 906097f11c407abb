"""What the passes of both families share: a stream beside the current one, sets of pieces on the device, counters."""

from __future__ import annotations

import weakref
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distattn.kernels.linear.protocol import Pieces


class Beside:
    """A stream beside the current one, on devices that have streams: what is launched in the context follows what was launched
    before it, and what comes after ``join`` follows both. number: tells streams of one device apart."""

    def __init__(self, device: torch.device, number: int = 0) -> None:
        self._stream = _side_stream(device, number) if device.type == "cuda" else None
        self._device, self._marked = device, False

    def mark(self) -> None:
        """The next context follows what was launched up to here, and nothing that is launched from here to there."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._marked = True

    def __enter__(self) -> None:
        if not self._marked:
            self.mark()
        self._marked = False
        if self._stream is not None:
            self._context = torch.cuda.stream(self._stream)
            self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._context.__exit__(*error)

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@lru_cache(maxsize=64)
def _side_stream(device: torch.device, _: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


_indices: weakref.WeakKeyDictionary[Pieces, dict[tuple[str, torch.device], Tensor]] = weakref.WeakKeyDictionary()


def index_on(device: torch.device, pieces: Pieces, name: str, values: np.ndarray) -> Tensor:
    """Host indices on the device, uploaded once; name: tells them apart."""
    known = _indices.setdefault(pieces, {})
    if (name, device) not in known:
        known[name, device] = torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(device)
    return known[name, device]


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, number: int) -> Tensor:
    """At least so many zeros, int32, for kernels that leave them zeros.

    The same for all calls of a stream, which follow one another; a graph being captured has its own, since its replays may run
    beside calls of any stream.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(number, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters or len(_counters[key]) < number:
        _counters[key] = torch.zeros(max(number, 1024), dtype=torch.int32, device=device)
    return _counters[key]
