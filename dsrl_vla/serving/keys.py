"""openpi's observation keys to ours: a robot that was written for openpi sends what its dataset called things.

An observation with ``observation.state`` in it is LeRobot's dictionary and passes as it is. Any other is translated:
images from wherever a `KeyMap` says, uint8 or float in [0, 1], channels last or first; the state put together from
one or several keys; the prompt from ``prompt``. Float images become uint8 as openpi's own input transforms have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import bad, unknown
from ..observation import IMAGE_PREFIX, PROMPT, STATE, Observations, ObservationSpec
from .wire import WireError

_WRIST = "wrist"


@dataclass(frozen=True)
class KeyMap:
    """Where openpi's dictionary keeps what a base sees. A nested place is written ``images>cam_high``."""

    state: tuple[str, ...] = ("observation/state",)
    """Put together, in this order, they are our state."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Our camera -> openpi's place. Empty: `order`, camera by camera."""
    order: tuple[str, ...] = ("observation/image", "observation/wrist_image")
    prompt: str = "prompt"

    def places(self, spec: ObservationSpec) -> dict[str, str]:
        """Our camera -> openpi's place, for the cameras of a base.

        Raises:
            DsrlError: a camera has no place, or a place has no such camera.
        """
        if not self.images:
            if len(spec.cameras) > len(self.order):
                raise bad(
                    "key map",
                    f"a place for each camera of {', '.join(spec.cameras)}",
                    f"only {', '.join(self.order)}",
                    "Name them: --keys <camera>=<openpi's key>,…",
                )
            found = dict(zip(spec.cameras, self.order, strict=False))
            for camera, place in found.items():  # by their order alone
                if _WRIST in camera and _WRIST not in place:
                    fix = "Name them: --keys <camera>=<openpi's key>,…"
                    raise bad("key map", f"a wrist camera's place for '{camera}'", f"'{place}'", fix)
            return found
        for camera in self.images:
            if camera not in spec.cameras:
                raise unknown("camera", camera, spec.cameras)
        missing = [camera for camera in spec.cameras if camera not in self.images]
        if missing:
            raise bad("key map", f"a place for camera '{missing[0]}'", "none")
        return dict(self.images)

    def check(self, spec: ObservationSpec) -> None:
        """Refuse keys that were given for cameras and do not name a base's; the default ones may be too few."""
        if self.images:
            self.places(spec)

    def translate(self, message: Mapping[str, Any], spec: ObservationSpec, default_prompt: str = "") -> Observations:
        """A single observation with openpi's keys, or ours, as a single one with ours.

        Raises:
            DsrlError: names the key that is missing or malformed.
        """
        if STATE in message:
            return ours(message, spec) | self._prompt(message, spec, default_prompt)
        found: Observations = {STATE: np.concatenate([_numbers(_get(message, place), place) for place in self.state])}
        for camera, place in self.places(spec).items():
            found[IMAGE_PREFIX + camera] = _image(_get(message, place), place)
        return found | self._prompt(message, spec, default_prompt)

    def _prompt(self, message: Mapping[str, Any], spec: ObservationSpec, default: str) -> Observations:
        """The prompt under our key or openpi's, or the default; none at all is no prompt to act on."""
        if not spec.prompt:
            return {}
        for key in (PROMPT, self.prompt):
            if key in message:
                return {PROMPT: message[key]}
        if default:
            return {PROMPT: default}
        raise WireError(str(bad(self.prompt, *_absent(message), "Send it, or give the server one: --prompt")))


PRESETS = {
    "libero": KeyMap(),
    "droid": KeyMap(
        state=("observation/joint_position", "observation/gripper_position"),
        order=("observation/exterior_image_1_left", "observation/wrist_image_left"),
    ),
    "aloha": KeyMap(state=("state",), order=("images>cam_high", "images>cam_left_wrist", "images>cam_right_wrist")),
}
"""The keys of openpi's own examples."""


def parse_keys(text: str) -> KeyMap:
    """A preset's name, or ``front=observation/image,state=observation/state,prompt=prompt``; several states with +.

    Raises:
        DsrlError: not of that form. UnknownNameError: no such preset.
    """
    if "=" not in text:
        if text not in PRESETS:
            raise unknown("key map", text, PRESETS)
        return PRESETS[text]
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not name or not place for name, _, place in pairs):
        raise bad("keys", "<camera>=<openpi's key>,…,state=<key>[+<key>…]", f"'{text}'")
    places = {name: place for name, _, place in pairs}
    state = tuple(places.pop("state", "observation/state").split("+"))
    return KeyMap(state, prompt=places.pop("prompt", "prompt"), images=places)


def _get(message: Any, place: str) -> Any:
    value = message
    for key in place.split(">"):
        if not isinstance(value, Mapping) or key not in value:
            raise WireError(str(bad(place, *_absent(message))))
        value = value[key]
    return value


def _absent(message: Any) -> tuple[str, str]:
    """What was expected of a key, and what was sent."""
    return "to be in the observation", f"only {', '.join(sorted(map(str, message)))[:200] or 'nothing'}"


def array(value: Any, place: str) -> np.ndarray:
    """An array of what a stranger sent as one, or as numbers in (nested) lists: out of text in a list numpy would make
    rows as long as the longest.

    Raises:
        WireError: something else; a ragged list.
    """
    inner = [value]
    while any(isinstance(part, list) for part in inner):
        inner = [each for part in inner for each in (part if isinstance(part, list) else [part])]
    others = [part for part in inner if not isinstance(part, (bool, int, float, np.generic, np.ndarray))]
    if others:
        raise WireError(str(bad(place, "numbers", type(others[0]).__name__)))
    try:
        return np.asarray(value)
    except ValueError as error:
        raise WireError(str(bad(place, "an array", "a ragged list"))) from error


def ours(message: Mapping[str, Any], spec: ObservationSpec) -> Observations:
    """State and images under our own keys, as far as they are there."""
    names = [STATE, *(IMAGE_PREFIX + camera for camera in spec.cameras)]
    return {name: array(message[name], name) for name in names if name in message}


def _numbers(value: Any, place: str) -> np.ndarray:
    try:
        return array(value, place).astype(np.float32).reshape(-1)
    except (TypeError, OverflowError) as error:
        raise WireError(str(bad(place, "numbers", type(value).__name__))) from error


def _image(value: Any, place: str) -> np.ndarray:
    image = array(value, place)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.dtype.kind == "f":
        if not (np.isfinite(image).all() and image.min(initial=0.0) >= 0 and image.max(initial=0.0) <= 1):
            raise WireError(str(bad(place, "floats in [0, 1]", "values outside")))
        image = (image * 255).astype(np.uint8)
    return np.ascontiguousarray(image)
