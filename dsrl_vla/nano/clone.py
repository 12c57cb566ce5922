"""Behaviour cloning on demonstrations: what every architecture shares, and the nano π0.

An architecture registers under the entry-point group ``dsrl_vla.architectures``; its target is a callable
``(demos, config, sizes, out, on_step) -> FrozenPolicy`` that trains one and leaves it in the folder `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapters.pi0_processing import Pi0Processing, Pi0Statistics
from ..adapters.pi0_sampling import flow_loss
from ..adapters.transformers_pi0 import TransformersPi0
from ..errors import at_least, bad
from ..observation import IMAGE_PREFIX, PROMPT, STATE
from ..run_dir import disk_errors
from ..tasks.metaworld import prompts
from .demos import Demos
from .model import NanoConfig, build_model, build_tokenizer

OnStep = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class CloneConfig:
    """How a nano base is cloned."""

    steps: int = 5000
    batch: int = 64
    draws: int = 4
    """Noises and flow times per sample, behind one prefix where the architecture allows."""
    lr: float = 1e-3
    weight_decay: float = 1e-4
    wait_share: float = 0.15
    """Share of samples whose prompt is another task's; their demonstration is to hold still. The prompt is
    then needed: a policy that reads the task off the scene alone gets these wrong."""
    sight_weight: float = 0.3
    """Weight of an auxiliary loss, dropped after training, that asks the prefix where object and goal are."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, "clone", "steps", "batch", "draws")
        at_least(0, self, "clone", "weight_decay", "sight_weight", "seed")
        if self.lr <= 0:
            raise bad("clone.lr", "above 0", self.lr)
        if not 0 <= self.wait_share < 1:
            raise bad("clone.wait_share", "from 0 to below 1", self.wait_share)


def statistics(demos: Demos, config: NanoConfig) -> Pi0Statistics:
    """Normalisation from the demonstrations; a column that never varies keeps a deviation of 1."""

    def moments(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        std = values.std(0)
        std[std < 1e-3] = 1.0
        return tuple(map(float, values.mean(0).round(6))), tuple(map(float, std.round(6)))

    state_mean, state_std = moments(demos.states)
    actions_mean, actions_std = moments(demos.actions)
    return Pi0Statistics(
        cameras=(demos.camera,),
        image_size=config.image_size,
        image_seq_length=config.image_tokens,
        state_mean=state_mean,
        state_std=state_std,
        actions_mean=actions_mean,
        actions_std=actions_std,
        max_length=config.prompt_tokens,
    )


class Sampler:
    """Draws training batches: observation, chunk, and where things are."""

    def __init__(self, demos: Demos, chunk: int, wait_share: float, rng: np.random.Generator):
        self.demos, self.chunk, self.wait_share, self.rng = demos, chunk, wait_share, rng

    def __call__(self, size: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        d, rng = self.demos, self.rng
        rows = rng.integers(len(d), size=size)
        ahead = np.minimum(rows[:, None] + np.arange(self.chunk), d.last[rows][:, None])
        actions, task = d.actions[ahead], d.task[rows].copy()
        wait = (rng.random(size) < self.wait_share) & (len(d.prompts) > 1)
        task[wait] = (task[wait] + rng.integers(1, max(2, len(d.prompts)), wait.sum())) % len(d.prompts)
        wait &= np.array([d.prompts[i] != d.prompts[j] for i, j in zip(task, d.task[rows], strict=True)])
        actions[wait, :, :-1] = 0.0
        actions[wait, :, -1] = actions[wait, :1, -1]  # the gripper, which holds what it holds
        observations = {
            IMAGE_PREFIX + d.camera: d.images[rows],
            STATE: d.states[rows],
            PROMPT: [d.prompts[i] for i in task],
        }
        return observations, torch.from_numpy(actions), torch.from_numpy(d.objects[rows])


class Sight(torch.nn.Module):
    """The auxiliary loss: object and goal, read off the pooled prefix by a linear map that is dropped afterwards."""

    def __init__(self, demos: Demos, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(width, demos.objects.shape[1])
        self.centre = torch.from_numpy(demos.objects.mean(0))
        self.spread = torch.from_numpy(demos.objects.std(0) + 1e-3)

    def forward(self, feature: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """(B, W) and (B, 6) -> the loss."""
        return torch.nn.functional.mse_loss(self.linear(feature), (objects - self.centre) / self.spread)


def fit(
    parameters: list[torch.nn.Parameter],
    losses: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    config: CloneConfig,
    on_step: OnStep,
) -> None:
    """Minimise flow loss + sight loss: AdamW, a short warm-up and a cosine. `losses` makes both for a new batch."""
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, min(100, max(1, config.steps // 10)))
    cool = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.steps))
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warm, cool])
    for step in range(config.steps):
        flow, see = losses()
        optimizer.zero_grad(set_to_none=True)
        (flow + config.sight_weight * see).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, {"flow_loss": float(flow.detach()), "sight_loss": float(see.detach())})


def clone(
    demos: Demos, config: CloneConfig, sizes: NanoConfig, on_step: OnStep = lambda *_: None
) -> tuple[Any, Any, Pi0Statistics]:
    """Clone a nano base; return (model, tokenizer, statistics). Deterministic on one thread."""
    torch.manual_seed(config.seed)
    stats = statistics(demos, sizes)
    tokenizer = build_tokenizer([*prompts().values(), *demos.prompts])
    model = build_model(sizes, len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")).train()
    processing = Pi0Processing(stats, tokenizer, sizes.max_state_dim)
    sight = Sight(demos, sizes.vlm_width)
    sample = Sampler(demos, sizes.chunk, config.wait_share, np.random.default_rng(config.seed))

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        observations, actions, objects = sample(config.batch)
        inputs = processing(observations, torch.device("cpu"), torch.float32)
        target = processing.normalise_actions(actions, sizes.max_action_dim)
        flow, feature = flow_loss(model, inputs, target, config.draws)
        return flow, sight(feature, objects)

    fit([*model.parameters(), *sight.parameters()], losses, config, on_step)
    return model.eval(), tokenizer, stats


def clone_pi0(demos: Demos, config: CloneConfig, sizes: NanoConfig, out: Path, on_step: OnStep) -> TransformersPi0:
    """The architecture ``pi0``: transformers' own class."""
    model, tokenizer, stats = clone(demos, config, sizes, on_step)
    with disk_errors(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        stats.save(out)
    return TransformersPi0(model, Pi0Processing(stats, tokenizer, sizes.max_state_dim), uri=f"nano:{out}")
