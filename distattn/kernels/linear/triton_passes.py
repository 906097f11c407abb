"""What the passes of both families share: a stream beside the current one, and sets of pieces on the device."""

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
