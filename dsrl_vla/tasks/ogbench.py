"""OGBench's manipulation tasks with cubes (``ogbench:cube-single-task2``), with fast rendering.

State, float32 (19 + 12 n,) for n cubes: OGBench's own observation (arm, gripper, cubes) and the targets' xyz,
centred and scaled as OGBench does. Action, float32 (5,) in [-1, 1]: hand displacement, yaw, gripper.
Reward: -1 per step, 0 on the step that succeeds, which ends the episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import bad, missing_extra, unknown
from .base import IMAGE_PREFIX, STATE, Demonstrable, Expert, TaskInfo
from .rendering import FastRenderer, choose_backend

CAMERA = "front_pixels"
IMAGE_SIZE = 64
_CUBES = {"single": 1, "double": 2, "triple": 3, "quadruple": 4}
_CENTRE, _SCALE = np.array([0.425, 0.0, 0.0]), 10.0  # of OGBench's observation
NAMES = tuple(f"cube-{kind}-task{task}" for kind in _CUBES for task in range(1, 6))


def make(name: str, *, max_episode_steps: int = 200, uri: str = "") -> OGBenchCube:
    """Make the task called `name`, for instance ``cube-single-task2``.

    Raises:
        UnknownNameError: no such task; names the nearest one.
        MissingExtraError: OGBench is not installed.
    """
    if name not in NAMES:
        raise unknown("OGBench task", name, NAMES)
    if max_episode_steps < 1:
        raise bad("task.max_episode_steps", "1 or more", max_episode_steps)
    return OGBenchCube(name, max_episode_steps, uri or f"ogbench:{name}")


def _import_ogbench() -> tuple[Any, Any]:
    choose_backend()
    try:
        import mujoco
        from ogbench.manipspace.envs.cube_env import CubeEnv
    except ImportError as error:
        raise missing_extra(
            (error.name or "ogbench").split(".")[0], "ogbench", "the task family 'ogbench:'"
        ) from error
    return CubeEnv, mujoco


class OGBenchCube(Demonstrable):
    """One of the five goals of a cube environment; cubes start within a centimetre of their place, arm anywhere."""

    def __init__(self, name: str, max_episode_steps: int, uri: str):
        cube_env, self._mujoco = _import_ogbench()
        kind, task = name.removeprefix("cube-").split("-task")
        self.cubes = _CUBES[kind]
        self.sim = _seeded(cube_env)(kind, permute_blocks=False, reward_task_id=int(task))
        self.sim.reset(seed=0)
        self._render = FastRenderer(self._mujoco, self.sim.model)
        what = self.sim.cur_task_info["task_name"].partition("_")[2].replace("_", " ")
        self.info = TaskInfo(
            uri=uri,
            prompt=f"move the cube{'s' if self.cubes > 1 else ''} to the target , {what}",
            max_episode_steps=max_episode_steps,
            state_dim=19 + 12 * self.cubes,
            action_dim=5,
            cameras={CAMERA: (IMAGE_SIZE, IMAGE_SIZE, 3)},
        )
        self.build_spaces()

    def begin(self, seed: int) -> None:
        self._seed = seed
        self.sim.box.seed(seed)  # its reset takes two random steps
        self.raw, self._said = self.sim.reset(seed=seed)

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        self.raw, _, _, _, self._said = self.sim.step(np.clip(action, -1.0, 1.0))
        success = bool(self._said["success"])
        return (0.0 if success else -1.0), success, success

    def observe(self) -> dict[str, np.ndarray]:
        targets = [(self._target(i) - _CENTRE) * _SCALE for i in range(self.cubes)]
        state = np.concatenate([self.raw, *targets]).astype(np.float32)
        return {IMAGE_PREFIX + CAMERA: self._render(self.sim.data, CAMERA, IMAGE_SIZE), STATE: state}

    def frame(self, size: int = 256) -> np.ndarray:
        return self._render(self.sim.data, "front", size)

    def expert(self) -> Expert:
        """OGBench's Markov oracle, told in turn which cube is not yet where it belongs."""
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle

        oracle = CubeMarkovOracle(env=self.sim)
        oracle.reset(None, None)
        rng = np.random.default_rng(self._seed)
        oracle._final_pos, oracle._final_yaw = rng.uniform(*self.sim._arm_sampling_bounds), rng.uniform(-np.pi, np.pi)

        def act(shift: float) -> np.ndarray:
            block = self._misplaced()
            seen = dict(self._said)
            seen[f"privileged/block_{block}_pos"] = seen[f"privileged/block_{block}_pos"] + np.array([shift, 0, 0])
            seen |= {
                "privileged/target_block": block,
                "privileged/target_block_pos": self._target(block),
                "privileged/target_block_yaw": np.zeros(1),
            }
            return oracle.select_action(self.raw, seen)

        return act

    def whereabouts(self) -> np.ndarray:
        block = self._misplaced()
        return np.concatenate([self._place(block), self._target(block)]).astype(np.float32)

    def close(self) -> None:
        self._render.close()

    def _place(self, block: int) -> np.ndarray:
        return self.sim.data.joint(f"object_joint_{block}").qpos[:3].copy()

    def _target(self, block: int) -> np.ndarray:
        return self.sim.data.mocap_pos[self.sim._cube_target_mocap_ids[block]].copy()

    def _misplaced(self) -> int:
        away = [np.linalg.norm(self._place(i) - self._target(i)) > 0.04 for i in range(self.cubes)]
        return int(np.argmax(away))


def _seeded(cube_env: Any) -> Any:
    """OGBench makes a new, unseeded action space at every look; its reset draws from one."""
    import gymnasium as gym

    class Seeded(cube_env):
        box = property(lambda self: self.__dict__.setdefault("_box", gym.spaces.Box(-1.0, 1.0, (5,), np.float32)))
        action_space = property(lambda self: self.box)

    return Seeded
