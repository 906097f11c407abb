"""The source's tokens on disk, tokenised once and mapped into memory by every process.

    CACHE_DIR/KEY/           published by one rename: it is whole, or it is not there
        tokens.bin           the documents' tokens, one document after the other, in the smallest fitting unsigned integer
        offsets.bin          int64 [num_documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]], never empty
        meta.json            the numbers of `TokenCache`
    CACHE_DIR/KEY.building/  of the process that holds the lock, or of one that was killed
    CACHE_DIR/KEY.lock       held by flock while building, so that the kernel releases it when the builder dies

KEY is a digest of what the tokens are made from (paths, sizes and times of the files, text key, tokenizer, format); the
`digest` of a TokenCache is one of the tokens themselves, the same on every machine that holds the same text.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from distattn.data.config import DataConfig
from distattn.data.shuffle import shuffled
from distattn.data.source import SourceFile, list_files, read_documents
from distattn.data.tokenizer import Tokenizer, open_tokenizer
from distattn.errors import DataError

FORMAT_VERSION = 1
TOKENS_FILE = "tokens.bin"
OFFSETS_FILE = "offsets.bin"
META_FILE = "meta.json"

Split = Literal["train", "held_out"]

_SPLIT_SEED = 0
_LOG_SECONDS = 5.0
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Tokens of all documents. `tokens`: uint8, uint16 or uint32 [num_tokens]; `offsets`: int64 [num_documents + 1]."""

    digest: str
    tokenizer_digest: str
    vocab_size: int
    num_documents: int
    num_tokens: int
    held_out_fraction: float
    tokens: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)

    def documents(self, split: Split) -> np.ndarray:
        """Where the documents of a split lie in `tokens`: int64 [n, 2], start and stop.

        Training documents come in the order of the source, held-out ones in a fixed shuffled order.
        """
        return self._splits[0 if split == "train" else 1]

    @cached_property
    def _splits(self) -> tuple[np.ndarray, np.ndarray]:
        return split_documents(np.asarray(self.offsets), self.held_out_fraction)


