"""Chunked rollouts over gymnasium vector environments, with one seed per episode."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Literal

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState

from .errors import at_least, bad
from .interrupts import ignore_requests, stop_requests
from .observation import PROMPT, Observations
from .tasks import ChunkEnv, TaskInfo, make_task
from .tasks.live import VOID

log = logging.getLogger(__name__)
VectorMode = Literal["sync", "async"]
_GRACE_S = 5.0


@dataclass(frozen=True)
class TaskConfig:
    """Which task, and how it is run."""

    uri: str = "metaworld:drawer-open-v3"
    max_episode_steps: int = 120
    num_envs: int = 10
    vector: VectorMode = "sync"
    """sync: in this process; async: one process per environment."""
    more: tuple[str, ...] = ()
    """Further tasks, for one head that does them all: the environments take turns. The spaces have to agree."""

    def __post_init__(self) -> None:
        at_least(1, self, "task", "max_episode_steps")
        if len(set(self.uris)) < len(self.uris):  # whose episodes would count twice
            raise bad("task.more", "other tasks than task.uri, each once", ", ".join(self.more))
        if self.num_envs < len(self.uris):
            raise bad("task.num_envs", f"{len(self.uris)} or more, one for every task", self.num_envs)
        if self.vector not in ("sync", "async"):
            raise bad("task.vector", "sync or async", f"'{self.vector}'")

    @property
    def uris(self) -> tuple[str, ...]:
        """All tasks."""
        return (self.uri, *self.more)


def _make_chunked(uri: str, max_episode_steps: int, chunk: int) -> ChunkEnv:
    return make_task(uri, max_episode_steps=max_episode_steps).chunked(chunk)


def _make_apart(learner: int, *options: Any) -> ChunkEnv:
    """As `_make_chunked`, in a process of its own: what all processes of a run are told is the `learner`'s to obey."""
    if os.getpid() != learner:  # where gymnasium makes one, too, to see its spaces
        ignore_requests()
    return _make_chunked(*options)


