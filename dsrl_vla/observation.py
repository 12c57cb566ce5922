"""Observations: LeRobot's dictionary, batched, and the check that every one passes before it is used.

Keys: ``observation.images.<camera>`` uint8 (B, H, W, 3), ``observation.state`` float32 (B, S), and ``task``,
a list of B prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import bad

STATE = "observation.state"
IMAGE_PREFIX = "observation.images."
PROMPT = "task"

Observations = dict[str, Any]


@dataclass(frozen=True)
class ObservationSpec:
    """What a base needs to see. Image sizes of None accept any size (the base resizes)."""

    state_dim: int
    cameras: Mapping[str, tuple[int, int, int] | None] = field(default_factory=dict)
    prompt: bool = True

    def check(self, observations: Mapping[str, Any]) -> int:
        """Refuse a batch that is not as declared; return its size B.

        Raises:
            DsrlError: a missing camera, a wrong shape or dtype, a non-finite state, a missing prompt.
        """
        state = np.asarray(_get(observations, STATE))
        if state.ndim != 2 or state.shape[1] != self.state_dim:
            raise bad(STATE, f"shape (B, {self.state_dim})", f"{state.shape}")
        if not len(state):
            raise bad(STATE, "a row or more", "none")
        if state.dtype.kind not in "fiu":
            raise bad(STATE, "numbers", f"dtype {state.dtype}")
        with np.errstate(over="ignore"):
            finite = np.isfinite(state.astype(np.float32))  # which is what it becomes
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            expected = "a number that float32 holds" if np.isfinite(state[row, column]) else "a finite number"
            raise bad(f"{STATE}[{row}, {column}]", expected, f"{state[row, column]}")
        batch = state.shape[0]
        for name, shape in self.cameras.items():
            self._check_image(IMAGE_PREFIX + name, _get(observations, IMAGE_PREFIX + name), batch, shape)
        if self.prompt:
            prompts = _get(observations, PROMPT)
            listed = isinstance(prompts, Sized) and not isinstance(prompts, str) and getattr(prompts, "ndim", 1) == 1
            if not listed or len(prompts) != batch or not all(isinstance(text, str) for text in prompts):
                raise bad(PROMPT, f"a list of {batch} prompts", f"{prompts!r}"[:80])
        return batch

    def blank(self) -> Observations:
        """One row of zeros that passes `check`, for what is run before it counts; 224 x 224 where any size does."""
        made: Observations = {STATE: np.zeros((1, self.state_dim), np.float32)}
        for name, shape in self.cameras.items():
            made[IMAGE_PREFIX + name] = np.zeros((1, *(shape or (224, 224, 3))), np.uint8)
        return made | ({PROMPT: ["warm up"]} if self.prompt else {})

    @staticmethod
    def _check_image(key: str, image: Any, batch: int, shape: tuple[int, int, int] | None) -> None:
        image = np.asarray(image)
        if image.dtype != np.uint8:
            raise bad(key, "uint8 in [0, 255]", f"dtype {image.dtype}")
        want = f"({batch}, {', '.join(map(str, shape))})" if shape else f"({batch}, H, W, 3)"
        wrong = image.shape != (batch, *shape) if shape else image.ndim != 4 or image.shape[::3] != (batch, 3)
        if wrong or not all(image.shape[1:]):
            raise bad(key, f"shape {want}", f"{image.shape}")


def _get(observations: Mapping[str, Any], key: str) -> Any:
    if key not in observations:
        raise bad(key, "to be in the observation", f"only {', '.join(sorted(observations)) or 'nothing'}")
    return observations[key]


def batch(observations: Sequence[Mapping[str, Any]]) -> Observations:
    """Stack single observations (prompt a string) into a batch."""
    stacked: Observations = {
        key: np.stack([np.asarray(o[key]) for o in observations]) for key in observations[0] if key != PROMPT
    }
    if PROMPT in observations[0]:
        stacked[PROMPT] = [o[PROMPT] for o in observations]
    return stacked


def unsqueeze(observation: Mapping[str, Any]) -> Observations:
    """A single observation as a batch of one."""
    return batch([observation])


def select(observations: Mapping[str, Any], indices: Sequence[int]) -> Observations:
    """The rows `indices` of a batch."""
    return {
        key: [value[i] for i in indices] if key == PROMPT else np.asarray(value)[list(indices)]
        for key, value in observations.items()
    }
