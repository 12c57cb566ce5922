"""The algorithms by name; what a recipe's ``algorithm`` chooses from."""

from __future__ import annotations

from typing import Literal

from .critic import CriticConfig
from .errors import bad
from .head import SteeringHead
from .latent_sac import LatentSAC, SACConfig
from .noise_aliasing import ExactNoiseAliasing, NAConfig, NoiseAliasing
from .policy import FrozenPolicy

Algorithm = Literal["sac", "na", "na-exact"]


def build_learner(
    algorithm: Algorithm,
    base: FrozenPolicy | None,
    head: SteeringHead,
    critic: CriticConfig,
    sac: SACConfig,
    na: NAConfig,
    value_bounds: tuple[float, float],
    seed: int,
    device: str = "cpu",
) -> LatentSAC:
    """DSRL-SAC, DSRL-NA over a noise bank, or DSRL-NA as the paper has it (denoising in the update).

    `head` is moved to `device`, where all else is made; the last one learns on the CPU, wherever its base is.

    Raises:
        DsrlError: no base, for the one that asks it.
    """
    shared = (head, critic, sac, value_bounds, seed)
    if algorithm == "sac":
        return LatentSAC(*shared, device)
    width = head.config.action_dim
    if algorithm == "na":
        return NoiseAliasing(*shared, device, na=na, action_dim=width)
    if base is None:
        raise bad("algorithm", "sac or na, which update without the base, in several processes", algorithm)
    return ExactNoiseAliasing(*shared, na=na, action_dim=width, base=base)
