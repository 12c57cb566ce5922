"""``preflight``, ``search`` and ``record``: commands that run a base."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..errors import bad
from ..measures import shown
from .options import check_new_file, parse, read_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..offline import OfflineEpisode
    from ..policy import FrozenPolicy
    from ..recipe import Recipe
    from ..sources import NoiseSource


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
    """Directory for ticket.json, eval.json and, in best/, a head that always chooses the ticket, which the other
    commands take as they take a run's; by default runs/<recipe>-ticket."""


@dataclass(frozen=True)
class RecordArgs:
    """Record rollouts of a recipe's base, or demonstrations, as offline data (npz): see `dsrl_vla.offline`."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe or a YAML file; recipe fields are options too."""
    out: Path
    """The .npz file to write; see dsrl_vla.offline_sources for its format."""
    episodes: int = 50
    skip: int = 0
    """Pass over so many: for more data than were recorded before, and not the same again."""
    noise: Literal["base", "layout", "held"] | None = None
    """Who picks the noise. base, the default: the base as it ships. layout: drawn in the recipe's layout and bound at
    every decision, which is what a head explores with. held: drawn so once per episode and held, so that how an
    episode ends tells what its noise did: the best data to learn from offline."""
    run: Path | None = None
    """A run's directory: its best head picks the noise."""
    demonstrator: Literal["operator", "expert"] | None = None
    """Demonstrations, by no base, on tasks that have a scripted expert (metaworld:, ogbench:, robosuite:). operator:
    whom the embedded base was cloned from, who in 60 % of episodes sees the object where it is not; failures are kept.
    expert: one who never does."""


def run_preflight(argv: list[str]) -> int:
    """Measure whether a base can be steered on a task, and in which layout."""
    args, rest = parse(PreflightArgs, argv, "preflight")
    recipe = read_recipe(args.recipe, rest)
    from tqdm import tqdm

    from ..rollout import VectorTask
    from ..run_dir import write_json
    from ..steerability import PreflightConfig, preflight
    from ..tables import print_preflight

    config = PreflightConfig(args.episodes, args.best_of, args.layouts, args.bounds, recipe.noise.columns)
    out = _new(args.out or Path("runs") / f"{recipe.name}-preflight")
    base = recipe.base.load()
    total = config.total_episodes(base) * len(recipe.task.uris)
    with (
        VectorTask(recipe.task, base.spec.executed_steps) as task,
        tqdm(total=total, unit="episode", disable=None) as bar,
    ):

        def tick(name: str, _: Any) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        result = preflight(base, task, config, tick)
    result["recipe"] = {"base": asdict(recipe.base), "task": asdict(recipe.task), "columns": recipe.noise.columns}
    write_json(out / "preflight.json", result)
    print_preflight(result)
    print(f"written: {out / 'preflight.json'}")
    return 0


def run_search(argv: list[str]) -> int:
    """Find the best constant noise for a task: steering without learning."""
    args, rest = parse(SearchArgs, argv, "search")
    recipe = read_recipe(args.recipe, rest)
    from tqdm import tqdm

    from ..evaluation import check_scenes
    from ..noise_search import SearchConfig, evaluate_ticket, search_ticket
    from ..rollout import VectorTask
    from ..run_dir import write_json, write_text

    config = SearchConfig(args.candidates, args.episodes, args.seed)
    tasks = len(recipe.task.uris)
    envs = min(args.episodes * tasks, recipe.task.num_envs)
    if args.eval_episodes < 1:
        raise bad("search --eval-episodes", "1 or more", args.eval_episodes)
    out = _new(args.out or Path("runs") / f"{recipe.name}-ticket")
    base = recipe.base.load()
    layout = recipe.noise.over(base.spec.noise)
    with (
        tqdm(total=config.total_episodes * tasks, unit="episode", desc="search", disable=None) as bar,
        VectorTask(replace(recipe.task, num_envs=envs), base.spec.executed_steps) as task,
    ):
        check_scenes(task.infos, args.eval_episodes)
        ticket = search_ticket(base, task, layout, config, lambda _: bar.update())
    ticket.save(out / "ticket.json")
    ticket.head(base, layout).save_pretrained(out / "best")
    write_text(out / "recipe.yaml", recipe.to_yaml())
    with (
        tqdm(total=2 * args.eval_episodes * tasks, unit="episode", desc="evaluation", disable=None) as bar,
        VectorTask(recipe.task, base.spec.executed_steps) as task,
    ):
        result = evaluate_ticket(base, task, layout, ticket, args.eval_episodes, lambda _: bar.update())
    facts = {"recipe": recipe.name, "train_seed": args.seed, "env_steps": ticket.env_steps}
    write_json(out / "eval.json", result | facts)
    own, best = result["base"], result["steered"]
    print(
        f"{result['task']}: base {' '.join(shown(own))}, best constant noise "
        f"{' '.join(shown(best))} over {result['episodes']} held-out episodes, found in {ticket.env_steps} steps"
    )
    print(f"written: {out}")
    return 0