class _Apart(AsyncVectorEnv):
    """Environments in processes that heed no SIGTERM: wherever they were to be ended by one, they are killed."""

    def __init__(self, *args: Any, **kwargs: Any):
        started: list[BaseProcess] = []
        Finalize(self, _kill, (started,), exitpriority=1)  # before multiprocessing waits for them at its end
        try:
            super().__init__(*args, **kwargs)
        finally:
            started += getattr(self, "processes", [])

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Wait for an answer that is under way no longer than `timeout`; end whoever has not ended by then."""
        try:
            if self._state != AsyncState.DEFAULT:
                getattr(self, f"{self._state.value}_wait")(timeout)
        except Exception:
            terminate = True
        if terminate:
            _kill(self.processes)
        try:
            with contextlib.suppress(ConnectionError, EOFError):
                super().close_extras(timeout, terminate=terminate)
        finally:
            _kill(self.processes)


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


@dataclass
class ChunkResult:
    """What executing one chunk in every environment gave; arrays of length B."""

    observations: Observations
    rewards: np.ndarray  # (B, k), per step, zero beyond `steps`
    steps: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    human: np.ndarray
    """Whether a person drove; only `LiveTask` says so."""
    ending: np.ndarray
    """How a `LiveTask` was ended, '' while it was not."""
    executed: np.ndarray | None
    """(B, k, A), what a `LiveTask` really executed."""

    @property
    def done(self) -> np.ndarray:
        """Whether the episode is over, either way."""
        return self.terminated | self.truncated

    @property
    def void(self) -> np.ndarray:
        """Whether the episode does not count, by word of its operator."""
        return np.isin(self.ending, list(VOID))


class VectorTask:
    """B environments of one task or, in turn, of several; reset one by one with the seeds they are given.

    Close it, or use it as a context.

    Raises:
        DsrlError: the tasks differ in their spaces, or in what counts; several environments of a robot.
    """

    def __init__(self, config: TaskConfig, chunk: int):
        self.config, self.chunk = config, chunk
        self.uris = [config.uris[i % len(config.uris)] for i in range(config.num_envs)]
        how = _make_chunked if config.vector == "sync" else functools.partial(_make_apart, os.getpid())
        make = [functools.partial(how, uri, config.max_episode_steps, chunk) for uri in self.uris]
        vector = SyncVectorEnv if config.vector == "sync" else functools.partial(_Apart, context="spawn")
        try:
            self.envs: Any = vector(make, autoreset_mode=AutoresetMode.DISABLED)
        except (AssertionError, RuntimeError) as error:
            if not config.more:
                raise
            raise bad("task.more", "tasks with the same observation and action spaces", f"{error}"[:200]) from error
        except (ConnectionError, EOFError) as error:  # a process that did not come up has said why on its own
            fix = "Name it <package>:<Name-v0>, so that the process imports what registers it, or set vector: sync."
            words = f"an environment that a process of its own can make of '{config.uri}'"
            raise bad("task.vector async", words, f"{type(error).__name__}", fix) from error
        self.infos: list[TaskInfo] = list(self.envs.get_attr("info"))
        self._signals = contextlib.ExitStack()
        if len(measures := sorted({info.measure for info in self.infos})) > 1:
            self.close()
            raise bad("task.more", "tasks that are measured alike", " and ".join(measures))
        if self.info.live and (config.num_envs > 1 or config.vector != "sync"):
            self.close()
            got = f"num_envs {config.num_envs}, vector {config.vector}"
            raise bad("task", "num_envs 1 and vector sync, for there is one robot and one operator", got)

    @property
    def info(self) -> TaskInfo:
        """Of the first task; what the others share with it: widths and cameras."""
        return self.infos[0]

    def reset(self, seeds: Sequence[int | None], resting: Sequence[bool] = ()) -> Observations:
        """Reset the environments whose seed is not None; return the observations of all.

        Those `resting` stay as they are: they execute and render nothing until they are given a seed.
        """
        mask = np.array([seed is not None for seed in seeds])
        if resting:  # told by a reset that names no seed
            mask |= resting
        options = {"reset_mask": mask}
        observations, _ = self.envs.reset(seed=[s if s is None else int(s) for s in seeds], options=options)
        return self._with_prompts(observations)

    @property
    def repeatable(self) -> bool:
        """Whether the same seed and the same actions give the same episode in every environment."""
        return all(self.envs.get_attr("repeatable"))

    @property
    def driven(self) -> bool:
        """Whether a person drives now, so that nobody need choose a chunk."""
        return self.info.live and all(self.envs.get_attr("human"))

    def restore(self, episodes: Sequence[tuple[int, Sequence[np.ndarray]]]) -> Observations:
        """Bring every environment to where an episode was: its seed, and the chunks (k, A) executed since."""
        self.reset([seed for seed, _ in episodes])
        self.envs.set_attr("under_way", list(episodes))
        seen = self.envs.call("restore")
        return self._with_prompts({key: np.stack([each[key] for each in seen]) for key in seen[0]})

    def step(self, chunks: np.ndarray | None) -> ChunkResult:
        """Execute float32 (B, k, A), open loop; None: nobody chose any, for a person drives.

        Raises:
            DsrlError: a chunk for a robot that is not finite; it has been stopped.
        """
        if chunks is None:
            chunks = np.full((self.config.num_envs, self.chunk, self.info.action_dim), np.nan, dtype=np.float32)
        elif self.info.live and not np.isfinite(chunks).all():
            self.stop()
            raise bad("the base's actions", "finite numbers", "NaN or infinity", "The robot was told to stand still.")
        observations, _, terminated, truncated, info = self.envs.step(chunks)
        none = np.zeros(len(chunks), dtype=bool)
        return ChunkResult(
            self._with_prompts(observations),
            np.stack(list(info["rewards"])),
            np.asarray(info["steps"], dtype=np.int64),
            terminated.copy(),
            truncated.copy(),
            np.asarray(info["success"], dtype=bool),
            np.asarray(info.get("human", none), dtype=bool),
            np.array([str(word or "") for word in info.get("ending", [""] * len(chunks))]),
            info.get("executed"),
        )

    def _with_prompts(self, observations: dict[str, np.ndarray]) -> Observations:
        return {**observations, PROMPT: [info.prompt for info in self.infos]}

    def stop(self) -> None:
        """Let a robot stand still, whatever is done next; what fails in it is logged."""
        if not self.info.live:
            return
        try:
            self.envs.call("stop")
        except Exception as error:
            log.error("the robot could not be told to stand still: %s", error)

    def close(self) -> None:
        """Close every environment; a process that has died, or does not come to its end, is ended."""
        self.envs.close(timeout=_GRACE_S)

    def __enter__(self) -> VectorTask:
        if self.info.live:  # a signal is to leave the block, which stops the robot
            self._signals.enter_context(stop_requests(at_once=True))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self._signals.close()
