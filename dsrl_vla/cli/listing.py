"""``recipes``, ``init-recipe`` and ``adapters``: what is there, and a start of your own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from .options import check_new_file


@dataclass(frozen=True)
class ListArgs:
    """List what is there."""

    json: Annotated[bool, tyro.conf.arg(help="Print JSON.")] = field(default=False)


@dataclass(frozen=True)
class InitArgs:
    """Write a commented recipe for your own base and task."""

    preflight: tyro.conf.Positional[Path]
    """The preflight.json of `dsrl-vla preflight demo --base.uri <yours> --task.uri <yours>`."""
    out: Path
    """The recipe to write, a new .yaml file."""


def list_recipes(argv: list[str]) -> int:
    """List the recipes that ship, with what they were measured at."""
    args = tyro.cli(ListArgs, prog="dsrl-vla recipes", args=argv)
    from dataclasses import asdict

    from ..shelf import shelf

    entries = shelf()
    if args.json:
        return _print({entry.name: {k: v for k, v in asdict(entry).items() if k != "name"} for entry in entries}, True)
    for entry in entries:
        print(f"{entry.name}\n    {entry.description}")
        print(f"    {entry.status}" + (f": {entry.figures}; {entry.artefact}" if entry.figures else ""))
    return 0


def init_recipe(argv: list[str]) -> int:
    """Write a commented recipe for your own base and task, from preflight's findings."""
    args = tyro.cli(InitArgs, prog="dsrl-vla init-recipe", args=argv)
    import json

    from ..errors import DsrlError
    from ..first_recipe import first_recipe
    from ..recipe import load_recipe
    from ..run_dir import make_folder, write_text

    check_new_file(args.out, ".yaml")
    text = first_recipe(args.preflight, args.out.stem)
    make_folder(args.out.parent)
    write_text(args.out, text)
    try:
        load_recipe(args.out)
    except DsrlError:  # a second try is to start anew
        args.out.unlink()
        raise
    advice = json.loads(args.preflight.read_text())["recommendation"]
    print(f"written: {args.out}")
    print(f"next: dsrl-vla train {args.out}" if advice["worth_steering"] else f"before you train: {advice['words']}")
    return 0


def list_adapters(argv: list[str]) -> int:
    """List the adapters that are installed."""
    args = tyro.cli(ListArgs, prog="dsrl-vla adapters", args=argv)
    from ..bases import adapters

    return _print({f"{name}:": where for name, where in adapters().items()}, args.json)


def _print(rows: dict[str, Any], as_json: bool) -> int:
    import json

    width = max(map(len, rows), default=0)
    print(json.dumps(rows, indent=2) if as_json else "\n".join(f"{k:<{width}}  {v}" for k, v in rows.items()))
    return 0
