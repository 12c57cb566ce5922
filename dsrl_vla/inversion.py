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

from .errors import bad
from .noise import NoiseLayout
from .policy import Encoding, FrozenPolicy

FAR = 0.2
"""Mean reach below which there is little to imitate."""
FAR_WORDS = "the base does not act like that, or does so whatever its noise"
_DRAWS = 8
"""Random noises, from which the distance without any search is known."""
_ITERATIONS = 4
_STEP = 0.1
"""Of the differences, in the latent's box: far above what a base in bf16 rounds off."""
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
_AT_ONCE = 8
"""Noises denoised behind a prefix at a time, as many as a bank has: there may be hundreds, and little memory."""
_MOST = 512
"""Numbers of a latent: every iteration asks for a noise for each."""


@dataclass(frozen=True)
class Inverted:
    """Noise found for recorded chunks."""

    latent: torch.Tensor
    """(B, n, d) in [-1, 1]."""
    reach: torch.Tensor
    """(B,) from 0, no nearer to the recorded chunk than random noise comes, to 1: the chunk itself. It is the share of
    the mean squared distance of random draws that the noise found takes away; 0 where noise makes no difference (the
    base does it anyway, or never), and where the base, or what was recorded, is not finite."""


def check_layout(layout: NoiseLayout) -> None:
    """Refuse a layout of more numbers than are searched."""
    n, d = layout.latent_shape
    if n * d > _MOST:
        what = f"'{layout.name}' of {n * d}"
        raise bad(
            "noise.layout", f"one of at most {_MOST} numbers to look for", what, "repeat or knots:<n> has fewer."
        )


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
    best of some draws, once more from there.

    Args:
        chunk: (B, k, A) in environment units. steps: int64 (B,), how many of its rows were executed; others do not
            count.
        generators: one per row.

    Raises:
        DsrlError: a layout of more numbers than are searched.
    """
    check_layout(layout)
    n, d = layout.latent_shape
    batch, k = chunk.shape[:2]
    draws = torch.stack([torch.rand(_DRAWS, n * d, generator=g) for g in generators]) * 2 - 1
    latents = torch.cat([torch.zeros(batch, 1, n * d), draws], 1)
    executed = (torch.arange(k) < steps[:, None])[:, None, :, None]

    def missed(latents: torch.Tensor) -> torch.Tensor:
        """What is missing to the recorded chunks, (B, K, k, A)."""
        chunks = _denoise(base, encoding, layout, latents.view(batch, -1, n, d))[:, :, :k]
        return torch.where(executed, chunk[:, None] - chunks, 0.0)

    first = missed(latents)
    weight = _weight(first, chunk, executed)
    wrong = (first * weight).flatten(2)
    search = lambda guess: _descend(guess, lambda latents: (missed(latents) * weight).flatten(2))
    found, drawn = search(_Guess(latents[:, 0], wrong[:, 0])), _nearest(latents[:, 1:], wrong[:, 1:])
    if (stuck := drawn.apart < found.apart).any():
        found = found.or_nearer(search(drawn), stuck)
    random = wrong[:, 1:].square().sum(2).mean(1)
    sound = random.isfinite() & found.apart.isfinite() & (random > 0)
    reach = torch.where(sound, 1 - found.apart / random, 0.0).clamp(0, 1)
    return Inverted(torch.where(sound[:, None], found.latent, 0.0).view(batch, n, d), reach)


@dataclass(frozen=True)
class _Guess:
    latent: torch.Tensor  # (B, n * d)
    wrong: torch.Tensor  # (B, k * A), recorded less had, weighted

    @property
    def apart(self) -> torch.Tensor:
        return self.wrong.square().sum(1).nan_to_num(torch.inf)

    def or_nearer(self, other: _Guess, where: torch.Tensor | bool = True) -> _Guess:
        """Row by row the other one, if it is nearer."""
        nearer = ((other.apart < self.apart) & where)[:, None]
        return _Guess(torch.where(nearer, other.latent, self.latent), torch.where(nearer, other.wrong, self.wrong))


def _nearest(latents: torch.Tensor, wrong: torch.Tensor) -> _Guess:
    """Of (B, K, n * d) and (B, K, k * A), each row's best."""
    apart = wrong.square().sum(2).nan_to_num(torch.inf)
    rows, best = torch.arange(len(latents)), apart.argmin(1)
    return _Guess(latents[rows, best], wrong[rows, best])


def _descend(guess: _Guess, error: Callable[[torch.Tensor], torch.Tensor]) -> _Guess:
    """Damped Gauss-Newton; `error` takes latents (B, K, n * d) to what is wrong with them, (B, K, k * A)."""
    for _ in range(_ITERATIONS):
        inward = torch.where(guess.latent + _STEP > 1, -_STEP, _STEP)
        moved = error(guess.latent[:, None] + torch.diag_embed(inward))
        slopes = (guess.wrong[:, None] - moved) / inward[:, :, None]  # d chunk / d latent, (B, n * d, k * A)
        tried = (guess.latent[:, None] + _steps(slopes, guess.wrong)).nan_to_num(0.0).clamp(-1, 1)
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


def _weight(missed: torch.Tensor, chunk: torch.Tensor, executed: torch.Tensor) -> torch.Tensor:
    """What every action column counts by, (A,): the inverse of how far the base's draws spread in it, over the batch.

    In a column that noise does not move a tenth of what is missing there stands for the spread: it cannot be had, and
    says that this decision is out of reach, but the search goes on for the others. Rounding errors are no spread.
    """
    sound = missed.isfinite().flatten(1).all(1) & chunk.isfinite().flatten(1).all(1)
    count = executed[sound].sum().clamp(min=1)
    size = lambda values: (values.square().mean(1, keepdim=True) * executed[sound]).sum((0, 1, 2)).div(count).sqrt()
    missed, chunk = missed[sound], chunk[sound][:, None]
    spread = size(missed - missed.mean(1, keepdim=True))
    scale = torch.maximum(spread, torch.maximum(0.1 * size(missed.mean(1, keepdim=True)), 1e-3 * size(chunk)))
    return torch.where(scale > 0, 1 / scale.clamp(min=1e-12), 1.0)


def _denoise(base: FrozenPolicy, encoding: Encoding, layout: NoiseLayout, latents: torch.Tensor) -> torch.Tensor:
    """(B, K, n, d) -> chunks (B, K, H, A), a few noises at a time: K may be large."""
    return torch.cat([base.denoise(encoding, layout.expand(some)) for some in latents.split(_AT_ONCE, 1)], 1)
