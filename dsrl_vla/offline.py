"""Data without noise: demonstrations, teleoperation, another policy's rollouts.

Nobody knows which noise, if any, would have produced their actions. DSRL-NA needs none: Q^A learns from actions, and
the base is asked once per decision for a noise bank to distil it over. With ``sac.imitate`` the noise that comes
nearest to them is looked for (`dsrl_vla.inversion`): DSRL-SAC can learn from it too, and the actor imitates it where
the episode is not known to have failed.

An episode is a mapping of arrays, one row per environment step: ``observation.state`` (T, S),
``observation.images.<camera>`` uint8 (T, H, W, 3), ``action`` float32 (T, A) in environment units, ``reward``
(T,), ``terminated`` bool, ``task`` the prompt. `dsrl_vla.offline_sources` reads them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .episodes import episode_generators
from .errors import bad
from .head import SteeringHead
from .latent_sac import SACConfig
from .n_step import Decision, NStepWindows
from .noise_bank import IMITATED, REACH, Keeper
from .observation import IMAGE_PREFIX, PROMPT, STATE, Observations
from .policy import FrozenPolicy
from .replay import Replay

OfflineEpisode = dict[str, Any]
Relabel = Callable[[OfflineEpisode], OfflineEpisode]
AT_A_TIME = 64  # decisions that the base is asked for: an episode may be long, and a prefix large


@dataclass(frozen=True)
class OfflineConfig:
    """Offline data of a run; needs algorithm na or na-exact, or ``sac.imitate``."""

    source: str = ""
    """An .npz file, a Robomimic .hdf5 file, a folder of a Hugging Face dataset or a LeRobotDataset; empty for none."""
    more: tuple[str, ...] = ()
    """Further ones beside it: demonstrations, say, beside rollouts of the base. `relabel` goes for all of them."""
    episodes: int | None = None
    """Use only the first so many of each."""
    stride: int | None = None
    """Steps between the starts of two decisions; by default a whole chunk. Less makes more of the data, and
    costs as many more calls to the base."""
    share: float = 0.5
    """Share of a batch drawn from offline data while there are online data too."""
    updates: int = 0
    """Updates on offline data alone, before the first environment step."""
    relabel: str = ""
    """sparse_success, demonstrations (all of them succeed), or ``package.module:function`` from episode to episode:
    sets rewards and `terminated` anew."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise bad("offline.share", "above 0 and below 1", self.share)
        if self.updates < 0:
            raise bad("offline.updates", "0 or more", self.updates)
        for name in ("episodes", "stride"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise bad(f"offline.{name}", "1 or more", value)
        if self.more and not self.source:
            raise bad("offline.more", "offline.source to go with it", f"{', '.join(self.more)} and no source")

    @property
    def sources(self) -> tuple[str, ...]:
        """All of them."""
        return (self.source, *self.more)


def check_episode(
    episode: OfflineEpisode,
    number: int,
    base: FrozenPolicy,
    rewards: tuple[float, float] = (-math.inf, math.inf),
    cameras: Iterable[str] = (),
) -> int:
    """Refuse an episode that lacks something or does not fit the base; return its length T.

    Args:
        rewards: least and greatest of the task.
        cameras: the head's, beside the base's.

    Raises:
        DsrlError: names episode and field.
    """
    spec = base.spec
    seen = dict.fromkeys((*spec.observation.cameras, *cameras))
    wanted = [STATE, "action", "reward", "terminated", *(IMAGE_PREFIX + name for name in seen)]
    for key in wanted + [PROMPT] * spec.observation.prompt:
        if key not in episode:
            raise bad(f"offline episode {number}", f"a field '{key}'", ", ".join(sorted(episode)) or "none")
    length = len(episode["action"])
    for key in wanted:
        if key != "terminated" and len(episode[key]) != length:
            raise bad(f"offline episode {number}: {key}", f"{length} rows, as action has", len(episode[key]))
    shape = np.shape(episode["action"])
    if length == 0 or len(shape) != 2 or shape[1] != spec.action_dim:
        raise bad(f"offline episode {number}: action", f"shape (T, {spec.action_dim}) with T > 0", shape)
    if np.shape(episode["reward"]) != (length,):
        raise bad(f"offline episode {number}: reward", f"shape ({length},)", np.shape(episode["reward"]))
    for key in ("action", "reward", STATE):
        if not np.isfinite(episode[key]).all():
            raise bad(f"offline episode {number}: {key}", "finite numbers", "NaN or infinity")
    least = min(episode["reward"][:-1], default=rewards[0])  # the last may say what failing costs
    for worst in (least, max(episode["reward"])):
        if not rewards[0] - 1e-6 <= worst <= rewards[1] + 1e-6:  # else its values would be cut to the task's, unsaid
            fix = "offline.relabel (sparse_success, say) gives rewards like the task's."
            raise bad(f"offline episode {number}: reward", f"within the task's {list(rewards)}", float(worst), fix)
    return length


def sparse_success(episode: OfflineEpisode) -> OfflineEpisode:
    """Relabel: -1 per step and 0 on the last step of an episode whose ``success`` is true, which ends there."""
    if "success" not in episode:
        raise bad("offline.relabel sparse_success", "a field 'success' in every episode", ", ".join(sorted(episode)))
    success = bool(np.max(episode["success"]))
    reward = np.full(len(episode["action"]), -1.0)
    reward[-1] += success
    return episode | {"reward": reward, "terminated": success}


def demonstrations(episode: OfflineEpisode) -> OfflineEpisode:
    """Relabel, for data without rewards: every episode is a success, -1 per step and 0 on the last."""
    if "action" not in episode:
        raise bad("an offline episode", "a field 'action'", ", ".join(sorted(episode)))
    return sparse_success(episode | {"success": np.ones(len(episode["action"]), dtype=bool)})


class OfflineLoader:
    """Fills a replay from episodes: one prefix pass and one noise bank per decision.

    Args:
        rewards: least and greatest of the task that the head is for.

    Raises:
        DsrlError: a stride beyond a chunk.
    """

    def __init__(
        self,
        base: FrozenPolicy,
        head: SteeringHead,
        keeper: Keeper,
        sac: SACConfig,
        config: OfflineConfig,
        rewards: tuple[float, float] = (-math.inf, math.inf),
    ):
        self.base, self.head, self.keeper, self.sac, self.config = base, head, keeper, sac, config
        self.rewards = rewards
        self.reach: list[float] = []
        """Of every decision, where noise was looked for: how near it comes, from 0 to 1."""
        self.actions = hashlib.sha256()
        """Of every chunk, as it was recorded."""
        self.stride = config.stride or base.spec.executed_steps
        if self.stride > base.spec.executed_steps:
            most = f"at most the {base.spec.executed_steps} steps that '{base.spec.uri}' executes of a chunk"
            raise bad("offline.stride", most, self.stride)

    def fill(self, replay: Replay, episodes: Iterable[OfflineEpisode], on_episode: Callable[[], None] = lambda: None):
        """Add every episode's decisions; `replay` keeps what it has room for.

        Raises:
            DsrlError: an episode is malformed, or the algorithm needs noise that such data do not have.
        """
        for number, episode in enumerate(episodes):
            length = check_episode(episode, number, self.base, self.rewards, self.head.config.cameras)
            for first in range(0, min(self.base.spec.executed_steps, length), self.stride):
                self._chain(replay, episode, first, length, number)
            on_episode()

    @torch.no_grad()
    def _chain(self, replay: Replay, episode: OfflineEpisode, first: int, length: int, number: int) -> None:
        """Add the decisions at steps first, first + k, first + 2k, …"""
        k = self.base.spec.executed_steps
        starts = np.arange(first, length, k)
        chunk, reward, steps = self._chunks(episode, starts, length)
        self.actions.update(chunk.numpy().tobytes())
        numbers, latent = np.zeros(len(starts), dtype=np.int64), torch.zeros(len(starts), *replay.latent.shape[1:])
        for at in range(0, len(starts), AT_A_TIME):
            some = slice(at, at + AT_A_TIME)
            done = chunk[some], torch.from_numpy(steps[some])
            numbers[some], latent[some] = self._observe(replay, episode, starts[some], done, number)
        windows = NStepWindows(self.sac.n_step, 1, replay.add)
        over = bool(episode["terminated"]) or self.sac.timeouts == "terminal"
        for i in range(len(starts)):
            windows.observed(np.array([0]), numbers[i : i + 1])
            last = i == len(starts) - 1
            if last and not over:  # nobody saw what followed
                windows.truncated(0, int(numbers[i]))
                return
            discount = 0.0 if last else float(self.sac.chunk_discount(steps[i]))
            windows.push(0, Decision(int(numbers[i]), latent[i], float(reward[i]), discount))
        windows.terminated(0)

    def _observe(
        self,
        replay: Replay,
        episode: OfflineEpisode,
        starts: np.ndarray,
        done: tuple[torch.Tensor, torch.Tensor],
        number: int,
    ) -> tuple[np.ndarray, torch.Tensor]:
        """Store what there was to see at these steps, with what is kept of each; return their numbers, and latents."""
        observations = episode_rows(episode, starts)
        encoding = self.base.encode(observations)
        inputs = self.head.read(observations, encoding)
        numbers = replay.observe(inputs)
        streams = decision_streams(number, starts)
        latent, extras = self.keeper.label(self.base, encoding, self.head, inputs, *done, streams)
        if REACH in extras:
            self.reach += extras[REACH].tolist()
            extras[IMITATED] *= not _failed(episode)
        replay.attach(numbers, extras | self.keeper.observed(self.base, encoding))
        return numbers, latent

    def _chunks(
        self, episode: OfflineEpisode, starts: np.ndarray, length: int
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Executed chunks (B, k, A), rewards and steps of each."""
        k = self.base.spec.executed_steps
        chunk, steps = episode_chunks(episode, starts, k)
        reward = np.asarray(episode["reward"], dtype=np.float64)[_held(starts, k, length)]
        return chunk, self.sac.chunk_reward(reward, steps), steps


def _held(starts: np.ndarray, k: int, length: int) -> np.ndarray:
    """Steps of chunks, (B, k), the last one held beyond the end."""
    return np.minimum(starts[:, None] + np.arange(k), length - 1)


def episode_chunks(episode: OfflineEpisode, starts: np.ndarray, k: int) -> tuple[torch.Tensor, np.ndarray]:
    """Chunks (B, k, A) of an episode's actions, its last one held beyond the end; and how many steps are its own."""
    length = len(episode["action"])
    action = np.asarray(episode["action"], dtype=np.float32)[_held(starts, k, length)]
    return torch.from_numpy(action), np.minimum(k, length - starts)


def decision_streams(number: int, starts: np.ndarray) -> list[torch.Generator]:
    """A generator for each decision of an episode, whichever others are asked for with it."""
    return [episode_generators([number], int(start))[0] for start in starts]


def _failed(episode: OfflineEpisode) -> bool:
    """Whether an episode is known not to have succeeded: what was done in it is not for imitation."""
    return "success" in episode and not np.max(episode["success"])


def episode_rows(episode: OfflineEpisode, rows: np.ndarray) -> Observations:
    """What there was to see at these steps, as a batch."""
    found: Observations = {k: np.asarray(v)[rows] for k, v in episode.items() if k.startswith("observation.")}
    found[STATE] = found[STATE].astype(np.float32)
    if PROMPT in episode:
        found[PROMPT] = [str(episode[PROMPT])] * len(rows)
    return found
