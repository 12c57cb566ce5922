"""``point:fork`` and ``point:mirror``: tasks of microseconds for tests and first steps, and demonstrations.

A point in the plane has to go round a pillar to a goal behind it. Demonstrators pass on the left or on the
right, and on the right there is a wall: a clone of both has a mode that works and one that does not, and
constant zero noise runs into the pillar.

State, float32 (4,): position, goal. Action, float32 (2,) in [-1, 1]: displacement in tenths.
"""

from __future__ import annotations

import numpy as np

from ..errors import bad, unknown
from ..observation import STATE
from .base import TaskEnv, TaskInfo

_STEP, _RADIUS, _REACH = 0.1, 0.25, 0.15
_SIDES = {"fork": 1.0, "mirror": -1.0}


def make(name: str, *, max_episode_steps: int = 40, uri: str = "") -> Fork:
    """Make ``fork``, or its ``mirror`` image.

    Raises:
        UnknownNameError: any other name.
    """
    if name not in _SIDES:
        raise unknown("point task", name, _SIDES)
    if max_episode_steps < 1:
        raise bad("task.max_episode_steps", "1 or more", max_episode_steps)
    return Fork(uri or f"point:{name}", max_episode_steps, _SIDES[name])


def _solid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the pillar and the wall to the right of it are; any shape."""
    return (np.hypot(x, y - 1.0) <= _RADIUS) | ((x > 0.1) & (x < 1.2) & (y > 0.9) & (y < 1.1))


class Fork(TaskEnv):
    """The fork in the road, walled off to the right (side 1) or to the left (-1). It has no camera.

    The mirrored one has its goal a little further off, which is how a policy can tell them apart.
    """

    def __init__(self, uri: str, max_episode_steps: int, side: float = 1.0):
        self.side = side
        self.info = TaskInfo(uri, "go round the pillar to the goal", max_episode_steps, state_dim=4, action_dim=2)
        self.build_spaces()

    def begin(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.position = np.array([rng.uniform(-0.1, 0.1), 0.0])
        self.goal = np.array([rng.uniform(-0.2, 0.2), 2.0 if self.side > 0 else 2.15])

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        moved = self.position + _STEP * np.clip(action, -1, 1)
        if not _solid(self.side * moved[0], moved[1]):
            self.position = moved
        success = bool(np.linalg.norm(self.position - self.goal) < _REACH)
        return (0.0 if success else -1.0), success, success

    def observe(self) -> dict[str, np.ndarray]:
        return {STATE: np.concatenate([self.position, self.goal]).astype(np.float32)}

    def frame(self, size: int = 256) -> np.ndarray:
        picture = np.full((size, size, 3), 255, np.uint8)
        y, x = np.mgrid[0:size, 0:size] / size
        x, y = (x - 0.5) * 3, 2.4 - y * 3
        picture[_solid(self.side * x, y)] = 90
        picture[np.hypot(x - self.goal[0], y - self.goal[1]) < _REACH] = (60, 170, 80)
        picture[np.hypot(x - self.position[0], y - self.position[1]) < 0.06] = (11, 110, 153)
        return picture


def demonstrate(seed: int, steps: int = 40, name: str = "fork") -> tuple[np.ndarray, np.ndarray]:
    """One demonstration: states (T, 4) and actions (T, 2). Half of them pass on the wrong side."""
    rng = np.random.default_rng(seed)
    env = make(name, max_episode_steps=steps)
    env.begin(seed)
    side = rng.choice([-1.0, 1.0])
    states, actions, passed = [], [], False
    for _ in range(steps):
        passed |= bool(env.position[1] > 1.0 and abs(env.position[0]) > _RADIUS)
        target = env.goal if passed else np.array([side * 0.5, 1.1])
        towards = target - env.position
        action = towards / max(np.linalg.norm(towards), _STEP) + 0.1 * rng.standard_normal(2)
        states.append(env.observe()[STATE])
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        if env.advance(actions[-1])[1]:
            break
    return np.stack(states), np.stack(actions)
