"""The configuration of a training run: frozen dataclasses, read from YAML and ``key=value`` overrides.

OmegaConf converts and checks every value against its declared type. YAML's own guesses never apply: scalars reach OmegaConf
as the text that was written, so ``1e-3`` is a number where a number is declared and stays ``1e-3`` where text is, and an
override of a text key arrives exactly as it was typed. Interpolations (``${...}``) are refused everywhere: a run's
configuration is what is written in it, and reading one looks nothing up and executes nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distattn.config_pairs import check_keeping, check_nano_batches, check_offload, check_servers
from distattn.data.config import DataConfig
from distattn.errors import ConfigError
from distattn.kernels import BACKENDS
from distattn.models.config import ModelConfig
from distattn.models.hf_weights import with_shape
from distattn.parallel.keep import MODES as KEEP_MODES
from distattn.parallel.schedulers import SCHEDULERS

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")
ACTIVATION_CHECKPOINTING = ("none", "selective", "full")
ENGINES = ("fsdp", "deepspeed")
ZERO_STAGES = (1, 2, 3)

MAY_CHANGE = (
    "run.*",
    "parallel.*",
    "kernel",
    "data.cache_dir",
    "checkpoint.*",
    "log.*",
    "train.device",
    "train.activation_checkpointing",
    "train.activation_offload",
    "train.nano_batches",
    "train.engine",
    "train.zero_stage",
    "train.loss_chunk_tokens",
    "train.timeout_seconds",
    "train.hang_seconds",
)
"""Patterns of the keys that may differ when a run resumes: where and how numbers are computed, not which come out."""


@dataclass(frozen=True)
class RunConfig:
    """dir: where the run lives; empty means ``runs/<name of the config file>``, the same at every start.

    max_restarts: how often ranks that failed are started again, after backoff_seconds, twice that, and so on.
    storage_patience_seconds: so long is a file system that has vanished waited for.
    """

    dir: str = ""
    max_restarts: int = 0
    backoff_seconds: float = 5.0
    storage_patience_seconds: float = 120.0


@dataclass(frozen=True)
class TrainConfig:
    """How long and on what; ``global_batch`` counts sequences a step over all data ranks.

    nano_batches: 2 cuts every sequence in two halves that take turns, so that transfers of attention hide behind the other
    half (``distattn.pingpong``); 0 does so where it is predicted to be faster. activation_checkpointing: ``selective``
    recomputes everything but attention, ``full`` also repeats attention and its communication. activation_offload: what a
    checkpointed block keeps as its input lies in host memory until its backward. loss_chunk_tokens: tokens whose logits exist
    at one time. timeout_seconds: a collective that waits longer ends the run with an error. hang_seconds: without progress for
    so long, every rank reports where it is and ends; 0: never.
    engine: who shards and updates the model, FSDP2 or DeepSpeed's ZeRO of stage ``zero_stage``.
    """

    steps: int = 1000
    seed: int = 0
    global_batch: int = 1
    nano_batches: int = 1
    device: str = "auto"
    precision: str = "auto"
    activation_checkpointing: str = "none"
    activation_offload: bool = False
    engine: str = "fsdp"
    zero_stage: int = 2
    loss_chunk_tokens: int = 1024
    timeout_seconds: float = 600.0
    hang_seconds: float = 300.0


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (weight decay on matrices only), linear warm-up, cosine down to ``min_lr_ratio · lr``; clip_norm 0 is off."""

    lr: float = 1e-3
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclass(frozen=True)
class ParallelConfig:
    """context: ranks that share one sequence. data: groups of ``context`` ranks, each with sequences of its own; 0 makes as
    many as there are devices for (one on a CPU). strategy: a scheduler's name, or auto. servers: so many last ranks of each
    context group hold no rows and compute attention for the others; needs strategy disaggregated. backward: whether received
    queries, keys and values are sent again or kept for the backward; auto keeps where they are at most keep_bytes a layer."""

    context: int = 1
    data: int = 0
    strategy: str = "auto"
    servers: int = 0
    backward: str = "resend"
    keep_bytes: int = 0


@dataclass(frozen=True)
class CheckpointConfig:
    """interval: steps between checkpoints (a final one is always written); keep: the newest that are kept."""

    interval: int = 100
    keep: int = 3


@dataclass(frozen=True)
class EvalConfig:
    """interval: steps between held-out evaluations, 0 for one at the end; position_bins: bins of the loss by position.

    How much is held out, and how many sequences of it an evaluation reads, are ``data.*`` keys.
    """

    interval: int = 0
    position_bins: int = 16


