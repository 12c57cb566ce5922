"""The steering head: a small actor that looks at what the robot sees and picks the sampler's noise.

Tokens: the frozen VLM's pooled feature, the robot state, optionally small camera images, and one query token
per noise vector of the layout. Output: a tanh-Gaussian over the latent u in [-1, 1]^(n, d), which the layout
expands to the base's noise. Always float32, whatever the base's dtype: in bf16 such a head stops learning.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .draws import Source, normal
from .head_config import CONFIG, WEIGHTS, HeadConfig
from .networks import ImageTokens, build
from .observation import IMAGE_PREFIX, STATE, Observations, ObservationSpec
from .policy import Encoding
from .recorded import Recorded
from .run_dir import make_folder, write_tensors, write_text

_LOG_STD = (-5.0, 2.0)

HeadInputs = dict[str, torch.Tensor]
"""What head and critic look at: "state" (B, S) and "feature" (B, F) float32, "image.<camera>" uint8 (B, s, s, 3)."""


def deviation(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation of every column of a sample (N, C); of a single row 0, and not NaN."""
    return values.std(0, correction=min(1, len(values) - 1))


class Normaliser(nn.Module):
    """Mean and deviation of state and feature, fitted once on warm-up data; travels with the head."""

    state_std: torch.Tensor

    def __init__(self, sizes: Mapping[str, int]):
        super().__init__()
        self.names = tuple(sizes)
        for name, size in sizes.items():
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    @torch.no_grad()
    def fit(self, inputs: HeadInputs) -> None:
        """Set the statistics from a sample (N, …). A column that hardly varies is left at unit scale."""
        for name in self.names:
            values = inputs[name].double()
            std = deviation(values)
            size = values.abs().mean(0)
            still = std < 1e-3 * size.mean().clamp(min=1e-3)
            if name == "state":  # small in its own units beside others', a column may yet be one that varies
                still &= (std < 0.05 * size) | (std < 1e-4)
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(torch.where(still, torch.ones_like(std), std))

    @torch.no_grad()
    def deviations(self, inputs: HeadInputs) -> dict[str, torch.Tensor]:
        """How far from what was fitted: |x - mean| / std, the shape of each input."""
        fitted = lambda name, what: getattr(self, f"{name}_{what}")
        return {n: ((inputs[n] - fitted(n, "mean")) / fitted(n, "std")).abs() for n in self.names}

    def here(self) -> Normaliser:
        """A copy on the CPU, where inputs are, whatever becomes of this one."""
        return copy.deepcopy(self).cpu()

    def jittered(self, inputs: HeadInputs, amount: float, source: Source) -> HeadInputs:
        """The inputs with normal noise on the state, `amount` of what was fitted as its deviation."""
        if "state" not in self.names:
            return inputs
        state = inputs["state"]
        return inputs | {"state": state + amount * self.state_std * normal(state.shape, source, state.device)}

    def forward(self, inputs: HeadInputs) -> list[torch.Tensor]:
        """Normalised vectors, clipped at five deviations; the feature scaled to unit norm in expectation.

        A frozen feature has hundreds of directions, most of them irrelevant to the task at hand. At unit
        variance each they drown a state of twenty numbers and slow learning down several times.
        """
        vectors = []
        for name in self.names:
            mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
            vector = ((inputs[name] - mean) / std).clamp(-5, 5)
            vectors.append(vector * vector.shape[-1] ** -0.5 if name == "feature" else vector)
        return vectors


