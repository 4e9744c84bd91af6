import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llmsys import env
from llmsys.data import corpus as corpus_module, documents


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_text_files_are_read_as_they_stand(tmp_path):
    text = "Zeile eins\r\nzwei — ünï 🦙\n\n\tdrei"
    for name in ("a.txt", "b.md", "c.rst", "d.py", "E.TXT"):
        (tmp_path / name).write_bytes(text.encode())
        assert list(documents(tmp_path / name)) == [text]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
    assert list(documents(tmp_path)) == ["word", "line"]


def test_large_text_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 10)
    text = "é" * 7 + "\n" + "ab\n" * 9 + "🦙" * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(documents(tmp_path))
    assert len(pieces) > 2 and "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])

    (tmp_path / "a.txt").write_bytes(b"0123456789\n" * 3 + b"0123\xff\n")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 at byte 37 "):
        list(documents(tmp_path))


def test_jsonl(tmp_path):
    separators = "one\u2028still one\x85and\x0cso on"
    path = write_lines(tmp_path / "a.jsonl", {"text": "first", "id": 1}, {"text": separators})
    path.write_bytes(path.read_bytes() + b"\n  \n" + b'{"text": "no line end"}')
    assert list(documents(path)) == ["first", separators, "no line end"]


def test_parquet_streams_every_row_in_order(tmp_path):
    rows = [f"row {i}" for i in range(5000)]
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(5000)), "text": rows}, row_group_size=700)
    assert list(documents(path)) == rows
    path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(rows).dictionary_encode()})
    assert list(documents(path)) == rows
    path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(rows, pyarrow.large_string())})
    assert list(documents(path)) == rows


