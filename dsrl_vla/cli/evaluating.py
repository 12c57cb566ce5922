"""``eval``: a head against its base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ..errors import bad
from .serving import ServeArgs, load

if TYPE_CHECKING:
    from ..rollout import TaskConfig


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a run's best head, or a head that was handed on, against its base, on the same held-out episodes."""

    run: tyro.conf.Positional[Path]
    """A run's directory, a head's folder (`dsrl-vla pull`), or shipped:<recipe>."""
    episodes: int = 100
    controls: bool = True
    out: Path | None = None
    """Where to write the result; by default the run's eval.json. A head that was handed on keeps its author's."""
    dtype: str = ""
    """Of the base; by default the run's."""
    device: str = ""


def run_eval(argv: list[str]) -> int:
    """Evaluate a head against its base, on the same held-out episodes."""
    args = tyro.cli(EvalArgs, prog="dsrl-vla eval", args=argv)
    from tqdm import tqdm

    from ..artefact import EVAL
    from ..evaluation import RUN_FACTS, evaluate, evaluation_episodes
    from ..rollout import VectorTask
    from ..run_dir import make_folder, write_json
    from ..tables import print_evaluation

    folder, own = _folder(args)
    target = args.out or folder / EVAL
    if target.is_dir():
        raise bad("eval --out", "a JSON file to write", f"a folder, '{target}'")
    base, head = load(ServeArgs(str(folder), dtype=args.dtype, device=args.device))
    config = _task(folder, own)
    make_folder(target.parent)
    before = base.sha256()
    total = evaluation_episodes(config, args.episodes, args.controls)
    with (
        VectorTask(config, base.spec.executed_steps) as task,
        tqdm(total=total, unit="episode", desc="evaluation", disable=None) as bar,
    ):
        result = evaluate(base, head, task, args.episodes, args.controls, on_episode=lambda _: bar.update())
    kept = json.loads((folder / EVAL).read_text()) if (folder / EVAL).exists() else {}
    facts = (*RUN_FACTS, *(["baselines"] if own and kept.get("seeds") == result["seeds"] else []))
    result |= {key: kept[key] for key in facts if key in kept}
    result |= {"base_sha256_before": before, "base_sha256_after": base.sha256()}
    write_json(target, result)
    if own and target == folder / EVAL:
        _draw(folder, result)
    print_evaluation(result)
    print(f"written: {target}")
    return 0


def _folder(args: EvalArgs) -> tuple[Path, bool]:
    """Where the head is, and whether that is a run, whose own evaluation this is to be."""
    from ..artefact import RECIPE
    from ..head_config import CONFIG
    from ..hub import SHELF, fetch

    folder = fetch(str(args.run)) if str(args.run).startswith(SHELF) else args.run
    if (folder / CONFIG).exists():
        if args.out is None or args.out.resolve().parent == folder.resolve():
            raise bad("eval --out", "a file outside the head's folder, whose eval.json is its author's", args.out)
        return folder, False
    if not (folder / RECIPE).exists():
        wanted = "a run's directory, a head's folder (dsrl-vla pull fetches one) or shipped:<recipe>"
        raise bad(f"{args.run}", wanted, "none of these")
    return folder, True


def _task(folder: Path, own: bool) -> TaskConfig:
    """What the recipe says of the task; a head's, of which only this section is looked at, must be the head's own."""
    from ..artefact import RECIPE, held
    from ..recipe import load_recipe, task_beside

    if own:
        return load_recipe(folder / RECIPE).task
    if RECIPE not in held(folder):
        raise bad(str(folder), f"a head with the {RECIPE} of its run, which says the task", "one without")
    return task_beside(folder)


def _draw(folder: Path, result: dict) -> None:
    """The curve's picture shows the evaluation beside its bars."""
    from ..plots import draw_curves
    from ..run_dir import Metrics

    draw_curves(folder / "curves.png", Metrics(folder / "metrics.jsonl").rows(), result)
