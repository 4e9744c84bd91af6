import ast
import os
import platform
import subprocess
import sys

import pytest

from llmsys.data import python_corpus
from llmsys.data.python_corpus import _documented, _without


@pytest.fixture(scope="module")
def small():
    return python_corpus(max_bytes=700_000)


def test_prose_comes_first_and_the_cap_holds(small):
    texts = list(small)
    assert texts[0].startswith('The "assert" statement')
    assert any(text.startswith("argparse\n\nCommand-line parsing library") for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert 600_000 < num_bytes <= 700_000
    assert small.description.startswith(f"Python {platform.python_version()} standard library: ")
    assert small.description.endswith(f" modules' docstrings; {num_bytes:,} bytes")


def test_every_process_reads_the_same(small):
    program = "from llmsys.data import python_corpus; print(python_corpus(max_bytes=700_000).digest())"
    printed = subprocess.check_output([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "1"})
    assert printed.decode().strip() == small.digest()


def test_a_smaller_cap_is_a_beginning(small):
    texts = list(python_corpus(max_bytes=100_000))
    assert texts == list(small)[: len(texts)]


def test_cap_below_the_first_document_is_refused():
    with pytest.raises(ValueError, match="max_bytes=10, expected None or at least [0-9]+"):
        python_corpus(max_bytes=10)


def test_missing_library_source_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match="no library sources in"):
        python_corpus()


SOURCE = '''"""Module."""
import os


class Shape(Base):
    """A shape.

    With \x0c a form feed.
    """

    def area(self, scale=1.0): "On one line."

    if os.name:

        async def move(self, *, dx: int = 0):
            """Move it."""
            text = """no docstring"""
'''


def test_docstrings_leave_the_source_for_the_prose():
    found = list(_documented(ast.parse(SOURCE), "shapes"))
    assert [(heading, text.split("\n")[0]) for heading, text, _ in found] == [
        ("shapes", "Module."),
        ("shapes.Shape", "A shape."),
        ("shapes.Shape.area(self, scale=1.0)", "On one line."),
        ("shapes.Shape.move(self, *, dx: int=0)", "Move it."),
    ]
    assert _without(SOURCE, [statement for _, _, statement in found]) == (
        "import os\n\n\nclass Shape(Base):\n\n"
        '    def area(self, scale=1.0): "On one line."\n\n    if os.name:\n\n'
        "        async def move(self, *, dx: int = 0):\n"
        '            text = """no docstring"""\n'
    )
