"""Documents from text, JSONL and Parquet files. A file is read to its end or refused by name; nothing is half-read."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from llmsys import env

TEXT_SUFFIXES = frozenset(
    [".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".yaml", ".yml", ".toml", ".ini", ".py", ".pyi", ".sh"]
    + [".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".lua", ".sql"]
)
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Corpus:
    """Text documents that can be iterated again and again, and a line that says what they are.

    Empty documents are left out. Errors: ValueError at the end of an iteration that met no text at all.
    """

    description: str
    read: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        empty = True
        for text in self.read():
            if text:
                empty = False
                yield text
        if empty:
            raise ValueError(
                f"llmsys.data.Corpus: no text in {self.description}, expected a document that is not empty"
            )

    def digest(self) -> str:
        """SHA-256 of all documents and their borders, in hex. Reads the whole corpus once."""
        sha256 = hashlib.sha256()
        for text in self:
            data = text.encode()
            sha256.update(len(data).to_bytes(8, "little"))
            sha256.update(data)
        return sha256.hexdigest()


def documents(paths: str | os.PathLike | Iterable[str | os.PathLike], text_field: str = "text") -> Corpus:
    """The documents of files and directories, in the order given; a directory in sorted order, with all below it.

    Text      one document per file, as it stands, UTF-8; a file over 8 MiB is several, cut at line ends
    JSONL     `.jsonl`, `.ndjson`: one per line, from the string field `text_field`; blank lines hold none
    Parquet   `.parquet`: one per row, from the string column `text_field`, streamed in batches of rows
    Left out  of a directory: hidden entries, links to directories, other file types; `description` counts them
    Errors    ValueError for what is missing, unreadable, truncated or of another type, with path and line, row or byte;
              paths are checked here, contents when they are read
    """
    given = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    files: list[Path] = []
    left_out = 0
    try:
        for path in given:
            if path.is_dir():
                found, skipped = _walk(path)
                files += found
                left_out += skipped
            else:
                files.append(path)
        num_bytes = sum(_checked_size(path) for path in files)
    except OSError as error:
        raise ValueError(
            f"llmsys.data.documents: cannot read {error.filename} ({error.strerror}), expected a readable path"
        ) from error
    names = ", ".join(map(str, given[:3])) + (f" and {len(given) - 3} more" if len(given) > 3 else "")
    if not files:
        raise ValueError(f"llmsys.data.documents: no file to read in [{names}], expected any of {_known_suffixes()}")
    if any(path.suffix.lower() == ".parquet" for path in files) and not env.has("pyarrow"):
        raise RuntimeError("llmsys.data.documents: pyarrow is missing, expected for .parquet; pip install pyarrow")
    description = f"{names}: {len(files):,} file{'s' * (len(files) != 1)}, {num_bytes:,} bytes"
    if left_out:
        description += f" (left out: {left_out:,} hidden, linked or of other types)"
    return Corpus(description, lambda: chain.from_iterable(_read(path, text_field) for path in files))


def _walk(directory: Path) -> tuple[list[Path], int]:
    """The files to read below `directory`, sorted, and the number of entries left out."""

    def refuse(error: OSError):
        raise error

    files, left_out = [], 0
    for parent, directories, names in os.walk(directory, onerror=refuse):
        entered = [name for name in directories if not name.startswith(".") and not Path(parent, name).is_symlink()]
        taken = [name for name in names if not name.startswith(".") and _reader(Path(name))]
        left_out += len(directories) - len(entered) + len(names) - len(taken)
        directories[:] = sorted(entered)
        files += [Path(parent, name) for name in sorted(taken)]
    return files, left_out


def _checked_size(path: Path) -> int:
    if not path.exists():
        raise ValueError(f"llmsys.data.documents: {path} does not exist, expected a file or a directory")
    if not path.is_file():
        raise ValueError(f"llmsys.data.documents: {path} is not a regular file, expected a file or a directory")
    if not _reader(path):
        raise ValueError(
            f"llmsys.data.documents: {path} has suffix {path.suffix!r}, expected one of {_known_suffixes()}"
        )
    return path.stat().st_size


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]] | None:
    suffix = path.suffix.lower()
    return _text if suffix in TEXT_SUFFIXES else {".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}.get(suffix)


def _known_suffixes() -> str:
    return " ".join([".jsonl", ".ndjson", ".parquet", *sorted(TEXT_SUFFIXES)])


def _read(path: Path, text_field: str) -> Iterator[str]:
    reader = _reader(path)
    assert reader is not None
    try:
        yield from reader(path, text_field)
    except OSError as error:
        raise ValueError(
            f"llmsys.data.documents: cannot read {path} ({error}), expected a readable, whole file"
        ) from error


def _text(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            piece += file.readline()
            try:
                yield piece.decode("utf-8-sig" if offset == 0 else "utf-8")
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise ValueError(
                    f"llmsys.data.documents: {path} is not UTF-8 at byte {at} ({error.reason}), expected UTF-8 text"
                ) from error
            offset += len(piece)


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            where = f"{path} line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"llmsys.data.documents: {where} is not JSON in UTF-8 ({error}), expected one object per line"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(f"llmsys.data.documents: {where} is a {type(record).__name__}, expected an object")
            if text_field not in record:
                raise _missing(where, "field", text_field, list(record))
            yield _checked_text(record[text_field], where, text_field)


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            if text_field not in file.schema_arrow.names:
                raise _missing(str(path), "column", text_field, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    yield _checked_text(value.as_py(), f"{path} row {row}", text_field)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"llmsys.data.documents: {path} is not whole Parquet after row {row} ({error}), expected a Parquet file"
        ) from error


def _checked_text(value: object, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"llmsys.data.documents: {where}: {text_field!r} is a {type(value).__name__}, expected a string; "
            f"choose the text with text_field"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"llmsys.data.documents: {where}: {text_field!r} holds half a surrogate pair at character {error.start}, "
            f"expected Unicode text"
        ) from error
    return value


def _missing(where: str, kind: str, text_field: str, present: list[str]) -> ValueError:
    names = ", ".join(map(repr, present[:8])) + ", …" * (len(present) > 8)
    return ValueError(
        f"llmsys.data.documents: {where} has no {kind} {text_field!r}, "
        f"expected one of [{names}]; choose it with text_field"
    )
