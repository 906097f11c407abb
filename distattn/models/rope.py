"""Rotary position embedding (arXiv 2104.09864) in the half-split convention of Llama checkpoints, and its scalings.

rotate(x, position):  (x1, x2) = halves of x [D];  angle = position · frequency [D/2]
                      (x1 cos − x2 sin, x2 cos + x1 sin)

Frequencies and angles are fp64 and cos, sin fp32: at position 1,000,000 a bf16 angle would be off by thousands of
radians and an fp32 one by 0.06.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distattn.models.config import RopeConfig


class Rotation:
    """cos and sin of every local token, ``[B or 1, T, 1, D/2]``, fp32 (fp64 for an fp64 model).

    A plain class: FSDP2's mixed precision casts every tensor that it finds in the tuples and dataclasses that a block
    is called with, and would round these to bf16.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per token of each pair of dimensions, fp64 ``[head_dim / 2]``, after scaling.

    none         θ^(−2i/D)
    linear       position interpolation (arXiv 2306.15595): all divided by factor
    dynamic_ntk  θ grows to θ · (factor · L/L₀ − (factor − 1))^(D/(D−2)), where L = max(seq_len, L₀), L₀ = original_seq_len
    yarn         "NTK by parts" (arXiv 2309.00071, §3.2): pairs that turn more than beta_fast times within L₀ are kept,
                 those below beta_slow are divided by factor, a ramp between; the ramp is linear in the pair's index, with
                 its ends rounded outwards, as in the paper's code and in the checkpoints made with it
    llama3       (Llama 3.1) wavelengths below L₀/high_freq_factor are kept, those above L₀/low_freq_factor divided by
                 factor, in between a mixture linear in L₀/wavelength
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = config.theta**-exponent
    if config.scaling == "linear":
        return plain / config.factor
    if config.scaling == "dynamic_ntk":
        stretch = max(config.seq_len, config.original_seq_len) / config.original_seq_len
        growth = config.factor * stretch - (config.factor - 1)
        return (config.theta * growth ** (head_dim / (head_dim - 2))) ** -exponent
    if config.scaling == "yarn":
        low, high = _yarn_ramp(config, head_dim)
        interpolated = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
        return plain * (1 - interpolated) + plain / config.factor * interpolated
    if config.scaling == "llama3":
        turns = config.original_seq_len * plain / (2 * math.pi)
        span = config.high_freq_factor - config.low_freq_factor
        kept = np.clip((turns - config.low_freq_factor) / span, 0, 1)
        return plain * kept + plain / config.factor * (1 - kept)
    return plain


def rope_amplitude(config: RopeConfig) -> float:
    """What cos and sin are multiplied by: YaRN's attention temperature (both q and k carry it), else 1."""
    if config.scaling != "yarn":
        return 1.0
    return config.attention_factor if config.attention_factor > 0 else 0.1 * math.log(config.factor) + 1.0


def make_rotation(config: RopeConfig, head_dim: int, positions: Tensor, dtype: torch.dtype) -> Rotation:
    """Rotation for int64 ``positions`` ``[T]`` or ``[B, T]`` (relative to their document); fp64 if dtype is, else fp32."""
    frequencies = torch.from_numpy(rope_frequencies(config, head_dim)).to(positions.device)
    angles = (positions.to(torch.float64)[..., None] * frequencies)[..., None, :]
    angles = angles if positions.dim() == 2 else angles[None]
    amplitude = rope_amplitude(config)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    return Rotation((angles.cos() * amplitude).to(result), (angles.sin() * amplitude).to(result))


def apply_rotation(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate ``x`` ``[B, T, H, D]`` in fp32 (fp64 for fp64) and return it in its own dtype. Saves only cos and sin."""
    rotated = _Rotate.apply(x, rotation.cos, rotation.sin)
    assert isinstance(rotated, Tensor)
    return rotated


class _Rotate(torch.autograd.Function):
    """The rotation is orthogonal (up to the amplitude), so its backward is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


def _yarn_ramp(config: RopeConfig, head_dim: int) -> tuple[float, float]:
    """Pair indices where interpolation begins and where it is complete."""

    def index_of(turns: float) -> float:
        wavelength = config.original_seq_len / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(index_of(config.beta_fast)), 0)
    high = min(math.ceil(index_of(config.beta_slow)), head_dim - 1)
    # The reference code opens a ramp of width zero by the same 0.001.
    return low, high if high != low else high + 0.001
