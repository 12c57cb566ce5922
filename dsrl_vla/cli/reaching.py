"""``reach``: whether a base can do what recorded episodes show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ..errors import bad
from .options import check_new_file, parse, read_recipe


@dataclass(frozen=True)
class ReachArgs:
    """Look for the noise behind recorded episodes, in several layouts and bounds, and tell how near it comes. Nothing
    moves; no simulator is needed. Recipe fields are options too."""

    recipe: tyro.conf.Positional[str]
    """Name of a shipped recipe or a YAML file, for its base."""
    data: tyro.conf.Positional[Path]
    """Demonstrations: an .npz or Robomimic .hdf5 file, the folder of a Hugging Face dataset or a LeRobotDataset."""
    episodes: int = 10
    """Look at the first so many."""
    layouts: tuple[str, ...] = ()
    """By default the recipe's."""
    bounds: tuple[float, ...] = ()
    """By default the recipe's."""
    out: Path | None = None
    """A .json file for the result."""


def run_reach(argv: list[str]) -> int:
    """Tell whether a base can do what demonstrations show."""
    args, rest = parse(ReachArgs, argv, "reach")
    recipe = read_recipe(args.recipe, rest)
    if args.out:
        check_new_file(args.out, ".json")
    if args.episodes < 1:
        raise bad("reach --episodes", "1 or more", args.episodes)
    import itertools

    from tqdm import tqdm

    from ..noise import NoiseLayout
    from ..offline import OfflineConfig
    from ..offline_sources import read_episodes
    from ..reachability import reachability, verdict
    from ..run_dir import make_folder, write_json
    from ..tables import print_reach

    episodes = read_episodes(OfflineConfig(str(args.data), episodes=args.episodes))
    first = next(episodes)  # what is wrong with a file is told before a base is loaded
    base, noise = recipe.base.load(), recipe.noise
    layouts = [
        NoiseLayout(base.spec.noise, name, bound, noise.columns)
        for name in args.layouts or (noise.layout,)
        for bound in args.bounds or (noise.bound,)
    ]
    with tqdm(total=args.episodes, unit="episode", desc="reach", disable=None) as bar:
        found = reachability(base, layouts, itertools.chain([first], episodes), bar.update)
    print_reach(base.spec.uri, args.data, found)
    print(verdict(found))
    if args.out:
        make_folder(args.out.parent)
        decisions = len(found[0].reach)
        facts = {"base": base.spec.uri, "data": str(args.data), "decisions": decisions, "words": verdict(found)}
        write_json(args.out, facts | {"layouts": [each.to_json() for each in found]})
        print(f"written: {args.out}")
    return 0
