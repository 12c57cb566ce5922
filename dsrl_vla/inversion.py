"""Noise inversion: which noise would have led a frozen base to a recorded action.

A demonstration, a correction or another policy's rollout has actions and no noise. A base that can act like that does
so from *some* noise within a head's reach. It is found by damped Gauss-Newton steps (Levenberg 1944, Marquardt 1963)
on the distance between f(s, u) and the recorded chunk, with a Jacobian by differences. All noises of an iteration
share one prefix, and nothing is asked of the base but `denoise`: bases behind a socket are inverted like those in
process.
"""

from __future__ import annotations

from collections.abc import Callable
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

    The search begins at zero noise, so that like decisions end at like noise; and where it ends no nearer than the
    best of some draws, once more from there. Columns count by how far the base's own draws spread in them: what the
    base does not vary cannot be had.

    Args:
        chunk: (B, k, A) in environment units. steps: int64 (B,), how many of its rows were executed; others do not
            count.
        generators: one per row.
    """
    n, d = layout.latent_shape
    batch, k = chunk.shape[:2]
    draws = torch.stack([torch.rand(_DRAWS, n * d, generator=g) for g in generators]) * 2 - 1
    latents = torch.cat([torch.zeros(batch, 1, n * d), draws], 1)
    act = lambda latents: _denoise(base, encoding, layout, latents.view(batch, -1, n, d))[:, :, :k]
    chunks = act(latents)
    scale = _scale(chunks, steps)
    error = lambda chunks: ((chunk[:, None] - chunks) * scale).flatten(2)
    wrong = error(chunks)
    apart = wrong.square().sum(2)
    found = _descend(_Guess(latents[:, 0], wrong[:, 0]), lambda latents: error(act(latents)))
    drawn = _nearest(latents, wrong)
    if (drawn.apart < found.apart).any():
        found = found.or_nearer(_descend(drawn, lambda latents: error(act(latents))))
    reach = 1 - found.apart / apart[:, 1:].mean(1).clamp(min=1e-12)
    return Inverted(found.latent.view(batch, n, d), reach.clamp(0, 1))


@dataclass(frozen=True)
class _Guess:
    latent: torch.Tensor  # (B, n * d)
    wrong: torch.Tensor  # (B, k * A), recorded less had, weighted

    @property
    def apart(self) -> torch.Tensor:
        return self.wrong.square().sum(1)

    def or_nearer(self, other: _Guess) -> _Guess:
        nearer = (other.apart < self.apart)[:, None]
        return _Guess(torch.where(nearer, other.latent, self.latent), torch.where(nearer, other.wrong, self.wrong))


def _nearest(latents: torch.Tensor, wrong: torch.Tensor) -> _Guess:
    """Of (B, K, n * d) and (B, K, k * A), each row's best."""
    rows, best = torch.arange(len(latents)), wrong.square().sum(2).argmin(1)
    return _Guess(latents[rows, best], wrong[rows, best])


def _descend(guess: _Guess, error: Callable[[torch.Tensor], torch.Tensor]) -> _Guess:
    """Damped Gauss-Newton; `error` takes latents (B, K, n * d) to what is wrong with them."""
    for _ in range(_ITERATIONS):
        inward = torch.where(guess.latent + _STEP > 1, -_STEP, _STEP)
        moved = error(guess.latent[:, None] + torch.diag_embed(inward))
        slopes = (guess.wrong[:, None] - moved) / inward[:, :, None]  # d chunk / d latent, (B, n * d, k * A)
        tried = (guess.latent[:, None] + _steps(slopes, guess.wrong)).clamp(-1, 1)
        guess = guess.or_nearer(_nearest(tried, error(tried)))
    return guess


def _steps(slopes: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """A step for each damping, (B, len(_DAMPINGS), n * d)."""
    square = slopes @ slopes.mT
    toward = slopes @ wrong[:, :, None]
    size = square.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    eye = torch.eye(square.shape[1])
    found = [torch.linalg.solve(square + damping * size[:, None, None] * eye, toward) for damping in _DAMPINGS]
    return torch.cat(found, 2).mT


def _scale(chunks: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """What the numbers of a chunk are multiplied by, (B, 1, k, A): 1 / spread over draws (B, K, k, A), 0 where there
    is none, and in steps that were not executed."""
    spread = (chunks - chunks.mean(1, keepdim=True)).square().mean((0, 1, 2)).sqrt()
    weight = torch.where(spread > 1e-3 * spread.max(), 1 / spread.clamp(min=1e-12), 0.0)
    executed = (torch.arange(chunks.shape[2]) < steps[:, None]).float()
    return (executed[:, :, None] * weight)[:, None]


def _denoise(base: FrozenPolicy, encoding: Encoding, layout: NoiseLayout, latents: torch.Tensor) -> torch.Tensor:
    """(B, K, n, d) -> chunks (B, K, H, A), a few noises at a time: K may be large."""
    return torch.cat([base.denoise(encoding, layout.expand(some)) for some in latents.split(_AT_ONCE, 1)], 1)
