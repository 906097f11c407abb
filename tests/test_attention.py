"""One rank, no torch.distributed: options of ``attention`` against dense autograd in fp64, bad input, compile, phases."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distattn.attention import (
    attention,
    attention_begin,
    attention_compute,
    attention_finish,
    checkpoint_contexts,
)
from distattn.errors import InputError
from distattn.mask import Mask
from distattn.planning import Plan, plan
from tests.parallel.cases import inputs

HEADS, KV_HEADS, WIDTH = 4, 2, 4
# The first rows and one in the middle see nothing.
MASK = Mask.sliding_window(13, 5, 1) & (Mask.from_bands([(2, 6, 0, 13, -99, 99), (7, 13, 0, 13, -99, 99)], 13, 13))


def make_plan(mask: Mask = MASK, **changes: Any) -> Plan:
    shape: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "kernel": "reference"}
    return plan(mask, **{**shape, **changes})


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, sink: Tensor | None, softcap: float | None,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse by plain differentiable torch; the sink is one more key of value 0."""
    group = q.shape[2] // k.shape[2]
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    if key_bias is not None:
        bias = key_bias if key_bias.ndim == 3 else key_bias[None, :, None].expand(k.shape[:3])
        scores = scores + bias.repeat_interleave(group, 2).permute(0, 2, 1)[:, :, None]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = torch.from_numpy(mask.dense())
    scores = scores.masked_fill(~allowed, -1e30)
    columns = scores if sink is None else torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(columns, -1)[..., : k.shape[1]].masked_fill(~allowed, 0.0)
    lse = torch.logsumexp(columns, -1)
    lse = torch.where(lse < -1e29, float("-inf"), lse)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values), lse.transpose(1, 2)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("bias", [None, "row", "full"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sink", [False, True], ids=["no_sink", "sink"])
@pytest.mark.parametrize("use_lse", [False, True], ids=["out", "lse"])
def test_options_and_their_gradients(
    split: bool, bias: str | None, softcap: float | None, with_sink: bool, use_lse: bool
) -> None:
    q, k, v, do = inputs(13, HEADS, KV_HEADS, WIDTH, 6, batch=2)
    sink = torch.linspace(-1, 2, HEADS).double() if with_sink else None
    key_bias = {None: None, "row": torch.randn(13).double(), "full": torch.randn(2, 13, KV_HEADS).double()}[bias]
    made = make_plan(value_dim=6)
    got_in, want_in = leaves(q, k, v, sink, key_bias), leaves(q, k, v, sink, key_bias)
    options: dict[str, Any] = {"scale": 0.7, "sink": got_in[3], "softcap": softcap, "key_bias": got_in[4]}
    if split:
        handle = attention_begin(*got_in[:3], made, return_lse=True, **options)  # type: ignore[arg-type]
        attention_compute(handle)
        result = attention_finish(handle)
    else:
        result = attention(*got_in[:3], made, return_lse=True, **options)  # type: ignore[arg-type]
    want, want_lse = dense(*want_in[:3], MASK, 0.7, want_in[3], softcap, want_in[4])  # type: ignore[arg-type]
    got, got_lse = result
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    torch.testing.assert_close(got_lse, want_lse, atol=1e-10, rtol=0)
    for out, lse in ((got, got_lse), (want, want_lse)):
        loss = (out * do).sum()
        if use_lse:
            loss = loss + torch.where(lse.isinf(), 0.0, lse).square().sum()
        loss.backward()
    for x, y in zip(got_in, want_in, strict=True):
        if x is not None and y is not None:
            torch.testing.assert_close(x.grad, y.grad, atol=1e-10, rtol=0)


def test_rows_that_see_nothing() -> None:
    q, k, v, do = leaves(*inputs(13, HEADS, KV_HEADS, WIDTH))
    sink = torch.zeros(HEADS, dtype=torch.double, requires_grad=True)
    assert q is not None
    assert do is not None
    out, lse = attention(q, k, v, make_plan(), sink=sink, return_lse=True)  # type: ignore[arg-type, misc]
    assert (out[:, [0, 1, 6]] == 0).all()
    assert (lse[:, [0, 1, 6]] == 0).all(), "only the sink's logit, 0, is left"
    (out * do).sum().backward()
    assert (q.grad[:, [0, 1, 6]] == 0).all()  # type: ignore[index]
    assert sink.grad is not None
    assert sink.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_key_bias_keeps_its_precision_in_16_bits(dtype: torch.dtype) -> None:
    q, k, v, _ = (x.to(dtype) for x in inputs(13, HEADS, KV_HEADS, WIDTH))
    bias = torch.linspace(-9, 9, 13) + 0.001
    out = attention(q, k, v, make_plan(Mask.full(13, 13)), key_bias=bias)
    want, _ = dense(q.double(), k.double(), v.double(), Mask.full(13, 13), WIDTH**-0.5, None, None, bias.double())
    # A bias rounded to bf16 is off by up to 0.03 and would fail; what is left is one rounding of the result.
    torch.testing.assert_close(out.double(), want, atol=8e-3 if dtype == torch.bfloat16 else 1e-3, rtol=4e-3)


def test_non_contiguous_inputs_and_dtypes() -> None:
    q, k, v, _ = inputs(13, HEADS, KV_HEADS, WIDTH)
    made = make_plan()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(attention(*strided, made), attention(q, k, v, made))  # type: ignore[arg-type]
    out, lse = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), made, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


GOOD = [torch.zeros(1, 13, h, WIDTH) for h in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": GOOD[0][:, :5]}, r"q must have shape \[B, 13, 4, 4\].*got \[1, 5, 4, 4\]"),
        ({"q": GOOD[0][0]}, "q must have shape"),
        ({"k": GOOD[0]}, r"k must have shape \[1, 13, 2, 4\]"),
        ({"v": GOOD[2].expand(2, -1, -1, -1)}, r"v must have shape \[1, 13, 2, 4\].*got \[2,"),
        ({"v": GOOD[2].double()}, r"v is torch.float64; q, k and v must share"),
        ({"q": GOOD[0].int(), "k": GOOD[1].int(), "v": GOOD[2].int()}, "q is torch.int32"),
        ({"k": GOOD[1].to("meta")}, "k is on meta, q is on cpu"),
        ({"sink": torch.zeros(3)}, r"sink must have one logit a query head, shape \(4,\), got \(3,\)"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"key_bias": torch.zeros(12)}, r"key_bias must have shape \[13\] or \[1, 13, 2\], got \[12\]"),
        ({"key_bias": torch.full((13,), float("-inf"))}, "key_bias must be finite"),
        ({"plan": 3}, "plan must come from distattn.plan, got int"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": GOOD[0], "k": GOOD[1], "v": GOOD[2], "plan": make_plan()} | change
    with pytest.raises(InputError, match=message):
        attention(**arguments)


def test_a_plan_for_one_dtype_refuses_others() -> None:
    with pytest.raises(InputError, match=r"q is torch\.float32, but the plan was made for torch\.bfloat16"):
        attention(*GOOD, make_plan(dtype=torch.bfloat16))  # type: ignore[arg-type]


def test_works_at_compile_boundaries() -> None:
    made = make_plan()
    q, k, v, do = leaves(*inputs(13, HEADS, KV_HEADS, WIDTH))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q * 2, k.sin(), v, made, sink=torch.ones(HEADS, dtype=torch.double))
        assert isinstance(out, Tensor)
        return out.cos()

    want = torch.autograd.grad((block(q, k, v) * do).sum(), [q, k, v])  # type: ignore[arg-type]
    compiled = torch.compile(block, backend="aot_eager")
    got = torch.autograd.grad((compiled(q, k, v) * do).sum(), [q, k, v])  # type: ignore[arg-type]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_operator_is_registered_soundly() -> None:
    made = make_plan()
    q, k, v, _ = leaves(*inputs(13, HEADS, KV_HEADS, WIDTH))
    torch.library.opcheck(torch.ops.distattn.attention.default, (q, k, v, made.handle, 0.5, 0.0, True))


def test_selective_checkpointing_runs_attention_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package's attribute of that name is the function.
    module = importlib.import_module("distattn.attention")
    calls: list[str] = []
    real = module._forward
    monkeypatch.setattr(module, "_forward", lambda *a: calls.append("forward") or real(*a))
    made = make_plan()
    q, k, v, _ = leaves(*inputs(13, HEADS, KV_HEADS, WIDTH))

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q.sin(), k, v, made)
        assert isinstance(out, Tensor)
        return out.tanh()

    counts, grads = {}, {}
    for name, options in {"plain": {}, "selective": {"context_fn": checkpoint_contexts}}.items():
        calls.clear()
        out = checkpoint(block, q, k, v, use_reentrant=False, **options)
        grads[name] = torch.autograd.grad(out.square().sum(), [q, k, v])  # type: ignore[arg-type]
        counts[name] = len(calls)
    assert counts == {"plain": 2, "selective": 1}
    for x, y in zip(grads["plain"], grads["selective"], strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


def test_a_handle_is_finished_once() -> None:
    handle = attention_begin(*GOOD, make_plan())  # type: ignore[arg-type]
    attention_finish(handle)
    with pytest.raises(InputError, match="this handle is finished"):
        attention_finish(handle)


def test_gradcheck() -> None:
    made = make_plan(Mask.causal(4), heads=2, kv_heads=1, head_dim=2)
    q, k, v, _ = leaves(*inputs(4, 2, 1, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, made, return_lse=True), (q, k, v))  # type: ignore[arg-type]
