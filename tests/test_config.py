"""The configuration: what is read, what is refused, and in which words. Ring 1: no torch.distributed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distattn.config import MAY_CHANGE, Config, load_config
from distattn.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text("train: {steps: 7}\noptim:\n  lr: 3e-4\nmodel: {tie_embeddings: no}\n")
    return file


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_and_overrides_in_order(path: Path) -> None:
    config = load_config(path, ["train.seed=5", "train.seed=6", "model.rope.theta=5e5", "log.plot=off"])
    assert (config.train.steps, config.train.seed, config.optim.lr) == (7, 6, 3e-4)
    assert (config.model.rope.theta, config.model.tie_embeddings, config.log.plot) == (500_000.0, False, False)


def test_run_dir_is_stable_by_default(path: Path) -> None:
    assert load_config(path).run.dir == load_config(path, ["train.steps=9"]).run.dir == os.path.join("runs", "tiny")
    assert load_config(path, ["run.dir=/x"]).run.dir == "/x"


@pytest.mark.parametrize("text", ["1e3", "a: b\n- c", "[1, 2]", "null", "true", " x ", "'q'", "$(touch x)", "a=b", "007"])
def test_text_arrives_as_it_was_typed(path: Path, text: str) -> None:
    assert load_config(path, [f"data.source={text}"]).data.source == text


def test_text_in_a_file_stays_text(path: Path) -> None:
    assert load_config(write(path, "data: {source: 1e3, text_key: no}")).data.source == "1e3"


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${train.steps}", "a${b}", "???"])
@pytest.mark.parametrize("key", ["data.source", "train.steps"])
def test_interpolations_are_refused(path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.* is refused: values are taken as written"):
        load_config(path, [f"{key}={value}"])
    section, name = key.split(".")
    write(path, f"{section}: {{{name}: '{value}'}}")
    with pytest.raises(ConfigError, match=rf"^{key}=.* is refused"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=3", "unknown key train.stesp: did you mean train.steps?"),
        ("steps=3", "unknown key steps: did you mean train.steps?"),
        ("train.zzzz=3", "unknown key train.zzzz: train has the keys steps, seed, "),
        ("zzzz=3", "unknown key zzzz: the sections are run, train, data, model, "),
        ("train=3", "train=3 is not allowed: train is a section, set one of its keys: steps, "),
        ("train.steps", "the override 'train.steps' is not of the form key=value"),
        ("train.steps=1.5", "train.steps='1.5' is not allowed: train.steps must be a whole number."),
        ("train.steps=1e3", "train.steps='1e3' is not allowed: train.steps must be a whole number."),
        ("train.steps=[1]", "train.steps=['1'] is not allowed: train.steps must be a whole number."),
        ("train.steps=", "train.steps=None is not allowed: train.steps must be a whole number."),
        ("optim.lr=fast", "optim.lr='fast' is not allowed: optim.lr must be a number."),
        ("optim.lr=inf", "optim.lr=inf is not allowed: it must be a finite number, 0 or more."),
        ("optim.lr=0", "optim.lr=0.0 is not allowed: it must be greater than 0."),
        ("log.plot=maybe", "log.plot='maybe' is not allowed: log.plot must be true or false."),
        ("train.steps=0", "train.steps=0 is not allowed: it must be a finite number, 1 or more."),
        (
            "train.precision=bf16",
            "train.precision=bf16 is unknown: choose one of auto, float32, bfloat16; did you mean bfloat16?",
        ),
        ("parallel.strategy=rnig", "parallel.strategy=rnig is unknown: choose one of auto, ring, double_ring"),
        ("kernel=fast", "kernel=fast is unknown: choose one of auto, reference, "),
        ("data.source=", "data.source is empty"),
        ("data.seq_len=0", "data.seq_len=0"),
        ("model.num_kv_heads=5", "model.num_kv_heads is 5, but it must divide model.num_heads"),
        ("run.dir=a\0b", "holds a NUL character"),
    ],
)
def test_refusals_are_one_sentence_that_names_the_key(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_batches_must_divide(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch=3 does not divide over parallel.data=2 .* multiple of 2"):
        load_config(path, ["train.global_batch=3", "parallel.data=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 3", "is not valid YAML"),
        ("train: {steps: 3, steps: 4}", "steps appears twice"),
        ("- 1", "must hold sections"),
        ("train: 3", "train=3 is not allowed: train is a section"),
        ("tarin: {steps: 3}", "unknown key tarin"),
        ("train: !!python/object/apply:os.getpid []", "is not valid YAML"),
    ],
)
def test_files_that_cannot_be_read(path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(path, text))


def test_a_missing_file_and_an_empty_one(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the config file .*absent.yaml cannot be read: No such file"):
        load_config(path.with_name("absent.yaml"))
    assert load_config(write(path, "train:\n")).train == Config().train


def test_loading_twice_changes_nothing_shared(path: Path) -> None:
    load_config(path, ["train.steps=3", "model.rope.factor=2"])
    assert load_config(path).train.steps == 7
    assert load_config(path).model.rope.factor == 1.0


def test_keys_that_may_change_exist() -> None:
    sections = Config().to_dict()
    for pattern in MAY_CHANGE:
        section, _, key = pattern.partition(".")
        assert section in sections
        assert key in ("", "*") or key in sections[section]


def test_committed_configs_load() -> None:
    configs = Path(__file__).parent.parent / "configs"
    for file in sorted(configs.glob("*.yaml")):
        load_config(file)
