"""RoPE and its scalings against formulas written pair by pair from the papers. No torch.distributed."""

import cmath
import math

import numpy as np
import pytest
import torch

from distattn.models.config import RopeConfig
from distattn.models.rope import apply_rotation, make_rotation, rope_amplitude, rope_frequencies

D = 64
L0 = 4096


def plain(i: int, theta: float = 10_000.0) -> float:
    return 1.0 / theta ** (2 * i / D)


def expected(config: RopeConfig, i: int) -> float:
    s = config.factor
    if config.scaling == "linear":
        return plain(i) / s
    if config.scaling == "dynamic_ntk":
        length = max(config.seq_len, L0)
        return plain(i, 10_000.0 * (s * length / L0 - (s - 1)) ** (D / (D - 2)))
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / plain(i)
        if wavelength < L0 / config.high_freq_factor:
            return plain(i)
        if wavelength > L0 / config.low_freq_factor:
            return plain(i) / s
        smooth = (L0 / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        return (1 - smooth) * plain(i) / s + smooth * plain(i)
    if config.scaling == "yarn":
        # The pair that turns b times in L0: D ln(L0 / 2πb) / (2 ln θ).
        first, last = (D * math.log(L0 / (b * 2 * math.pi)) / (2 * math.log(10_000.0)) for b in (32, 1))
        first, last = math.floor(first), math.ceil(last)
        if i <= first:
            return plain(i)
        if i >= last:
            return plain(i) / s
        ramp = (i - first) / (last - first)
        return ramp * plain(i) / s + (1 - ramp) * plain(i)
    return plain(i)


@pytest.mark.parametrize(
    "config",
    [
        RopeConfig(),
        RopeConfig(scaling="linear", factor=8),
        RopeConfig(scaling="dynamic_ntk", factor=2, original_seq_len=L0, seq_len=16 * L0),
        RopeConfig(scaling="dynamic_ntk", factor=2, original_seq_len=L0, seq_len=L0 // 2),
        RopeConfig(scaling="yarn", factor=16, original_seq_len=L0),
        RopeConfig(scaling="llama3", factor=32, original_seq_len=L0),
    ],
    ids=["none", "linear", "dynamic_ntk-long", "dynamic_ntk-short", "yarn", "llama3"],
)
def test_frequencies(config: RopeConfig) -> None:
    got = rope_frequencies(config, D)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, [expected(config, i) for i in range(D // 2)], rtol=1e-13)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones_as_the_paper_defines_them() -> None:
    config = RopeConfig(scaling="yarn", factor=16, original_seq_len=L0)
    ratio = rope_frequencies(config, D) / rope_frequencies(RopeConfig(), D)
    turns = L0 * rope_frequencies(RopeConfig(), D) / (2 * math.pi)
    assert (ratio[turns > 32] > 0.94).all()  # rounding the ramp's ends outwards touches one pair
    np.testing.assert_allclose(ratio[turns < 0.7], 1 / 16)
    assert (np.diff(ratio) <= 1e-15).all()


def test_yarn_temperature() -> None:
    assert rope_amplitude(RopeConfig(scaling="yarn", factor=16)) == pytest.approx(0.1 * math.log(16) + 1)
    assert rope_amplitude(RopeConfig(scaling="yarn", factor=16, attention_factor=1.5)) == 1.5
    assert rope_amplitude(RopeConfig(scaling="linear", factor=16)) == 1.0
    rotation = make_rotation(RopeConfig(scaling="yarn", factor=16), D, torch.arange(3), torch.float64)
    squares = rotation.cos.square() + rotation.sin.square()
    torch.testing.assert_close(squares, torch.full_like(squares, (0.1 * math.log(16) + 1) ** 2))


@pytest.mark.parametrize("batched", [False, True], ids=["shared-positions", "positions-per-sequence"])
def test_rotation_is_complex_multiplication(batched: bool) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 1_000_000, (2, 5)) if batched else torch.randint(0, 1_000_000, (5,))
    got = apply_rotation(x, make_rotation(RopeConfig(), 8, positions, torch.float64))
    for b, t, h, i in np.ndindex(2, 5, 3, 4):
        position = int(positions[b, t] if batched else positions[t])
        z = complex(x[b, t, h, i], x[b, t, h, i + 4]) * cmath.exp(1j * position * 10_000.0 ** (-2 * i / 8))
        assert abs(complex(got[b, t, h, i], got[b, t, h, i + 4]) - z) < 1e-9


def test_bf16_queries_at_a_million_tokens_turn_by_exact_angles() -> None:
    positions = torch.tensor([0, 999_983, 3_999_971])
    rotation = make_rotation(RopeConfig(theta=500_000.0), D, positions, torch.bfloat16)
    assert rotation.cos.dtype == torch.float32
    angles = positions.double()[:, None] * torch.tensor([5e5 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    torch.testing.assert_close(rotation.sin[0, :, 0], angles.sin().float(), rtol=0, atol=1e-6)
    x = torch.randn(1, 3, 2, D).bfloat16()
    exact = apply_rotation(x.double(), make_rotation(RopeConfig(theta=500_000.0), D, positions, torch.float64))
    torch.testing.assert_close(apply_rotation(x, rotation), exact.bfloat16(), rtol=2**-7, atol=1e-6)


def test_gradient_and_non_contiguous_inputs() -> None:
    rotation = make_rotation(RopeConfig(scaling="yarn", factor=4), 6, torch.tensor([0, 5, 900]), torch.float64)
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rotation(x.transpose(1, 2), rotation), x)


def test_no_tokens() -> None:
    rotation = make_rotation(RopeConfig(), 8, torch.zeros(0, dtype=torch.int64), torch.float32)
    assert apply_rotation(torch.zeros(1, 0, 2, 8), rotation).shape == (1, 0, 2, 8)
