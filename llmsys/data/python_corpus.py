"""A corpus that is on every machine: the documentation and source text of the installed Python."""

import ast
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmsys.data.corpus import Corpus

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"})
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_corpus(max_bytes: int | None = None) -> Corpus:
    """Documents of the running Python's standard library, prose first, at most `max_bytes` of UTF-8.

    Order   the language reference by topic (`pydoc_data`, about 0.5 MB); each module's docstrings under the names they
            describe (about 2 MB); each module's source without its docstrings (about 10 MB); each part sorted by name.
            Prose goes first because a small model trained on a few megabytes of it writes the most readable paragraphs
    Same    text from the same Python; installed packages, tests and build settings are left out
    Errors  ValueError if `max_bytes` does not hold the first document; RuntimeError if the library's source is missing
    """
    texts: list[str] = []
    counts = {"language topics": 0, "modules' docstrings": 0, "modules' source": 0}
    num_bytes = 0
    for kind, text in _parts(Path(sysconfig.get_path("stdlib"))):
        size = len(text.encode())
        if max_bytes is not None and num_bytes + size > max_bytes:
            break
        texts.append(text)
        counts[kind] += 1
        num_bytes += size
    if not texts:
        raise ValueError(
            f"llmsys.data.python_corpus: max_bytes={max_bytes}, expected None or at least {size}, the first document"
        )
    parts = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return Corpus(f"Python {platform.python_version()} standard library: {parts}; {num_bytes:,} bytes", lambda: texts)


def _parts(root: Path) -> Iterator[tuple[str, str]]:
    """All documents in order, each with its kind."""
    modules = _modules(root)
    topics = root / "pydoc_data" / "topics.py"
    if not modules or not topics.is_file():
        raise RuntimeError(f"llmsys.data.python_corpus: no library sources in {root}, expected *.py and {topics}")
    for _, topic in sorted(_topics(topics).items()):
        yield "language topics", topic
    sources = []
    for path in modules:
        with tokenize.open(path) as file:
            source = file.read()
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        documented = list(_documented(_parse(source), name))
        sources.append(_without(source, [docstring for _, _, docstring in documented]))
        if documented:
            yield (
                "modules' docstrings",
                "\n\n".join(f"{heading}\n\n{text.rstrip()}" for heading, text, _ in documented) + "\n",
            )
    for source in sources:
        if source.strip():
            yield "modules' source", source


def _modules(root: Path) -> list[Path]:
    modules = []
    for parent, directories, names in os.walk(root):
        directories[:] = [name for name in directories if name not in LEFT_OUT]
        modules += [
            Path(parent, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(modules)


def _topics(path: Path) -> dict[str, str]:
    """The dict that `topics.py` assigns, without running the file."""
    [assignment] = [node for node in _parse(path.read_text("utf-8")).body if isinstance(node, ast.Assign)]
    return ast.literal_eval(assignment.value)


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own invalid escapes are no concern of this program's user
        return ast.parse(source)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str, ast.stmt]]:
    """Every docstring at or below `node`: its heading, its text, its statement."""
    if isinstance(node, (ast.Module, *DEFINITIONS)) and (text := ast.get_docstring(node)):
        signature = "" if isinstance(node, (ast.Module, ast.ClassDef)) else f"({ast.unparse(node.args)})"
        yield name + signature, text, node.body[0]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from _documented(child, f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name)


def _without(source: str, statements: list[ast.stmt]) -> str:
    """`source` without the lines of `statements`, except a statement that shares its first line with other code."""
    lines: list[str | None] = [*source.split("\n")]
    for statement in statements:
        assert statement.end_lineno is not None
        first, end = statement.lineno - 1, statement.end_lineno
        if not (lines[first] or "")[: statement.col_offset].strip():
            lines[first:end] = [None] * (end - first)
    return "\n".join(line for line in lines if line is not None)
