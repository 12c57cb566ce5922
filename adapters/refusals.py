"""Policies that cannot be steered, recognised by their config before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsrl_vla.errors import NotSteerableError

_AUTOREGRESSIVE = {"pi0_fast", "openvla", "openvla_oft", "rt1", "octo_ar", "llama", "gemma", "paligemma", "qwen2_vl"}
_NO_SAMPLER = {"act", "vqbet", "tdmpc", "gaussian_actor", "sac"}


def refuse_unsteerable(source: str, config: Mapping[str, Any]) -> None:
    """Refuse a config whose sampler takes no initial noise, or draws more of it on the way.

    Raises:
        NotSteerableError: an autoregressive policy, one without a sampler, or a DDPM scheduler.
    """
    kind = str(config.get("model_type") or config.get("type") or "").lower()
    if kind in _AUTOREGRESSIVE or config.get("prediction_mode") == "fast" or config.get("action_mode") == "discrete":
        raise NotSteerableError(
            f"{source}: expected a flow or diffusion policy, got the autoregressive '{kind}', which picks tokens "
            "and has no initial noise to steer. Use a flow-matching variant, such as pi0 in place of pi0_fast."
        )
    if kind in _NO_SAMPLER:
        raise NotSteerableError(
            f"{source}: expected a flow or diffusion policy, got '{kind}', whose actions do not come out of a sampler."
        )
    scheduler = str(config.get("noise_scheduler_type") or config.get("scheduler") or "").upper()
    if scheduler.startswith("DDPM"):
        raise NotSteerableError(
            f"{source}: expected a deterministic sampler, got a DDPM scheduler, which draws fresh noise at every "
            "step, so the initial noise does not decide the action. Load it with noise_scheduler_type=DDIM and "
            "measure it again: that is another sampler than the one the checkpoint was evaluated with."
        )
