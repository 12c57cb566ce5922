"""robosuite's manipulation tasks with a Panda (``robosuite:Lift``, ``robosuite:Can``, any other by its name).

Options follow the name: ``robosuite:Can?cameras=agentview,robot0_eye_in_hand&image_size=84&lite_physics=false``.
Without cameras nothing is rendered. `lite_physics=false` is the simulation of robosuite 1.4 and before, with which
Robomimic's data were recorded.

State, float32: the hand's xyz (metres), its quaternion (xyzw), the two fingers' positions, then the objects. For Lift
(19) and Can (23) that is the order and sign of Robomimic's low-dimensional observation: robosuite 1.5 lists relative
poses first and points from gripper to object, robosuite 1.4 the other way round, and so does this. By reading only.
Action, float32 (7,) in [-1, 1], at 20 Hz: hand displacement and rotation vector (OSC_POSE, 5 cm and 0.5 rad), gripper
(-1 opens). Reward: -1 per step, 0 on the step that succeeds, which ends the episode (Robomimic's go on).
Sizes of objects are drawn when a model is built, once, and are the same in every episode.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from ..errors import bad, missing_extra, unknown
from ..plain import from_plain
from .base import IMAGE_PREFIX, STATE, Demonstrable, Expert, TaskInfo
from .rendering import FastRenderer, choose_backend
from .robosuite_experts import EXPERTS, Operator

ROBOMIMIC = {"Can": "PickPlaceCan", "Square": "NutAssemblySquare", "Transport": "TwoArmTransport"}
"""Robomimic's names of robosuite's tasks, where they differ."""
PROMPTS = {
    "Lift": "lift the cube",
    "PickPlaceCan": "put the can in its bin",
    "NutAssemblySquare": "put the square nut on its peg",
}


@dataclass(frozen=True)
class Options:
    """What may follow a task's name."""

    cameras: tuple[str, ...] = ()
    """Cameras to observe, by robosuite's names: agentview, frontview, robot0_eye_in_hand, …"""
    image_size: int = 84
    lite_physics: bool = True

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise bad("robosuite image_size", "1 or more", self.image_size)

    @classmethod
    def parse(cls, query: str) -> Options:
        """From ``cameras=a,b&image_size=84``; raises what `from_plain` raises."""
        raw: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
        if "cameras" in raw:
            raw["cameras"] = [name for name in raw["cameras"].split(",") if name]
        if raw.get("image_size", "").isdigit():
            raw["image_size"] = int(raw["image_size"])
        if raw.get("lite_physics") in ("true", "false"):
            raw["lite_physics"] = raw["lite_physics"] == "true"
        return from_plain(cls, raw, "robosuite task option")


def _import_robosuite() -> tuple[Any, Any]:
    choose_backend()
    log = logging.getLogger("robosuite_logs")
    log.addFilter(lambda record: record.levelno >= logging.ERROR)  # it warns of parts nobody asked for
    try:
        import mujoco
        import robosuite
    except ImportError as error:
        raise missing_extra(
            (error.name or "robosuite").split(".")[0], "robosuite", "the task family 'robosuite:'"
        ) from error
    return robosuite, mujoco


def make(name: str, *, max_episode_steps: int = 300, uri: str = "") -> RobosuiteTask:
    """Make the task called `name`, for instance ``Lift``, ``Can`` or ``Stack?cameras=agentview``.

    Raises:
        UnknownNameError: no such task; names the nearest one. DsrlError: an option that does not exist.
        MissingExtraError: robosuite is not installed.
    """
    short, _, query = name.partition("?")
    options, full = Options.parse(query), ROBOMIMIC.get(short, short)
    if max_episode_steps < 1:
        raise bad("task.max_episode_steps", "1 or more", max_episode_steps)
    robosuite, mujoco = _import_robosuite()
    if full not in robosuite.ALL_ENVIRONMENTS:
        raise unknown("robosuite task", short, [*robosuite.ALL_ENVIRONMENTS, *ROBOMIMIC])
    sim = robosuite.make(
        full,
        robots=["Panda"] * (2 if full.startswith("TwoArm") else 1),
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        renderer="mujoco",
        control_freq=20,
        lite_physics=options.lite_physics,
        ignore_done=True,
        hard_reset=False,  # building the model again takes a second
        seed=0,
    )
    return RobosuiteTask(sim, mujoco, full, options, max_episode_steps, uri or f"robosuite:{name}")


