"""A first recipe for somebody's own base and task, from what preflight found there."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .errors import bad


def first_recipe(path: Path, name: str) -> str:
    """A commented recipe from a ``preflight.json``.

    Raises:
        DsrlError: no such file, or not one that `dsrl-vla preflight` wrote.
    """
    if not path.is_file():
        raise bad(f"{path}", "the preflight.json that `dsrl-vla preflight` wrote", "no such file")
    try:
        return _fill(json.loads(path.read_text()), path.name, name)
    except json.JSONDecodeError as error:
        raise bad(f"{path}", "the preflight.json that `dsrl-vla preflight` wrote", f"no JSON: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise bad(f"{path}", "a preflight.json of this version", f"one without {error}", "Run it again.") from error


def _fill(report: dict[str, Any], source: str, name: str) -> str:
    base, task, advice = report["recipe"]["base"], report["recipe"]["task"], report["recommendation"]
    rows = {k: m["success"] for k, m in report["conditions"].items()}
    best = report["best_of"]
    rows |= {f"{k}, best of {best['k']}": m["success"] for k, m in best.items() if k != "k"}
    width = max(map(len, rows))
    steps = 15_000
    text = resources.files("dsrl_vla.data").joinpath("first_recipe.yaml").read_text()
    return Template(text).substitute(
        source=source,
        name=json.dumps(name),
        file=name,
        episodes=report["episodes"],
        table="\n".join(f"#   {k:<{width}}  {success:.2f}" for k, success in rows.items()),
        words=advice["words"] or "Nothing stands out.",
        description=json.dumps(f"Steers {base['uri']} on {task['uri']}."),
        base_uri=json.dumps(base["uri"]),
        dtype=base["dtype"],
        device=base["device"],
        options=json.dumps(base["options"]),
        task_uri=json.dumps(task["uri"]),
        max_episode_steps=task["max_episode_steps"],
        num_envs=task["num_envs"],
        vector=task["vector"],
        more=json.dumps(task["more"]),
        columns=report["recipe"]["columns"],
        layout=advice["layout"],
        bound=f"{advice['bound']:g}",
        env_steps=steps,
        eval_episodes=min(100, report.get("scenes", 100)),
        validate_every=steps // 6,
        checkpoint_every=steps // 10,
    )
