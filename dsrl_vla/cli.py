"""The command line: ``dsrl-vla preflight | train | eval | search | pretrain | recipes | adapters``.

Every field of a recipe can be overridden: ``dsrl-vla train demo --train.seed 3 --noise.layout chunk``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from .errors import DsrlError, unknown


@dataclass(frozen=True)
class TrainArgs:
    """Train a steering head by a recipe, and evaluate it. Recipe fields are options too; see --help-recipe."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe (`dsrl-vla recipes`) or a YAML file."""
    out: Path | None = None
    """Run directory; by default runs/<recipe>."""
    resume: bool = False
    """Go on from the newest checkpoint in the run directory."""
    help_recipe: bool = False
    """Show every field of the recipe with its value, and stop."""


@dataclass(frozen=True)
class PreflightArgs:
    """Measure whether a base is steerable on a recipe's task, in which layout, and what there is to gain."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe or a YAML file; recipe fields are options too."""
    episodes: int = 30
    """Episodes per condition."""
    best_of: int = 4
    """Noise draws per episode behind the headroom."""
    layouts: tuple[str, ...] = ("repeat", "knots:2", "knots:4", "chunk")
    bounds: tuple[float, ...] = (1.0, 1.5, 2.0)
    out: Path | None = None
    """Directory for preflight.json; by default runs/<recipe>-preflight."""


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a run's best head against its base, on the same held-out episodes."""

    run: tyro.conf.Positional[Path]
    """A run's directory."""
    episodes: int = 100
    controls: bool = True
    out: Path | None = None
    """File to write; by default <run>/eval.json."""


@dataclass(frozen=True)
class SearchArgs:
    """Search the best constant noise ("golden ticket") for a recipe's task, and evaluate it: steering without
    learning. Recipe fields are options too."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe or a YAML file."""
    candidates: int = 24
    """Constant noises to try."""
    episodes: int = 3
    """Episodes each plays per round; the better half of the candidates goes on."""
    seed: int = 0
    eval_episodes: int = 100
    """Held-out episodes of the evaluation."""
    out: Path | None = None
    """Directory for ticket.json and eval.json; by default runs/<recipe>-ticket."""


@dataclass(frozen=True)
class PretrainArgs:
    """Clone a nano base on MetaWorld tasks and measure it."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped pretraining recipe or a YAML file."""
    out: Path
    """Folder for the base, in Hub format; use it as nano:<folder>."""


