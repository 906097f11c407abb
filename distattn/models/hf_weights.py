"""The decoder's weights as Hugging Face checkpoints of Llama, Mistral and Qwen3, read and written without transformers.

    model.embed_tokens.weight                        embedding.weight
    model.layers.N.input_layernorm.weight            blocks.N.attention_norm.weight
    model.layers.N.self_attn.{q,k,v,o}_proj.weight   blocks.N.attention.{q,k,v,o}.weight
    model.layers.N.self_attn.{q,k}_norm.weight       blocks.N.attention.{q,k}_norm.weight         Qwen3
    model.layers.N.post_attention_layernorm.weight   blocks.N.feed_forward_norm.weight
    model.layers.N.mlp.{gate,up,down}_proj.weight    blocks.N.feed_forward.{gate,up,down}.weight
    model.norm.weight, lm_head.weight                norm.weight, output.weight (untied)

Both sides rotate halves and keep ``[outputs, inputs]``, so values are copied as they are. Files are safetensors and JSON:
nothing in such a folder is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distattn.errors import ConfigError
from distattn.models.config import SOFTMAX, ModelConfig, RopeConfig
from distattn.models.decoder import Decoder, assign_weight

CONFIG = "config.json"
MAX_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ATTENTION = ("q", "k", "v", "o")
_FEED_FORWARD = ("gate", "up", "down")
_LEFT_OUT = ("rotary_emb.inv_freq",)
"""Endings of tensors in older files that hold nothing learned."""


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Our parameter name → Hugging Face's, for every parameter of the decoder."""
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        names[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.feed_forward_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        names |= {f"{ours}.attention.{x}.weight": f"{theirs}.self_attn.{x}_proj.weight" for x in _ATTENTION}
        names |= {f"{ours}.feed_forward.{x}.weight": f"{theirs}.mlp.{x}_proj.weight" for x in _FEED_FORWARD}
        if config.qk_norm:
            names |= {f"{ours}.attention.{x}_norm.weight": f"{theirs}.self_attn.{x}_norm.weight" for x in ("q", "k")}
    if not config.tie_embeddings:
        names["output.weight"] = "lm_head.weight"
    return names


def read_shape(folder: str | Path) -> dict[str, Any]:
    """The ``model.*`` settings, by dotted key without ``model.``, that a folder's config.json asks for.

    Raises ConfigError for a folder that cannot be read, or a model that the decoder does not compute exactly.
    """
    path = Path(folder) / CONFIG
    hf = _read_json(path)
    kind = hf.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"{path} describes a model of type {kind!r}, and model.init_from reads {', '.join(_ARCHITECTURES)}: choose one of "
            "these families."
        )
    _refuse_other(path, hf)
    heads = _number(path, hf, "num_attention_heads")
    shape: dict[str, Any] = {
        "vocab_size": _number(path, hf, "vocab_size"),
        "dim": _number(path, hf, "hidden_size"),
        "num_layers": _number(path, hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": int(hf.get("num_key_value_heads") or heads),
        "head_dim": int(hf.get("head_dim") or (128 if kind == "qwen3" else _number(path, hf, "hidden_size") // heads)),
        "ffn_dim": _number(path, hf, "intermediate_size"),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "qk_norm": kind == "qwen3",
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "sliding_window": _window(path, hf, kind),
        "layers": SOFTMAX,
        "attention_gate": False,
    }
    return shape | {f"rope.{name}": value for name, value in _read_rope(path, hf).items()}


def with_shape(config: ModelConfig, given: AbstractSet[str]) -> ModelConfig:
    """``config`` with the shape of the model in its ``init_from``; a key in ``given`` that says otherwise is refused.

    given: dotted keys, such as ``model.dim``, that the user has set.
    """
    for name, value in read_shape(config.init_from).items():
        now: Any = config
        for part in name.split("."):
            now = getattr(now, part)
        if f"model.{name}" in given and now != value:
            raise ConfigError(
                f"model.{name}={now} does not fit model.init_from={config.init_from}, which has {value}: drop it."
            )
        config = _replaced(config, name.split("."), value)
    return config


def _replaced(node: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of nested dataclasses with one field set."""
    name, *rest = path
    return replace(node, **{name: _replaced(getattr(node, name), rest, value) if rest else value})


def write_config(config: ModelConfig, folder: str | Path, *, seq_len: int, dtype: str = "float32") -> None:
    """Write config.json for a model of this shape. seq_len: tokens that it was trained on, where RoPE is not stretched.

    Raises ConfigError, naming the key, for a model that no Hugging Face class computes exactly.
    """
    kind = exported_type(config)
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # Both spellings: transformers 5 writes rope_parameters, earlier ones and others read the two older keys.
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_rope(config.rope),
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.rope.scaling != "none":
        hf["max_position_embeddings"] = max(seq_len, round(config.rope.original_seq_len * config.rope.factor))
    if kind == "llama":
        hf["mlp_bias"] = False
    if kind == "mistral":
        hf["sliding_window"] = config.sliding_window
    if kind == "qwen3":
        windowed = config.sliding_window > 0
        hf |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window or None, "max_window_layers": 0}
        hf["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * config.num_layers
    (Path(folder) / CONFIG).write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")


def exported_type(config: ModelConfig) -> str:
    """The model_type that computes what this decoder does: llama, mistral (with a window) or qwen3 (with q and k norms)."""
    if config.num_softmax_layers < config.num_layers:
        raise ConfigError(
            f"model.layers={config.layers} cannot be exported: llama, mistral and qwen3 have softmax layers only."
        )
    if config.attention_gate:
        raise ConfigError("model.attention_gate=true cannot be exported: llama, mistral and qwen3 have no such gate.")
    if config.rope.scaling == "dynamic_ntk":
        raise ConfigError(
            "model.rope.scaling=dynamic_ntk cannot be exported: transformers takes the frequencies from the length of each "
            "batch, where this model was trained with those of model.rope.seq_len."
        )
    return "qwen3" if config.qk_norm else "mistral" if config.sliding_window else "llama"


def write_weights(
    config: ModelConfig,
    read: Callable[[str], Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write model*.safetensors, and an index where there are several; returns the files' names.

    read: a parameter's value by our name, whole and on the CPU. One file's tensors are in memory at a time.
    """
    names = hf_names(config)
    shards = _split(_sizes(config, dtype), max_shard_bytes)
    files = (
        [_SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    folder, where, total = Path(folder), {}, 0
    for file, shard in zip(files, shards, strict=True):
        tensors = {names[name]: read(name).to(dtype).contiguous() for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o666 & ~_umask())
        where |= dict.fromkeys(tensors, file)
        total += sum(x.nbytes for x in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def check_weights(config: ModelConfig) -> None:
    """Raise ConfigError where ``init_from`` lacks weights of this model or has others; reads names only. No init_from: fine."""
    if config.init_from:
        path = Path(config.init_from)
        _check_tensors(path, hf_names(config), _weight_files(path), tied=config.tie_embeddings)


@torch.no_grad()
def load_weights(model: Decoder, folder: str | Path) -> None:
    """Fill a decoder, sharded or not, from a folder's safetensors; every rank reads the folder.

    Raises ConfigError where a tensor is missing, has another shape, or is one that the decoder has no place for.
    """
    path = Path(folder)
    names = hf_names(model.config)
    files = _weight_files(path)
    _check_tensors(path, names, files, tied=model.config.tie_embeddings)
    parameters = dict(model.named_parameters())
    by_file: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        by_file.setdefault(files[theirs], []).append(ours)
    for file, wanted in by_file.items():
        with _opened(path / file) as shard:
            for ours in wanted:
                value, parameter = shard.get_tensor(names[ours]), parameters[ours]
                if tuple(value.shape) != tuple(parameter.shape):
                    raise ConfigError(
                        f"{path / file}: {names[ours]} has shape {list(value.shape)}, and config.json makes it "
                        f"{list(parameter.shape)}: the folder's files belong to different models."
                    )
                assign_weight(parameter, value.to(parameter.device, parameter.dtype))


# --- reading config.json ---------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model.init_from={path.parent} cannot be used: {path.name} cannot be read ({error.strerror or error}); give a "
            "folder with config.json and model*.safetensors."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold an object with keys, not {type(value).__name__}.")
    return value


def _number(path: Path, hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{path}: {key} is {value!r}, but it must be a whole number.")
    return value


def _refuse_other(path: Path, hf: Mapping[str, Any]) -> None:
    """Settings that change what is computed and that the decoder does not have."""
    usual = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
        "quantization_config": None, "attention_dropout": 0.0,
    }  # fmt: skip
    for key, value in usual.items():
        if hf.get(key, value) not in (value, None):
            raise ConfigError(f"{path}: {key} is {hf[key]!r}, but the decoder computes {value!r} only.")


def _window(path: Path, hf: Mapping[str, Any], kind: str) -> int:
    if kind == "llama" or (kind == "qwen3" and not hf.get("use_sliding_window", False)):
        return 0
    window = int(hf.get("sliding_window") or 0)
    layers = _number(path, hf, "num_hidden_layers")
    full = int(hf.get("max_window_layers", 28)) if kind == "qwen3" and "layer_types" not in hf else 0
    types = set(hf.get("layer_types") or (["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full)))
    if window and len(types) > 1:
        raise ConfigError(f"{path}: some layers have a window and some have none, but the decoder's layers are all alike.")
    return window if types == {"sliding_attention"} else 0


def _read_rope(path: Path, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of ``RopeConfig``, from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(given.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    scaling = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{path}: partial_rotary_factor is not 1, but the decoder rotates whole heads.")
    if scaling == "default":
        return {"theta": theta, "scaling": "none"}
    if scaling not in ("linear", "llama3", "yarn"):
        raise ConfigError(f"{path}: rope_type is {scaling!r}, and the decoder reads default, linear, llama3 and yarn.")
    if given.get("mscale") or given.get("mscale_all_dim") or given.get("truncate") is False:
        raise ConfigError(f"{path}: yarn with mscale, mscale_all_dim or truncate=false is not what the decoder computes.")
    original = given.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 8192)
    rope = {"theta": theta, "scaling": scaling, "factor": float(given["factor"]), "original_seq_len": int(original)}
    if scaling == "llama3":
        rope |= {name: float(given[name]) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling == "yarn":
        rope |= {"beta_fast": float(given.get("beta_fast") or 32.0), "beta_slow": float(given.get("beta_slow") or 1.0)}
        rope["attention_factor"] = float(given.get("attention_factor") or 0.0)
    return rope


def _write_rope(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    written: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = rope.original_seq_len
    if rope.scaling == "llama3":
        written |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        written |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor:
            written["attention_factor"] = rope.attention_factor
    return written


# --- files -----------------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> dict[str, str]:
    """Tensor name → file in the folder."""
    index = folder / _INDEX
    if index.exists():
        where = _read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(x, str) and x == Path(x).name for x in where.values()):
            raise ConfigError(f"{index} must map tensors to files beside it, in weight_map.")
        return where
    single = folder / _SINGLE
    if not single.exists():
        raise ConfigError(
            f"model.init_from={folder} holds neither {_SINGLE} nor {_INDEX}: give a folder of safetensors (pickled weights are "
            "not read)."
        )
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), _SINGLE)


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def _check_tensors(folder: Path, names: Mapping[str, str], files: Mapping[str, str], *, tied: bool) -> None:
    missing = sorted(set(names.values()) - set(files))
    if missing:
        raise ConfigError(f"{folder} lacks {_few(missing)}, which its config.json asks for.")
    known = {*names.values(), *(["lm_head.weight"] if tied else [])}
    extra = sorted(name for name in set(files) - known if not name.endswith(_LEFT_OUT))
    if extra:
        raise ConfigError(f"{folder} holds {_few(extra)}, for which the decoder has no place.")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _sizes(config: ModelConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every parameter, in the decoder's order, without making any."""
    with torch.device("meta"):
        model = Decoder(replace(config))
    return {name: parameter.numel() * dtype.itemsize for name, parameter in model.named_parameters()}


def _split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, in runs of at most ``most`` bytes; a larger tensor stands alone."""
    return [names for names in _runs(sizes, most) if names]


def _runs(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    run: list[str] = []
    held = 0
    for name, size in sizes.items():
        if held + size > most:
            yield run
            run, held = [], 0
        run.append(name)
        held += size
    yield run


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
