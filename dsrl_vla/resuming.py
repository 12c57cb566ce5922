"""What a run is made of, as a checkpoint holds it: a resumed run goes on bit for bit as if nothing had happened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .errors import DsrlError, MismatchError, bad
from .head_config import HeadConfig
from .mixed_replay import MixedReplay
from .pairing import check_pair
from .run_dir import load_checkpoint, part

if TYPE_CHECKING:
    from .trainer import Trainer


def pack(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Learner, replay, collection, every generator, and what is known so far; tensors, and JSON-able state."""
    replay = trainer.replay
    tensors = {f"learner.{k}": v for k, v in trainer.learner.tensors().items()}
    tensors |= {f"replay.{k}": v for k, v in replay.tensors().items()}
    tensors |= {f"collector.{k}": v for k, v in trainer.collector.tensors().items()}
    tensors |= {f"info.{k}": torch.as_tensor(v) for k, v in trainer.updates.info.items()}
    tensors["torch_rng"] = torch.get_rng_state()
    state = {
        "head": trainer.head.config.to_json(),
        "offline_data": _offline(trainer),
        "env_steps": trainer.collector.env_steps,
        "updates": trainer.learner.updates,
        "observed": replay.observed,
        "added": replay.added,
        "collector": trainer.collector.state(),
        "rng": trainer.updates.rng.bit_generator.state,
        "validated": list(trainer.validated),
        "owed": trainer.owed,
        "validation_env_steps": trainer.validation_env_steps,
        "seconds": trainer.seconds,
    }
    return tensors, state


def unpack(trainer: Trainer, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Undo `pack`, in a trainer that has just been made by the same recipe.

    Raises:
        DsrlError: the base or the offline data that the recipe names are others by now.
    """
    _check_same(trainer, state)
    trainer.learner.load_tensors(part(tensors, "learner."), state["updates"])
    trainer.replay.load_tensors(part(tensors, "replay."), state["observed"], state["added"])
    trainer.collector.resume(part(tensors, "collector."), state["collector"])
    trainer.updates.info = part(tensors, "info.")
    trainer.updates.rng.bit_generator.state = state["rng"]
    trainer.validated.extend(state["validated"])
    trainer.owed = state.get("owed", False)  # which older checkpoints do not have
    trainer.validation_env_steps, trainer.seconds = state["validation_env_steps"], state["seconds"]
    torch.set_rng_state(tensors["torch_rng"])
    trainer.updates.resumed()


def _offline(trainer: Trainer) -> str:
    """A hash of the offline transitions; empty when there are none."""
    return trainer.data.sha256 if isinstance(trainer.data, MixedReplay) else ""


def _check_same(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Refuse to go on with what lies in the place of what the run began with; older checkpoints do not know."""
    if "head" not in state:
        return
    try:
        check_pair(HeadConfig.from_json(state["head"]), trainer.base)
    except MismatchError as error:
        raise DsrlError(f"{trainer.out}: expected the base that the run began with. {error}") from error
    if state.get("offline_data", _offline(trainer)) != _offline(trainer):
        raise bad(f"{trainer.out}: offline.source", "the data that the run began with", "others in their place")


def resume(trainer: Trainer) -> None:
    """Go on from the newest whole checkpoint, without one from the start; and, on a robot, from its journal."""
    found = load_checkpoint(trainer.out / "checkpoints")
    if found is not None:
        unpack(trainer, *found)
    trainer.finalists.load()
    before = trainer.collector.env_steps
    done_since = trainer.collector.restore()
    known = trainer.collector.env_steps if found is not None or done_since else -1
    trainer.metrics.truncate(known, math.inf if done_since else trainer.learner.updates)
    rows = trainer.metrics.rows()
    for row in rows:
        trainer.watch.see(row)
    if done_since:
        trainer.catch_up()
        due = trainer.due(trainer.recipe.train.validate_every, before)
        played = any(f"validation_{trainer.measured}" in row and row["env_steps"] > before for row in rows)
        trainer.owed |= due and not played and trainer.learner.updates > 0