class RobosuiteTask(Demonstrable):
    """One robosuite environment; object poses and the arm's start are drawn from each episode's seed."""

    def __init__(self, sim: Any, mujoco: Any, name: str, options: Options, max_episode_steps: int, uri: str):
        self.sim, self.name, self.options = sim, name, options
        known = {mujoco.mj_id2name(self.model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(self.model.ncam)}
        for camera in options.cameras:
            if camera not in known:
                raise unknown(f"camera of {name}", camera, known)
        self._render = FastRenderer(mujoco, self.model)
        self._render.option.geomgroup[0] = 0  # shapes for collisions
        spaced = "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()
        size = options.image_size
        self.begin(0)
        self.info = TaskInfo(
            uri=uri,
            prompt=PROMPTS.get(name, spaced),
            max_episode_steps=max_episode_steps,
            state_dim=len(self._state()),
            action_dim=int(sim.action_dim),
            cameras=dict.fromkeys(options.cameras, (size, size, 3)),
        )
        self.build_spaces()

    @property
    def model(self) -> Any:
        """MuJoCo's model."""
        return self.sim.sim.model._model

    @property
    def data(self) -> Any:
        """MuJoCo's state."""
        return self.sim.sim.data._data

    def begin(self, seed: int) -> None:
        # Samplers of the model share this generator; it cannot be replaced, but it can be turned back.
        self.sim.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self.sim.reset()

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        self.sim.step(np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0))
        success = bool(self.sim._check_success())
        return (0.0 if success else -1.0), success, success

    def observe(self) -> dict[str, np.ndarray]:
        data, size = self.data, self.options.image_size
        found = {IMAGE_PREFIX + name: self._render(data, name, size) for name in self.options.cameras}
        return found | {STATE: self._state()}

    def _state(self) -> np.ndarray:
        for _ in range(2):  # a relative pose is made from the object's pose of the update before
            self.sim._update_observables(force=True)
        seen = self.sim._observables
        active = [name for name, each in seen.items() if each.is_enabled() and each.is_active()]
        objects = [name for name in active if seen[name].modality == "object"]
        hands = [
            f"robot{i}_{part}" for i in range(len(self.sim.robots)) for part in ("eef_pos", "eef_quat", "gripper_qpos")
        ]
        parts = [seen[name].obs for name in hands if name in seen]
        for name in sorted(objects, key=lambda name: "_to_" in name):
            value = np.atleast_1d(seen[name].obs)
            parts.append(-value if name.startswith("gripper") else value)
        return np.concatenate(parts).astype(np.float32)

    def frame(self, size: int = 256) -> np.ndarray:
        return self._render(self.data, "agentview" if self.name != "Lift" else "frontview", size)

    def expert(self) -> Expert:
        """The scripted operator of this task.

        Raises:
            DsrlError: it has none.
        """
        if self.name not in EXPERTS:
            raise bad(f"task {self.info.uri}", f"one with a scripted expert ({', '.join(EXPERTS)})", self.name)
        return Operator(self.sim, EXPERTS[self.name](self.sim))

    def whereabouts(self) -> np.ndarray:
        if self.name not in EXPERTS:
            return np.zeros(6, dtype=np.float32)
        return np.concatenate(EXPERTS[self.name](self.sim).places()).astype(np.float32)

    def close(self) -> None:
        self._render.close()
