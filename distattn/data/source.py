"""From `data.source` to documents: which files there are, and the text of each.

A text file is one document, a .jsonl line is one, a row of a .parquet file is one. Documents are bytes: text is passed
on as it lies in the file, whatever its encoding, and strings of .jsonl and .parquet as UTF-8.
"""

from __future__ import annotations

import glob
import json
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distattn.errors import DataError

ALLOWED = "a directory, file or glob of text, .jsonl or .parquet, or 'stdlib'"

_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_BINARY_PROBE_BYTES = 8192


@dataclass(frozen=True)
class SourceFile:
    """A file of the source as it was when it was listed; `format` is text, jsonl or parquet."""

    path: str
    format: str
    size_bytes: int
    mtime_ns: int


def list_files(source: str) -> list[SourceFile]:
    """The files that `data.source` names, in the order in which their documents are numbered.

    A directory is walked without following links to directories, leaving out names that begin with a dot. Raises
    DataError where there is none.
    """
    if source == "stdlib":
        root = sysconfig.get_path("stdlib")
        paths = [path for path in _walk(root, skip=_NOT_STDLIB) if path.endswith(".py")]
    else:
        paths = _resolve(os.path.expanduser(source))
    if not paths:
        raise DataError(f"data.source={source!r} names no file: give {ALLOWED}.")
    return [_stat(path, source) for path in paths]


def _resolve(path: str) -> list[str]:
    # What exists is taken by its name, so that a directory called "a[1]" needs no quoting.
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    found: dict[str, None] = {}
    for match in matches:
        for file in _walk(match) if os.path.isdir(match) else [match]:
            found[os.path.abspath(file)] = None
    return list(found)


def _walk(root: str, skip: frozenset[str] = frozenset()) -> list[str]:
    """Regular files below `root`, ordered by path: a directory that was moved keeps its order."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        paths = (os.path.join(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if os.path.isfile(path)]
    return sorted(found)


def _stat(path: str, source: str) -> SourceFile:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, source, error) from error
    if not stat.S_ISREG(status.st_mode):
        # Reading a pipe or a device may never end.
        raise DataError(f"data.source={source!r}: {path} is neither a file nor a directory: give {ALLOWED}.")
    extension = os.path.splitext(path)[1].lower()
    return SourceFile(path, _FORMATS.get(extension, "text"), status.st_size, status.st_mtime_ns)


def read_documents(file: SourceFile, source: str, text_key: str) -> Iterator[bytes]:
    """The documents of one file, in order, empty ones included.

    Raises DataError naming the file (and line) that cannot be read, is not what its name says, or lacks `text_key`.
    """
    try:
        if file.format == "jsonl":
            yield from _read_jsonl(file.path, source, text_key)
        elif file.format == "parquet":
            yield from _read_parquet(file.path, source, text_key)
        else:
            yield _read_text(file.path, source)
    except OSError as error:
        raise _unreadable(file.path, source, error) from error


def _unreadable(path: str, source: str, error: OSError) -> DataError:
    return DataError(
        f"data.source={source!r}: {path} cannot be read ({error.strerror or error}): "
        "make it readable, or give a source without it."
    )


def _read_text(path: str, source: str) -> bytes:
    with open(path, "rb") as file:
        text = file.read()
    if b"\0" in text[:_BINARY_PROBE_BYTES]:
        # A compressed or binary file that lies among the text would otherwise be trained on without a word.
        raise DataError(
            f"data.source={source!r}: {path} is not text (it has a zero byte): unpack or convert it, "
            "or give a source without it."
        )
    return text


def _read_jsonl(path: str, source: str, text_key: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"data.source={source!r}: {where} is not JSON ({error}): repair or remove the line.") from error
            if not isinstance(record, dict) or text_key not in record:
                fields = ", ".join(map(repr, record)) if isinstance(record, dict) else "no field at all"
                raise _no_text(where, text_key, f"that line has {fields}")
            yield _text_bytes(record[text_key], where, text_key)


def _read_parquet(path: str, source: str, text_key: str) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"data.source={source!r}: {path} needs pyarrow, which is not installed: pip install 'distattn[data]'."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise _no_text(path, text_key, f"its columns are {', '.join(map(repr, columns))}")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    yield _text_bytes(value, f"{path}, row {row},", text_key)
                    row += 1
    except pyarrow.ArrowException as error:
        raise DataError(
            f"data.source={source!r}: {path} is not a parquet file that pyarrow can read ({error}): "
            "repair it, or give a source without it."
        ) from error


def _no_text(where: str, text_key: str, has: str) -> DataError:
    return DataError(f"data.text_key={text_key!r} is not in {where}: {has}; set data.text_key to the right one.")


def _text_bytes(value: Any, where: str, text_key: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        # JSON may hold half a surrogate pair, which strict UTF-8 has no bytes for.
        return value.encode("utf-8", "surrogatepass")
    raise DataError(
        f"data.text_key={text_key!r}: {where} holds a {type(value).__name__} there and not text: "
        "repair it, or set data.text_key to the one with the text."
    )
