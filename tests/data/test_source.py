"""Which files a source names, what their documents are, and what is said of a source that cannot be used."""

import json
import os
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from distattn.data.source import list_files, read_documents
from distattn.errors import DataError


def documents(source: str | Path, text_key: str = "text") -> list[bytes]:
    return [d for file in list_files(str(source)) for d in read_documents(file, str(source), text_key)]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_stdlib_is_its_python_source_without_tests_or_installed_packages() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [Path(file.path).relative_to(root) for file in list_files("stdlib")]
    assert Path("argparse.py") in paths
    assert Path("json/decoder.py") in paths
    assert all(path.suffix == ".py" for path in paths)
    assert not {"test", "tests", "site-packages", "dist-packages", "__pycache__"} & {p for q in paths for p in q.parts}
    assert paths == sorted(paths, key=str)


def test_directory_is_walked_in_a_fixed_order_and_formats_may_be_mixed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_bytes(b"third")
    write_jsonl(tmp_path / "a.jsonl", {"text": "first"}, {"text": "second"})
    write_parquet(tmp_path / "c.parquet", text=["fourth", "fifth"])
    (tmp_path / ".hidden").write_bytes(b"no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"no")
    assert documents(tmp_path) == [b"first", b"second", b"third", b"fourth", b"fifth"]


def test_a_file_and_a_glob(tmp_path: Path) -> None:
    for name in ("x1.txt", "x2.txt", "y.md"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "y.md") == [b"y.md"]
    assert documents(tmp_path / "x*.txt") == [b"x1.txt", b"x2.txt"]
    assert documents(tmp_path / "**") == [b"x1.txt", b"x2.txt", b"y.md"]


def test_what_exists_is_not_taken_for_a_glob(tmp_path: Path) -> None:
    folder = tmp_path / "part[1]"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    assert documents(folder) == [b"a"]


def test_text_of_any_encoding_is_passed_on_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà\r\n".encode("latin-1"))
    assert documents(tmp_path) == [b"d\xe9j\xe0\r\n"]


def test_other_text_keys_blank_lines_and_half_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "é"}\n\n{"body": "\\ud800", "text": 3}')
    assert documents(path, "body") == ["é".encode(), b"\xed\xa0\x80"]
    table = write_parquet(tmp_path / "b.parquet", body=[b"\xff", b""], other=[1, 2])
    assert documents(table, "body") == [b"\xff", b""]


@pytest.mark.parametrize("make", [lambda folder: folder / "nothing", lambda folder: folder / "*.txt", lambda folder: folder])
def test_no_file(tmp_path: Path, make) -> None:
    with pytest.raises(DataError, match=r"data\.source='.*' names no file: give a directory, file or glob of text"):
        list_files(str(make(tmp_path)))


BAD_JSONL = {
    "not json": (
        '{"text": "a"}\n{"text": oops}\n',
        r"data\.source=.*a\.jsonl:2 is not JSON .*repair or remove the line",
    ),
    "not utf-8": (b'{"text": "\xff"}\n', r"data\.source=.*a\.jsonl:1 is not JSON"),
    "too deep": ("[" * 200_000, r"data\.source=.*a\.jsonl:1 is not JSON"),
    "no such field": ('{"body": "a", "id": 1}\n', r"data\.text_key='text' is not in .*a\.jsonl:1: .*'body', 'id'"),
    "not an object": ("[1]\n", r"data\.text_key='text' is not in .*a\.jsonl:1"),
    "not text": ('{"text": null}\n', r"data\.text_key='text': .*a\.jsonl:1 holds a NoneType"),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, case: str) -> None:
    content, message = BAD_JSONL[case]
    (tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        documents(tmp_path)


def test_bad_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["a"], id=[1])
    with pytest.raises(DataError, match=r"data\.text_key='text' is not in .*a\.parquet: its columns are 'body', 'id'; set"):
        documents(path)
    with pytest.raises(DataError, match=r"data\.text_key='id': .*a\.parquet, row 0, holds a int there and not text"):
        documents(path, "id")
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"data\.source=.*a\.parquet is not a parquet file that pyarrow can read"):
        documents(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow, which is not installed: pip install 'distattn\[data\]'"):
        documents(path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.gz").write_bytes(b"\x1f\x8b\x08\x00abc")
    with pytest.raises(DataError, match=r"data\.source=.*b\.gz is not text .*unpack or convert it"):
        documents(tmp_path)


def test_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"pipe is neither a file nor a directory"):
        list_files(str(tmp_path / "pipe"))


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.source=.*gone\.txt cannot be read \(No such file"):
        list_files(str(tmp_path / "*.txt"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read (Linux /proc)")
def test_file_that_fails_while_it_is_read() -> None:
    with pytest.raises(DataError, match=r"data\.source='/proc/self/mem': .* cannot be read \(Input/output error\)"):
        documents("/proc/self/mem")
