"""``push``, ``inspect`` and ``pull``: heads on the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ..errors import bad


@dataclass(frozen=True)
class HubArgs:
    """What every command that talks to the Hub takes."""

    token: str | None = None
    """By default the one that `hf auth login` stored."""
    endpoint: str | None = None
    """Another Hub than huggingface.co."""

    @property
    def hub(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {"token": self.token, "endpoint": self.endpoint}


@dataclass(frozen=True)
class PushArgs(HubArgs):
    """Push a run's best head to the Hub in one commit: head, evaluation, recipe, curve, video and card."""

    run: tyro.conf.Positional[Path] = tyro.MISSING
    """A finished run's directory."""
    repo: tyro.conf.Positional[str] = ""
    """owner/name; it is made when it does not exist."""
    folder: Path | None = None
    """Write what would be pushed here instead; nothing leaves this machine."""
    private: bool = False
    branch: str | None = None
    create_pr: bool = False
    message: str = "Push a steering head with dsrl-vla"


@dataclass(frozen=True)
class InspectArgs(HubArgs):
    """Show what a head says about itself; loads no base."""

    head: tyro.conf.Positional[str] = tyro.MISSING
    """A folder, owner/name, or shipped:<recipe>."""
    revision: str | None = None
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class PullArgs(HubArgs):
    """Copy a head with its card, evaluation and recipe to a folder, checked."""

    head: tyro.conf.Positional[str] = tyro.MISSING
    """owner/name, or shipped:<recipe>."""
    out: Path = tyro.MISSING
    """A new folder."""
    revision: str | None = None


def run_push(argv: list[str]) -> int:
    """Push a run's best head to the Hub, with a card made from the run."""
    args = tyro.cli(PushArgs, prog="dsrl-vla push", args=argv)
    if bool(args.repo) == bool(args.folder):
        raise bad("push", "a repository 'owner/name', or --folder", "both" if args.repo else "neither")
    from ..hub import completed, push, write_artefact
    from ..training import load_run

    recipe, head = load_run(args.run)
    head = completed(head, recipe, args.run)
    if args.folder:
        if args.folder.exists():
            raise bad(f"{args.folder}", "a new folder", "one that exists")
        write_artefact(head, args.folder, args.run)
        print(f"written: {args.folder}")
        return 0
    more: dict[str, Any] = {"private": args.private or None, "branch": args.branch, "create_pr": args.create_pr}
    print(push(head, args.repo, run=args.run, commit_message=args.message, **more, **args.hub))
    return 0


def run_inspect(argv: list[str]) -> int:
    """Show whose head it is, what it was measured at, and how large it is."""
    args = tyro.cli(InspectArgs, prog="dsrl-vla inspect", args=argv)
    from ..hub import inspect

    found = inspect(args.head, args.revision, **args.hub)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        print("\n".join(f"{name:<{width}}  {json.dumps(value)}" for name, value in found.items()))
    return 0


def run_pull(argv: list[str]) -> int:
    """Copy a head from the Hub to a folder."""
    args = tyro.cli(PullArgs, prog="dsrl-vla pull", args=argv)
    from ..hub import pull

    print(f"written: {pull(args.head, args.out, args.revision, **args.hub)}")
    return 0
