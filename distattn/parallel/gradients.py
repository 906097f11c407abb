"""What the backward starts from, besides the gradient that it is given."""

from __future__ import annotations

from torch import Tensor

from distattn.kernels.merge import accumulation_dtype


def output_gradient_sums(out: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    """delta = Σ do∘out − dlse in fp32 (fp64): [B, S, H] from out, do [B, S, H, Dv] and dlse [B, S, H]."""
    dtype = accumulation_dtype(out.dtype)
    delta = (do.to(dtype) * out.to(dtype)).sum(-1)
    return delta if dlse is None else delta - dlse.to(dtype)
