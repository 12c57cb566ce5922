"""A LeRobot policy as a `FrozenPolicy`: its own processors around its split."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from dsrl_vla.errors import bad
from dsrl_vla.observation import IMAGE_PREFIX, PROMPT, STATE, Observations, ObservationSpec
from dsrl_vla.policy import Encoding, FrozenPolicy, PolicySpec

from .seam import Prefix, own_randomness
from .split import Batch, Split

_REFERENCE = "relative_to"


class LeRobotPolicy(FrozenPolicy):
    """A frozen LeRobot policy.

    Args:
        preprocess, postprocess: LeRobot's pipelines for this policy; actions come out in environment units.
        cameras: camera of the task -> camera of the policy, where the two have different names.
        absent: cameras of the policy that there are none of here: its own code does without them.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Any,
        postprocess: Any,
        *,
        uri: str,
        dtype: str = "float32",
        cameras: Mapping[str, str] | None = None,
        absent: Sequence[str] = (),
        repo_id: str = "",
        revision: str = "",
    ):
        self.split, self.preprocess, self.postprocess = split, preprocess, postprocess
        self.model = split.policy.eval().requires_grad_(False)
        self._keys, shapes = _camera_keys(split, cameras or {}, absent)
        self._relative = _relative_step(preprocess)
        self._template: Any = None
        self._lock = threading.Lock()
        self.spec = PolicySpec(
            uri=uri,
            adapter="lerobot",
            noise=split.noise,
            observation=ObservationSpec(split.state_dim, shapes, prompt=split.prompt),
            action_dim=self._action_dim(),
            executed_steps=split.executed_steps,
            sampler_steps=split.sampler_steps,
            feature_dim=split.feature_dim,
            dtype=dtype,
            repo_id=repo_id,
            revision=revision,
        )

    def _action_dim(self) -> int:
        """Width of what comes out of the policy's own postprocessing, which may crop or convert."""
        if self._relative is not None:
            return self.split.action_dim
        return self.postprocess(torch.zeros(1, 1, self.split.chunk_width)).shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        # the split stands in for methods of the policy while it looks for the seam
        with self._lock, own_randomness(self.device):
            prepared = self.preprocess(self._batch(observations, batch))
            feature, prefix = self.split.encode(prepared)
            if self._relative is not None:
                prefix.tensors[_REFERENCE] = self._relative.get_cached_state()
            self._template = prefix.template
        return Encoding(batch, feature, prefix)

    def _batch(self, observations: Observations, batch: int) -> Batch:
        """LeRobot's batch: images float32 (B, 3, H, W) in [0, 1], the state float32 (B, S), prompts."""
        made: Batch = {STATE: torch.as_tensor(np.asarray(observations[STATE]), dtype=torch.float32)}
        for camera, key in self._keys.items():
            image = torch.as_tensor(np.asarray(observations[IMAGE_PREFIX + camera]))
            made[key] = image.permute(0, 3, 1, 2).contiguous().float() / 255
        made[PROMPT] = list(observations[PROMPT]) if PROMPT in observations else [""] * batch
        return made

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        batch, count, horizon, _ = noise.shape
        prefix: Prefix = encoding.context.repeated(count)
        with self._lock, own_randomness(self.device):
            chunk = self.split.denoise(prefix.arguments(), noise.flatten(0, 1).to(self.device))
            if self._relative is not None:
                self._refer_to(prefix.tensors[_REFERENCE])
            actions = self.postprocess(chunk.float())
        if actions.shape[1] < horizon:  # rows that belong to the past were dropped: hold the last action
            actions = torch.cat([actions, actions[:, -1:].expand(-1, horizon - actions.shape[1], -1)], 1)
        return actions.unflatten(0, (batch, count))

    def _refer_to(self, state: torch.Tensor) -> None:
        """Relative actions count from the state that the preprocessing has seen last; make it this one."""
        from lerobot.processor import TransitionKey

        self._relative({TransitionKey.OBSERVATION: {STATE: state}})

    @property
    def image_features(self) -> dict[str, Any]:
        """The policy's camera features, those that go by another name here under that name."""
        own = self.split.config.image_features
        return {key if camera_of(key) == name else IMAGE_PREFIX + name: own[key] for name, key in self._keys.items()}

    def pack(self, encoding: Encoding) -> dict[str, torch.Tensor]:
        return dict(encoding.context.tensors)

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> Encoding:
        if self._template is None:
            raise bad("unpack", "an encoding to have been made by this base", "none so far", "Call `encode` once.")
        prefix = Prefix({k: v.to(self.device) for k, v in tensors.items()}, self._template)
        return Encoding(len(next(iter(tensors.values()))), None, prefix)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()

    def processors(self) -> dict[str, Any]:
        """The cameras in order, and whose names they go by here; and what every step of the pipelines has learnt:
        normalisation statistics."""
        found: dict[str, Any] = {"cameras": list(self._keys.values())}
        if renamed := {name: key for name, key in self._keys.items() if name != camera_of(key)}:
            found["renamed cameras"] = renamed
        for when, pipeline in (("before", self.preprocess), ("after", self.postprocess)):
            for step in pipeline.steps:
                state = {name: tensor.float().tolist() for name, tensor in step.state_dict().items()}
                if state:
                    found[f"{when} {type(step).__name__}"] = state
        return found


def camera_of(key: str) -> str:
    """``observation.images.front`` -> front; LeRobot's only camera, ``observation.image``, is called image."""
    return key.removeprefix(IMAGE_PREFIX).removeprefix("observation.")


def _camera_keys(
    split: Split, renamed: Mapping[str, str], absent: Sequence[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return (camera -> the policy's key, camera -> shape or None) in the policy's own order."""
    known: dict[str, str] = {}
    shapes: dict[str, tuple[int, int, int] | None] = {}
    back = {theirs: ours for ours, theirs in renamed.items()}
    if len(back) < len(renamed):
        raise bad("base.cameras", "a camera of its own for each of the policy's", ", ".join(renamed.values()))
    _check_absent(split, absent)
    for key, feature in split.config.image_features.items():
        theirs = camera_of(key)
        if theirs.startswith("empty_camera_") or theirs in absent:
            continue
        camera = back.pop(theirs, theirs)
        if camera in known:
            fix = f"Name another for '{theirs}', or for '{camera_of(known[camera])}'."
            raise bad("base.cameras", "a name of its own for each of the policy's cameras", f"'{camera}' twice", fix)
        channels, height, width = feature.shape
        known[camera], shapes[camera] = key, None if split.resizes else (height, width, channels)
    if back:
        raise bad("base.cameras", f"cameras of the policy: {', '.join(known) or 'none'}", ", ".join(back))
    return known, shapes


def _check_absent(split: Split, absent: Sequence[str]) -> None:
    """Refuse to leave out cameras that the policy does not have, or cannot do without."""
    theirs = [camera_of(key) for key in split.config.image_features]
    if unknown := [name for name in absent if name not in theirs]:
        raise bad("base.absent", f"cameras of the policy: {', '.join(theirs) or 'none'}", ", ".join(unknown))
    real = sum(not name.startswith("empty_camera_") for name in theirs)
    most = real - 1 if split.spares else 0
    if len(absent) > most:
        raise bad("base.absent", f"at most {most} of this policy's cameras left out", ", ".join(absent))


def _relative_step(preprocess: Any) -> Any:
    from lerobot.processor import RelativeActionsProcessorStep

    steps = [s for s in preprocess.steps if isinstance(s, RelativeActionsProcessorStep) and s.enabled]
    return steps[0] if steps else None
