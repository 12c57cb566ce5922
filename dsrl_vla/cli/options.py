"""How a command reads its options: its own by a dataclass, the rest as fields of a recipe."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import tyro

from ..errors import DsrlError, bad, unknown


def parse(kind: type, argv: list[str], command: str) -> tuple[Any, list[str]]:
    """A command's own options, and those of the recipe as ``--name=value``, wherever they stand.

    Raises:
        UnknownNameError: an option that neither has. DsrlError: one of the recipe without a value.
    """
    known = {field.name for field in fields(kind)}
    own, rest = [], []
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token[2:].partition("=")
        if not token.startswith("--") or name.replace("-", "_").removeprefix("no_") in {*known, "help"}:
            own.append(token)
            continue
        _check(name, known)
        if not equals:
            value = next(tokens, "--")
            if value.startswith("--"):
                raise DsrlError(f"option '{token}': expected a value, as in {token} VALUE or {token}=VALUE, got none.")
        rest.append(f"--{name}={value}")
    args: Any
    args, unread = tyro.cli(kind, prog=f"dsrl-vla {command}", args=own, return_unknown_args=True)
    if unread:
        raise DsrlError(f"unexpected argument '{unread[0]}': expected an option such as --train.seed 3.")
    return args, rest


def check_new_file(path: Path, suffix: str) -> None:
    """Refuse to write over a file, or to one that is not named as what it will hold."""
    if path.suffix != suffix or path.exists():
        raise bad(f"{path}", f"a new file that ends in {suffix}", "one that exists" if path.exists() else path)


def _check(name: str, known: set[str]) -> None:
    """Whether there can be such an option; what is in a section of a recipe is the recipe's to say."""
    if "." in name:
        return
    from ..recipe import Recipe

    sections = {field.name for field in fields(Recipe)}
    if name.replace("-", "_") not in sections:
        raise unknown("option", f"--{name}", [f"--{each.replace('_', '-')}" for each in known | sections])


def read_recipe(source: str, rest: list[str]) -> Any:
    """A recipe with options ``--name=value`` applied over it."""
    import yaml

    from ..recipe import Recipe, load_recipe

    tree: dict[str, Any] = {}
    for token in rest:
        option, _, value = token.partition("=")
        # section.field.field is ours; what is deeper, such as a camera, is named by the user
        place, parts = tree, [p.replace("-", "_") if i < 3 else p for i, p in enumerate(option[2:].split("."))]
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise DsrlError(f"option '{option}': expected a value of '{part}' or of its fields, got both.")
        try:
            parsed = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            words = " ".join(str(error).split())
            raise DsrlError(f"option '{option}': expected a value as YAML has it, got '{value}' ({words}).") from error
        plain = isinstance(parsed, dict) and not value.lstrip().startswith("{")  # "nano:" is a URI, not a mapping
        place[parts[-1]] = value if plain else parsed
    recipe: Recipe = load_recipe(source, tree)
    return recipe
