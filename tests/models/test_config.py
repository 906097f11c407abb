"""Shapes, counts and refusals of ModelConfig. Plan only: no torch.distributed."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distattn.config import load_config
from distattn.errors import ConfigError
from distattn.models.config import ModelConfig, RopeConfig

LLAMA_1B = ModelConfig(vocab_size=128256, dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64, ffn_dim=8192)
LLAMA_8B = ModelConfig(
    vocab_size=128256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_dim=14336,
    tie_embeddings=False,
)  # fmt: skip


def test_published_parameter_counts() -> None:
    assert LLAMA_1B.num_parameters() == 1_235_814_400
    assert LLAMA_8B.num_parameters() == 8_030_261_248


def test_flops_by_hand() -> None:
    config = ModelConfig(vocab_size=10, dim=4, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=6, ffn_dim=5, qk_norm=True)
    block = 4 * 12 + 4 * 6 * 2 + 12 * 4 + 3 * 4 * 5
    area = 7 * 8 // 2
    forward = 3 * 2 * area * (2 * 6 + 2 * 6)  # layers · heads · pairs · (q·k and p·v, 2 FLOPs a multiply-add)
    assert config.attention_flops(area) == 3 * forward
    assert config.flops_per_token(area, 7) == 6 * (3 * block + 10 * 4) + 3 * forward / 7
    untied = replace(config, tie_embeddings=False)
    assert untied.num_parameters() == config.num_parameters() + 40
    assert untied.flops_per_token(area, 7) == config.flops_per_token(area, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 5}, r"model\.num_kv_heads is 5, .* model\.num_heads = 12: use one of 1, 2, 3, 4, 6, 12\."),
        ({"head_dim": 15}, r"model\.head_dim is 15, but it must be even"),
        ({"dim": 0}, r"model\.dim is 0, but it must be at least 1\."),
        ({"num_kv_heads": 0}, r"model\.num_kv_heads is 0, but it must be at least 1\."),
        ({"sliding_window": -1}, r"model\.sliding_window is -1, but it must be at least 0 \(0 is the whole document\)"),
        ({"norm_eps": 0.0}, r"model\.norm_eps is 0\.0, but it must be between 0 and 1\."),
        ({"init_std": -1.0}, r"model\.init_std is -1\.0, but it must be greater than 0\."),
        ({"rope": RopeConfig(scaling="ntk")}, r"model\.rope\.scaling is 'ntk', but it must be one of none, linear, "),
        ({"rope": RopeConfig(theta=1.0)}, r"model\.rope\.theta is 1\.0, but it must be greater than 1\."),
        ({"rope": RopeConfig(scaling="linear", factor=0.5)}, r"model\.rope\.factor is 0\.5, .* at least 1\."),
        ({"rope": RopeConfig(original_seq_len=0)}, r"model\.rope\.original_seq_len is 0, .* at least 1 token\."),
        ({"rope": RopeConfig(scaling="dynamic_ntk", seq_len=0)}, r"model\.rope\.seq_len is 0, .* at least 1 token\."),
        ({"rope": RopeConfig(scaling="dynamic_ntk"), "head_dim": 2}, r"model\.head_dim is 2, .* greater than 2 for"),
        ({"rope": RopeConfig(scaling="yarn", beta_slow=32)}, r"beta_slow is 32, .* less than model\.rope\.beta_fast"),
        ({"rope": RopeConfig(scaling="yarn", attention_factor=-1)}, r"attention_factor is -1, .* at least 0"),
        ({"rope": RopeConfig(scaling="llama3", low_freq_factor=4)}, r"low_freq_factor is 4, .*high_freq_factor = 4"),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(changes: dict[str, object], message: str) -> None:
    ModelConfig().validate()
    with pytest.raises(ConfigError, match=message):
        replace(ModelConfig(), **changes).validate()  # pyright: ignore[reportArgumentType]


def test_is_a_structured_config() -> None:
    schema = OmegaConf.structured(ModelConfig)
    merged = OmegaConf.merge(schema, {"dim": 64, "rope": {"scaling": "yarn", "factor": 4}})
    config = OmegaConf.to_object(merged)
    assert config == replace(ModelConfig(), dim=64, rope=RopeConfig(scaling="yarn", factor=4.0))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("quickstart", 492_224),
        ("decoder-2m", 1_967_936),
        ("llama-150m", 144_991_232),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_configs_of_the_repository(name: str, parameters: int) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    config.model.validate()
    assert config.model.num_parameters() == parameters
    assert config.model.num_heads % config.parallel.context == 0
