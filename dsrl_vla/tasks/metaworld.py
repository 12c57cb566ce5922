"""MetaWorld's 50 manipulation tasks (``metaworld:drawer-open-v3``), with fast rendering.

State, float32 (21,): hand xyz in metres, gripper opening in [0, 1], poses of up to two objects (xyz and
quaternion each), goal xyz. Objects that are *loose* (their body has a free joint) are tracked; articulated
fixtures (drawers, doors, faucets) and their goals are not, and read zero: a policy has to see them.
Action, float32 (4,) in [-1, 1]: hand displacement in centimetres, gripper effort.
Reward: -1 per step, 0 on the step that succeeds, which ends the episode.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from ..errors import bad, missing_extra, unknown
from .base import IMAGE_PREFIX, STATE, Demonstrable, Expert, TaskInfo
from .rendering import FastRenderer, choose_backend

CAMERA = "behindGripper"
IMAGE_SIZE = 64
_TRACKED = slice(4, 21)  # object poses and goal within the 21-d state


@cache
def prompts() -> dict[str, str]:
    """The instruction of each task."""
    import yaml

    text = resources.files("dsrl_vla.data").joinpath("metaworld_prompts.yaml").read_text()
    return yaml.safe_load(text)


def _import_metaworld():
    choose_backend()
    try:
        import metaworld.env_dict as env_dict
        import mujoco
    except ImportError as error:
        raise missing_extra(
            (error.name or "metaworld").split(".")[0], "metaworld", "the task family 'metaworld:'"
        ) from error
    return env_dict, mujoco


def make(name: str, *, max_episode_steps: int = 120, uri: str = "") -> MetaWorldTask:
    """Make the task called `name`, for instance ``drawer-open-v3``.

    Raises:
        UnknownNameError: no such task; names the nearest one.
        MissingExtraError: MetaWorld is not installed.
    """
    if name not in prompts():
        raise unknown("MetaWorld task", name, prompts())
    return MetaWorldTask(name, max_episode_steps, uri or f"metaworld:{name}")


class MetaWorldTask(Demonstrable):
    """One MetaWorld task with a goal drawn anew from each episode's seed."""

    def __init__(self, name: str, max_episode_steps: int, uri: str):
        if not 1 <= max_episode_steps <= 500:
            raise bad("task.max_episode_steps", "1 to 500 steps", max_episode_steps)
        env_dict, mujoco = _import_metaworld()
        self.name = name
        self.sim = env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"](seed=0)
        self.sim._freeze_rand_vec = False  # a new goal on every reset …
        self.sim.seeded_rand_vec = True  # … drawn from the seed
        model = self.sim.model
        self._render = FastRenderer(mujoco, model)
        self._loose = bool((model.jnt_type == mujoco.mjtJoint.mjJNT_FREE).any())
        self.raw = np.zeros(39)
        self.info = TaskInfo(
            uri=uri,
            prompt=prompts()[name],
            max_episode_steps=max_episode_steps,
            state_dim=21,
            action_dim=4,
            cameras={CAMERA: (IMAGE_SIZE, IMAGE_SIZE, 3)},
        )
        self.build_spaces()

    def begin(self, seed: int) -> None:
        self.sim.seed(seed)
        self.raw, _ = self.sim.reset()

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        self.raw, _, _, _, info = self.sim.step(np.clip(action, -1.0, 1.0))
        success = bool(info["success"])
        return (0.0 if success else -1.0), success, success

    def observe(self) -> dict[str, np.ndarray]:
        state = np.concatenate([self.raw[:18], self.raw[36:39]]).astype(np.float32)
        if not self._loose:
            state[_TRACKED] = 0.0
        return {IMAGE_PREFIX + CAMERA: self._render(self.sim.data, CAMERA, IMAGE_SIZE), STATE: state}

    def frame(self, size: int = 256) -> np.ndarray:
        return self._render(self.sim.data, "corner3", size)

    def expert(self) -> Expert:
        from metaworld.policies import ENV_POLICY_MAP

        policy: Any = ENV_POLICY_MAP[self.name]
        policy = policy()

        def act(shift: float) -> np.ndarray:
            seen = self.raw.copy()
            seen[4] += shift
            return policy.get_action(seen)

        return act

    def whereabouts(self) -> np.ndarray:
        return np.concatenate([self.raw[4:7], self.raw[36:39]]).astype(np.float32)

    def close(self) -> None:
        self._render.close()
