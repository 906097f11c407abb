"""The decoder on one rank: shapes, invariances, gradients, seeded weights. No torch.distributed but a one-rank mesh."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from distattn.errors import ConfigError, InputError
from distattn.mask import Mask
from distattn.models import Decoder, ModelConfig, RopeConfig
from distattn.planning import Plan, plan

TINY = ModelConfig(vocab_size=11, dim=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=10)
LENGTHS = (5, 1, 7)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])


def documents(config: ModelConfig = TINY, lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64) -> Plan:
    mask = Mask.documents(list(lengths))
    return plan(mask, heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype)


def tokens(n: int = sum(LENGTHS), batch: int = 1) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, n), generator=torch.Generator().manual_seed(n))


def written_out(model: Decoder, x: Tensor, positions: Tensor) -> Tensor:
    """The decoder again, one sequence without packing, by the formulas and with dense attention."""
    config = model.config
    weights = dict(model.named_parameters())
    frequencies = config.rope.theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    turn = torch.polar(torch.ones(()).double(), positions.double()[:, None] * frequencies)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    def rope(x: Tensor) -> Tensor:
        z = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([z.real, z.imag], -1)

    h = weights["embedding.weight"][x]
    for i in range(config.num_layers):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in weights.items()}
        n = norm(h, f"blocks.{i}.attention_norm.weight")
        q, k, v = ((n @ w[f"attention.{p}.weight"].t()).unflatten(-1, (-1, config.head_dim)) for p in "qkv")
        if config.qk_norm:
            q = norm(q, f"blocks.{i}.attention.q_norm.weight")
            k = norm(k, f"blocks.{i}.attention.k_norm.weight")
        group = config.num_heads // config.num_kv_heads
        k, v = (t.repeat_interleave(group, 1) for t in (rope(k), v))
        scores = torch.einsum("qhd,khd->hqk", rope(q), k) / config.head_dim**0.5
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        h = h + out @ w["attention.o.weight"].t()
        n = norm(h, f"blocks.{i}.feed_forward_norm.weight")
        gate, up = n @ w["feed_forward.gate.weight"].t(), n @ w["feed_forward.up.weight"].t()
        h = h + (gate * gate.sigmoid() * up) @ w["feed_forward.down.weight"].t()
    return norm(h, "norm.weight")


def make(config: ModelConfig = TINY, seed: int = 0, spread: float = 0.5) -> Decoder:
    """In fp64, with weights wide enough that every part of the model matters."""
    model = Decoder(replace(config, init_std=spread), seed=seed).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "output.weight":
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
            if name.endswith("norm.weight"):
                parameter += torch.linspace(-0.3, 0.4, parameter.numel())
    return model


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
def test_packed_documents_equal_the_model_written_out_one_by_one(qk_norm: bool) -> None:
    config = replace(TINY, qk_norm=qk_norm)
    model, x = make(config), tokens()
    hidden = model(x, POSITIONS, documents(config))
    assert hidden.shape == (1, sum(LENGTHS), config.dim)
    singles = [written_out(model, part, torch.arange(len(part))) for part in x[0].split(LENGTHS)]
    torch.testing.assert_close(hidden[0], torch.cat(singles), rtol=1e-10, atol=1e-10)


def test_batch_and_positions_of_either_shape() -> None:
    model, x = make(), tokens(batch=3)
    hidden = model(x, POSITIONS, documents())
    torch.testing.assert_close(model(x, POSITIONS.expand(3, -1), documents()), hidden)
    torch.testing.assert_close(model(x[1:2], POSITIONS, documents()), hidden[1:2])


def test_only_relative_positions_matter() -> None:
    model, x = make(), tokens()
    hidden = model(x, POSITIONS, documents())
    torch.testing.assert_close(model(x, POSITIONS + 3_000_017, documents()), hidden, rtol=1e-7, atol=1e-7)
    stretched = model(x, POSITIONS * 2, documents())
    assert not torch.allclose(stretched, hidden, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_parameters_and_output_weight(tie: bool) -> None:
    config = replace(TINY, tie_embeddings=tie, qk_norm=True)
    model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    assert (model.output_weight is model.embedding.weight) is tie
    assert ("output.weight" in model.state_dict()) is not tie


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_losses(tie: bool) -> None:
    model, x = make(replace(TINY, tie_embeddings=tie)), tokens()
    labels = x.roll(-1, 1)
    labels[0, torch.tensor(LENGTHS).cumsum(0) - 1] = -100
    logits = model(x, POSITIONS, documents()) @ model.output_weight.t()
    reference = F.cross_entropy(logits[0], labels[0], reduction="sum")
    loss, count = model.loss(x, POSITIONS, labels, documents(), chunk_tokens=4)
    torch.testing.assert_close(loss, reference)
    assert count.item() == sum(LENGTHS) - len(LENGTHS)
    torch.testing.assert_close(model.token_losses(x, POSITIONS, labels, documents()).sum(), reference.detach())


def test_gradients_of_every_parameter_by_finite_differences() -> None:
    config = replace(TINY, num_layers=1, qk_norm=True, rope=RopeConfig(scaling="yarn", factor=4, original_seq_len=64))
    model, x, schedule = make(config), tokens(6), documents(config, (4, 2))
    names = [name for name, _ in model.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values))
        arguments = (x, torch.tensor([0, 1, 2, 3, 0, 1]), x.roll(-1, 1), schedule)
        return torch.func.functional_call(_Loss(model), {f"model.{k}": v for k, v in parameters.items()}, arguments)

    assert torch.autograd.gradcheck(loss, tuple(model.parameters()), fast_mode=True)


class _Loss(torch.nn.Module):
    """``Decoder.loss`` as a forward, which is what functional_call substitutes parameters in."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, positions: Tensor, labels: Tensor, schedule: Plan) -> Tensor:
        return self.model.loss(x, positions, labels, schedule, chunk_tokens=4)[0]


