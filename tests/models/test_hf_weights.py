"""Weights in and out: transformers' own logits from ours and ours from theirs; shapes, scalings, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distattn
from distattn.errors import ConfigError
from distattn.models import Decoder, ModelConfig, RopeConfig
from distattn.models.hf_weights import (
    exported_type,
    hf_names,
    load_weights,
    read_shape,
    with_shape,
    write_config,
    write_weights,
)
from distattn.models.rope import rope_frequencies

SMALL = ModelConfig(
    vocab_size=64, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=40, tie_embeddings=False, init_std=0.3
)
LLAMA3 = RopeConfig(theta=5e5, scaling="llama3", factor=4.0, original_seq_len=16, low_freq_factor=1.0, high_freq_factor=4.0)
MODELS = {
    "llama": SMALL,
    "llama-tied-llama3": replace(SMALL, tie_embeddings=True, rope=LLAMA3),
    "llama-linear": replace(SMALL, rope=RopeConfig(scaling="linear", factor=2.0, original_seq_len=16)),
    "mistral-window": replace(SMALL, sliding_window=5),
    "qwen3": replace(SMALL, qk_norm=True, norm_eps=1e-6, tie_embeddings=True),
    "qwen3-window-yarn": replace(
        SMALL, qk_norm=True, sliding_window=5, rope=RopeConfig(scaling="yarn", factor=4.0, original_seq_len=16)
    ),
}
TOKENS = torch.randint(0, 64, (1, 33), generator=torch.Generator().manual_seed(1))


def our_logits(model: Decoder) -> Tensor:
    """Of TOKENS as one document."""
    config, n = model.config, TOKENS.shape[1]
    mask = distattn.Mask.causal(n)
    if config.sliding_window:
        mask &= distattn.Mask.sliding_window(n, config.sliding_window - 1)
    plan = distattn.plan(mask, heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    with torch.no_grad():
        return model(TOKENS, torch.arange(n), plan) @ model.output_weight.T


def their_logits(folder: Path) -> Tensor:
    from distattn.integrations import transformers as adapter  # first: it hides the checkout's links from transformers

    adapter.register()
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


def random_decoder(config: ModelConfig) -> Decoder:
    """Nothing at its initial value: norms too."""
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


def export(model: Decoder, folder: Path, **options: Any) -> list[str]:
    weights = dict(model.named_parameters())
    write_config(model.config, folder, seq_len=64)
    return write_weights(model.config, lambda name: weights[name].detach(), folder, **options)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    """Our logits, transformers' on the exported folder, and ours on what it saved, are the same."""
    model = random_decoder(config)
    assert export(model, tmp_path) == ["model.safetensors"]
    expected = our_logits(model)
    scale = float(expected.abs().max())
    assert float((their_logits(tmp_path) - expected).abs().max()) < 1e-5 * scale
    shape = with_shape(replace(ModelConfig(), init_from=str(tmp_path), init_std=config.init_std), set())
    assert replace(shape, init_from="", rope=config.rope) == config
    assert np.array_equal(rope_frequencies(shape.rope, 8), rope_frequencies(config.rope, 8))
    again = Decoder(shape, seed=9)
    load_weights(again, tmp_path)
    assert torch.equal(our_logits(again), expected)


def test_shards(tmp_path: Path) -> None:
    """Files of at most so many bytes, with transformers' index; ours and theirs read it."""
    model = random_decoder(SMALL)
    files = export(model, tmp_path, max_shard_bytes=8_000)
    assert len(files) > 3
    sizes = [(tmp_path / name).stat().st_size for name in files]
    assert max(sizes) < 12_000
    assert float((their_logits(tmp_path) - our_logits(model)).abs().max()) < 1e-4
    again = Decoder(SMALL, seed=9)
    load_weights(again, tmp_path)
    assert torch.equal(our_logits(again), our_logits(model))


def test_saved_by_transformers(tmp_path: Path) -> None:
    """The way in: what transformers' save_pretrained writes, bf16 included."""
    from distattn.integrations import transformers as adapter

    adapter.register()
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    shape = with_shape(replace(ModelConfig(), init_from=str(tmp_path)), {"model.init_from"})
    assert (shape.qk_norm, shape.head_dim, shape.tie_embeddings, shape.dim) == (True, 8, True, 24)
    model = Decoder(shape)
    load_weights(model, tmp_path)
    assert float((their_logits(tmp_path) - our_logits(model)).abs().max()) < 1e-5


def test_names_cover_the_decoder() -> None:
    for config in MODELS.values():
        assert set(hf_names(config)) == {name for name, _ in Decoder(config).named_parameters()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model of type 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vocab_size": "many"}, "vocab_size is 'many', but it must be a whole number"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "some layers have a window",
        ),
    ],
)  # fmt: skip
def test_refused_config(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(SMALL, tmp_path, seq_len=64)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_shape(tmp_path)


def test_refused_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_shape(tmp_path)
    write_config(SMALL, tmp_path, seq_len=64)
    model = Decoder(SMALL)
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load_weights(model, tmp_path)
    export(random_decoder(replace(SMALL, num_layers=1)), tmp_path)
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.1\..* and 6 more tensors"):
        load_weights(model, tmp_path)
    export(random_decoder(replace(SMALL, qk_norm=True)), tmp_path)
    with pytest.raises(ConfigError, match="no place"):
        load_weights(model, tmp_path)
    export(random_decoder(replace(SMALL, ffn_dim=48)), tmp_path)
    with pytest.raises(ConfigError, match=r"has shape \[48, 24\], and config.json makes it \[40, 24\]"):
        load_weights(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_weights(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ConfigError, match="files beside it"):
        load_weights(model, tmp_path)


def test_given_keys_must_fit(tmp_path: Path) -> None:
    write_config(SMALL, tmp_path, seq_len=64)
    config = replace(ModelConfig(), init_from=str(tmp_path), dim=32)
    with pytest.raises(ConfigError, match=r"model\.dim=32 does not fit model\.init_from=.* which has 24: drop it"):
        with_shape(config, {"model.dim"})
    assert with_shape(config, set()).dim == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "gated_delta,softmax"}, "model.layers="),
        ({"attention_gate": True}, "model.attention_gate=true"),
        ({"rope": RopeConfig(scaling="dynamic_ntk")}, "dynamic_ntk cannot be exported"),
    ],
)
def test_not_exportable(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        exported_type(replace(SMALL, **change))
