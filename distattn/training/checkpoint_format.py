"""What a checkpoint looks like on disk, and how one is read without trusting it.

    step-N/
      manifest.json                     step, meta, and the size and blake2b of every file below; written last
      shard-R-of-W.safetensors          the blocks of tensors that rank R wrote
      shard-R-of-W.json                 for each block: the tensor's global shape and dtype, and the block's place in it

A tensor is a set of disjoint blocks that cover it. A reader asks for any block of any tensor, so the ranks that read
need not be those that wrote. Only safetensors and JSON are parsed: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distattn.errors import CheckpointError
from distattn.training.atomic_file import replace_text
from distattn.training.checkpoint_parts import Block, Part, TensorInfo

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d+)")
_SHARD_FILE = re.compile(r"shard-\d+-of-\d+\.(safetensors|json)")
_READ_BYTES = 1 << 22
# What a parser may raise on bytes that somebody else wrote.
_DAMAGE = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class FileRecord:
    """Size and blake2b (hex) of a file, as the manifest keeps them."""

    num_bytes: int
    digest: str


@dataclass(frozen=True)
class _Stored:
    """A block and the file that holds it."""

    file: str
    block: Block


def step_folder(directory: Path, step: int) -> Path:
    return directory / f"step-{step}"


def published_steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in ``directory``, ascending; empty where there is none."""
    path = Path(directory)
    if not path.is_dir():
        return []
    found = [_STEP_FOLDER.fullmatch(entry.name) for entry in path.iterdir() if entry.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def write_shard(folder: Path, rank: int, world: int, parts: Sequence[Part]) -> dict[str, FileRecord]:
    """Write one rank's parts (values on the CPU, contiguous) and their index, synced to disk; returns the files' records.

    Raises OSError or SafetensorError where the file system refuses.
    """
    stem = f"shard-{rank:05d}-of-{world:05d}"
    data, index = folder / f"{stem}.safetensors", folder / f"{stem}.json"
    _write_index(index, parts)
    save_file({part.name: part.values for part in parts}, data)
    with open(data, "rb") as stream:
        # safetensors makes files that only their owner can read; the index has the mode that the user's umask asks for.
        os.fchmod(stream.fileno(), index.stat().st_mode & 0o777)
        os.fsync(stream.fileno())
    return {path.name: record_of(path) for path in (data, index)}


def _write_index(path: Path, parts: Sequence[Part]) -> None:
    rows = {
        part.name: {
            "shape": part.info.shape,
            "dtype": _dtype_name(part.info.dtype),
            "offset": part.block.offset,
            "block": part.block.shape,
        }
        for part in parts
    }
    replace_text(path, json.dumps({"format": FORMAT_VERSION, "tensors": rows}, ensure_ascii=False) + "\n")


def write_manifest(folder: Path, step: int, meta: Mapping[str, Any], files: Mapping[str, FileRecord]) -> None:
    """Write the manifest, which makes the folder a checkpoint; it carries a digest of itself."""
    body = {
        "format": FORMAT_VERSION,
        "step": step,
        "meta": dict(meta),
        "files": {name: {"bytes": record.num_bytes, "blake2b": record.digest} for name, record in sorted(files.items())},
    }
    replace_text(folder / MANIFEST, json.dumps({"blake2b": _body_digest(body), "body": body}, indent=1) + "\n")


def record_of(path: Path) -> FileRecord:
    """Size and digest of a file's content."""
    digest, num_bytes = hashlib.blake2b(digest_size=32), 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileRecord(num_bytes, digest.hexdigest())


class CheckpointReader:
    """One published checkpoint, opened for reading.

    Opening checks the manifest and the indices (their digests included); ``verify`` checks the content of the large
    files. Whatever is damaged is a CheckpointError that names the file and what is wrong with it.
    """

    step: int
    meta: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stored: dict[str, list[_Stored]] = {}
        self.tensors = {}
        self._read_manifest()
        for name in self.files:
            if name.endswith(".json"):
                self._check_file(name)
                self._read_index(name)

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compare size and digest of ``files`` (default: all) with the manifest's."""
        for name in self.files if files is None else files:
            self._check_file(name)

    def read(self, name: str) -> Tensor:
        """The whole tensor ``name``, on the CPU."""
        info = self._info(name)
        values = torch.empty(info.shape, dtype=info.dtype)
        self.read_into([Part(name, info, Block((0,) * values.ndim, info.shape), values)])
        return values

    def check(self, parts: Sequence[Part]) -> None:
        """Refuse (CheckpointError) unless every part can be read: its name, global shape, dtype, all of its block."""
        for part in parts:
            if math.prod(part.info.shape) == 0 and part.name not in self.tensors:
                continue  # nothing was stored, nothing is to be read
            stored = self._info(part.name)
            if stored != part.info:
                raise CheckpointError(
                    f"{self.path}: {part.name} has shape {list(stored.shape)} and dtype {_dtype_name(stored.dtype)} in the "
                    f"checkpoint, and shape {list(part.info.shape)} and dtype {_dtype_name(part.info.dtype)} here"
                )
            if part.num_held and sum(part.block.meet(kept.block).numel for kept in self._stored[part.name]) != part.num_held:
                raise CheckpointError(f"{self.path}: the blocks of {part.name} do not cover it exactly once")
        for file, rows in self._by_file(parts).items():
            self._check_header(file, {part.name: kept.shape for part, kept in rows})

    def read_into(self, parts: Sequence[Part]) -> None:
        """Copy the stored values into those of ``parts``, on any device."""
        # One file at a time: a thousand ranks' files would not all fit under a process's limit of open files.
        for file, rows in self._by_file(parts).items():
            try:
                with safe_open(str(self.path / file), framework="pt") as shard, torch.no_grad():
                    for part, kept in rows:
                        common = part.block.meet(kept)
                        whole = common == kept
                        values = shard.get_tensor(part.name) if whole else shard.get_slice(part.name)[common.within(kept)]
                        part.values[common.within(part.block)].copy_(values)
            except _DAMAGE as error:
                raise CheckpointError(f"{self.path / file} cannot be read: {_one_line(error)}") from error

    def _by_file(self, parts: Sequence[Part]) -> dict[str, list[tuple[Part, Block]]]:
        """The stored blocks that each part takes something from, under the file that holds them."""
        rows: dict[str, list[tuple[Part, Block]]] = {}
        for part in parts:
            for kept in self._stored.get(part.name, ()) if part.num_held else ():
                if part.block.meet(kept.block).numel:
                    rows.setdefault(kept.file, []).append((part, kept.block))
        return rows

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}: it was written by another model or optimiser")
        return self.tensors[name]

    def _read_manifest(self) -> None:
        path = self.path / MANIFEST
        document = self._parse(path)
        try:
            body = document["body"]
            if document["blake2b"] != _body_digest(body):
                raise CheckpointError(f"{path} is damaged: its digest is not that of its content")
            if body["format"] != FORMAT_VERSION:
                raise CheckpointError(
                    f"{path} has format {body['format']}, and this distattn reads format {FORMAT_VERSION}: "
                    "use the version that wrote it"
                )
            self.step, self.meta = int(body["step"]), dict(body["meta"])
            self.files = {name: FileRecord(int(row["bytes"]), row["blake2b"]) for name, row in body["files"].items()}
        except _DAMAGE as error:
            raise CheckpointError(f"{path} is damaged: {_one_line(error)}") from error
        for name in self.files:
            if not _SHARD_FILE.fullmatch(name):
                raise CheckpointError(f"{path} lists a file {name!r}, which is no file of a checkpoint")

    def _read_index(self, name: str) -> None:
        path, data = self.path / name, name.removesuffix(".json") + ".safetensors"
        document = self._parse(path)
        try:
            for tensor, row in document["tensors"].items():
                info = TensorInfo(tuple(map(int, row["shape"])), _dtype_named(row["dtype"]))
                block = Block(tuple(map(int, row["offset"])), tuple(map(int, row["block"])))
                if self.tensors.setdefault(tensor, info) != info or len(block.offset) != len(info.shape):
                    raise ValueError(f"{tensor} has another shape or dtype than in the other files")
                self._stored.setdefault(tensor, []).append(_Stored(data, block))
        except _DAMAGE as error:
            raise CheckpointError(f"{path} is damaged: {_one_line(error)}") from error

    def _parse(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes().decode("utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except _DAMAGE as error:
            raise CheckpointError(f"{path} is not the JSON that was written: {_one_line(error)}") from error

    def _check_file(self, name: str) -> None:
        path, expected = self.path / name, self.files[name]
        try:
            size = path.stat().st_size
            if size != expected.num_bytes:
                raise CheckpointError(f"{path} has {size} bytes instead of {expected.num_bytes}")
            if record_of(path) != expected:
                raise CheckpointError(f"{path} is damaged: its digest is not the one that was written")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {_one_line(error)}") from error

    def _check_header(self, file: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        try:
            with safe_open(str(self.path / file), framework="pt") as shard:
                for name, shape in shapes.items():
                    if tuple(shard.get_slice(name).get_shape()) != shape:
                        raise ValueError(f"{name} does not have the shape that the index gives")
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path / file} is missing") from error
        except _DAMAGE as error:
            raise CheckpointError(f"{self.path / file} is damaged: {_one_line(error)}") from error


def _body_digest(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_named(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
