"""The steering head: a small actor that looks at what the robot sees and picks the sampler's noise.

Tokens: the frozen VLM's pooled feature, the robot state, optionally small camera images, and one query token
per noise vector of the layout. Output: a tanh-Gaussian over the latent u in [-1, 1]^(n, d), which the layout
expands to the base's noise. Always float32, whatever the base's dtype: in bf16 such a head stops learning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .errors import DsrlError, bad
from .networks import ImageTokens, NetworkConfig, build
from .noise import NoiseLayout, NoiseSpace
from .observation import IMAGE_PREFIX, STATE, Observations
from .policy import Encoding, PolicySpec

WEIGHTS, CONFIG = "head.safetensors", "head_config.json"
_LOG_STD = (-5.0, 2.0)

HeadInputs = dict[str, torch.Tensor]
"""What head and critic look at: "state" (B, S) and "feature" (B, F) float32, "image.<camera>" uint8 (B, s, s, 3)."""


@dataclass(frozen=True)
class HeadConfig:
    """Everything needed to build a head again and to know which base it belongs to."""

    layout: NoiseLayout
    state_dim: int
    feature_dim: int
    executed_steps: int
    adapter: str
    base_model_name_or_path: str
    revision: str = ""
    cameras: tuple[str, ...] = ()
    """Cameras the head itself looks at; usually none, for the feature already holds them."""
    image_size: int = 32
    network: NetworkConfig = field(default_factory=NetworkConfig)
    dsrl_vla_version: str = ""

    @classmethod
    def for_base(cls, spec: PolicySpec, layout: NoiseLayout, network: NetworkConfig, **more: Any) -> HeadConfig:
        """The config of a new head for a base."""
        from . import __version__

        return cls(
            layout=layout,
            state_dim=spec.observation.state_dim,
            feature_dim=spec.feature_dim,
            executed_steps=spec.executed_steps,
            adapter=spec.adapter,
            base_model_name_or_path=spec.repo_id or spec.uri,
            revision=spec.revision,
            network=network,
            dsrl_vla_version=__version__,
            **more,
        )

    @property
    def base_uri(self) -> str:
        """The base's URI, as `load_base` takes it."""
        name = self.base_model_name_or_path
        if ":" in name:  # a URI already
            return name
        return f"{self.adapter}:{name}" + (f"@{self.revision}" if self.revision else "")

    def to_json(self) -> str:
        """As ``head_config.json``."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> HeadConfig:
        """Read ``head_config.json``.

        Raises:
            DsrlError: a key is missing or unknown.
        """
        try:
            raw = json.loads(text)
            layout, network = raw.pop("layout"), raw.pop("network")
            space = layout.pop("space")
            space["live"] = tuple(space["live"])
            raw["cameras"] = tuple(raw["cameras"])
            return cls(
                layout=NoiseLayout(space=NoiseSpace(**space), **layout), network=NetworkConfig(**network), **raw
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise bad(CONFIG, "the keys of this version's HeadConfig", f"{error}") from error


class Normaliser(nn.Module):
    """Mean and deviation of state and feature, fitted once on warm-up data; travels with the head."""

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
            std = values.std(0)
            floor = 1e-3 * values.abs().mean().clamp(min=1e-3)
            getattr(self, f"{name}_mean").copy_(values.mean(0))
            getattr(self, f"{name}_std").copy_(torch.where(std < floor, torch.ones_like(std), std))

    def forward(self, inputs: HeadInputs) -> list[torch.Tensor]:
        """Normalised vectors, clipped at five deviations; the feature scaled to unit norm in expectation.

        A frozen feature has hundreds of directions, most of them irrelevant to the task at hand. At unit
        variance each they drown a state of twenty numbers and slow learning down several times.
        """
        vectors = []
        for name in self.names:
            mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
            scale = inputs[name].shape[-1] ** -0.5 if name == "feature" else 1.0
            vectors.append(((inputs[name] - mean) / std).clamp(-5, 5) * scale)
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

    def start_at(self, latent: torch.Tensor) -> None:
        """Let the untrained head choose about `latent` (n, d) in [-1, 1] wherever it looks: a warm start."""
        self.start.copy_(latent.clamp(-0.9, 0.9).atanh())

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
        out = self.network([x.unsqueeze(0) for x in self.eyes(inputs)], None)[0]
        mean, log_std = out.chunk(2, -1)
        return mean + self.start, log_std.clamp(*_LOG_STD)

    def sample(
        self, inputs: HeadInputs, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reparametrised latents (B, n, d) in [-1, 1] and their log density (B,), in units of that box."""
        mean, log_std = self.distribution(inputs)
        epsilon = torch.randn(mean.shape, generator=generator, device=mean.device)
        raw = mean + log_std.exp() * epsilon
        gaussian = -0.5 * epsilon.square() - log_std - 0.5 * math.log(2 * math.pi)
        squash = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return raw.tanh(), (gaussian - squash).flatten(1).sum(1)

    def latent(self, inputs: HeadInputs, generators: list[torch.Generator] | None) -> torch.Tensor:
        """Latents (B, n, d) in [-1, 1]: the mode, or one sample per row from its own generator."""
        mean, log_std = self.distribution(inputs)
        if generators is not None:
            epsilon = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
            mean = mean + log_std.exp() * epsilon.to(mean.device)
        return mean.tanh()

    @torch.no_grad()
    def noise(
        self, observations: Observations, encoding: Encoding, generators: list[torch.Generator] | None
    ) -> torch.Tensor:
        """The noise for a batch: float32 (B, 1, H, D), |w| <= bound. Deterministic without generators."""
        return self.layout.expand(self.latent(self.read(observations, encoding), generators)).unsqueeze(1)

    def check_base(self, spec: PolicySpec) -> None:
        """Refuse a base this head was not trained for.

        Raises:
            DsrlError: names what differs.
        """
        wanted = {
            "noise shape": (self.layout.space.shape, spec.noise.shape),
            "noise prior": (self.layout.space.prior, spec.noise.prior),
            "live noise columns": (self.layout.space.live, spec.noise.live),
            "feature width": (self.config.feature_dim, spec.feature_dim),
            "state width": (self.config.state_dim, spec.observation.state_dim),
            "executed steps": (self.config.executed_steps, spec.executed_steps),
        }
        for name, (mine, theirs) in wanted.items():
            if mine != theirs:
                raise bad(
                    f"head for '{self.config.base_model_name_or_path}', {name}", f"{mine}", f"{theirs} of '{spec.uri}'"
                )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``head.safetensors`` and ``head_config.json``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(self.config.to_json())

    @classmethod
    def from_pretrained(cls, source: Path | str, revision: str | None = None) -> SteeringHead:
        """Load a head from a folder or a Hub repository; strict, safetensors only.

        Raises:
            DsrlError: no head there, or its weights do not fit its config.
        """
        from safetensors.torch import load_file

        folder = Path(source)
        if not folder.is_dir():
            folder = _download(str(source), revision)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).exists():
                raise bad(f"head '{source}'", f"a file {name}", "none in that folder")
        head = cls(HeadConfig.from_json((folder / CONFIG).read_text()))
        try:
            head.load_state_dict(load_file(folder / WEIGHTS), strict=True)
        except RuntimeError as error:
            raise bad(
                f"{source}/{WEIGHTS}", f"the weights that {CONFIG} describes", " ".join(str(error).split())
            ) from error
        return head.eval()


def shrink(images: Any, size: int) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, size, size, 3), by area."""
    pixels = torch.as_tensor(images)
    if pixels.shape[1:3] == (size, size):
        return pixels
    small = F.interpolate(pixels.permute(0, 3, 1, 2).float(), (size, size), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[WEIGHTS, CONFIG]))
    except Exception as error:
        raise DsrlError(f"head '{repo_id}': expected a folder or a Hub repository, got {error}") from error
