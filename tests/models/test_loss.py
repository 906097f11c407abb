"""Chunked cross-entropy against F.cross_entropy, with gradients and a count of what is alive. No torch.distributed."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distattn.errors import InputError
from distattn.models.loss import chunked_cross_entropy, per_token_loss


def example(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(1, tokens, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(37, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 37, (1, tokens), generator=generator)
    labels[:, ::5] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (23, 4), (23, 1), (24, 4), (23, 1000)])
def test_equals_cross_entropy_with_gradients(tokens: int, chunk: int) -> None:
    hidden, weight, labels = example(tokens)
    loss, count = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    reference = plain(hidden, weight, labels)
    assert loss.shape == count.shape == ()
    assert count.dtype == torch.int64
    assert count.item() == (labels != -100).sum()
    torch.testing.assert_close(loss, reference)
    got = torch.autograd.grad(loss * 0.3, (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad(reference * 0.3, (hidden, weight)))


def test_gradcheck() -> None:
    hidden, weight, labels = example(7)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, chunk_tokens=3)[0], (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed(frozen: str) -> None:
    hidden, weight, labels = example(9)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    needed = weight if frozen == "hidden" else hidden
    (got,) = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)[0], needed)
    (reference,) = torch.autograd.grad(plain(hidden, weight, labels), needed)
    torch.testing.assert_close(got, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_summed_in_fp32(dtype: torch.dtype) -> None:
    hidden, weight, labels = example(500, dtype)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=64)
    loss.backward()
    assert loss.dtype == torch.float32
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    reference = plain(exact_hidden, exact_weight, labels)
    reference.backward()
    # The operands are the same numbers, so only gradients, stored in dtype, may be off by its rounding.
    torch.testing.assert_close(loss.double(), reference, rtol=1e-6, atol=0)
    for got, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert got.grad is not None
        assert exact.grad is not None
        assert got.grad.dtype == dtype
        rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 5e-2)
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=rtol, atol=atol)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss, _ = chunked_cross_entropy(hidden, torch.eye(2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, -1.0]]))


@pytest.mark.parametrize("tokens", [0, 6], ids=["no-tokens", "all-ignored"])
def test_empty_shards(tokens: int) -> None:
    hidden = torch.randn(1, tokens, 12, requires_grad=True)
    weight = torch.randn(37, 12, requires_grad=True)
    labels = torch.full((1, tokens), -100)
    loss, count = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4)
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_per_token_loss_sums_to_the_loss() -> None:
    hidden, weight, labels = example(23)
    losses = per_token_loss(hidden, weight, labels, chunk_tokens=4)
    assert losses.shape == labels.shape
    assert not losses.requires_grad
    assert not losses[labels == -100].any()
    reference = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), reference.detach())


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_full_logits_never_exist() -> None:
    tokens, vocab, dim, chunk = 256, 500, 8, 16
    hidden = torch.randn(1, tokens, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    labels = torch.randint(0, vocab, (1, tokens))
    with LargestTensor() as largest:
        loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
        loss.backward()
        per_token_loss(hidden, weight, labels, chunk_tokens=chunk)
    assert largest.elements == max(chunk * vocab, vocab * dim)


def test_refusals() -> None:
    hidden, weight, labels = example(4)
    with pytest.raises(InputError, match=r"must be \[\.\.\., dim\], \[vocab, dim\] and \[\.\.\.\]"):
        chunked_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(InputError, match="must have the same dtype"):
        chunked_cross_entropy(hidden.float(), weight, labels)
    with pytest.raises(InputError, match=r"labels are torch\.int32, but they must be torch\.int64"):
        per_token_loss(hidden, weight, labels.int())
    with pytest.raises(InputError, match="chunk_tokens is 0"):
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=0)
