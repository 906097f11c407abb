"""Cross-entropy over a shard of tokens whose full logits never exist.

for each chunk of tokens:  z = hidden Wᵀ (fp32);  loss += Σ logsumexp(z) − z[label];  dz = softmax(z) − onehot(label)
                           dhidden = dz W;  dW += dzᵀ hidden

The gradients are formed in the forward, where the chunk's logits are at hand, and scaled in the backward: nothing is
computed twice. Memory: one chunk of logits, dhidden in hidden's dtype and dW in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distattn.errors import InputError


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = 1024, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy (nats) and the number of tokens that it sums over.

    hidden [..., dim]; weight [vocab, dim], same dtype; labels [...] int64, in [0, vocab) or ignore_index. An empty
    shard, or one whose labels are all ignored, gives 0 and 0 with zero gradients.

    Returns (loss_sum 0-d fp32, fp64 for fp64 inputs; num_tokens 0-d int64, not differentiable). Divide by the global
    number of tokens, not the local one: then the loss does not depend on how the batch was sharded. Not twice
    differentiable. Raises InputError for shapes or dtypes that do not fit.
    """
    _check(hidden, weight, labels, chunk_tokens)
    loss_sum, num_tokens = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), chunk_tokens, ignore_index
    )
    return loss_sum, num_tokens


@torch.no_grad()
def per_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = 1024, ignore_index: int = -100
) -> Tensor:
    """Cross-entropy (nats) of each token, shape of labels, fp32 (fp64 for fp64 inputs), 0 where ignored. No gradient.

    Arguments and errors as for ``chunked_cross_entropy``.
    """
    _check(hidden, weight, labels, chunk_tokens)
    flat = labels.reshape(-1)
    losses = torch.zeros(flat.shape, dtype=_logit_dtype(hidden), device=hidden.device)
    for rows, logits in _logit_chunks(hidden.reshape(-1, hidden.shape[-1]), weight, chunk_tokens):
        keep = flat[rows] != ignore_index
        losses[rows] = _chunk_losses(logits, flat[rows], keep)[0]
    return losses.reshape(labels.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        accumulate = _logit_dtype(hidden)
        loss_sum = torch.zeros((), dtype=accumulate, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        for rows, logits in _logit_chunks(hidden, weight, chunk_tokens):
            keep = labels[rows] != ignore_index
            losses, lse = _chunk_losses(logits, labels[rows], keep)
            loss_sum += losses.sum()
            if not (needs_hidden or needs_weight):
                continue
            d_logits = _logit_gradient(logits, lse, labels[rows], keep).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += _matmul(d_logits.t(), hidden[rows])
        ctx.save_for_backward(*(grad for grad in (d_hidden, d_weight) if grad is not None))
        ctx.needs = needs_hidden, needs_weight
        ctx.weight_dtype = weight.dtype
        num_tokens = (labels != ignore_index).sum()
        ctx.mark_non_differentiable(num_tokens)
        return loss_sum, num_tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scale = grads[0]
        saved = list(ctx.saved_tensors)
        needs_hidden, needs_weight = ctx.needs
        d_hidden = saved.pop(0) if needs_hidden else None
        d_weight = saved.pop(0) if needs_weight else None
        return (
            None if d_hidden is None else (d_hidden * scale).to(d_hidden.dtype),
            None if d_weight is None else (d_weight * scale).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _logit_chunks(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, hidden.shape[0]))
        yield rows, _matmul(hidden[rows], weight.t())


def _chunk_losses(logits: Tensor, labels: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row of the chunk (0 where not kept) and its logsumexp, both [chunk]."""
    lse = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(1, labels.where(keep, 0)[:, None]).squeeze(1)
    return (lse - chosen).where(keep, 0.0), lse


def _logit_gradient(logits: Tensor, lse: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    """softmax − onehot, 0 in rows that are not kept; overwrites the logits."""
    gradient = logits.sub_(lse[:, None]).exp_()
    gradient.scatter_add_(1, labels.where(keep, 0)[:, None], gradient.new_full((1, 1), -1.0).expand(len(labels), 1))
    return gradient.mul_(keep[:, None])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 (fp64 for fp64): half-precision operands are never rounded again on the way out."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _logit_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> None:
    if hidden.shape[:-1] != labels.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)}, but they "
            "must be [..., dim], [vocab, dim] and [...]."
        )
    if hidden.dtype != weight.dtype:
        raise InputError(f"hidden is {hidden.dtype} and weight {weight.dtype}, but they must have the same dtype.")
    if labels.dtype != torch.int64:
        raise InputError(f"labels are {labels.dtype}, but they must be torch.int64.")
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens is {chunk_tokens}, but it must be at least 1.")