def test_text_field_selects(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": 1, "content": "from a line"})
    write_parquet(tmp_path / "b.parquet", {"text": [2], "content": ["from a row"]})
    assert list(documents(tmp_path, text_field="content")) == ["from a line", "from a row"]


def test_directory_is_sorted_deep_and_counts_what_it_leaves_out(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a/z.md", "c.py", ".hidden.txt", ".git/x.txt", "b/image.png", "b/LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b/linked.txt").symlink_to(tmp_path / "c.py")
    corpus = documents(tmp_path)
    assert list(corpus) == ["c.py", "a/z.md", "b/10.txt", "b/2.txt", "c.py"]
    assert list(corpus) == list(corpus), "a corpus can be read again"
    assert corpus.description == f"{tmp_path}: 5 files, 29 bytes (left out: 5 hidden, linked or of other types)"


def test_paths_keep_their_order(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(name)
    paths = [str(tmp_path / f"{name}.txt") for name in "cabed"]
    corpus = documents(paths)
    assert list(corpus) == list("cabed")
    assert corpus.description == f"{', '.join(paths[:3])} and 2 more: 5 files, 5 bytes"


def test_digest_covers_text_borders_and_order(tmp_path):
    def digest(*texts):
        return documents(write_lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))).digest()

    digests = [digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("c", "ab"), digest("ab", "c", "d")]
    assert len(set(digests)) == len(digests)
    assert digest("ab", "c") == digests[0] == digest("ab", "", "c")


def test_paths_are_refused_at_once(tmp_path):
    def refused(paths, message):
        with pytest.raises(ValueError, match=message):
            documents(paths)

    refused(tmp_path / "absent.txt", r"absent\.txt does not exist, expected a file or a directory")
    refused([], "no file to read")
    refused(tmp_path, r"no file to read in \[.*\], expected any of \.jsonl \.ndjson \.parquet .*\.txt")
    for name in ("data.json", "data.jsonl.gz", "README"):
        (tmp_path / name).write_text("{}")
        refused(tmp_path / name, rf"{re.escape(name)} has suffix '.*', expected one of .*\.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, r"gone\.txt does not exist")
    (tmp_path / "gone.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path, r"pipe\.txt is not a regular file")


def test_contents_are_refused_by_place(tmp_path):
    def refused(name, data, message):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            list(documents(path))
        assert str(error.value).startswith(f"llmsys.data.documents: {path}")
        assert ", expected " in str(error.value)

    refused("a.txt", "grün".encode("latin-1"), "is not UTF-8 at byte 2")
    refused("a.txt", "text".encode("utf-16"), "is not UTF-8 at byte 0")
    good = b'{"text": "good"}\n'
    refused("a.jsonl", good + b"\n{text}\n", "line 3 is not JSON")
    refused("a.jsonl", good + b'{"text": "cut o', "line 2 is not JSON")
    refused("a.jsonl", good + b'{"text": "\xff"}', "line 2 is not JSON in UTF-8")
    refused("a.jsonl", b"[" * 200_000, "line 1 is not JSON")
    refused("a.jsonl", good + b'["text"]', "line 2 is a list, expected an object")
    refused("a.jsonl", good + b'{"id": 1, "body": ""}', r"line 2 has no field 'text', expected one of \['id', 'body'\]")
    refused("a.jsonl", good + b'{"text": null}', "line 2: 'text' is a NoneType, expected a string")
    refused("a.jsonl", b'{"text": "\\ud83e"}', "line 1: 'text' holds half a surrogate pair at character 0")
    refused("a.parquet", b"PAR1", "is not whole Parquet after row 0")


def test_parquet_is_refused_by_place(tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message):
            list(documents(path))

    path = tmp_path / "a.parquet"
    write_parquet(path, {"id": [1], "body": ["x"]})
    refused(path, r"a\.parquet has no column 'text', expected one of \['id', 'body'\]")
    write_parquet(path, {"text": ["one", "two", None]})
    refused(path, r"a\.parquet row 3: 'text' is a NoneType, expected a string")
    write_parquet(path, {"text": [b"bytes"]})
    refused(path, r"row 1: 'text' is a bytes")

    write_parquet(path, {"text": [f"row {i}" for i in range(3000)]}, write_page_checksum=True, compression="none")
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, r"a\.parquet is not whole Parquet after row 0")
    at = whole.index(b"row 1500")
    path.write_bytes(whole[:at] + b"ROW" + whole[at + 3 :])
    refused(path, r"a\.parquet .*after row|cannot read .*a\.parquet")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
def test_read_error_names_the_file(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")  # opens, and fails when address 0 is read
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt \(.*Input/output error.*\)"):
        list(documents(tmp_path / "a.txt"))


@contextmanager
def unprivileged():
    """Nobody's rights, if this is root, whom no permission bit stops."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_forbidden_paths_are_named():
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "locked").mkdir()
        (directory / "locked" / "a.txt").write_text("secret")
        (directory / "locked").chmod(0)
        (directory / "b.txt").write_text("secret")
        (directory / "b.txt").chmod(0)
        with unprivileged():
            for paths in (directory, directory / "locked"):
                with pytest.raises(
                    ValueError, match=r"cannot read .*locked \(Permission denied\), expected a readable path"
                ):
                    documents(paths)
            with pytest.raises(ValueError, match=r"cannot read .*a\.txt \(Permission denied\)"):
                documents(directory / "locked" / "a.txt")
            with pytest.raises(
                ValueError, match=r"cannot read .*b\.txt \(.*Permission denied.*\), expected a readable, whole"
            ):
                list(documents(directory / "b.txt"))
        (directory / "locked").chmod(0o700)


def test_missing_pyarrow_is_named(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    monkeypatch.setattr(env, "has", lambda package: package != "pyarrow")
    with pytest.raises(RuntimeError, match="pyarrow is missing.*pip install pyarrow"):
        documents(tmp_path)


def test_corpus_without_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    write_lines(tmp_path / "b.jsonl", {"text": ""})
    write_parquet(tmp_path / "c.parquet", {"text": pyarrow.array([], pyarrow.string())})
    corpus = documents(tmp_path)
    for read in (list, lambda corpus: corpus.digest()):
        with pytest.raises(ValueError, match="no text in .*: 3 files, .* expected a document that is not empty"):
            read(corpus)
