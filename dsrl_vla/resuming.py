"""What a run is made of, as a checkpoint holds it: a resumed run goes on bit for bit as if nothing had happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .under_way import part

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
        "env_steps": trainer.collector.env_steps,
        "updates": trainer.learner.updates,
        "observed": replay.observed,
        "added": replay.added,
        "collector": trainer.collector.state(),
        "rng": trainer.updates.rng.bit_generator.state,
        "validated": list(trainer.validated),
        "validation_env_steps": trainer.validation_env_steps,
        "seconds": trainer.seconds,
    }
    return tensors, state


def unpack(trainer: Trainer, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Undo `pack`, in a trainer that has just been made by the same recipe."""
    trainer.learner.load_tensors(part(tensors, "learner."), state["updates"])
    trainer.replay.load_tensors(part(tensors, "replay."), state["observed"], state["added"])
    trainer.collector.resume(part(tensors, "collector."), state["collector"])
    trainer.updates.info = part(tensors, "info.")
    trainer.updates.rng.bit_generator.state = state["rng"]
    trainer.validated.extend(state["validated"])
    trainer.validation_env_steps, trainer.seconds = state["validation_env_steps"], state["seconds"]
    torch.set_rng_state(tensors["torch_rng"])
    trainer.updates.resumed()
