"""Noise inversion: which noise would have led a frozen base to a recorded action.

A demonstration, a correction or another policy's rollout has actions and no noise. A base that can act like that does
so from *some* noise within a head's reach. It is found by damped Gauss-Newton steps (Levenberg 1944, Marquardt 1963)
on the distance between f(s, u) and the recorded chunk, with a Jacobian by differences. All noises of an iteration
share one prefix, and nothing is asked of the base but `denoise`: bases behind a socket are inverted like those in
process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .noise import NoiseLayout
from .policy import Encoding, FrozenPolicy

_DRAWS = 8
"""Random noises, from which the distance without any search is known."""
_ITERATIONS = 4
_STEP = 0.1
"""Of the differences, in the latent's box: far above what a base in bf16 rounds off."""
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
_AT_ONCE = 8
"""Noises denoised behind a prefix at a time, as many as a bank has: there may be hundreds, and little memory."""


@dataclass(frozen=True)
class Inverted:
    """Noise found for recorded chunks."""

    latent: torch.Tensor
    """(B, n, d) in [-1, 1]."""
    reach: torch.Tensor
    """(B,) from 0, no nearer to the recorded chunk than random noise comes, to 1: the chunk itself. It is the share of
    the mean squared distance of random draws that the noise found takes away."""


@torch.no_grad()
def invert(
    base: FrozenPolicy,
    encoding: Encoding,
    layout: NoiseLayout,
    chunk: torch.Tensor,
    steps: torch.Tensor,
    generators: list[torch.Generator],
) -> Inverted:
    """Find the latents whose chunks are nearest to the recorded ones.

    Columns count by how far the base's own draws spread in them: what the base does not vary cannot be had.

    Args:
        chunk: (B, k, A) in environment units. steps: int64 (B,), how many of its rows were executed; others do not
            count.
        generators: one per row.
    """
    n, d = layout.latent_shape
    batch, k = chunk.shape[:2]
    act = lambda latent: _denoise(base, encoding, layout, latent.view(batch, -1, n, d))[:, :, :k]
    draws = torch.stack([torch.rand(_DRAWS, n * d, generator=g) for g in generators]) * 2 - 1
    latents = torch.cat([torch.zeros(batch, 1, n * d), draws], 1)
    found = act(latents)
    spread = (found - found.mean(1, keepdim=True)).square().mean((0, 1, 2)).sqrt()
    weight = torch.where(spread > 1e-3 * spread.max(), 1 / spread.clamp(min=1e-12), 0.0)
    executed = (torch.arange(k) < steps[:, None]).float()
    scale = executed[:, :, None] * weight
    error = lambda chunks: ((chunk[:, None] - chunks) * scale[:, None]).flatten(2)  # (B, K, k * A)
    rows, wrong = torch.arange(batch), error(found)
    apart = wrong.square().sum(2)
    latent, residual, least = latents[:, 0], wrong[:, 0], apart[:, 0]
    for _ in range(_ITERATIONS):
        inward = torch.where(latent + _STEP > 1, -_STEP, _STEP)
        moved = error(act(latent[:, None] + torch.diag_embed(inward)))
        slopes = (residual[:, None] - moved) / inward[:, :, None]  # d chunk / d latent, (B, n * d, k * A)
        tried = (latent[:, None] + _steps(slopes, residual)).clamp(-1, 1)
        wrong = error(act(tried))
        best = wrong.square().sum(2).min(1)
        nearer = best.values < least
        latent = torch.where(nearer[:, None], tried[rows, best.indices], latent)
        residual = torch.where(nearer[:, None], wrong[rows, best.indices], residual)
        least = torch.where(nearer, best.values, least)
    reach = (1 - least / apart[:, 1:].mean(1).clamp(min=1e-12)).clamp(0, 1)
    return Inverted(latent.view(batch, n, d), reach)


def _steps(slopes: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Damped Gauss-Newton steps (B, len(_DAMPINGS), n * d)."""
    square = slopes @ slopes.mT
    toward = slopes @ residual[:, :, None]
    size = square.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(square.shape[1])
    found = [torch.linalg.solve(square + damping * size[:, None, None] * eye, toward) for damping in _DAMPINGS]
    return torch.cat(found, 2).mT


def _denoise(base: FrozenPolicy, encoding: Encoding, layout: NoiseLayout, latents: torch.Tensor) -> torch.Tensor:
    """(B, K, n, d) -> chunks (B, K, H, A), a few noises at a time: K may be large."""
    return torch.cat([base.denoise(encoding, layout.expand(some)) for some in latents.split(_AT_ONCE, 1)], 1)