def _new(out: Path) -> Path:
    """A directory for results that holds none yet, made."""
    from ..run_dir import make_folder

    results = ("recipe.yaml", "preflight.json", "ticket.json", "eval.json")
    if there := [name for name in results if (out / name).exists()]:
        raise bad(f"{out}", "a new directory", f"one that holds a {there[0]}", "Choose another --out.")
    make_folder(out)
    return out


def _played(args: RecordArgs, recipe: Recipe, numbers: list[int]) -> Iterator[OfflineEpisode]:
    """The episodes of these numbers, by whom the arguments name."""
    from ..nano.demos import DemoConfig
    from ..recording import demonstrate, record

    if args.demonstrator:
        operator = DemoConfig() if args.demonstrator == "operator" else DemoConfig(offset_share=0.0)
        return demonstrate(recipe.task, operator, numbers)
    base = recipe.base.load()
    return record(base, recipe.task, _source(args, recipe, base), numbers)


def _source(args: RecordArgs, recipe: Recipe, base: FrozenPolicy) -> NoiseSource:
    """Who picks the noise of recorded episodes."""
    from ..pairing import check_pair
    from ..sources import HeadNoise, HeldNoise, LayoutNoise, PriorNoise
    from ..training import load_run

    if args.run:
        head = load_run(args.run)[1]
        check_pair(head.config, base)
        return HeadNoise(head)
    if args.noise in ("layout", "held"):
        layout = recipe.noise.over(base.spec.noise)
        return HeldNoise(layout) if args.noise == "held" else LayoutNoise(layout)
    return PriorNoise(base.spec.noise)


def run_record(argv: list[str]) -> int:
    """Record rollouts as offline data."""
    args, rest = parse(RecordArgs, argv, "record")
    recipe = read_recipe(args.recipe, rest)
    from tqdm import tqdm

    from .. import seeds
    from ..offline_sources import write_npz
    from ..run_dir import make_folder

    check_new_file(args.out, ".npz")
    if args.skip < 0:
        raise bad("record --skip", "0 or more", args.skip)
    given = {"--noise": args.noise, "--run": args.run, "--demonstrator": args.demonstrator}
    if len(told := [name for name, value in given.items() if value]) > 1:
        raise bad("record", "one of --noise, --run and --demonstrator", " and ".join(told))
    make_folder(args.out.parent)
    numbers = seeds.block(seeds.RECORDING + args.skip, args.episodes)
    episodes, total = _played(args, recipe, numbers), args.episodes * len(recipe.task.uris)
    kept: list[OfflineEpisode] = []
    with tqdm(episodes, total=total, unit="episode", desc="recording", disable=None) as bar:
        try:
            kept.extend(bar)
        except KeyboardInterrupt:  # what has been played is worth keeping
            if not kept:
                raise
    write_npz(args.out, kept)
    won = sum(bool(episode["success"].max()) for episode in kept)
    print(f"{len(kept)} episodes, {won} successful; written: {args.out}")
    if len(kept) == total:
        return 0
    if len(recipe.task.uris) == 1:
        print(f"interrupted; others than these: --skip {args.skip + len(kept)}")
    return 130
