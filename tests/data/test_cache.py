"""The cache: what it holds, when it is built, and that builders may race, die and run out of space."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models

from distattn.data import DataConfig, TokenCache, open_cache
from distattn.data.cache import default_cache_dir, split_documents
from distattn.errors import ConfigError, DataError

DOCUMENTS = [b"one", b"", b"two\xff", b"three three"]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    source = tmp_path / "source"
    source.mkdir()
    for number, document in enumerate(DOCUMENTS):
        (source / f"{number}.txt").write_bytes(document)
    return DataConfig(source=str(source), cache_dir=str(tmp_path / "cache"))


def entries(config: DataConfig) -> list[str]:
    """What lies in the cache directory, without the locks, which stay."""
    return sorted(path.suffix for path in Path(config.cache_dir).iterdir() if path.suffix != ".lock")


def open_logged(config: DataConfig) -> tuple[TokenCache, str]:
    lines: list[str] = []
    return open_cache(config, log=lines.append), "\n".join(lines)


def test_tokens_of_all_documents_without_the_empty_ones(config: DataConfig) -> None:
    cache = open_cache(config)
    assert cache.tokens.dtype == np.uint8
    assert not cache.tokens.flags.writeable
    assert [bytes(cache.tokens[a:b]) for a, b in zip(cache.offsets, cache.offsets[1:])] == [d for d in DOCUMENTS if d]
    assert (cache.num_documents, cache.num_tokens, cache.vocab_size) == (3, 18, 256)
    assert cache.tokenizer_digest == "bytes"


def test_second_opening_builds_nothing(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first, log = open_logged(config)
    assert "tokenised 3 documents, 18 tokens" in log
    monkeypatch.setattr("distattn.data.cache._publish", None)
    second, log = open_logged(config)
    assert log == ""
    assert second.digest == first.digest


def test_digest_is_of_the_tokens_and_the_key_of_the_files(config: DataConfig, tmp_path: Path) -> None:
    first = open_cache(config)
    os.utime(Path(config.source) / "0.txt", (1, 1))
    again, log = open_logged(config)
    assert "tokenised" in log
    assert again.digest == first.digest
    (Path(config.source) / "0.txt").write_bytes(b"eno")
    assert open_cache(config).digest != first.digest
    # The same bytes, cut elsewhere, are another data set.
    for name, documents in (("a", [b"ab", b"c"]), ("b", [b"a", b"bc"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": d.decode()}) + "\n" for d in documents))
    cut = [open_cache(DataConfig(source=str(tmp_path / f"{n}.jsonl"), cache_dir=config.cache_dir)) for n in "ab"]
    assert bytes(cut[0].tokens) == bytes(cut[1].tokens)
    assert cut[0].digest != cut[1].digest


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)])
def test_smallest_dtype_that_fits(config: DataConfig, tmp_path: Path, largest: int, dtype: type) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"one": 0, "three three": largest, "?": 1}, unk_token="?")).save(str(path))
    cache = open_cache(DataConfig(source=config.source, cache_dir=config.cache_dir, tokenizer=str(path)))
    assert cache.tokens.dtype == dtype
    assert cache.tokens.tolist() == [0, 1, largest]
    assert cache.vocab_size == largest + 1


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_damaged_cache_is_built_again(config: DataConfig, name: str, damage: str) -> None:
    digest = open_cache(config).digest
    (path,) = Path(config.cache_dir).glob(f"*/{name}")
    path.unlink() if damage == "gone" else os.truncate(path, path.stat().st_size - 1)
    cache, log = open_logged(config)
    assert "removing an unfinished or damaged token cache" in log
    assert cache.digest == digest
    assert entries(config) == [""]


def test_default_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache_dir() == Path("/cache/distattn/tokens")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == Path("/home/someone/.cache/distattn/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path("/home/someone/.cache/distattn/tokens")


def test_stdlib_is_enough_text_for_long_sequences(tmp_path: Path) -> None:
    began = time.perf_counter()
    cache = open_cache(DataConfig(cache_dir=str(tmp_path)))
    assert time.perf_counter() - began < 20
    assert cache.num_tokens > 8_000_000
    assert cache.num_documents > 400


# Builders that race and die. The child opens the cache with a reader that reports and then waits.

CHILD = """
import sys, time
from pathlib import Path
import distattn.data.cache as cache
from distattn.data import DataConfig

folder, source, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
read = cache.read_documents

def slow(*args):
    yield from read(*args)
    with open(folder / "reads", "a") as file:
        file.write(args[0].path + "\\n")
    time.sleep(seconds)

