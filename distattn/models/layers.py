"""What the decoder's layers share: the stream that they run over, the norm, and weights that are drawn later."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distattn.models.rope import Rotation
from distattn.planning import Plan


class StreamInfo:
    """What each block needs to know of the token stream besides the hidden states.

    documents: cu_seqlens of the whole stream, int64 [D+1], where there are linear layers. segments: attention inside the
    segments of titans_mac layers, where there are some. A plain class: FSDP2 rebuilds the dataclasses that a block is called
    with, tensor by tensor, and a plan is not to be rebuilt.
    """

    __slots__ = ("documents", "plan", "rotation", "segments")

    def __init__(self, plan: Plan, rotation: Rotation, documents: np.ndarray | None, segments: Plan | None = None) -> None:
        self.plan = plan
        self.rotation = rotation
        self.documents = documents
        self.segments = segments


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467), in fp32 for half-precision x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def widen(x: Tensor) -> Tensor:
    """fp32, or fp64 as it is: for gates and norms."""
    return x if x.dtype == torch.float64 else x.float()


def bare_linear(inputs: int, outputs: int) -> nn.Linear:
    """Without bias, left uninitialised: ``Decoder.init_weights`` draws all weights."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=torch.get_default_device())
    assert isinstance(layer, nn.Linear)
    return layer
