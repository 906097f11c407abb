"""Token ids of bytes and of tokenizers files, and what is said of a file that is none."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from distattn.data.tokenizer import ByteTokenizer, FileTokenizer, open_tokenizer
from distattn.errors import DataError

TEXTS = ["hello world", "grüße <s> & co", "", "x " * 50]


def trained() -> Tokenizer:
    """A byte-level BPE as models ship it: a BOS token that is added, and truncation and padding left on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["hello world"] * 20, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken("<s>")])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trained().save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def encode(tokenizer, *documents: bytes) -> list[list[int]]:
    lines: list[str] = []
    return [ids.tolist() for ids in tokenizer.encode(documents, lines.append)]


def test_bytes_are_their_own_ids() -> None:
    tokenizer = open_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.vocab_size == 256
    assert encode(tokenizer, b"a\xff\x00", b"") == [[97, 255, 0], []]


def test_documents_survive_whole_and_nothing_is_added(path: Path) -> None:
    ids = encode(open_tokenizer(str(path)), *(text.encode() for text in TEXTS))
    bos = trained().token_to_id("<s>")
    decoder = trained()
    assert [decoder.decode(document, skip_special_tokens=False) for document in ids] == TEXTS
    assert not any(bos in document for document in ids), "a special token's name in the text is text"
    assert len(ids[3]) > 8, "the file's truncation is off"


def test_directory_of_a_model_and_digest_of_the_content(path: Path) -> None:
    by_file, by_folder = FileTokenizer(str(path)), FileTokenizer(str(path.parent))
    assert by_file.digest == by_folder.digest != "bytes"
    path.write_text(path.read_text() + "\n")
    assert FileTokenizer(str(path)).digest != by_file.digest


def test_ids_with_holes_bound_the_vocabulary(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "b": 70_000, "?": 2}, unk_token="?")).save(str(tmp_path / "t.json"))
    tokenizer = FileTokenizer(str(tmp_path / "t.json"))
    assert tokenizer.vocab_size == 70_001
    assert encode(tokenizer, b"b", b"c") == [[70_000], [2]]


def test_bad_utf8_is_replaced_and_counted(path: Path) -> None:
    lines: list[str] = []
    ids = list(FileTokenizer(str(path)).encode([b"a\xffb", b"ok", b"\xed\xa0\x80"], lines.append))
    assert trained().decode(ids[0].tolist()) == "a�b"
    assert lines == ["2 documents are not valid UTF-8: their bad bytes were read as U+FFFD"]


def test_batches_keep_the_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distattn.data.tokenizer._BATCH_BYTES", 10)
    documents = [str(number).encode() for number in range(40)]
    expected = [trained().encode(d.decode(), add_special_tokens=False) for d in documents]
    got = encode(FileTokenizer(str(path)), *documents)
    assert got == [[i for i, keep in zip(e.ids, e.attention_mask, strict=True) if keep] for e in expected]
    assert next(iter(FileTokenizer(str(path)).encode([b"a"], print))).dtype == np.uint32


def test_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer='/no/such' cannot be read \(No such file.*give 'bytes'"):
        open_tokenizer("/no/such")
    bad = tmp_path / "bad.json"
    bad.write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=r"data\.tokenizer='.*bad\.json' is not a tokenizers file .*give 'bytes'"):
        open_tokenizer(str(bad))
    Tokenizer(models.BPE()).save(str(bad))
    with pytest.raises(DataError, match=r"data\.tokenizer='.*bad\.json' has an empty vocabulary"):
        open_tokenizer(str(bad))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="?")).save(str(bad))
    with pytest.raises(DataError, match=r"data\.tokenizer='.*bad\.json' cannot encode this source .*or 'bytes'"):
        encode(open_tokenizer(str(bad)), b"zebra")
