"""Experiment trackers, by way of accelerate: tensorboard, wandb, trackio, or none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .errors import first_line, missing_extra
from .recipe import Recipe

log = logging.getLogger(__name__)
_TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker:
    """Logs rows of numbers to what the recipe names; a context that closes it."""

    def __init__(self, recipe: Recipe, out: Path):
        self.accelerator: Any = None
        name = recipe.train.tracker
        if name == "none":
            return
        from importlib.util import find_spec

        if find_spec(_TRACKERS[name]) is None:
            raise missing_extra(_TRACKERS[name], name, f"the tracker '{name}'")
        from accelerate import Accelerator

        try:
            self.accelerator = Accelerator(log_with=name, project_dir=str(out), cpu=True)
            self.accelerator.init_trackers(recipe.name)
        except Exception as error:  # nobody logged in, no network: no reason not to train
            log.warning("the tracker '%s' does not start, and is done without: %s", name, first_line(error))
            self.accelerator = None

    def log(self, row: dict[str, float], step: int) -> None:
        """Log a row at an environment step. A tracker that fails is done without: ``metrics.jsonl`` has it all."""
        if self.accelerator is None:
            return
        try:
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=step)
        except Exception as error:
            log.warning("the tracker failed, and is done without: %s", first_line(error))
            self.accelerator = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.accelerator is None:
            return
        try:
            self.accelerator.end_training()
        except Exception as error:
            log.warning("the tracker did not end as it should: %s", first_line(error))
