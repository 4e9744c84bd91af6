import hashlib
import json
import struct

import pytest
import torch

from llmsys.data import TokenFile, token_file as module
from llmsys.data.token_file import HEADER_BYTES


def rewrite_header(path, **changes):
    data = path.read_bytes()
    header = json.loads(data[:HEADER_BYTES])
    header.update(changes)
    path.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n" + data[HEADER_BYTES:])


@pytest.fixture
def path(texts, tokenizer, tmp_path):
    return TokenFile.write(tmp_path / "new" / "a.tokens", texts, tokenizer).path


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 1 << 20])
def test_every_document_is_followed_by_end_of_text(texts, tokenizer, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    file = TokenFile.write(tmp_path / "a.tokens", texts, tokenizer)
    expected = [id for text in texts for id in [*tokenizer.encode(text), tokenizer.end_of_text]]
    assert file.tokens.dtype == torch.uint16
    assert file.tokens.to(torch.int64).tolist() == expected
    assert len(file) == len(expected)
    data = file.path.read_bytes()
    assert data[HEADER_BYTES:] == struct.pack(f"={len(expected)}H", *expected)
    assert file.sha256 == hashlib.sha256(data[HEADER_BYTES:]).hexdigest()
    reopened = TokenFile(file.path)
    assert torch.equal(reopened.tokens.to(torch.int64), file.tokens.to(torch.int64))
    assert (reopened.vocab_size, reopened.end_of_text, reopened.sha256) == (400, tokenizer.end_of_text, file.sha256)


def test_a_large_vocabulary_takes_four_bytes(texts, tmp_path):
    class Large:
        """A stand-in with ids that a vocabulary trained in a test would not reach."""

        vocab_size = 100_000
        end_of_text = 99_999

        def encode_batch(self, texts):
            return [[65_536 + len(text)] for text in texts]

    file = TokenFile(TokenFile.write(tmp_path / "a.tokens", texts, Large()).path)
    assert file.tokens.dtype == torch.uint32
    assert file.tokens.to(torch.int64).tolist() == [id for text in texts for id in (65_536 + len(text), 99_999)]


def test_a_failed_write_leaves_nothing(tokenizer, tmp_path):
    def documents():
        yield "first"
        raise ValueError("a broken source")

    with pytest.raises(ValueError, match="a broken source"):
        TokenFile.write(tmp_path / "a.tokens", documents(), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="TokenFile.write: no documents, expected at least one"):
        TokenFile.write(tmp_path / "a.tokens", [], tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_files_are_refused(path, verify):
    whole = path.read_bytes()
    for size in (0, 1, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"llmsys.data.TokenFile: .*a\.tokens has .*, expected a whole token file"):
            TokenFile(path, verify=verify)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(ValueError, match="bytes where its header promises"):
        TokenFile(path, verify=verify)


def test_inconsistent_headers_are_refused(path):
    whole = path.read_bytes()
    for changes, message in [
        ({"format": "llmsys tokens 9"}, "has format 'llmsys tokens 9'.*expected 'llmsys tokens 1'"),
        ({"dtype": "float32"}, "dtype 'float32'"),
        ({"dtype": "uint32"}, "bytes where its header promises"),
        ({"byte_order": "middle"}, "byte order 'middle'"),
        ({"count": 10**30}, "bytes where its header promises"),
        ({"count": -1}, "count -1"),
        ({"count": True}, "header of other fields"),
        ({"end_of_text": 400}, "end_of_text 400, vocab_size 400"),
        ({"vocab_size": 1 << 40}, "vocab_size 1099511627776"),
        ({"extra": 1}, "header of other fields"),
    ]:
        path.write_bytes(whole)
        rewrite_header(path, **changes)
        with pytest.raises(ValueError, match=message):
            TokenFile(path, verify=False)
    for head in (b"[1]", b"{}", b"[" * HEADER_BYTES, b"\xff" * HEADER_BYTES):
        path.write_bytes(head.ljust(HEADER_BYTES) + whole[HEADER_BYTES:])
        with pytest.raises(ValueError, match="expected a whole token file"):
            TokenFile(path)


def test_changed_ids_are_found(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert len(TokenFile(path, verify=False)) > 0
    with pytest.raises(ValueError, match="has ids of sha256 .* where its header says"):
        TokenFile(path)


def test_ids_outside_the_vocabulary_are_found(path):
    rewrite_header(path, vocab_size=300)
    with pytest.raises(ValueError, match=r"has id 3\d\d in a vocabulary of 300"):
        TokenFile(path)


def test_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "absent.tokens", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            TokenFile(path)