@dataclass(frozen=True)
class ListArgs:
    """List what is there."""

    json: Annotated[bool, tyro.conf.arg(help="Print JSON.")] = field(default=False)


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status. Errors a user can mend are one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from . import __version__

        print(f"dsrl-vla {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise unknown("command", argv[0], COMMANDS)
        return COMMANDS[argv[0]](argv[1:])
    except DsrlError as error:
        print(f"dsrl-vla: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dsrl-vla: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = ["usage: dsrl-vla COMMAND …    (dsrl-vla COMMAND --help tells more)", ""]
    lines += [f"  {name:<10} {(command.__doc__ or '').strip()}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _parse(kind: type, argv: list[str], command: str) -> tuple[Any, list[str]]:
    return tyro.cli(kind, prog=f"dsrl-vla {command}", args=argv, return_unknown_args=True)


def _recipe(source: str, rest: list[str]) -> Any:
    """A recipe with the remaining options applied over it."""
    import yaml

    from .recipe import Recipe, load_recipe

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
        parsed = yaml.safe_load(value)
        place[parts[-1]] = value if isinstance(parsed, dict) else parsed  # "nano:" is a URI, not a mapping
    recipe: Recipe = load_recipe(source, tree)
    return recipe


def _train(argv: list[str]) -> int:
    """Train a steering head by a recipe, and evaluate it."""
    args, rest = _parse(TrainArgs, argv, "train")
    recipe = _recipe(args.recipe, rest)
    out = args.out or Path("runs") / recipe.name
    if args.resume and not rest and (out / "recipe.yaml").exists():
        recipe = _recipe(str(out / "recipe.yaml"), [])  # with the overrides the run was started with
    if args.help_recipe:
        print(recipe.to_yaml())
        return 0
    from .evaluation import summary
    from .training import train

    result = train(recipe, out, resume=args.resume)
    if result.evaluation is None:
        return 130
    print(summary(result.evaluation))
    print(f"run directory: {result.out}")
    return 0


def _preflight(argv: list[str]) -> int:
    """Measure whether a base can be steered on a task, and in which layout."""
    args, rest = _parse(PreflightArgs, argv, "preflight")
    recipe = _recipe(args.recipe, rest)
    from tqdm import tqdm

    from .rollout import VectorTask
    from .run_dir import disk_errors, write_json
    from .steerability import PreflightConfig, conditions, preflight
    from .tables import print_preflight

    out = args.out or Path("runs") / f"{recipe.name}-preflight"
    config = PreflightConfig(args.episodes, args.best_of, tuple(args.layouts), tuple(args.bounds))
    base = recipe.base.load()
    total = args.episodes * (len(conditions(base, config)) + args.best_of - 1)
    with (
        VectorTask(recipe.task, base.spec.executed_steps) as task,
        tqdm(total=total, unit="episode", disable=None) as bar,
    ):

        def tick(name: str, _: Any) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        result = preflight(base, task, config, tick)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "preflight.json", result)
    print_preflight(result)
    print(f"written: {out / 'preflight.json'}")
    return 0


def _eval(argv: list[str]) -> int:
    """Evaluate a run's best head against its base, on the same held-out episodes."""
    args = tyro.cli(EvalArgs, prog="dsrl-vla eval", args=argv)
    import json

    from .evaluation import evaluate
    from .rollout import VectorTask
    from .run_dir import write_json
    from .tables import print_evaluation
    from .training import load_run

    recipe, head = load_run(args.run)
    base = recipe.base.load()
    before = base.sha256()
    with VectorTask(recipe.task, base.spec.executed_steps) as task:
        result = evaluate(base, head, task, args.episodes, args.controls)
    target = args.out or args.run / "eval.json"
    kept = json.loads((args.run / "eval.json").read_text()) if (args.run / "eval.json").exists() else {}
    counts = {
        key: kept[key]
        for key in ("recipe", "train_seed", "env_steps", "validation_env_steps", "updates", "train_seconds")
        if key in kept
    }
    result |= counts | {"base_sha256_before": before, "base_sha256_after": base.sha256()}
    write_json(target, result)
    print_evaluation(result)
    print(f"written: {target}")
    return 0


def _search(argv: list[str]) -> int:
    """Find the best constant noise for a task: steering without learning."""
    args, rest = _parse(SearchArgs, argv, "search")
    recipe = _recipe(args.recipe, rest)
    from tqdm import tqdm

    from .noise_search import SearchConfig, evaluate_ticket, search_ticket
    from .rollout import VectorTask
    from .run_dir import disk_errors, write_json

    config = SearchConfig(args.candidates, args.episodes, args.seed)
    out = args.out or Path("runs") / f"{recipe.name}-ticket"
    base = recipe.base.load()
    layout = recipe.noise.over(base.spec.noise)
    with (
        tqdm(total=config.total_episodes, unit="episode", desc="search", disable=None) as bar,
        VectorTask(replace(recipe.task, num_envs=args.episodes), base.spec.executed_steps) as task,
    ):
        ticket = search_ticket(base, task, layout, config, lambda _: bar.update())
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        ticket.save(out / "ticket.json")
    with (
        tqdm(total=2 * args.eval_episodes, unit="episode", desc="evaluation", disable=None) as bar,
        VectorTask(recipe.task, base.spec.executed_steps) as task,
    ):
        result = evaluate_ticket(base, task, layout, ticket, args.eval_episodes, lambda _: bar.update())
    write_json(out / "eval.json", result)
    own, best = result["base"], result["ticket"]
    print(
        f"{result['task']}: base {own['success']:.2f} {own['ci95']}, best constant noise {best['success']:.2f} "
        f"{best['ci95']} over {result['episodes']} held-out episodes, found in {ticket.env_steps} steps"
    )
    print(f"written: {out}")
    return 0


def _pretrain(argv: list[str]) -> int:
    """Clone a nano base on MetaWorld tasks and measure it."""
    args = tyro.cli(PretrainArgs, prog="dsrl-vla pretrain", args=argv)
    from .pretraining import load_pretrain_recipe, pretrain

    pretrain(load_pretrain_recipe(args.recipe), args.out)
    print(f"base written; use it as nano:{args.out}")
    return 0


def _recipes(argv: list[str]) -> int:
    """List the recipes that ship."""
    args = tyro.cli(ListArgs, prog="dsrl-vla recipes", args=argv)
    import yaml

    from .recipes import shipped

    rows = {name: (yaml.safe_load(path.read_text()) or {}).get("description", "") for name, path in shipped().items()}
    return _list(rows, args.json)


def _adapters(argv: list[str]) -> int:
    """List the adapters that are installed."""
    args = tyro.cli(ListArgs, prog="dsrl-vla adapters", args=argv)
    from .bases import adapters

    return _list({f"{name}:": where for name, where in adapters().items()}, args.json)


def _list(rows: dict[str, str], as_json: bool) -> int:
    import json

    width = max(map(len, rows), default=0)
    print(json.dumps(rows, indent=2) if as_json else "\n".join(f"{k:<{width}}  {v}" for k, v in rows.items()))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "preflight": _preflight,
    "train": _train,
    "eval": _eval,
    "search": _search,
    "pretrain": _pretrain,
    "recipes": _recipes,
    "adapters": _adapters,
}

if __name__ == "__main__":
    sys.exit(main())