def test_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = Decoder(TINY, seed=3), Decoder(TINY, seed=3), Decoder(TINY, seed=4)
    deeper = Decoder(replace(TINY, num_layers=5), seed=3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert parameter.dim() == 1 or not torch.equal(parameter, other.get_parameter(name))
    assert torch.equal(first.get_parameter("blocks.1.attention.q.weight"), deeper.get_parameter("blocks.1.attention.q.weight"))
    with torch.device("meta"):
        empty = Decoder(TINY)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").init_weights(3)
    assert all(torch.equal(p, first.get_parameter(name)) for name, p in empty.named_parameters())


@pytest.mark.parametrize(("tie", "embedding"), [(True, 0.02), (False, 1.0)], ids=["tied", "untied"])
def test_initial_spread(tie: bool, embedding: float) -> None:
    model = Decoder(replace(TINY, vocab_size=64, dim=96, ffn_dim=256, num_layers=8, tie_embeddings=tie))
    stds = {"embedding": embedding, "blocks.7.attention.q": 0.02, "blocks.0.feed_forward.down": 0.02 / 4}
    for name, std in stds.items():
        assert model.get_parameter(f"{name}.weight").std().item() == pytest.approx(std, rel=0.1)
    assert tie or not model.output_weight.any()


def test_block_runner_keeps_names_and_values() -> None:
    model, x = make(), tokens()
    names = [name for name, _ in model.named_parameters()]
    model.loss(x, POSITIONS, x, documents())[0].backward()
    gradients = [p.grad for p in model.parameters()]
    calls: list[None] = []

    def run(function: object, *args: object) -> Tensor:
        calls.append(None)
        return partial(checkpoint, use_reentrant=False)(function, *args)  # pyright: ignore[reportReturnType, reportArgumentType]

    model.zero_grad(set_to_none=True)
    model.set_block_runner(run)
    model.loss(x, POSITIONS, x, documents())[0].backward()
    assert len(calls) == TINY.num_layers
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_bf16_follows_fp64() -> None:
    model, x = make(spread=0.2), tokens()
    exact = model(x, POSITIONS, documents())
    hidden = model.bfloat16()(x, POSITIONS, documents(dtype=torch.bfloat16))
    assert hidden.dtype == torch.bfloat16
    assert (hidden.double() - exact).norm() < 0.02 * exact.norm()


def test_fsdp2_shards_blocks_and_gathers_the_output_weight(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, x = Decoder(TINY, seed=5), tokens()
        schedule = documents(dtype=torch.float32)
        reference = plain.loss(x, POSITIONS, x, schedule)[0]
        reference.backward()
        with torch.device("meta"):
            model = Decoder(TINY)
        model.set_block_runner(partial(checkpoint, use_reentrant=False))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "loss")
        model.to_empty(device="cpu").init_weights(5)
        loss = model.loss(x, POSITIONS, x, schedule)[0]
        loss.backward()
        torch.testing.assert_close(loss, reference)
        for name, parameter in plain.named_parameters():
            gradient = model.get_parameter(name).grad
            assert isinstance(gradient, DTensor)
            torch.testing.assert_close(gradient.to_local(), parameter.grad)
    finally:
        dist.destroy_process_group()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="num_kv_heads is 3"):
        Decoder(replace(TINY, num_kv_heads=3))
    with pytest.raises(InputError, match=r"tokens are \(1, 13\) and positions \(12,\)"):
        make()(tokens(), POSITIONS[1:], documents())
