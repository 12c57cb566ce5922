"""LeRobot's environments as tasks: ``lerobot-env:<type>[/<task>[/<index>]]``, made by LeRobot's own factory.

``lerobot-env:pusht``, ``lerobot-env:metaworld/drawer-open-v3``, ``lerobot-env:aloha/AlohaTransferCube-v0``,
``lerobot-env:libero/libero_spatial/3``. Observations pass LeRobot's own conversion and the environment's processors;
the camera of a one-camera environment is called ``image``. State and action are in the environment's units.
Reward: -1 per step, 0 on the step that succeeds, which ends the episode; success is LeRobot's ``is_success``.
An environment that its package renders at every step costs that much at every step.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from ..errors import DsrlError, MissingExtraError, bad, unknown
from ..observation import IMAGE_PREFIX, STATE
from .base import TaskEnv, TaskInfo
from .rendering import choose_backend


def make(name: str, *, max_episode_steps: int = 300, uri: str = "") -> LeRobotTask:
    """Make the environment `name`, ``<type>[/<task>[/<index>]]``.

    Raises:
        UnknownNameError: no such type; names the nearest one.
        MissingExtraError: LeRobot, or the environment's package, is not installed.
        DsrlError: the environment's assets are missing, it has no such task, or it runs code from the Hub.
    """
    kind, _, rest = name.partition("/")
    task, _, index = rest.partition("/")
    if index and not index.isdigit():
        raise bad("task", "lerobot-env:<type>/<task>/<index> with a number for index", f"'{name}'")
    uri = uri or f"lerobot-env:{name}"
    vector, config = _create(kind, task, int(index or 0), max_episode_steps, uri)
    return LeRobotTask(vector, config, max_episode_steps, uri)


def _create(kind: str, task: str, index: int, steps: int, uri: str) -> tuple[Any, Any]:
    _headless()
    try:
        from lerobot.envs import EnvConfig
        from lerobot.envs.configs import HubEnvConfig
        from lerobot.envs.factory import make_env, make_env_config
    except ImportError as error:
        raise MissingExtraError(
            f"the task family 'lerobot-env:' needs the package 'lerobot' (Python 3.12 or newer), which could not be "
            f"imported ({error}). Install it with: pip install 'dsrl-vla[lerobot]'"
        ) from error
    known = EnvConfig.get_known_choices()
    if kind not in known:
        raise unknown("LeRobot environment", kind, known)
    if issubclass(EnvConfig.get_choice_class(kind), HubEnvConfig):
        raise bad(f"task '{uri}'", "an environment of an installed package", "one that runs code from the Hub")
    with _explained(kind, uri):
        config = make_env_config(kind, **({"task": task} if task else {}))
        if hasattr(config, "episode_length"):
            config.episode_length = steps
        suites = make_env(config, n_envs=1, use_async_envs=False)
    (tasks,) = suites.values()
    if index not in tasks:
        raise bad(f"task '{uri}'", f"an index from 0 to {max(tasks)}", index)
    return tasks[index], config


def _headless() -> None:
    choose_backend()
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


@contextlib.contextmanager
def _explained(kind: str, uri: str) -> Iterator[None]:
    """Say in a line what an environment lacks; some ask on the terminal when they are not set up, which hangs."""
    terminal, sys.stdin = sys.stdin, io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ImportError as error:
        raise MissingExtraError(
            f"task '{uri}' needs a package that is not installed ({error}). "
            f"Install it with: pip install 'lerobot[{kind}]'"
        ) from error
    except (EOFError, OSError) as error:
        what = "a question on the terminal" if isinstance(error, EOFError) else f"{error}"
        raise DsrlError(
            f"task '{uri}': expected its package to be set up, with its assets on this machine, got {what}. "
            "Follow the package's own set-up once, while on line."
        ) from error
    except (ValueError, KeyError, AttributeError, gym.error.Error) as error:
        raise bad(f"task '{uri}'", "a task that the environment knows", f"{type(error).__name__}: {error}") from error
    finally:
        sys.stdin = terminal


class LeRobotTask(TaskEnv):
    """A single environment of LeRobot's; `vector` is what its factory made, of size one."""

    def __init__(self, vector: Any, config: Any, max_episode_steps: int, uri: str):
        self.vector, self.env = vector, vector.envs[0]
        self._process = config.get_env_processors()[0]
        with _explained(config.type, uri):
            self._raw, _ = self.env.reset(seed=0)
        first = self.observe()
        cameras = {k.removeprefix(IMAGE_PREFIX): v.shape for k, v in first.items() if k.startswith(IMAGE_PREFIX)}
        space = self.env.action_space
        self.info = TaskInfo(
            uri=uri,
            prompt=_prompt(self.env),
            max_episode_steps=max_episode_steps,
            state_dim=len(first[STATE]),
            action_dim=space.shape[0],
            cameras=cameras,
            scenes=_scenes(self.env),
        )
        self.build_spaces()
        self.action_space = gym.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32))

    def begin(self, seed: int) -> None:
        inner = getattr(self.env, "unwrapped", self.env)
        if hasattr(inner, "init_state_id"):  # LIBERO's initial states take turns, whatever the seed
            inner.init_state_id = seed
        self._raw, _ = self.env.reset(seed=seed)
        self.cut_short = False

    def advance(self, action: np.ndarray) -> tuple[float, bool, bool]:
        space = self.env.action_space
        action = np.clip(action, space.low, space.high).astype(space.dtype)
        self._raw, _, terminated, truncated, info = self.env.step(action)
        self.cut_short = bool(truncated)  # by a limit of its own
        success = bool(info.get("is_success", False))
        return (0.0 if success else -1.0), success, bool(terminated or success)

    def observe(self) -> dict[str, np.ndarray]:
        from lerobot.envs.utils import preprocess_observation

        made: dict[str, np.ndarray] = {}
        for key, value in self._process(preprocess_observation(_batched(self._raw))).items():
            if key.startswith("observation.image"):
                camera = key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")
                pixels = (value[0] * 255).round().byte().permute(1, 2, 0)
                made[IMAGE_PREFIX + camera] = pixels.contiguous().numpy()
            elif key == STATE:
                made[STATE] = value[0].float().numpy()
        if STATE not in made:
            raise bad("task", f"an environment that observes '{STATE}'", f"only {', '.join(made) or 'nothing'}")
        return made

    def frame(self, size: int = 256) -> np.ndarray:
        from PIL import Image

        return np.asarray(Image.fromarray(np.ascontiguousarray(self.env.render())).resize((size, size)))

    def close(self) -> None:
        self.vector.close()


def _batched(observation: Any) -> Any:
    """A leading 1 on every array, as LeRobot's vector environments have it."""
    if isinstance(observation, dict):
        return {key: _batched(value) for key, value in observation.items()}
    return np.asarray(observation)[None]


def _scenes(env: Any) -> int | None:
    """How many initial states LIBERO has of a task, and begins with in turn; other environments draw theirs."""
    states = getattr(getattr(env, "unwrapped", env), "_init_states", None)
    return None if states is None else len(states)


def _prompt(env: Any) -> str:
    """What LeRobot tells a policy to do: the environment's ``task_description``, or else its ``task``."""
    for name in ("task_description", "task"):
        with contextlib.suppress(AttributeError):
            return str(env.get_wrapper_attr(name) if hasattr(env, "get_wrapper_attr") else getattr(env, name))
    return ""
