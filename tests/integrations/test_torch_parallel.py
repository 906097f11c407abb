"""Context parallel for plain torch models equals one rank, and refuses what it cannot take over. Gloo on CPU with 3 ranks."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.utils.checkpoint import checkpoint

from distattn import Mask
from distattn.errors import InputError, PlanError, UnsupportedError
from distattn.integrations.torch_parallel import ContextParallel, local_block_mask, parallelize
from distattn.testing import run_ranks

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
VOCABULARY, WIDTH = 23, 24


class SelfAttention(nn.Module):
    def __init__(self, heads: int, kv_heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        self.q = nn.Linear(WIDTH, heads * 8)
        self.kv = nn.Linear(WIDTH, 2 * kv_heads * 8)
        self.o = nn.Linear(heads * 8, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.kv_heads, 8)).unbind(2)
        out = F.scaled_dot_product_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), mask, is_causal=self.causal and mask is None, scale=0.3, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Learned positions, layers with different heads, and the second under activation checkpointing."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList([SelfAttention(6, 2, causal), SelfAttention(5, 1, causal)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens) + self.places(positions)
        for number, layer in enumerate(self.layers):
            x = x + (checkpoint(layer, self.norm(x), mask, use_reentrant=False) if number else layer(self.norm(x), mask))
        return self.head(x)


def build(causal: bool = True) -> Model:
    torch.manual_seed(3)
    return Model(causal).double()


def inputs(num_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (2, num_rows + 1), generator=generator)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": torch.arange(num_rows)}


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


CASES: list[tuple[str, Mask, bool, str]] = [
    ("causal", Mask.causal(37), True, "ring"),
    ("documents in a window", Mask.documents([20, 3, 14]) & Mask.sliding_window(37, 6), True, "all_gather"),
    ("both ways", Mask.full(37, 37), False, "auto"),
    ("fewer rows than ranks", Mask.causal(2), True, "usp"),
]
"""(name, mask, whether the calls are causal, strategy)"""


def on_ranks(rank: int, world: int) -> list[tuple[float, dict[str, np.ndarray], np.ndarray]]:
    """Loss, gradients and logits of every case."""
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for number, (_, mask, causal, strategy) in enumerate(CASES):
        model = build(causal)
        group: dist.ProcessGroup | DeviceMesh = mesh if number % 2 else mesh.get_group()
        parallel = parallelize(model, r"layers\.\d+", group, heads=6, kv_heads=2, head_dim=8, strategy=strategy)
        batch = parallel.shard_batch(inputs(mask.num_queries), mask)
        with batch:
            logits = model(batch["tokens"], batch["positions"])
            loss = token_loss(logits, batch["labels"])
            (loss / mask.num_queries).backward()
        parallel.sum_gradients()
        total = loss.detach().clone()
        dist.all_reduce(total)
        whole = batch.plan.gather(logits.detach())
        if batch.plan.num_local_rows:
            block_mask = local_block_mask(batch.plan, block_size=8)
            assert block_mask.shape == (1, 1, batch.plan.num_local_rows, mask.num_keys)
            assert (Mask.from_flex(block_mask).dense() == mask.dense()[batch.plan.positions.numpy()]).all()
        gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
        results.append((float(total), gradients, whole.numpy()))
        if number == 0:
            with context_parallel(mesh, buffers=[torch.zeros(2 * world)], buffer_seq_dims=[0]):
                inside = pytest.raises(UnsupportedError, match="a call inside torch's context_parallel")
                with batch, inside:
                    model(batch["tokens"], batch["positions"])
    return results


def test_equals_one_rank() -> None:
    ranks = run_ranks(on_ranks, 3)
    for i, (name, mask, causal, _) in enumerate(CASES):
        model, batch = build(causal), inputs(mask.num_queries)
        expected = model(batch["tokens"], batch["positions"], torch.from_numpy(mask.dense()))
        loss = token_loss(expected, batch["labels"])
        (loss / mask.num_queries).backward()
        for rank in ranks:
            total, gradients, logits = rank[i]
            assert total == pytest.approx(loss.item(), rel=1e-12), name
            np.testing.assert_allclose(logits, expected.detach(), rtol=1e-10, atol=1e-10, err_msg=name)
            assert gradients.keys() == dict(model.named_parameters()).keys(), name
            for key, parameter in model.named_parameters():
                assert parameter.grad is not None
                np.testing.assert_allclose(gradients[key], parameter.grad, rtol=1e-10, atol=1e-10, err_msg=f"{name}: {key}")


def one_rank(model: nn.Module, modules: str = r"layers\.\d+") -> ContextParallel:
    return parallelize(model, modules, None, heads=6, kv_heads=2, head_dim=8)


def test_remove_gives_the_model_back() -> None:
    model, batch = build(), inputs(9)
    before = model(batch["tokens"], batch["positions"])
    parallel = one_rank(model)
    with pytest.raises(InputError, match="is replaced already"):
        one_rank(model)
    sharded = parallel.shard_batch(batch, Mask.causal(9))
    assert list(sharded) == ["tokens", "labels", "positions"]
    with sharded:
        torch.testing.assert_close(model(sharded["tokens"], sharded["positions"]), before)
    parallel.remove()
    torch.testing.assert_close(model(batch["tokens"], batch["positions"]), before)
    one_rank(model)


class Caller(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, body: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


def attend(x: Tensor, **given: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, **{"is_causal": True, **given})


X = torch.randn(1, 2, 8, 4)
REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a mask as a tensor": (lambda x: attend(x, attn_mask=torch.ones(8, 8), is_causal=False), "an attention mask as a tensor"),
    "dropout": (lambda x: attend(x, dropout_p=0.1), "attention dropout of 0.1"),
    "a cache": (lambda x: F.scaled_dot_product_attention(x[:, :, :1], x, x), "KV cache"),
    "not causal under a causal mask": (lambda x: attend(x, is_causal=False), "is_causal=False"),
    "no attention": (lambda x: x.sum(), "ran without calling scaled_dot_product_attention"),
    "multi-head": (
        lambda x: nn.MultiheadAttention(4, 2)(x[0], x[0], x[0], need_weights=False), "nn.MultiheadAttention is not supported",
    ),
    "recurrence": (lambda x: nn.LSTM(4, 4)(x[0]), "a recurrent layer"),
    "convolution": (lambda x: nn.Conv1d(8, 8, 3)(x[0]), "a convolution"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    body, message = REFUSED[name]
    model = nn.Sequential(Caller(body))
    parallel = parallelize(model, "0", None, heads=2, head_dim=4)
    batch = parallel.shard_batch({}, Mask.causal(8))
    with batch, pytest.raises(UnsupportedError, match=message):
        model(X)


def test_refuses_attention_elsewhere() -> None:
    model = nn.Sequential(Caller(attend), Caller(attend))
    batch = parallelize(model, "0", None, heads=2, head_dim=4).shard_batch({}, Mask.causal(8))
    with batch, pytest.raises(UnsupportedError, match="outside of the chosen modules"):
        model(X)
    # What was raised inside leaves nothing behind.
    torch.testing.assert_close(attend(X), F.scaled_dot_product_attention(X, X, X, is_causal=True))


def test_wrong_use_is_named() -> None:
    caller = Caller(attend)
    model = nn.Sequential(caller, nn.Linear(4, 4))
    with pytest.raises(InputError, match="must choose at least one submodule"):
        parallelize(model, "attention", None, heads=2, head_dim=4)
    with pytest.raises(InputError, match="not a submodule"):
        parallelize(model, [nn.Linear(1, 1)], None, heads=2, head_dim=4)
    with pytest.raises(UnsupportedError, match=r"nn\.MultiheadAttention"):
        parallelize(nn.Sequential(nn.MultiheadAttention(4, 2)), "0", None, heads=2, head_dim=4)
    parallel = parallelize(model, [caller], None, heads=2, head_dim=4)
    with pytest.raises(InputError, match="no batch is entered"):
        model(X)
    batch = parallel.shard_batch({"x": X}, Mask.causal(8), dim=2)
    with pytest.raises(InputError, match="has no 'y'; it has x"):
        batch["y"]
    with batch, pytest.raises(InputError, match="entered already"), batch:
        pass
    with pytest.raises(InputError, match="this rank has 8 of the batch's"), batch:
        model(X[:, :, :5])
    caller.body = lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], is_causal=True)
    with pytest.raises(InputError, match="2 query and 1 KV heads need enable_gqa=True"), batch:
        model(X)


def test_a_mesh_has_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceMesh, "__init__", lambda self: None)
    monkeypatch.setattr(DeviceMesh, "ndim", 2)
    monkeypatch.setattr(DeviceMesh, "mesh_dim_names", ("data", "context"), raising=False)
    with pytest.raises(PlanError, match="pass one of them"):
        parallelize(nn.Sequential(Caller(attend)), "0", DeviceMesh(), heads=2, head_dim=4)  # type: ignore[call-arg]


def run_example(name: str, world: int) -> list[float]:
    """The losses that an example prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    ran = subprocess.run(
        [*command, "--nproc-per-node", str(world), str(EXAMPLES / name)], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [float(line.split()[-1]) for line in ran.stdout.splitlines() if line.startswith("step ")]


def test_the_example_gives_the_same_on_two_ranks() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLES / "torch_model.py"), run_name="__main__")
    one = [float(line.split()[-1]) for line in printed.getvalue().splitlines()]
    assert one == sorted(one, reverse=True)
    assert run_example("torch_model.py", 2) == pytest.approx(one, abs=1e-5)
