"""Plain data (YAML, JSON), read and turned into frozen dataclasses strictly: no unknown key, no other type."""

from __future__ import annotations

import contextlib
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import bad, unknown


def read_object(path: Path, named: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DsrlError: it holds anything else; says so of `named`, or of the path.
    """
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise bad(named or f"{path}", "JSON", f"{type(error).__name__}: {error}"[:200]) from error
    if not isinstance(found, dict):
        raise bad(named or f"{path}", "a JSON object", type(found).__name__)
    return found


def read_sections(path: Path, named: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        DsrlError: it is empty, or holds anything else; says so of `named`.
    """
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise bad(named, "YAML in UTF-8", " ".join(str(error).split())) from error
    if not isinstance(tree, dict):
        raise bad(named, "a mapping of sections", "an empty file" if tree is None else type(tree).__name__)
    return tree


def from_plain(cls: type, tree: Any, where: str, kind: str = "recipe key") -> Any:
    """Build a dataclass from plain data; `where` is its name in messages.

    Raises:
        UnknownNameError: a key that does not exist. DsrlError: a value of another type, or refused by the dataclass.
    """
    if not isinstance(tree, Mapping):
        raise bad(where or kind, f"a mapping with keys {', '.join(f.name for f in fields(cls))}", repr(tree))
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise unknown(kind, name, [f"{where}.{h}" if where else h for h in hints])
        values[key] = _convert(hints[key], value, name, kind)
    return cls(**values)


def check_choices(config: Any, where: str = "") -> None:
    """Refuse a dataclass, or one within it, that holds what its type does not list: also when built from Python.

    Raises:
        DsrlError: names the field, and what it may be.
    """
    for name, wanted in typing.get_type_hints(type(config)).items():
        value, named = getattr(config, name), f"{where}.{name}" if where else name
        if is_dataclass(value):
            check_choices(value, named)
        elif any(typing.get_origin(kind) is Literal for kind in (wanted, *typing.get_args(wanted))):
            _convert(wanted, value, named, "")


def _convert(wanted: Any, value: Any, name: str, kind: str) -> Any:
    if wanted is Any:
        return value
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if is_dataclass(wanted):
        return from_plain(typing.cast(type, wanted), value, name, kind)
    if origin is Literal:
        if value not in arguments:
            raise bad(name, " or ".join(map(str, arguments)), repr(value))
        return value
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise bad(name, "a mapping", repr(value))
        return {str(key): _convert(arguments[1], item, f"{name}.{key}", kind) for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise bad(name, "a list", repr(value))
        return tuple(_convert(arguments[0], item, f"{name}[{i}]", kind) for i, item in enumerate(value))
    if arguments and type(None) in arguments:
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _convert(inner, value, name, kind)
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 3e-4 as text
            if not math.isnan(number := float(value)):  # which would pass every check of a range
                return number
        raise bad(name, "a number", repr(value))
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise bad(name, f"{wanted.__name__}", repr(value))
    return value