@dataclass(frozen=True)
class LogConfig:
    """interval_seconds: how often a line is printed where there is no terminal; plot: draw ``loss.png`` at the end."""

    interval_seconds: float = 5.0
    plot: bool = True


@dataclass(frozen=True)
class Config:
    """A whole run. ``load_config`` makes one; ``to_dict`` gives it back as plain data."""

    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernel: str = "auto"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as JSON and YAML know them."""
        return dataclasses.asdict(self)

    def replace(self, key: str, value: Any) -> Config:
        """A copy with one dotted key set to a value of its declared type."""
        section, _, name = key.partition(".")
        if not name:
            return dataclasses.replace(self, **{section: value})
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **{name: value})})


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides and check everything that needs no data, device or process.

    Raises ConfigError: one sentence that names the key, the value and what is allowed.
    """
    path = Path(path)
    settings = dict(_leaves(_read_yaml(path), _SCHEMA, ""))
    texts: dict[str, str] = {}
    for override in overrides:
        key, value = _parse_override(override)
        if _is_text(key):
            texts[key] = value
        else:
            settings[key] = value
    config = _build(settings, texts)
    if config.model.init_from:
        config = dataclasses.replace(config, model=with_shape(config.model, settings.keys() | texts.keys()))
    if not config.run.dir:
        config = config.replace("run.dir", str(Path("runs") / path.stem))
    check(config)
    config.model.validate()
    config.data.check()
    return config


# --- reading ---------------------------------------------------------------------------------------------------------


class _TextLoader(yaml.SafeLoader):
    """YAML in which every scalar is the text that was written, ``null`` excepted, and no key appears twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"{key.value} appears twice in one section (line {key.start_mark.line + 1}): keep one.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# A resolver table of our own: the class attribute is shared with yaml.SafeLoader otherwise.
_TextLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] == "tag:yaml.org,2002:null"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the config file {path} must hold sections ({', '.join(_SCHEMA)}), not one bare value.")
    return tree


def _schema(kind: type) -> dict[str, Any]:
    """Key → type of the values as OmegaConf has them, sections nested."""
    node = OmegaConf.structured(kind)
    tree: dict[str, Any] = {}
    for name in node:
        child = node._get_node(name)
        declared = OmegaConf.get_type(child) if isinstance(child, DictConfig) else None
        if isinstance(declared, type) and dataclasses.is_dataclass(declared):
            tree[str(name)] = _schema(declared)
        else:
            tree[str(name)] = child._metadata.ref_type
    return tree


_SCHEMA = _schema(Config)


def _lookup(key: str) -> Any:
    """Declared type of a dotted key, a dict for a section; ConfigError for a key that does not exist."""
    here: Any = _SCHEMA
    for part in key.split("."):
        if not isinstance(here, dict) or part not in here:
            raise ConfigError(_unknown_key(key))
        here = here[part]
    return here


def _is_text(key: str) -> bool:
    return _lookup(key) is str


def _all_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, child in tree.items():
        if isinstance(child, dict):
            yield from _all_keys(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown_key(key: str) -> str:
    known = list(_all_keys(_SCHEMA))
    prefix, _, last = key.rpartition(".")
    beside = [name for name in known if name.rpartition(".")[0] == prefix]
    close = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in beside], n=1)
    if close:
        return f"unknown key {key}: did you mean {prefix}{'.' if prefix else ''}{close[0]}?"
    # A right name in a wrong or misspelt section.
    homes = [name for name in known if name.rpartition(".")[2] == last]
    if homes:
        return f"unknown key {key}: did you mean {difflib.get_close_matches(key, homes, n=1, cutoff=0.0)[0]}?"
    section = key.partition(".")[0]
    if isinstance(_SCHEMA.get(section), dict):
        return f"unknown key {key}: {section} has the keys {', '.join(_all_keys(_SCHEMA[section]))}."
    close = difflib.get_close_matches(section, list(_SCHEMA), n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"unknown key {key}: the sections are {', '.join(_SCHEMA)}{hint}"


def _leaves(tree: dict[Any, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and written value of each setting of a file."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        declared = _lookup(key)
        if isinstance(declared, dict):
            if value is None:  # a section header without keys
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{key}={value} is not allowed: {key} is a section with the keys {', '.join(declared)}.")
            yield from _leaves(value, declared, f"{key}.")
        else:
            _refuse_interpolation(key, value)
            yield key, value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"the override {text!r} is not of the form key=value, for instance train.steps=100.")
    declared = _lookup(key)
    if isinstance(declared, dict):
        raise ConfigError(f"{key}={value} is not allowed: {key} is a section, set one of its keys: {', '.join(declared)}.")
    _refuse_interpolation(key, value)
    if declared is str:
        return key, value
    try:
        return key, yaml.load(value, Loader=_TextLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={value!r} cannot be read: {_allowed(key)}.") from error


def _refuse_interpolation(key: str, value: Any) -> None:
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("${" in text or text == "???"):
            raise ConfigError(
                f"{key}={text!r} is refused: values are taken as written, without ${{...}} or ???; write the value."
            )


def _allowed(key: str) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    declared = _lookup(key)
    return f"{key} must be {names.get(declared, str(declared).replace('typing.', ''))}"


def _build(settings: dict[str, Any], texts: dict[str, str]) -> Config:
    node = OmegaConf.structured(Config)
    _make_writable(node)
    for key, value in settings.items():
        try:
            OmegaConf.update(node, key, value)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise ConfigError(f"{key}={value!r} is not allowed: {_allowed(key)}.") from error
    for key, value in texts.items():
        OmegaConf.update(node, key, value)
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


def _make_writable(node: DictConfig) -> None:
    """OmegaConf marks the node of a frozen dataclass read-only; the freezing is for the objects made from it."""
    OmegaConf.set_readonly(node, False)
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            _make_writable(child)


# --- checks ----------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Ranges and choices of every key that is not the model's or the data's own; those classes check theirs."""
    for key, least in _AT_LEAST.items():
        value = _value(config, key)
        if not math.isfinite(value) or value < least:
            raise ConfigError(f"{key}={value} is not allowed: it must be a finite number, {least} or more.")
    for key, choices in _CHOICES.items():
        _require_choice(key, _value(config, key), choices)
    for key in ("optim.lr", "optim.eps", "train.timeout_seconds"):
        if not _value(config, key) > 0:
            raise ConfigError(f"{key}={_value(config, key)} is not allowed: it must be greater than 0.")
    for key in ("optim.beta1", "optim.beta2"):
        if not _value(config, key) < 1:
            raise ConfigError(f"{key}={_value(config, key)} is not allowed: it must be less than 1.")
    if config.optim.min_lr_ratio > 1:
        raise ConfigError(f"optim.min_lr_ratio={config.optim.min_lr_ratio} is not allowed: it must be 1 or less.")
    data = config.parallel.data
    if data and config.train.global_batch % data:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} does not divide over parallel.data={data} data ranks: "
            f"make it a multiple of {data}."
        )
    check_servers(config.parallel)
    check_keeping(config.parallel)
    check_nano_batches(config)
    check_offload(config.train)
    _check_engine(config.train)
    if "\0" in config.run.dir:
        raise ConfigError(f"run.dir={config.run.dir!r} cannot be a path: it holds a NUL character.")


