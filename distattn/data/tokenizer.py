"""From documents to token ids: bytes, or a Hugging Face tokenizer file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from distattn.errors import DataError

_BATCH_BYTES = 4 << 20


class Tokenizer(Protocol):
    """`vocab_size` bounds every id from above; `digest` names the mapping and does not depend on the file's place."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def encode(self, documents: Iterable[bytes], log: Callable[[str], None]) -> Iterator[np.ndarray]:
        """The ids of each document, in order: an unsigned integer array [num_tokens] each."""
        ...


def open_tokenizer(tokenizer: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; DataError where there is none."""
    return ByteTokenizer() if tokenizer == "bytes" else FileTokenizer(tokenizer)


class ByteTokenizer:
    """A token is a byte. No end-of-document token: the mask keeps documents apart."""

    vocab_size = 256
    digest = "bytes"

    def encode(self, documents: Iterable[bytes], log: Callable[[str], None]) -> Iterator[np.ndarray]:
        for document in documents:
            yield np.frombuffer(document, np.uint8)


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    Text stays text: no special token is added, none is recognised inside a document, and the file's own truncation and
    padding are switched off. Bytes that are not UTF-8 become U+FFFD, and the log says in how many documents.
    """

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        file = os.path.expanduser(path)
        if os.path.isdir(file):
            file = os.path.join(file, "tokenizer.json")
        try:
            with open(file, "rb") as stream:
                content = stream.read()
        except OSError as error:
            raise DataError(
                f"data.tokenizer={path!r} cannot be read ({error.strerror}): give 'bytes' or the path of a tokenizer.json."
            ) from error
        try:
            loaded: Any = HuggingFaceTokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(
                f"data.tokenizer={path!r} is not a tokenizers file ({error}): give 'bytes' or the path of a tokenizer.json."
            ) from error
        loaded.no_truncation()
        loaded.no_padding()
        loaded.encode_special_tokens = True
        self._path = path
        self._tokenizer = loaded
        # Ids may have holes, so that the number of entries bounds nothing.
        self.vocab_size = max(loaded.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.vocab_size:
            raise DataError(f"data.tokenizer={path!r} has an empty vocabulary: give one that was trained.")
        self.digest = hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode(self, documents: Iterable[bytes], log: Callable[[str], None]) -> Iterator[np.ndarray]:
        replaced = 0
        for batch in _batches(documents):
            texts = []
            for document in batch:
                try:
                    texts.append(document.decode("utf-8"))
                except UnicodeDecodeError:
                    texts.append(document.decode("utf-8", "replace"))
                    replaced += 1
            for encoding in self._encode_batch(texts):
                yield np.array(encoding.ids, np.uint32)
        if replaced:
            log(f"{replaced} documents are not valid UTF-8: their bad bytes were read as U+FFFD")

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        try:
            return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(
                f"data.tokenizer={self._path!r} cannot encode this source ({error}): "
                "give one that knows its characters, or 'bytes'."
            ) from error


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lists of documents large enough to keep the library's threads busy and small enough for memory."""
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) + 1
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
