"""The model card of a head, from what its run left behind; results also as the Hub's evaluation metadata."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .artefact import CURVES, EVAL, RECIPE, VIDEO
from .head_config import HeadConfig
from .measures import shown, shown_gain, value, yardstick
from .policy import pinned
from .recipe import base_beside

_METRICS = {"success": "success_rate", "return": "mean_return"}
_HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def head_card(config: HeadConfig, folder: Path) -> str:
    """The card for a head whose run's files, if there are any, lie in `folder`."""
    result = json.loads((folder / EVAL).read_text()) if (folder / EVAL).is_file() else None
    title = f"{result.get('recipe', 'head')}: a steering head" if result else "A steering head"
    template = resources.files("dsrl_vla.data").joinpath("head_card.md").read_text()
    body = Template(template).substitute(
        title=title,
        base=config.base_model_name_or_path,
        revision=f" at `{config.revision}`" if config.revision else "",
        version=config.dsrl_vla_version,
        task=f"`{result['task']}`" if result else "(not recorded)",
        scope="It was trained and measured on the task above, with this base, and means nothing elsewhere."
        if result
        else "What it was trained on is not recorded; it means nothing on another task or base.",
        results=_results(result, folder) if result else "It was pushed without an evaluation.\n",
        base_arguments=_base_arguments(_base_uri(config, result), folder),
        source='"<this repository>"',
        executed=config.executed_steps,
        actions=config.action_dim or "A",
        horizon=config.layout.space.horizon,
        dim=config.layout.space.dim,
        layout=config.layout.name,
        bound=f"{config.layout.bound:g}",
        looks=", ".join(
            ["the robot's state"]
            + ["the base's pooled prefix feature"] * bool(config.feature_dim)
            + [f"camera {name} at {config.image_size} pixels" for name in config.cameras]
        ),
        network=f"{config.network.kind}, width {config.network.width}, {config.network.layers} layers, float32",
        footnote=f"\nThe whole recipe is in `{RECIPE}`." if (folder / RECIPE).is_file() else "",
    )
    return f"---\n{_metadata(config, result).to_yaml()}\n---\n{body}"


def _base_uri(config: HeadConfig, result: dict[str, Any] | None) -> str:
    """Of the base as it was loaded for the run, if there was one."""
    if result is None:
        return config.base_uri
    return pinned(result["base_uri"], config.adapter, config.base_model_name_or_path, config.revision)


def _base_arguments(uri: str, folder: Path) -> str:
    """What `load_base` is called with: the URI, and the options that the run's recipe gives the adapter."""
    options = base_beside(folder).options
    return ", ".join([json.dumps(uri), *(f"{name}={value!r}" for name, value in options.items())])


def _metadata(config: HeadConfig, result: dict[str, Any] | None) -> Any:
    """Tags as peft has them: the base's id, and that this adapts it; only where the base lives on the Hub."""
    from huggingface_hub import ModelCardData

    base = config.base_model_name_or_path
    on_hub = bool(_HUB_ID.fullmatch(base)) and ":" not in base and not Path(base).exists()
    more: dict[str, Any] = {"base_model": base, "base_model_relation": "adapter"} if on_hub else {}
    return ModelCardData(
        library_name="dsrl-vla",
        pipeline_tag="robotics",
        tags=["robotics", "dsrl", *([f"base_model:adapter:{base}"] if on_hub else [])],
        model_name=result.get("recipe", "steering head") if result else "steering head",
        eval_results=_eval_results(result) if result else None,
        **more,
    )


def _eval_results(result: dict[str, Any]) -> list[Any]:
    """Of the steered and of the bare base, with episodes, seeds and intervals."""
    from huggingface_hub import EvalResult

    first, last = result["seeds"]
    kind = yardstick(result["base"])
    return [
        EvalResult(
            task_type="robotics",
            dataset_type=result["task"],
            dataset_name=f"{result['task']}, {result['episodes']} held-out episodes",
            dataset_args={"episodes": result["episodes"], "first_seed": first, "last_seed": last},
            metric_type=_METRICS[kind.name],
            metric_name=f"{_METRICS[kind.name].replace('_', ' ')}, {name}",
            metric_value=value(result[key]),
            metric_args={
                "interval": f"{kind.interval_name}, 95 %",
                "low": result[key]["ci95"][0],
                "high": result[key]["ci95"][1],
            },
        )
        for name, key in (("steered", "steered"), ("base alone", "base"))
    ]


def _results(result: dict[str, Any], folder: Path) -> str:
    """Results in words, a table, the curve and the video."""
    first, last = result["seeds"]
    rows = {"base": result["base"]} | {f"{k} noise": m for k, m in result.get("controls", {}).items()}
    rows["**steered**"] = result["steered"]
    if "steered_stochastic" in result:
        rows["steered, stochastic"] = result["steered_stochastic"]
    counts, kind = [], yardstick(result["base"])
    seen = "never trained on"
    if "scenes" in result:
        seen = f"in initial states that training sees too: the task has {result['scenes']}"
    for key, words in (("env_steps", "environment steps"), ("updates", "updates"), ("train_seconds", "seconds")):
        if key in result:
            counts.append(f"{result[key]:,g} {words}" if key == "train_seconds" else f"{result[key]:,} {words}")
    trained = f" Training: {', '.join(counts)}; seed {result['train_seed']}." if "train_seed" in result else ""
    lines = [
        "## Results",
        "",
        f"{kind.name.capitalize()} over {result['episodes']} held-out episodes (seeds {first} to {last}, the same for "
        f"every row, {seen}), with {kind.interval_name} 95 % intervals. One training run.{trained}",
        "",
        f"| noise | {kind.name} | 95 % interval |",
        "|---|---|---|",
        *(f"| {k} | {' | '.join(shown(m))} |" for k, m in rows.items()),
        "",
        f"Steered less base, paired: {' '.join(shown_gain(result))}.",
        "",
    ]
    if (folder / CURVES).is_file():
        lines += [f"![learning curve and evaluation]({CURVES})", ""]
    if (folder / VIDEO).is_file():
        lines += [f"[Base and steered side by side on the same episodes]({VIDEO})", ""]
    return "\n".join(lines)
