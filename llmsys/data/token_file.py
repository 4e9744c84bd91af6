"""Token ids on disk, mapped into memory.

A file is 512 bytes of header (a JSON object, then spaces, then a line end), and the ids, two or four bytes each.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from llmsys.data.atomic import replacing
from llmsys.data.tokenizer import Tokenizer

FORMAT = "llmsys tokens 1"
HEADER_BYTES = 512
CHUNK_BYTES = 1 << 20
DTYPES = {"uint16": (torch.uint16, "H"), "uint32": (torch.uint32, "I")}
FIELDS = {
    "format": str,
    "dtype": str,
    "byte_order": str,
    "count": int,
    "vocab_size": int,
    "end_of_text": int,
    "sha256": str,
}


class TokenFile:
    """The ids of a corpus, each document followed by `end_of_text`. Make one with `write`.

    `tokens` is the file itself as a 1-d tensor of uint16 or uint32, read as it is used and shared by all processes of a
    machine. `vocab_size`, `end_of_text` and `sha256` (of the ids) come from the header.
    With `verify`, the default, opening reads the whole file once and compares every id with `sha256` and `vocab_size`.

    Errors  ValueError if the file is missing, truncated, changed, or no token file
    """

    def __init__(self, path: str | Path, verify: bool = True):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                header = self._read_header(file.read(HEADER_BYTES))
                size = self.path.stat().st_size
        except OSError as error:
            raise self._refused(f"cannot be read ({error})") from error
        dtype, _ = DTYPES[header["dtype"]]
        self.vocab_size: int = header["vocab_size"]
        self.end_of_text: int = header["end_of_text"]
        self.sha256: str = header["sha256"]
        expected = HEADER_BYTES + header["count"] * dtype.itemsize
        if size != expected:
            raise self._refused(f"has {size:,} bytes where its header promises {expected:,}")
        mapped = torch.from_file(str(self.path), shared=False, size=size // dtype.itemsize, dtype=dtype)
        self.tokens = mapped[HEADER_BYTES // dtype.itemsize :]
        if verify:
            self._verify()

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def write(cls, path: str | Path, documents: Iterable[str], tokenizer: Tokenizer) -> TokenFile:
        """Encode `documents` into a new file at `path`, which appears when it is whole."""
        name = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        _, code = DTYPES[name]
        sha256 = hashlib.sha256()
        count = 0
        with replacing(Path(path)) as file:
            file.write(b" " * HEADER_BYTES)
            for texts in _batches(documents):
                ids = array(code)
                for encoded in tokenizer.encode_batch(texts):
                    ids.extend(encoded)
                    ids.append(tokenizer.end_of_text)
                sha256.update(ids)
                ids.tofile(file)
                count += len(ids)
            if not count:
                raise ValueError("llmsys.data.TokenFile.write: no documents, expected at least one")
            header = {
                "format": FORMAT,
                "dtype": name,
                "byte_order": sys.byteorder,
                "count": count,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "sha256": sha256.hexdigest(),
            }
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER_BYTES - 1) + b"\n")
        return cls(path, verify=False)

    def _read_header(self, data: bytes) -> dict:
        try:
            header = json.loads(data.decode("ascii"))
        except (ValueError, RecursionError) as error:
            raise self._refused(f"has no header ({error})") from error
        if not isinstance(header, dict) or {key: type(value) for key, value in header.items()} != FIELDS:
            raise self._refused(f"has a header of other fields, {str(header)[:200]}")
        if header["format"] != FORMAT or header["dtype"] not in DTYPES or header["byte_order"] != sys.byteorder:
            raise self._refused(
                f"has format {header['format']!r}, dtype {header['dtype']!r}, byte order {header['byte_order']!r}",
                f"{FORMAT!r}, {' or '.join(DTYPES)}, {sys.byteorder!r}",
            )
        if header["count"] < 1 or not 0 <= header["end_of_text"] < header["vocab_size"] <= 1 << 32:
            raise self._refused(
                f"has count {header['count']}, end_of_text {header['end_of_text']}, vocab_size {header['vocab_size']}",
                "count > 0 and end_of_text within the vocabulary",
            )
        return header

    def _verify(self) -> None:
        sha256 = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
        if sha256.hexdigest() != self.sha256:
            raise self._refused(
                f"has ids of sha256 {sha256.hexdigest()[:12]}… where its header says {self.sha256[:12]}…"
            )
        for ids in self.tokens.split(CHUNK_BYTES):
            if (largest := int(ids.to(torch.int64).max())) >= self.vocab_size:
                raise self._refused(f"has id {largest} in a vocabulary of {self.vocab_size}")

    def _refused(self, what: str, expected: str = "a whole token file") -> ValueError:
        return ValueError(f"llmsys.data.TokenFile: {self.path} {what}, expected {expected}; write it again")


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents of about a mebibyte, so that memory is bounded and every core has work."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
