"""From a YAML, TOML or JSON file and `key=value` words to a `TrainConfig`; whatever is not understood is an error."""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from llmsys.models.llama import SIZES, LlamaConfig
from llmsys.train.config import TrainConfig

BUILT_IN = {"demo": TrainConfig()}
PRESETS: dict[type, dict[str, Any]] = {LlamaConfig: SIZES}  # a section of this type may say `size: <preset>`

C = TypeVar("C")


def load_config(source: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """The built-in config or the config file named `source`, then each `key=value` of `overrides` on top.

    A file gives what differs from the demo; `model: {size: 62M, …}` starts from a size. Keys of sections are written
    with dots on the command line: `optimizer.lr=1e-3`.

    Errors     FileNotFoundError; ValueError for an unknown key, a value out of range or a file that does not parse;
               TypeError for a value of the wrong type
    """
    config = BUILT_IN.get(source)
    if config is None:
        config = merge(BUILT_IN["demo"], {"name": Path(source).stem} | read(source), source)
    return merge(config, _settings(overrides), "the command line")


def _settings(words: Iterable[str]) -> dict[str, Any]:
    """`["steps=5", "optimizer.lr=1"]` as `{"steps": "5", "optimizer": {"lr": "1"}}`."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise ValueError(f"llmsys.train.config: {word!r}, expected key=value, such as optimizer.lr=1e-3")
        *sections, last = key.split(".")
        section = settings
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"llmsys.train.config: {word!r} after {name}={section}, expected one of the two")
        if last in section:
            raise ValueError(f"llmsys.train.config: {key} given twice on the command line, expected once")
        section[last] = _Text(text)
    return settings


def read(source: str) -> dict[str, Any]:
    """The settings in a config file, by its suffix."""
    path = Path(source)
    where = f"llmsys.train.config: {source}"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file, expected a config file or one of {', '.join(BUILT_IN)}")
    parse = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml, ".json": _json}.get(path.suffix)
    if parse is None:
        raise ValueError(f"{where}: suffix {path.suffix!r}, expected .yaml, .toml or .json")
    try:
        settings = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}, expected a valid {path.suffix[1:]} file") from error
    if not isinstance(settings, dict):
        raise TypeError(f"{where}: a {type(settings).__name__} at the top, expected keys and values")
    return settings


def merge(config: C, settings: dict[str, Any], source: str, section: str = "") -> C:
    """`config` with what `settings` say, section by section; the errors name `source` and the key."""
    settings = dict(settings)
    presets = PRESETS.get(type(config), {})
    if presets and "size" in settings:
        size = str(settings.pop("size"))
        if size not in presets:
            raise ValueError(
                f"llmsys.train.config: {section}size={size!r} in {source}, expected one of {', '.join(presets)}"
            )
        config = presets[size]
    known = typing.get_type_hints(type(config))
    changes = {}
    for key, value in settings.items():
        if key not in known:
            _unknown(key, [*known, *(["size"] if presets else [])], source, section)
        current = getattr(config, key)
        if not dataclasses.is_dataclass(current):
            changes[key] = _convert(value, known[key], f"{section}{key}", source)
        elif isinstance(value, dict):
            changes[key] = merge(current, value, source, f"{section}{key}.")
        else:
            raise TypeError(
                f"llmsys.train.config: {section}{key}={value!r} in {source}, expected a section of keys and values"
            )
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


class _Text(str):
    """A value from the command line: its type is the field's."""


def _convert(value: Any, kind: Any, key: str, source: str) -> Any:
    wrong = f"llmsys.train.config: {key}={value!r} in {source}, expected {_describe(kind)}"
    if isinstance(kind, types.UnionType):
        members = typing.get_args(kind)
        return None if value is None else _convert(value, members[0], key, source)
    if typing.get_origin(kind) is tuple:
        member = typing.get_args(kind)[0]
        if isinstance(value, _Text):
            value = [_Text(part) for part in value.split(",") if part]
        if not isinstance(value, (list, tuple)):
            raise TypeError(wrong)
        return tuple(_convert(part, member, key, source) for part in value)
    if isinstance(value, _Text):
        if kind is bool:
            if value not in ("true", "false"):
                raise TypeError(wrong)
            return value == "true"
        try:
            return kind(str(value))
        except ValueError as error:
            raise TypeError(wrong) from error
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(wrong)
    return value


def _describe(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join("nothing" if member is type(None) else _describe(member) for member in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_describe(typing.get_args(kind)[0])}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]


def _unknown(key: object, known: list[str], source: str, section: str) -> None:
    close = difflib.get_close_matches(str(key), known, n=1)
    raise ValueError(
        f"llmsys.train.config: unknown key {section}{key} in {source}, expected one of {', '.join(known)}"
        + (f"; did you mean {section}{close[0]}?" if close else "")
    )


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_duplicates)


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    settings = dict(pairs)
    if len(settings) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} given twice")
    return settings


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ModuleNotFoundError as error:
        raise RuntimeError(
            "llmsys.train.config: a .toml file on a Python without tomllib, expected Python 3.11; use .yaml or .json"
        ) from error
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            return _without_duplicates(
                [(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value]
            )

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")  # YAML 1.1 takes 1e-3, without a dot, for text
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