def split_documents(offsets: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out documents, int64 [n, 2] each, start and stop, none of them empty.

    Held out are the first documents, in a fixed shuffled order, that make up `fraction` of the tokens. Those longer
    than the wanted share stay in training (if all are, the shortest is held out), so that at most twice the share is
    held out. A lone document is split by position: its end is held out. It does not depend on the seed of the run.
    `fraction` is at most 0.5 and there are at least two tokens.
    """
    ranges = np.stack([offsets[:-1], offsets[1:]], axis=1)
    num_tokens = int(offsets[-1])
    wanted = max(1, int(fraction * num_tokens))
    if len(ranges) == 1:
        cut = num_tokens - wanted
        return np.array([[0, cut]], np.int64), np.array([[cut, num_tokens]], np.int64)
    lengths = np.diff(offsets)
    order = shuffled(len(ranges), _SPLIT_SEED)
    order = order[lengths[order] <= wanted]
    if not len(order):
        order = np.array([np.argmin(lengths)])
    held_out = order[: np.searchsorted(np.cumsum(lengths[order]), wanted) + 1]
    in_training = np.ones(len(ranges), bool)
    in_training[held_out] = False
    return ranges[in_training], ranges[held_out]


def default_cache_dir() -> Path:
    """`distattn/tokens` in the user's cache directory, as the XDG base directory specification places it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "distattn" / "tokens"


def open_cache(config: DataConfig, *, log: Callable[[str], None] | None = None) -> TokenCache:
    """The tokens of `config.source`, tokenised now if no process has done it before.

    Any number of processes may call this at once: one builds, the others wait for it. `log` receives a line for each
    thing that takes time. Raises DataError, in one sentence that names the key, for a source, tokenizer or cache
    directory that cannot be used.
    """
    log = log or _silent
    config.check()
    tokenizer = open_tokenizer(config.tokenizer)
    files = list_files(config.source)
    root = Path(os.path.expanduser(config.cache_dir)).absolute() if config.cache_dir else default_cache_dir()
    path = root / _key(files, tokenizer, config.text_key)
    cache = _load(path, config.held_out_fraction)
    if cache is None:
        try:
            with _locked(root, path.name, log):
                cache = _load(path, config.held_out_fraction)
                if cache is None:
                    _publish(path, config, files, tokenizer, log)
                    cache = _load(path, config.held_out_fraction)
        except OSError as error:
            raise _cache_error(root, error) from error
    assert cache is not None
    return cache


def _silent(message: str) -> None:
    pass


def _key(files: list[SourceFile], tokenizer: Tokenizer, text_key: str) -> str:
    made_from = [FORMAT_VERSION, tokenizer.digest, tokenizer.vocab_size, text_key]
    made_from += [[file.path, file.size_bytes, file.mtime_ns] for file in files]
    # Paths that are not UTF-8 reach us with surrogate escapes, which JSON writes as ASCII.
    return hashlib.blake2b(json.dumps(made_from).encode(), digest_size=16).hexdigest()


def _cache_error(root: Path, error: OSError) -> DataError:
    if error.errno in _NO_ROOM:
        return DataError(
            f"data.cache_dir={str(root)!r} has no space left for the tokens: free some, "
            "or set data.cache_dir to a directory with room."
        )
    return DataError(
        f"data.cache_dir={str(root)!r} cannot hold the tokens ({error.strerror or error}): "
        "set data.cache_dir to a directory that you may write to."
    )


@contextlib.contextmanager
def _locked(root: Path, name: str, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of one key. The lock file stays: removing it would let two processes lock two different files."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}.lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for the process that is building the token cache {root / name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(path: Path, held_out_fraction: float) -> TokenCache | None:
    """The published cache, or None where there is none or somebody has damaged it."""
    try:
        meta = json.loads((path / META_FILE).read_bytes())
        dtype = _dtype(meta["vocab_size"])
        sizes = {TOKENS_FILE: meta["num_tokens"] * dtype.itemsize, OFFSETS_FILE: (meta["num_documents"] + 1) * 8}
        if any((path / name).stat().st_size != size for name, size in sizes.items()):
            return None
        tokens = np.memmap(path / TOKENS_FILE, dtype, mode="r")
        offsets = np.memmap(path / OFFSETS_FILE, np.dtype("<i8"), mode="r")
        return TokenCache(
            digest=meta["digest"],
            tokenizer_digest=meta["tokenizer_digest"],
            vocab_size=meta["vocab_size"],
            num_documents=meta["num_documents"],
            num_tokens=meta["num_tokens"],
            held_out_fraction=held_out_fraction,
            tokens=np.asarray(tokens),
            offsets=np.asarray(offsets),
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise _cache_error(path.parent, error) from error


def _publish(path: Path, config: DataConfig, files: list[SourceFile], tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
    """Build beside `path` and rename; the caller holds the lock, so that what lies there was left by the dead."""
    building = path.with_name(f"{path.name}.building")
    for leftover in (building, path):
        if leftover.exists():
            log(f"removing an unfinished or damaged token cache {leftover}")
            shutil.rmtree(leftover)
    building.mkdir()
    try:
        _build(building, config, files, tokenizer, log)
        os.rename(building, path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _sync(path.parent)


def _build(
    building: Path, config: DataConfig, files: list[SourceFile], tokenizer: Tokenizer, log: Callable[[str], None]
) -> None:
    """Write the three files of the cache and force them to disk."""
    began = time.perf_counter()
    num_bytes = sum(file.size_bytes for file in files)
    log(f"tokenising data.source={config.source!r}: {len(files)} files, {num_bytes / 1e6:.1f} MB")
    dtype = _dtype(tokenizer.vocab_size)
    digest = hashlib.blake2b(json.dumps([tokenizer.digest, tokenizer.vocab_size]).encode(), digest_size=16)
    offsets = array("q", [0])
    with open(building / TOKENS_FILE, "wb") as out:
        for ids in tokenizer.encode(_documents(config, files, log), log):
            if len(ids):
                data = ids.astype(dtype, copy=False).tobytes()
                out.write(data)
                digest.update(data)
                offsets.append(offsets[-1] + len(ids))
    if offsets[-1] < 2:
        raise DataError(
            f"data.source={config.source!r} holds no text to train on ({offsets[-1]} tokens in {len(files)} files): "
            "give one with at least two tokens."
        )
    table = np.array(offsets, np.dtype("<i8")).tobytes()
    digest.update(table)
    (building / OFFSETS_FILE).write_bytes(table)
    meta = {
        "format": FORMAT_VERSION,
        "source": config.source,
        "digest": digest.hexdigest(),
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "num_documents": len(offsets) - 1,
        "num_tokens": offsets[-1],
    }
    (building / META_FILE).write_text(json.dumps(meta, indent=2))
    for name in (TOKENS_FILE, OFFSETS_FILE, META_FILE):
        _sync(building / name)
    if list_files(config.source) != files:
        raise DataError(f"data.source={config.source!r} was changed while it was read: run again when nothing writes to it.")
    log(f"tokenised {meta['num_documents']} documents, {offsets[-1]} tokens in {time.perf_counter() - began:.1f} s")


def _documents(config: DataConfig, files: list[SourceFile], log: Callable[[str], None]) -> Iterator[bytes]:
    last = time.monotonic()
    for number, file in enumerate(files):
        if time.monotonic() - last > _LOG_SECONDS:
            last = time.monotonic()
            log(f"tokenising: {number} of {len(files)} files read")
        yield from read_documents(file, config.source, config.text_key)


def _dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every id, little-endian on every machine."""
    if vocab_size <= 1 << 8:
        return np.dtype("u1")
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
