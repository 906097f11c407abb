"""Softmax attention by the two fused GPU kernels that torch brings: FlashAttention 2 and cuDNN.

Both return the LSE and take the global one in the backward, where they recompute delta = Σ do∘out from the global out.
Partial results are bf16 or fp16; they are merged, and gradients are summed, in fp32.

flash   any clipped tile in one launch: its windows are aligned to the bottom right corner, which a clipped tile reaches,
        so a band is ``window_size_left, window_size_right ≥ 0``. [B, n, H, D], grouped KV heads.
cudnn   full and square causal pieces whose sizes are multiples of ``CUDNN_ALIGNMENT``; the rest goes to flash. cuDNN
        builds an execution plan, in tens of milliseconds, for every new shape, and documents come in every length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from distattn.kernels.protocol import Case, why_no_extras
from distattn.kernels.softmax.launched import Inputs, Launch, LaunchedBackend
from distattn.kernels.tiles import UNBOUNDED, Kind, Piece, decompose, head_spans, windows

CUDNN_ALIGNMENT = 128
MAX_FLASH_HEAD_DIM = 256
MAX_CUDNN_HEAD_DIM = 128


class FlashBackend(LaunchedBackend):
    """torch's FlashAttention 2 (``aten._flash_attention_forward``): bf16 and fp16, windows, grouped KV heads."""

    name = "flash"

    def why_not(self, case: Case) -> str | None:
        reason = _vendor_why_not(case)
        if reason is not None:
            return reason
        if not torch.backends.cuda.is_flash_attention_available():
            return "is not part of this build of torch"
        if max(case.head_dim, case.value_dim) > MAX_FLASH_HEAD_DIM:
            return f"takes head dimensions up to {MAX_FLASH_HEAD_DIM}, not {max(case.head_dim, case.value_dim)}"
        if case.deterministic and not _deterministic_mode():
            return "is deterministic only under torch.use_deterministic_algorithms(True)"
        return None

    def launches(self, tiles: np.ndarray, group: int) -> list[Launch]:
        """Whole tiles: flash does windows itself."""
        return _launches(windows(tiles), group)

    def prepare(self, *tensors: Tensor) -> list[Tensor]:
        return _equal_width(*tensors)

    def forward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        assert softcap is None
        return _flash_forward(x, cast(Piece, launch.detail), scale)

    def backward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
        assert softcap is None
        return _flash_backward(x, cast(Piece, launch.detail), scale)


class CudnnBackend(LaunchedBackend):
    """cuDNN's fused attention (``aten._scaled_dot_product_cudnn_attention``) where it is at home, flash elsewhere."""

    name = "cudnn"

    def why_not(self, case: Case) -> str | None:
        reason = _vendor_why_not(case)
        if reason is not None:
            return reason
        if not torch.backends.cudnn.is_available() or (torch.backends.cudnn.version() or 0) < 90000:
            return "needs cuDNN 9"
        if case.head_dim != case.value_dim or case.head_dim % 8 or case.head_dim > MAX_CUDNN_HEAD_DIM:
            return (
                f"takes equal head dimensions of q and v, a multiple of 8 up to {MAX_CUDNN_HEAD_DIM}, "
                f"not {case.head_dim} and {case.value_dim}"
            )
        if case.deterministic:
            return "has no deterministic backward"
        # The pieces that cuDNN is not given are computed by flash.
        return FLASH.why_not(case)

    def launches(self, tiles: np.ndarray, group: int) -> list[Launch]:
        """Full and square causal pieces; tiles with a lower bound stay whole, as windows for flash."""
        return _launches(decompose(tiles, block=None), group)

    def prepare(self, *tensors: Tensor) -> list[Tensor]:
        return _equal_width(*tensors)

    def forward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
        assert softcap is None
        piece = cast(Piece, launch.detail)
        return (_cudnn_forward if suits_cudnn(piece) else _flash_forward)(x, piece, scale)

    def backward(self, launch: Launch, x: Inputs, scale: float, softcap: float | None) -> tuple[Tensor, ...]:
        assert softcap is None
        piece = cast(Piece, launch.detail)
        return (_cudnn_backward if suits_cudnn(piece) else _flash_backward)(x, piece, scale)


FLASH = FlashBackend()


def _vendor_why_not(case: Case) -> str | None:
    """What rules out both kernels."""
    if case.device_type != "cuda":
        return f"runs on cuda, not on {case.device_type}"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bf16 and fp16, not {case.dtype}"
    if case.softcap:
        return "has no soft-cap in torch's build"
    if case.lse_gradient:
        return "recomputes delta from out, which leaves out the gradient that comes through the LSE"
    reason = why_no_extras(case)
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


def _deterministic_mode() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _launches(pieces: Sequence[Piece], group: int) -> list[Launch]:
    """One launch a piece, or more where its heads do not share their KV heads evenly."""
    return [Launch(p.q0, p.q1, p.k0, p.k1, *span, detail=p) for p in pieces for span in head_spans(p.h0, p.h1, p.shift, group)]


def suits_cudnn(piece: Piece) -> bool:
    aligned = (piece.q1 - piece.q0) % CUDNN_ALIGNMENT == 0 and (piece.k1 - piece.k0) % CUDNN_ALIGNMENT == 0
    return aligned and piece.kind != Kind.BAND


def _equal_width(*tensors: Tensor) -> list[Tensor]:
    """Zero columns up to one width, a multiple of 8, as flash asks; and a last dimension of stride 1."""
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    padded = [x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _window(piece: Piece) -> tuple[int, int]:
    """flash's (window_size_left, window_size_right) of a clipped piece; −1 is unbounded.

    flash sees key j from query i, both counted from the piece's corner, when
    −left ≤ j − i − (keys − queries) ≤ right.
    """
    corner = piece.k1 - piece.q1
    left = -1 if piece.lo <= -UNBOUNDED else corner - piece.lo
    right = -1 if piece.hi >= UNBOUNDED else piece.hi - corner
    return left, right


def _flash_forward(x: Inputs, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
    left, right = _window(piece)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        x.q, x.k, x.v, None, None, x.q.shape[1], x.k.shape[1], 0.0, False, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _flash_backward(x: Inputs, piece: Piece, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _window(piece)
    # The state of the random numbers is not read without dropout.
    state = torch.empty(2, dtype=torch.uint64, device=x.q.device)
    return torch.ops.aten._flash_attention_backward(
        x.do, x.q, x.k, x.v, x.out, x.lse, None, None, x.q.shape[1], x.k.shape[1], 0.0, False, state, state,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


def _cudnn_forward(x: Inputs, piece: Piece, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (y.transpose(1, 2) for y in x[:3])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, piece.kind == Kind.CAUSAL, False, scale=scale
    )
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _cudnn_backward(x: Inputs, piece: Piece, scale: float) -> tuple[Tensor, ...]:
    assert x.out is not None
    assert x.lse is not None
    assert x.do is not None
    q, k, v = (y.transpose(1, 2) for y in x[:3])
    # Contiguous before the transpose, so that both have the strides that cuDNN's plan is built for.
    out, do = (y.contiguous().transpose(1, 2) for y in (x.out, x.do))
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, out, x.lse.unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0,
        piece.kind == Kind.CAUSAL, scale=scale,
    )  # fmt: skip
    return tuple(gradient.transpose(1, 2) for gradient in gradients)
