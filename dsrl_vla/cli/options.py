"""How a command reads its options: its own by a dataclass, the rest as fields of a recipe."""

from __future__ import annotations

from typing import Any

import tyro

from ..errors import DsrlError


def parse(kind: type, argv: list[str], command: str) -> tuple[Any, list[str]]:
    """A command's own options, and the arguments it does not know."""
    return tyro.cli(kind, prog=f"dsrl-vla {command}", args=argv, return_unknown_args=True)


def read_recipe(source: str, rest: list[str]) -> Any:
    """A recipe with the remaining options applied over it."""
    import yaml

    from ..recipe import Recipe, load_recipe

    tree: dict[str, Any] = {}
    keys = iter(rest)
    for option in keys:
        if not option.startswith("--"):
            raise DsrlError(f"unexpected argument '{option}': expected an option such as --train.seed 3.")
        name, equals, value = option[2:].partition("=")
        if not equals:
            value = next(keys, "")
        place, parts = tree, name.replace("-", "_").split(".")
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
