"""How long `import dsrl_vla` and `dsrl-vla --help` take, each in a fresh interpreter.

    python benchmarks/bench_import.py [--rounds 15]

CPU seconds of the child, user and system. Writes results/import.json.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass

import tyro
from common import Goal, finish, interval, side_by_side

COMMANDS = {
    "python": ["-c", "pass"],
    "import dsrl_vla": ["-c", "import dsrl_vla, sys; assert 'torch' not in sys.modules"],
    "dsrl-vla --help": ["-m", "dsrl_vla.cli", "--help"],
}


@dataclass(frozen=True)
class Args:
    """What to measure."""

    rounds: int = 15


def children() -> float:
    """CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    run = lambda command: lambda: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    times = side_by_side({name: run(command) for name, command in COMMANDS.items()}, args.rounds, clock=children)
    found = {name: interval(value) for name, value in times.items()}
    limits = {"import dsrl_vla": 0.3, "dsrl-vla --help": 0.6}
    goals = [Goal(name, found[name]["median"], limit, at_least=False, unit=" s") for name, limit in limits.items()]
    return finish("import", goals, rounds=args.rounds, cpu_seconds=found)


if __name__ == "__main__":
    sys.exit(main())
