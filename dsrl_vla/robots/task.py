"""A robot as a task: fixed rate, an operator's words, take-over, guards."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from ..observation import IMAGE_PREFIX, PROMPT
from ..tasks.base import TaskInfo
from ..tasks.live import TERMINAL, Ending, LiveTask
from .operators import Operator
from .pacing import Pacer
from .rewards import Reward
from .rig import Rig

log = logging.getLogger(__name__)


class RobotTask(LiveTask):
    """A rig, an operator and a reward as a `TaskEnv`.

    Args:
        reset: makes the scene and the robot ready, given the robot and the episode's seed; by default the
            operator is asked to.
        keep_images: keep every step's images for the journal; without, only the states and actions.
        close: called once nothing needs the rig any more; by default it is closed.

    An episode is no function of its seed here: the world is what it is. Failure costs what standing there until
    the limit would have cost, so that giving up never pays.
    """

    def __init__(
        self,
        uri: str,
        prompt: str,
        max_episode_steps: int,
        rig: Rig,
        operator: Operator,
        reward: Reward,
        pacer: Pacer,
        reset: Callable[[Any, int], None] | None = None,
        keep_images: bool = True,
        close: Callable[[], None] | None = None,
    ):
        self.rig, self.operator, self.reward, self.pacer = rig, operator, reward, pacer
        self._reset, self._close, self.keep_images = reset, close or rig.close, keep_images
        self.dry_run, self.fps = rig.dry_run, 1.0 / pacer.period
        self.info = TaskInfo(
            uri, prompt, max_episode_steps, len(rig.state), len(rig.actions), rig.shapes, reward.range, live=True
        )
        self.build_spaces()
        low, high = rig.guards.low.astype(np.float32), rig.guards.high.astype(np.float32)
        self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.columns: dict[str, list[Any]] = {}
        self.count = 0
        self.late = False
        """Whether the operator said how it ended between two chunks."""
        self.executed = np.zeros(len(rig.actions), dtype=np.float32)
        self.now: dict[str, np.ndarray] = {}

    def begin(self, seed: int) -> None:
        self.pacer.idle()
        self.rig.moved()
        if self._reset is not None:
            self._reset(self.rig.robot, seed)
        self.operator.ready(f"{self.info.prompt}: make the scene ready.")
        self.columns, self.count, self.ending, self.human, self.late = {}, 0, None, False, False
        self.now = self.rig.observe()

    def attend(self) -> None:
        before = self.ending
        self._hear()
        self.late = before is None and self.ending is not None
        self.pacer.start()

    def _hear(self) -> None:
        said = self.operator.hear()
        self.ending = said.ending or self.ending
        if said.human and self.rig.teleop is None:
            log.warning("the operator takes over, but there is no teleoperator (teleop:) to take over with")
        self.human = said.human and self.rig.teleop is not None

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        driven, before = self.human, self.now
        self.executed = self.rig.send(self.rig.persons_action() if driven else action)
        self.count += 1
        self.pacer.wait()
        self.now = self.rig.observe()
        self._hear()
        seen: dict[str, Any] = {**self.now, PROMPT: self.info.prompt}
        reward, done = self.reward(seen, self.executed)
        if self.ending is None and done:
            self.ending = Ending.SUCCESS
        elif self.ending in TERMINAL:
            reward = self.verdict()
        success = self.ending is Ending.SUCCESS
        row = before | {"action": self.executed, "reward": reward, "success": success, "human": driven}
        for key, value in row.items():
            if key.startswith(IMAGE_PREFIX) and not self.keep_images:
                continue
            self.columns.setdefault(key, []).append(value)
        return reward, success, self.ending in TERMINAL

    def verdict(self) -> float:
        low, high = self.info.reward_range
        if self.ending is Ending.SUCCESS:
            return high
        if self.ending is Ending.FAILURE:
            return min(low, 0.0) * (1 + self.info.max_episode_steps - self.count)
        return self.columns["reward"][-1] if self.columns else 0.0

    def stop(self) -> None:
        self.rig.hold()
        self.pacer.idle()

    def taken(self) -> dict[str, np.ndarray]:
        if self.late and self.columns:  # it judges the step before
            self.columns["reward"][-1] = self.verdict()
            self.columns["success"][-1] = self.ending is Ending.SUCCESS
        return {key: np.stack(values) for key, values in self.columns.items()}

    def observe(self) -> dict[str, np.ndarray]:
        return dict(self.now)

    def report(self) -> dict[str, float]:
        return self.pacer.report() | {"commands": self.rig.sent, "changed_by_guards": self.rig.clipped}

    def frame(self, size: int = 256) -> np.ndarray:
        from PIL import Image

        picture = next((v for k, v in self.now.items() if k.startswith(IMAGE_PREFIX)), np.zeros((1, 1, 3), np.uint8))
        return np.asarray(Image.fromarray(picture).resize((size, size)))

    def close(self) -> None:
        self._close()
