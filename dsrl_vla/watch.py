"""Watching over a run: what goes wrong in latent RL, noticed while it happens and said in words.

Four ailments, each seen in the reference's runs or in ours: the critic promises more than episodes bring; the
actor's entropy collapses; success falls from its best; nothing has been learnt at all after two thirds. A warning
is given once, and again only after its cause has gone and come back. What is saved is the best head anyway.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .critic import CriticEnsemble
from .measures import YARDSTICKS, Yardstick
from .n_step import Decision
from .replay import Replay

_LATE = 2 / 3
"""Of the environment steps. At half of them too many are told so that learn yet."""
_LEAST_GAP = 0.05  # below which a critic's promise is noise, whatever the episodes brought


@dataclass(frozen=True)
class Finished:
    """One finished episode: its decisions, and the return that really followed each."""

    numbers: np.ndarray
    """Of the observations in the replay."""
    latents: torch.Tensor
    returns: np.ndarray

    @classmethod
    def of(cls, decisions: list[Decision]) -> Finished:
        """Discounted return from each decision on: G_t = r_t + gamma^k G_{t+1}.

        Nothing follows the last, unless the episode was cut off: then it goes on as it was on average, if that is
        worth more than nothing. Of a robot that runs until its time is up, much of the return is still to come.
        """
        found, following = [], 0.0
        if decisions[-1].discount > 0:
            following = max(0.0, sum(d.reward for d in decisions) / sum(1 - d.discount for d in decisions))
        for decision in reversed(decisions):
            following = decision.reward + decision.discount * following
            found.append(following)
        latents = torch.stack([d.latent for d in decisions])
        return cls(np.array([d.number for d in decisions]), latents, np.array(found[::-1]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its fields."""
        return {
            "numbers": torch.as_tensor(self.numbers),
            "latents": self.latents,
            "returns": torch.as_tensor(self.returns),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Finished:
        """Undo `tensors`."""
        return cls(tensors["numbers"].numpy(), tensors["latents"], tensors["returns"].numpy())


@torch.no_grad()
def value_gap(
    critic: CriticEnsemble, replay: Replay, episodes: Collection[Finished], bounds: tuple[float, float]
) -> dict[str, float]:
    """What the critic promised in the last episodes against what they brought, over all their decisions.

    Args:
        bounds: of values, as the critic's targets are kept to; a robot's operator, who gives an episode up, has it
            pay for all the steps that it would have had, which is beyond them.

    Returns:
        ``{"return": mean of G, kept to `bounds`, "value_gap": mean of Q(s, u) - G}``; nothing when the replay has
        forgotten them.
    """
    if not episodes:
        return {}
    numbers = np.concatenate([e.numbers for e in episodes])
    held = numbers >= replay.observed - replay.rows
    if not held.any():
        return {}
    rows = torch.from_numpy(numbers[held]) % replay.rows
    latents = torch.cat([e.latents for e in episodes])[torch.from_numpy(held)]
    device = next(critic.parameters()).device
    values = critic.value({k: v[rows].to(device) for k, v in replay.inputs.items()}, latents.to(device))
    brought = float(np.concatenate([e.returns for e in episodes])[held].clip(*bounds).mean())
    return {"return": round(brought, 5), "value_gap": round(float(values.mean()) - brought, 5)}


class Watch:
    """Turns the rows of ``metrics.jsonl`` into warnings."""

    def __init__(
        self, target_entropy: float, episodes: int, env_steps: int, yardstick: Yardstick = YARDSTICKS["success"]
    ):
        """`episodes`: of a validation; `env_steps`: of the whole run; `yardstick`: what validations measure."""
        self.yardstick = yardstick
        self.target_entropy, self.episodes, self.env_steps = target_entropy, episodes, env_steps
        self.best, self.most = -math.inf, 0.0
        self.first = math.inf
        """What there was to begin with: the success of the warm-up or the first validation, whichever is less."""
        self.seen = 0
        """Validations."""
        self.active: set[str] = set()
        self.warnings: list[str] = []
        self.gaps: deque[float] = deque(maxlen=3)

    def see(self, row: Mapping[str, float]) -> list[str]:
        """Take a row; return the warnings it gives rise to, and keep them in `warnings`."""
        said = {"value": self._value(row), "entropy": self._entropy(row)}
        if self.yardstick.name in row and not row.get("updates"):
            self.first = row[self.yardstick.name]
        if (found := row.get(f"validation_{self.yardstick.name}")) is not None:
            self.best, self.seen = max(self.best, found), self.seen + 1
            if self.seen == 1:  # short episodes end first: what has been finished of a warm-up is the better part
                self.first = min(self.first, found)
            said |= {"drop": self._drop(found), "stuck": self._stuck(row["env_steps"])}
        ailing = {name: words for name, words in said.items() if words}
        ailing |= dict.fromkeys(self.active - set(said), "")  # not looked at: neither news nor over
        new = [f"at {row['env_steps']} steps: {ailing[name]}" for name in ailing if name not in self.active]
        self.active = set(ailing)
        self.warnings += new
        return new

    def _value(self, row: Mapping[str, float]) -> str:
        gap = row.get("value_gap", math.nan)
        if math.isnan(gap):
            return ""
        self.gaps.append(gap)
        self.most = max(self.most, abs(row["return"]))
        if len(self.gaps) < 3 or min(self.gaps) < max(0.5 * self.most, _LEAST_GAP):
            return ""
        return (
            f"the critic promises {gap:.2f} more than the last episodes brought ({row['return']:.2f} on average, "
            f"discounted): it overrates {self.yardstick.overrated}. Raise sac.n_step, or critic.members with "
            "reduction min."
        )

    def _entropy(self, row: Mapping[str, float]) -> str:
        entropy = row.get("entropy", math.nan)
        if math.isnan(entropy) or entropy > self.target_entropy - 1.5:
            return ""
        return (
            f"the actor's entropy is {entropy:.2f} nats per dimension, target {self.target_entropy:.2f}: it has "
            "stopped exploring. Raise sac.alpha_init or sac.alpha_lr."
        )

    def _drop(self, now: float) -> str:
        if now >= self.best - self.yardstick.slack(self.best, self.episodes):
            return ""
        name, digits = self.yardstick.name, self.yardstick.digits(self.best)
        return (
            f"validation {name} fell to {now:.{digits}f} from its best, {self.best:.{digits}f}. The best head is the "
            "one saved; lower sac.actor_lr or train.gradient_steps if it does not come back."
        )

    def _stuck(self, steps: float) -> str:
        late = self.env_steps * _LATE <= steps < self.env_steps
        if not late or self.seen < 2 or self.yardstick.risen(self.best, self.first):
            return ""
        name, digits = self.yardstick.name, self.yardstick.digits(self.best)
        return (
            f"two thirds of the steps are used and validation {name} has not risen (first {self.first:.{digits}f}, "
            f"best {self.best:.{digits}f}). {self.yardstick.search}"
        )