cache.read_documents = slow
print(cache.open_cache(DataConfig(source=source, cache_dir=str(folder / "cache")), log=print).digest)
"""


def start_builder(folder: Path, source: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", CHILD, str(folder), source, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the builder ended too early"
        assert time.monotonic() < deadline, "the builder read nothing"
        time.sleep(0.01)


def test_of_two_processes_one_builds_and_the_other_waits(config: DataConfig, tmp_path: Path) -> None:
    builders = [start_builder(tmp_path, config.source, 0.5) for _ in range(2)]
    out = [builder.communicate(timeout=60)[0].splitlines() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len((tmp_path / "reads").read_text().splitlines()) == len(DOCUMENTS), "each file is read by one process"
    assert out[0][-1] == out[1][-1] == open_cache(config).digest
    assert sum("tokenising" in "".join(lines) for lines in out) == 1


def test_second_process_waits_for_a_builder_that_is_at_work(config: DataConfig, tmp_path: Path) -> None:
    with start_builder(tmp_path, config.source, 0.4) as builder:
        wait_for(tmp_path / "reads", builder)
        cache, log = open_logged(config)
        assert "waiting for the process that is building" in log
        assert "tokenising" not in log
        assert builder.communicate(timeout=60)[0].splitlines()[-1] == cache.digest


def test_killed_builder_leaves_no_cache_and_the_next_one_builds(config: DataConfig, tmp_path: Path) -> None:
    with start_builder(tmp_path, config.source, 60) as builder:
        wait_for(tmp_path / "reads", builder)
        builder.send_signal(signal.SIGKILL)
        builder.wait(timeout=60)
    assert entries(config) == [".building"], "unfinished, and nothing published"
    cache, log = open_logged(config)
    assert "removing an unfinished or damaged token cache" in log
    assert cache.num_tokens == 18
    assert entries(config) == [""]


# What cannot be used


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full (Linux)")
def test_no_space_left(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distattn.data.cache.TOKENS_FILE", "/dev/full")
    with pytest.raises(DataError, match=r"data\.cache_dir='.*cache' has no space left for the tokens: free some, or set"):
        open_cache(config)
    assert entries(config) == [], "nothing is left behind"
    monkeypatch.undo()
    assert open_cache(config).num_tokens == 18


def test_cache_directory_that_cannot_be_made(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = DataConfig(source=config.source, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"data\.cache_dir='.*' cannot hold the tokens \(Not a directory\): set data"):
        open_cache(bad)


@pytest.mark.parametrize("content", [b"", b"x"])
def test_source_without_text(config: DataConfig, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    bad = DataConfig(source=str(tmp_path / "a.txt"), cache_dir=config.cache_dir)
    with pytest.raises(DataError, match=r"data\.source='.*a\.txt' holds no text to train on \([01] tokens in 1 files\)"):
        open_cache(bad)
    assert entries(config) == []


def test_source_that_changes_while_it_is_read(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from distattn.data.source import read_documents

    def read_and_touch(file, *args):
        yield from read_documents(file, *args)
        os.utime(file.path, (1, 1))

    monkeypatch.setattr("distattn.data.cache.read_documents", read_and_touch)
    with pytest.raises(DataError, match=r"data\.source='.*' was changed while it was read: run again"):
        open_cache(config)
    assert entries(config) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": " "}, r"data\.source is empty: give"),
        ({"text_key": ""}, r"data\.text_key is empty: name"),
        ({"seq_len": 0}, r"data\.seq_len=0 is not a length: give"),
        ({"held_out_fraction": 0.0}, r"data\.held_out_fraction=0\.0 is out of range: give"),
        ({"held_out_fraction": 0.6}, r"data\.held_out_fraction=0\.6 is out of range: give"),
        ({"held_out_fraction": float("nan")}, r"data\.held_out_fraction=nan is out of range: give"),
        ({"eval_sequences": -1}, r"data\.eval_sequences=-1 is negative: give"),
    ],
)
def test_bad_values(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_cache(DataConfig(**values))


def test_config_is_structured() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), {"seq_len": 100})
    assert OmegaConf.to_object(merged) == DataConfig(seq_len=100)


# The split


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.floats(0.001, 0.5))
def test_split_is_a_partition_with_something_on_both_sides(lengths: list[int], fraction: float) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_tokens = int(offsets[-1])
    if num_tokens < 2:
        return
    train, held_out = split_documents(offsets, fraction)
    assert len(train)
    assert len(held_out)
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    both = sorted(map(tuple, np.concatenate([train, held_out]).tolist()))
    if len(lengths) == 1:
        assert both == [(0, train[0, 1]), (held_out[0, 0], num_tokens)]
    else:
        assert both == list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    share = np.diff(held_out).sum()
    assert share < 2 * max(1, fraction * num_tokens) or (len(held_out) == 1 and share == min(lengths))
    again = split_documents(offsets, fraction)
    assert all(np.array_equal(a, b) for a, b in zip(again, (train, held_out), strict=True))


def test_one_document_is_split_by_position(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 101)))
    config = DataConfig(source=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), held_out_fraction=0.1)
    cache = open_cache(config)
    assert cache.documents("train").tolist() == [[0, 90]]
    assert cache.documents("held_out").tolist() == [[90, 100]]