class Eyes(nn.Module):
    """Head inputs to the list of vectors that a network takes as tokens."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        sizes = {name: n for name, n in (("state", config.state_dim), ("feature", config.feature_dim)) if n}
        self.normalise = Normaliser(sizes)
        self.images = nn.ModuleDict(
            {name: ImageTokens(config.image_size, config.network.width) for name in config.cameras}
        )
        self.sizes = [*sizes.values(), *(config.network.width for _ in config.cameras)]

    def forward(self, inputs: HeadInputs) -> list[torch.Tensor]:
        return [*self.normalise(inputs), *(net(inputs[f"image.{name}"]) for name, net in self.images.items())]


class SteeringHead(nn.Module):
    """The actor. Owns its normaliser; holds no reference to a base."""

    start: torch.Tensor

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config, self.layout = config, config.layout
        vectors, dim = self.layout.latent_shape
        self.eyes = Eyes(config)
        self.network = build(config.network, 1, self.eyes.sizes, (0, 0), vectors, 2 * dim)
        self.register_buffer("start", torch.zeros(vectors, dim))
        self._recorded = Recorded(self._named_distribution, "the head", self._weight)

    def start_at(self, latent: torch.Tensor) -> None:
        """Let the untrained head choose about `latent` (n, d) in [-1, 1] wherever it looks: a warm start."""
        self.start.copy_(latent.clamp(-0.9, 0.9).atanh())

    @torch.no_grad()
    def always(self, latent: torch.Tensor) -> None:
        """Choose `latent` (n, d) in [-1, 1] wherever it looks, to 1e-6, and never learn anything else."""
        for parameter in self.network.parameters():
            parameter.zero_()
        self.network.read.bias.view(-1, 2, latent.shape[1])[:, 1] = _LOG_STD[0]  # for each of n: means, deviations
        self.start.copy_(latent.clamp(-1 + 1e-6, 1 - 1e-6).atanh())

    def read(self, observations: Observations, encoding: Encoding) -> HeadInputs:
        """Take from a checked batch what the head looks at; float32 and uint8 tensors, batched."""
        inputs = {"state": torch.as_tensor(observations[STATE], dtype=torch.float32)}
        if self.config.feature_dim:
            assert encoding.feature is not None
            inputs["feature"] = encoding.feature.float().cpu()
        for name in self.config.cameras:
            inputs[f"image.{name}"] = shrink(observations[IMAGE_PREFIX + name], self.config.image_size)
        return inputs

    def distribution(self, inputs: HeadInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log deviation of the Gaussian before the tanh, each (B, n, d)."""
        out = self.network(self.eyes(inputs), None)[0]
        mean, log_std = out.chunk(2, -1)
        return mean + self.start, log_std.clamp(*_LOG_STD)

    def _named_distribution(self, inputs: HeadInputs) -> dict[str, torch.Tensor]:
        return dict(zip(("mean", "log_std"), self.distribution(inputs), strict=True))

    def _weight(self) -> torch.Tensor:
        return next(self.network.parameters())

    def sample(self, inputs: HeadInputs, source: Source = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Reparametrised latents (B, n, d) in [-1, 1] and their log density (B,), in units of that box."""
        mean, log_std = self.distribution(inputs)
        epsilon = normal(mean.shape, source, mean.device)
        raw = mean + log_std.exp() * epsilon
        gaussian = -0.5 * epsilon.square() - log_std - 0.5 * math.log(2 * math.pi)
        squash = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return raw.tanh(), (gaussian - squash).flatten(1).sum(1)

    @torch.no_grad()
    def latent(self, inputs: HeadInputs, generators: list[torch.Generator] | None) -> torch.Tensor:
        """Latents (B, n, d) in [-1, 1]: the mode, or one sample per row from its own generator.

        Inputs and latents are on the CPU, wherever the head is.
        """
        found = self._recorded({name: value.to(self.start.device) for name, value in inputs.items()})
        mean, log_std = found["mean"], found["log_std"]
        if generators is not None:
            epsilon = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
            mean = mean + log_std.exp() * epsilon.to(mean.device)
        return mean.tanh().cpu()

    @torch.no_grad()
    def noise(
        self, observations: Observations, encoding: Encoding, generators: list[torch.Generator] | None
    ) -> torch.Tensor:
        """The noise for a batch: float32 (B, 1, H, D), |w| <= bound. Deterministic without generators."""
        return self.layout.expand(self.latent(self.read(observations, encoding), generators)).unsqueeze(1)

    def warm_up(self) -> None:
        """Choose once, of zeros, so that the first decision takes no longer than others."""
        seen = ObservationSpec(self.config.state_dim, dict.fromkeys(self.config.cameras), prompt=False).blank()
        feature = torch.zeros(1, self.config.feature_dim)
        self.latent(self.read(seen, Encoding(1, feature, None)), None)

    def calibrate(self, inputs: HeadInputs) -> None:
        """Remember each column's furthest deviation in a sample (N, …): beyond it an observation counts as foreign."""
        z = self.eyes.normalise.here().deviations(inputs)
        furthest = {name: tuple(round(x, 2) for x in values.amax(0).tolist()) for name, values in z.items()}
        self.config = replace(self.config, furthest=furthest)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``head.safetensors`` and ``head_config.json``, each all or nothing. Raises as `disk_errors` does."""
        folder = Path(folder)
        make_folder(folder)
        write_tensors(folder / WEIGHTS, self.state_dict())
        write_text(folder / CONFIG, self.config.to_json())

    @classmethod
    def from_pretrained(cls, source: Path | str, revision: str | None = None, **hub_options: Any) -> SteeringHead:
        """Load a head from a folder, a Hub repository or the shelf (``shipped:<recipe>``); safetensors only, strict.

        Args:
            revision: branch, tag or commit of a Hub repository.
            hub_options: ``token``, ``cache_dir``, ``local_files_only``, ``force_download``, as huggingface_hub has
                them.

        Raises:
            DsrlError: no head there, or not a sound one: a pickle, another dtype, too large, NaN, weights that do
                not fit the config, a file that is not the one in the manifest.
        """
        from .artefact import read_head
        from .hub import fetch

        return read_head(cls, fetch(source, revision, **hub_options), str(source)).eval()

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push head, config and card to the Hub; return the commit's URL. Options are those of `dsrl_vla.hub.push`.

        With ``run=<run directory>`` the card carries the run's evaluation, curve and video.
        """
        from .hub import push

        return push(self, repo_id, **options)


def shrink(images: Any, size: int) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, size, size, 3), by area."""
    pixels = torch.as_tensor(images)
    if pixels.shape[1:3] == (size, size):
        return pixels
    small = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (size, size), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1)
