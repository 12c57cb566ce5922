"""``recipes`` and ``adapters``: what is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ListArgs:
    """List what is there."""

    json: Annotated[bool, tyro.conf.arg(help="Print JSON.")] = field(default=False)


def list_recipes(argv: list[str]) -> int:
    """List the recipes that ship."""
    args = tyro.cli(ListArgs, prog="dsrl-vla recipes", args=argv)
    import yaml

    from ..recipes import shipped

    rows = {name: (yaml.safe_load(path.read_text()) or {}).get("description", "") for name, path in shipped().items()}
    return _print(rows, args.json)


def list_adapters(argv: list[str]) -> int:
    """List the adapters that are installed."""
    args = tyro.cli(ListArgs, prog="dsrl-vla adapters", args=argv)
    from ..bases import adapters

    return _print({f"{name}:": where for name, where in adapters().items()}, args.json)


def _print(rows: dict[str, str], as_json: bool) -> int:
    import json

    width = max(map(len, rows), default=0)
    print(json.dumps(rows, indent=2) if as_json else "\n".join(f"{k:<{width}}  {v}" for k, v in rows.items()))
    return 0
