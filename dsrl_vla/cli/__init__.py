"""The command line: ``dsrl-vla preflight | train | eval | push | …``; ``dsrl-vla --help`` lists them all.

Every field of a recipe can be overridden: ``dsrl-vla train demo --train.seed 3 --noise.layout chunk``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from ..errors import DsrlError, unknown
from .driving import run_drive
from .evaluating import run_eval
from .exporting import run_export, run_export_policy
from .listing import init_recipe, list_adapters, list_recipes
from .measuring import run_preflight, run_record, run_search
from .reaching import run_reach
from .serving import run_serve
from .sharing import run_inspect, run_pull, run_push
from .training import run_pretrain, run_train


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status. Errors a user can mend are one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from .. import __version__

        print(f"dsrl-vla {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        return COMMANDS[argv[0]](argv[1:])
    except DsrlError as error:
        print(f"dsrl-vla: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read us, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("dsrl-vla: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = ["usage: dsrl-vla COMMAND …    (dsrl-vla COMMAND --help tells more)", ""]
    lines += [f"  {name:<14} {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "preflight": run_preflight,
    "train": run_train,
    "eval": run_eval,
    "serve": run_serve,
    "search": run_search,
    "record": run_record,
    "reach": run_reach,
    "drive": run_drive,
    "export": run_export,
    "export-policy": run_export_policy,
    "pretrain": run_pretrain,
    "push": run_push,
    "inspect": run_inspect,
    "pull": run_pull,
    "recipes": list_recipes,
    "init-recipe": init_recipe,
    "adapters": list_adapters,
}
