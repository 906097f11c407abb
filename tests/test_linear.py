"""One process: ``linear_attention`` refuses what it cannot do, says what it chose, and works under torch.compile."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import distattn
from distattn.errors import InputError, PlanError, UnsupportedError
from distattn.kernels.linear import recurrent
from distattn.parallel.exchanges.all_scan import AllScanOptions
from distattn.parallel.layout import Layout
from tests.kernels.linear_cases import make_operands

X = make_operands("gla", "vector", 2, 6)
SCALAR = make_operands("gated_delta", "scalar", 2, 6)


def call(**changes: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    arguments: dict[str, Any] = {"q": X.q, "k": X.k, "v": X.v, "kind": "gla", "decay": X.g} | changes
    return distattn.linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (UnsupportedError, {"kind": "mamba"}, "kind='mamba' is unknown; it may be linear, lightning, "),
        (UnsupportedError, {"kernel": "cuda"}, "kernel='cuda' is unknown; it may be auto, "),
        (InputError, {"k": X.k[:, :5]}, r"q and k must have shape \[B, T, H, K\] and v \[B, T, HV, V\]; got "),
        (InputError, {"v": X.v.float()}, "v is torch.float32 on cpu; q, k and v must share a device and one of "),
        (InputError, {"q": X.q.int(), "k": X.k.int(), "v": X.v.int()}, "q is torch.int32"),
        (InputError, {"v": X.v[:, :, :1]}, "the heads of v must be a multiple of those of q and k"),
        (InputError, {"decay": None}, r"decay of kind='gla' must be \[B, T, HV, K\] with .* got None"),
        (InputError, {"kind": "linear"}, r"decay of kind='linear' must be None with .* got \[2, 6, 2, 4\]"),
        (InputError, {"kind": "gated_delta", "decay": SCALAR.g}, r"kind='gated_delta' needs beta \[B, T, HV\]"),
        (InputError, {"beta": SCALAR.beta}, "kind='gla' takes no beta"),
        (InputError, {"kind": "kda", "beta": X.g}, r"beta must have shape \[2, 6, 2\], got \[2, 6, 2, 4\]"),
        (InputError, {"cu_seqlens": [1, 6]}, "cu_seqlens must be one-dimensional, begin with 0 and never decrease"),
        (InputError, {"cu_seqlens": [0, 7]}, "rank 0 passed 6 rows, the contiguous layout gives it 7 of 7: pass the layout"),
        (InputError, {"layout": Layout.contiguous(6, 2)}, "layout is for 2 ranks, the group has 1"),
        (InputError, {"layout": Layout.contiguous(6, 1), "cu_seqlens": [0, 5]}, "cu_seqlens ends at 5, but the layout has 6"),
        (InputError, {"initial_state": torch.zeros(1, 2, 4, 3)}, r"initial_state must be floating, .* \[2, 2, 4, 3\]"),
        (PlanError, {"exchange": "ring"}, "exchange='ring' is unknown; it may be auto, serial, "),
        (PlanError, {"options": AllScanOptions()}, "options belong to one exchange: name it"),
        (PlanError, {"exchange": "serial", "options": AllScanOptions()}, "options of serial must be SerialOptions, got All"),
    ],
)  # fmt: skip
def test_refusals(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_step_refuses_several_tokens() -> None:
    with pytest.raises(InputError, match="a step takes one token, q has 6: use linear_attention with initial_state"):
        distattn.linear_attention_step(X.q, X.k, X.v, None, kind="gla", decay=X.g)


def test_step_goes_on_from_a_final_state() -> None:
    want, final = call(output_final_state=True)
    assert X.g is not None
    first = [t[:, :5] for t in (X.q, X.k, X.v, X.g)]
    _, state = distattn.linear_attention(*first[:3], kind="gla", decay=first[3], output_final_state=True)
    q, k, v, g = (t[:, 5:] for t in (X.q, X.k, X.v, X.g))
    o, state = distattn.linear_attention_step(q, k, v, state, kind="gla", decay=g)
    torch.testing.assert_close(o, want[:, 5:])
    torch.testing.assert_close(state, final)


def test_retention_has_a_default_decay() -> None:
    decay = torch.log1p(-torch.exp2(-5 - torch.arange(2.0, dtype=torch.float64)))
    found, _ = call(kind="retention", decay=None)
    want, _ = recurrent(X._replace(g=decay), [6])
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)


def test_mamba2_is_simple_gla() -> None:
    """h_t = e^{Δ_t A} h_{t−1} + Δ_t B_t x_tᵀ, y_t = C_t h_t (arXiv 2405.21060), B and C shared by the heads."""
    r = torch.Generator().manual_seed(5)
    groups, heads, state_dim, head_dim = 1, 3, 4, 5
    B, C = (torch.randn((2, 7, groups, state_dim), generator=r, dtype=torch.float64) for _ in range(2))
    x = torch.randn((2, 7, heads, head_dim), generator=r, dtype=torch.float64)
    step_size = torch.rand((2, 7, heads), generator=r, dtype=torch.float64)
    A = -torch.rand(heads, generator=r, dtype=torch.float64)
    h, want = torch.zeros((2, heads, state_dim, head_dim), dtype=torch.float64), []
    for t in range(7):
        written = B[:, t, :, :, None] * (step_size[:, t, :, None] * x[:, t])[:, :, None]
        h = (step_size[:, t] * A).exp()[..., None, None] * h + written
        want.append((C[:, t, :, :, None] * h).sum(2))
    y, _ = distattn.linear_attention(C, B, step_size[..., None] * x, kind="simple_gla", decay=A * step_size, scale=1.0)
    torch.testing.assert_close(y, torch.stack(want, 1), atol=1e-12, rtol=0)


def test_documents_as_tensor_list_or_array() -> None:
    starts = torch.tensor([0, 2, 6])
    want, _ = call(cu_seqlens=[0, 2, 6])
    assert torch.equal(call(cu_seqlens=starts)[0], want)
    starts[1] = 3  # a tensor that changes in place is read again
    assert torch.equal(call(cu_seqlens=starts)[0], call(cu_seqlens=[0, 3, 6])[0])
    assert not torch.equal(call(cu_seqlens=starts)[0], want)


def test_the_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="distattn.linear_planning"):
        for _ in range(2):
            call(cu_seqlens=[0, 1, 4, 6], scale=0.7)
    assert len(caplog.records) == 1
    text = caplog.text
    for part in ("operator   gla, gate vector, boundary diagonal", "exchange   serial (no document crosses ranks)"):
        assert part in text
    assert "kernel     torch (" in text


def test_half_precision_keeps_its_dtypes() -> None:
    q, k, v = (t.bfloat16().requires_grad_() for t in (X.q, X.k, X.v))
    assert X.g is not None
    g = X.g.float().requires_grad_()
    o, state = call(q=q, k=k, v=v, decay=g, output_final_state=True)
    assert state is not None
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    o.float().sum().backward()
    assert [t.grad.dtype for t in (q, k, v, g) if t.grad is not None] == [torch.bfloat16] * 3 + [torch.float32]
    torch.testing.assert_close(o.double(), call()[0], atol=0.05, rtol=0.05)


def test_a_decay_that_asks_for_no_gradient_gets_none() -> None:
    assert X.g is not None
    found = []
    for wanted in (True, False):
        q, k, v, g = (t.clone().requires_grad_() for t in (X.q, X.k, X.v, X.g))
        call(q=q, k=k, v=v, decay=g if wanted else g.detach())[0].sum().backward()
        found.append([t.grad for t in (q, k, v)])
        assert (g.grad is not None) == wanted
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Dynamo looks at .grad of non-leaves where the graph breaks (torch 2.11 to 2.13).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, _ = distattn.linear_attention(q * 2, k, v, kind="gla", decay=X.g)
        return o.sin()

    leaves = [[t.clone().requires_grad_() for t in (X.q, X.k, X.v)] for _ in range(2)]
    want = layer(*leaves[0])
    found = torch.compile(layer, backend="aot_eager")(*leaves[1])
    want.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(found, want)
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
