"""The attach-time probe: does noise decide this policy's actions, and do its inputs matter?

Many policies accept a ``noise`` argument and silently ignore it; DDPM samplers draw more of it on the way.
Either way a head would be trained on nothing, so such a base is refused before anything else happens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from .errors import NotSteerableError, bad
from .noise import generators
from .observation import IMAGE_PREFIX, PROMPT, STATE, Observations, unsqueeze
from .policy import FrozenPolicy

log = logging.getLogger(__name__)
_ROUNDING = 1e-3, 0.05
"""Of the greatest action: what another size of a batch may come to, and in bfloat16."""


@dataclass(frozen=True)
class ProbeReport:
    """What the probe saw. Effects are the largest absolute change of any action, in environment units."""

    deterministic: bool
    noise_effect: float
    per_column: tuple[float, ...]
    """Effect of each noise column alone; padding columns often are not zero."""
    image_effect: float | None
    """None: the base declares no camera."""
    prompt_effect: float | None
    """None: the base declares no prompt."""


def probe(base: FrozenPolicy, observation: dict) -> ProbeReport:
    """Probe a base on one observation (a single one, not a batch).

    Raises:
        NotSteerableError: the same noise gives different actions, or different noises the same action.
        DsrlError: the actions' shape is not as `base.spec` declares, or they are not finite; an observation's depend
            on what else is in its batch.
    """
    observations = unsqueeze(observation)
    spec = base.spec
    encoding = base.encode(observations)
    noise = spec.noise.sample(generators([0]), count=4)
    actions = base.denoise(encoding, noise)
    wanted = (1, 4, spec.noise.horizon, spec.action_dim)
    if tuple(actions.shape) != wanted:
        raise bad(f"{spec.uri}: actions", f"shape (B, K, H, A) = {wanted}", tuple(actions.shape))
    if not torch.isfinite(actions).all():
        raise bad(f"{spec.uri}: actions", "finite values", "NaN or infinity")
    again = base.denoise(base.encode(observations), noise)
    if not torch.equal(actions, again):
        raise NotSteerableError(
            f"{spec.uri}: expected the same noise to give the same action, got actions that differ by "
            f"{_effect(actions, again):.3g}. Its sampler draws more noise on the way (DDPM, dropout?). Choose a "
            "deterministic one: DDIM for diffusion, an ODE solver for flow matching, and evaluation mode."
        )
    _check_rows(base, observations, noise, actions)
    effect = _effect(actions[:, 1:], actions[:, :1])
    if effect == 0.0:
        raise NotSteerableError(
            f"{spec.uri}: expected different noises to give different actions, got the same action for all. The "
            "policy ignores its noise argument, or its sampler never uses it: it cannot be steered this way."
        )
    report = ProbeReport(
        deterministic=True,
        noise_effect=effect,
        per_column=_columns(base, encoding, noise[:, :1]),
        image_effect=_image_effect(base, observations, noise, actions),
        prompt_effect=_prompt_effect(base, observations, noise, actions),
    )
    for name, value in (("image", report.image_effect), ("prompt", report.prompt_effect)):
        if value == 0.0:
            log.warning("%s: its %s does not change its actions, though it declares one.", spec.uri, name)
    return report


def _effect(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _check_rows(base: FrozenPolicy, observations: Observations, noise: torch.Tensor, alone: torch.Tensor) -> None:
    """Refuse a base whose rows of a batch, or whose noises, are mixed up: many robots at once would get each other's
    actions, and one by itself the right ones."""
    other = _negatives(base, observations) | {STATE: np.asarray(observations[STATE]) + 1.0}
    both = {k: [*v, *other[k]] if k == PROMPT else np.concatenate([v, other[k]]) for k, v in observations.items()}
    together = base.denoise(base.encode(both), torch.cat([noise, noise]))
    apart = torch.cat([alone, base.denoise(base.encode(other), noise)])
    if not torch.isfinite(apart).all():  # so far off: nothing to compare
        return
    exact = base.spec.dtype == "float32" and base.device.type == "cpu"  # elsewhere some go by bfloat16 all the same
    least = _ROUNDING[not exact] * float(apart.abs().max())
    mixed = 0.5 * min(_effect(apart[:1], apart[1:]), _effect(alone[:, 1:], alone[:, :1]))
    if together.shape != apart.shape or not _effect(together, apart) <= max(least, mixed):
        raise bad(
            f"{base.spec.uri}: actions of a batch",
            "those of each observation and noise alone",
            f"others, {_effect(together, apart):.3g} away" if together.shape == apart.shape else tuple(together.shape),
            "Its K noises of an observation come one after another: feature.repeat_interleave(K, 0), not repeat.",
        )


def _negatives(base: FrozenPolicy, observations: Observations) -> Observations:
    """The same, but for the pictures, which are their negatives."""
    keys = [IMAGE_PREFIX + name for name in base.spec.observation.cameras]
    return observations | {key: 255 - np.asarray(observations[key]) for key in keys}


def _columns(base: FrozenPolicy, encoding, noise: torch.Tensor) -> tuple[float, ...]:
    dim = base.spec.noise.dim
    shifted = noise.repeat(1, dim + 1, 1, 1)
    for column in range(dim):
        shifted[:, column + 1, :, column] += 0.5
    actions = base.denoise(encoding, shifted)
    return tuple(_effect(actions[:, i + 1], actions[:, 0]) for i in range(dim))


def _image_effect(
    base: FrozenPolicy, observations: Observations, noise: torch.Tensor, actions: torch.Tensor
) -> float | None:
    if not base.spec.observation.cameras:
        return None
    return _effect(base.denoise(base.encode(_negatives(base, observations)), noise), actions)


def _prompt_effect(
    base: FrozenPolicy, observations: Observations, noise: torch.Tensor, actions: torch.Tensor
) -> float | None:
    if not base.spec.observation.prompt:
        return None
    changed = {**observations, PROMPT: ["push and close the window"]}
    return _effect(base.denoise(base.encode(changed), noise), actions)
