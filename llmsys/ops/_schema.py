"""A function schema in the notation of `torch.library`, read into names, types and defaults."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

REQUIRED = object()


@dataclass(frozen=True)
class Argument:
    """One argument: `type` as written without alias marks ("Tensor", "Tensor?", "Tensor[]", "float", …); `written` for
    one whose mark says that the op changes it."""

    name: str
    type: str
    written: bool
    default: Any = REQUIRED


class Schema:
    """`(Tensor x, float eps=1e-6) -> (Tensor y)` as data."""

    def __init__(self, text: str) -> None:
        # Without defaults: the dispatcher would leave out arguments that equal them.
        self.text = re.sub(r"=[^,)]+", "", text)
        inputs, _, outputs = text.partition(" -> ")
        self.arguments = tuple(_argument(field) for field in _fields(inputs))
        self.names = tuple(argument.name for argument in self.arguments)
        self.results = tuple(field.split()[-1] for field in _fields(outputs))

    def complete(self, op: str, args: tuple) -> tuple:
        """`args` with the defaults of those left out."""
        missing = [a.name for a in self.arguments[len(args) :] if a.default is REQUIRED]
        if missing or len(args) > len(self.arguments):
            raise ValueError(f"llmsys.{op}: {len(args)} arguments given, expected {self.text.partition(' -> ')[0]}")
        return (*args, *(a.default for a in self.arguments[len(args) :]))


def _fields(text: str) -> list[str]:
    return [field.strip() for field in text.strip().strip("()").split(",") if field.strip()]


def _argument(field: str) -> Argument:
    declaration, _, default = field.partition("=")
    type_, name = re.sub(r"\(\w+!?\)", "", declaration).split()
    return Argument(name, type_, "!" in declaration, ast.literal_eval(default) if default else REQUIRED)