def _check_engine(train: TrainConfig) -> None:
    if train.zero_stage not in ZERO_STAGES:
        raise ConfigError(f"train.zero_stage={train.zero_stage} is not allowed: it must be 1, 2 or 3.")


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(config, section)
    return getattr(value, name) if name else value


def _require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key}={value} is unknown: choose one of {', '.join(choices)}{hint or '.'}")


_AT_LEAST: dict[str, float] = {
    "train.steps": 1,
    "train.seed": 0,
    "train.global_batch": 1,
    "train.nano_batches": 0,
    "train.loss_chunk_tokens": 1,
    "train.timeout_seconds": 0,
    "train.hang_seconds": 0,
    "run.max_restarts": 0,
    "run.backoff_seconds": 0,
    "run.storage_patience_seconds": 0,
    "optim.lr": 0,
    "optim.warmup_steps": 0,
    "optim.min_lr_ratio": 0,
    "optim.weight_decay": 0,
    "optim.beta1": 0,
    "optim.beta2": 0,
    "optim.eps": 0,
    "optim.clip_norm": 0,
    "parallel.context": 1,
    "parallel.data": 0,
    "parallel.servers": 0,
    "parallel.keep_bytes": 0,
    "checkpoint.interval": 1,
    "checkpoint.keep": 1,
    "eval.interval": 0,
    "eval.position_bins": 1,
    "log.interval_seconds": 0,
}
_CHOICES: dict[str, Sequence[str]] = {
    "parallel.strategy": ("auto", *SCHEDULERS),
    "parallel.backward": KEEP_MODES,
    "kernel": ("auto", *BACKENDS),
    "train.device": DEVICES,
    "train.precision": PRECISIONS,
    "train.activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "train.engine": ENGINES,
}
