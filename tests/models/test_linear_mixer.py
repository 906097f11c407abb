"""gloo on CPU: a decoder of every linear kind and of hybrids gives the same loss and gradients sharded as whole, in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distattn.errors import ConfigError
from distattn.mask import Mask
from distattn.models import Decoder, LinearConfig, ModelConfig
from distattn.models.config import LINEAR_KINDS, MemoryConfig
from distattn.parallel.layout import Layout
from distattn.planning import Plan, plan
from distattn.testing import run_ranks

LENGTHS = [1, 17, 2, 13]
TINY = ModelConfig(
    vocab_size=11, dim=8, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=6, qk_norm=True, init_std=0.4,
    tie_embeddings=True, attention_gate=True,
    linear=LinearConfig(num_heads=1, num_value_heads=2, head_dim=4, value_head_dim=3, conv_width=3),
)  # fmt: skip
PATTERNS = {
    "decays": replace(TINY, layers="linear,lightning,retention,simple_gla", linear=replace(TINY.linear, output_gate="none")),
    "deltas": replace(TINY, layers="gla,delta,gated_delta,kda"),
    "hybrid": replace(TINY, layers="gated_delta*3,softmax"),
    "no convolution": replace(
        TINY, layers="lightning*3,softmax", linear=replace(TINY.linear, conv_width=1, output_gate="sigmoid")
    ),
    "aaren": replace(TINY, layers="aaren,softmax"),
    "titans": replace(TINY, layers="titans_mac,titans_mag,titans_mal", memory=MemoryConfig(chunk=5, persistent=3)),
    "titans without": replace(
        TINY,
        layers="titans_mac,titans_mag,titans_mal",
        sliding_window=4,
        attention_gate=False,
        qk_norm=False,
        memory=MemoryConfig(chunk=4, persistent=0),
        linear=replace(TINY.linear, conv_width=1),
    ),
    "window": replace(TINY, layers="softmax,gated_delta", sliding_window=4),
}


def make_plan(config: ModelConfig, group: Any, layout: Layout | None) -> Plan:
    mask = Mask.documents(LENGTHS)
    if config.sliding_window:
        mask = mask & Mask.sliding_window(sum(LENGTHS), config.sliding_window - 1)
    return plan(
        mask, heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim, group=group,
        strategy="all_gather", layout=layout,
    )  # fmt: skip


def loss_and_gradients(config: ModelConfig, group: Any, layout: Layout | None) -> tuple[float, dict[str, torch.Tensor]]:
    """Of all rows, summed over the ranks of the group."""
    model = Decoder(config, seed=3).double()
    made = make_plan(config, group, layout)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, config.vocab_size, (2, 1, sum(LENGTHS)), generator=generator)
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in LENGTHS]))
    rows = made.positions
    loss, _ = model.loss(tokens[:, rows], positions[rows], labels[:, rows], made)
    loss.backward()
    total = loss.detach().clone()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if group is not None:
            dist.all_reduce(gradient)
        gradients[name] = gradient
    if group is not None:
        dist.all_reduce(total)
    return float(total), gradients


def run_patterns(rank: int, world: int) -> None:
    rows = sum(LENGTHS)
    for name, config in PATTERNS.items():
        loss, gradients = loss_and_gradients(config, None, None)
        for layout in (Layout.contiguous(rows, world), Layout.zigzag(rows, world)):
            found, sharded = loss_and_gradients(config, dist.group.WORLD, layout)
            assert abs(found - loss) < 1e-9 * abs(loss), (name, layout.name, found, loss)
            for parameter, gradient in gradients.items():
                assert gradient.abs().max() > 0, f"{parameter} of {name} has no part in the loss"
                error = float((sharded[parameter] - gradient).abs().max())
                assert error < 1e-9, (name, layout.name, parameter, error)


def test_sharded_equals_whole() -> None:
    run_ranks(run_patterns, 2, timeout_s=280)


@pytest.mark.parametrize("name", PATTERNS)
def test_parameters_are_counted(name: str) -> None:
    config = PATTERNS[name]
    assert sum(p.numel() for p in Decoder(config).parameters()) == config.num_parameters()


def test_patterns() -> None:
    assert replace(TINY, num_layers=5, layers="gated_delta*3, softmax").layer_kinds == ["gated_delta"] * 3 + [
        "softmax",
        "gated_delta",
    ]
    assert replace(TINY, layers=",".join(LINEAR_KINDS)).num_softmax_layers == 0
    for wrong in ("", "mamba", "gla*", "gla*0", "softmax,,gla"):
        with pytest.raises(ConfigError, match=r"model\.layers is .*, but it must be kinds, or kind\*n, separated by commas"):
            replace(TINY, layers=wrong).validate()
    with pytest.raises(ConfigError, match=r"model\.linear\.num_value_heads is 3, but it must be a multiple of .* = 2\."):
        replace(TINY, linear=LinearConfig(num_heads=2, num_value_heads=3)).validate()
    with pytest.raises(ConfigError, match=r"model\.linear\.output_gate is 'tanh', but it must be none, sigmoid or silu\."):
        replace(TINY, linear=LinearConfig(output_gate="tanh")).validate()


def test_flops_of_linear_layers_grow_with_tokens_alone() -> None:
    config = replace(TINY, layers="gla")
    assert config.attention_flops(10**6) == 0
    assert config.flops_per_token(10**6, 10) == config.flops_per_token(10**12, 10**6)
    states = config.num_layers * 12 * 2 * 4 * 3
    matmuls = 4 * (config.linear.matmul_parameters("gla", 8) + 3 * 8 * 6) + 11 * 8
    assert config.flops_per_token(0, 1) == 6 * matmuls + states
