"""``dppo:<checkpoint.pt or folder>?suite=robomimic``: a Robomimic or Gym base by DPPO (irom-princeton/dppo).

These are the paper's own bases: a diffusion MLP (`DiffusionModel` with `DiffusionMLP`), saved by torch as
``{"epoch", "model", "ema"}``, and ``normalization.npz`` beside it or in the folder above, with `obs_min`, `obs_max`,
`action_min` and `action_max`. Of a folder, the ``state_<n>.pt`` of greatest n is taken, there or in ``checkpoint/``.
Read with ``weights_only=True``: nothing in the file is executed. Sampling is DDIM with eta 0.

Sizes follow from the weights. What a checkpoint does not tell, the suite does, and each can be overridden:

=====================  =============  =========  =======================================================
option                 robomimic      gym
=====================  =============  =========  =======================================================
``activation``         Mish           ReLU       also ELU, GELU, Tanh
``ddim_steps``         8              5          DSRL's configurations; 100 for Transport
``denoising_steps``    20             20         of the pretraining; 100 for Square and Transport
=====================  =============  =========  =======================================================

``weights`` is ``model`` (what DSRL runs; the default) or ``ema`` (what DPPO fine-tunes). ``normalization`` is a path.
Layout by reading DPPO and ajwagen/dsrl; no checkpoint of theirs has been run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import torch
from dsrl_vla.errors import bad, first_line
from dsrl_vla.noise import NoiseSpace
from dsrl_vla.observation import STATE, Observations, ObservationSpec
from dsrl_vla.plain import from_plain
from dsrl_vla.policy import Encoding, FrozenPolicy, PolicySpec
from torch.nn import functional as F

_ACTIVATIONS = {"Mish": F.mish, "ReLU": F.relu, "ELU": F.elu, "GELU": F.gelu, "Tanh": torch.tanh}
_SUITES = {"robomimic": {"activation": "Mish", "ddim_steps": 8}, "gym": {"activation": "ReLU", "ddim_steps": 5}}
_LIMITS = ("obs_min", "obs_max", "action_min", "action_max")
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DPPOConfig:
    """What a checkpoint does not tell."""

    activation: str
    ddim_steps: int
    denoising_steps: int = 20
    weights: Literal["model", "ema"] = "model"
    normalization: str = ""

    def __post_init__(self) -> None:
        if self.activation not in _ACTIVATIONS:
            raise bad("dppo activation", ", ".join(_ACTIVATIONS), self.activation)
        if not 1 <= self.ddim_steps <= self.denoising_steps:
            raise bad("dppo ddim_steps", f"1 to denoising_steps ({self.denoising_steps})", self.ddim_steps)

    @classmethod
    def parse(cls, query: str) -> DPPOConfig:
        """From ``suite=gym&ddim_steps=5``; raises what `from_plain` raises."""
        raw: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
        suite = raw.pop("suite", "")
        if suite not in _SUITES:
            fix = "The activation is not in the file, and the wrong one makes nonsense of the weights."
            raise bad("base 'dppo:'", "'?suite=robomimic' or '?suite=gym' behind the path", f"suite '{suite}'", fix)
        raw |= {key: int(raw[key]) for key in ("ddim_steps", "denoising_steps") if raw.get(key, "").isdecimal()}
        return from_plain(cls, _SUITES[suite] | raw, "dppo option")


class DPPONetwork:
    """`DiffusionMLP` on the weights of a checkpoint: predicts the noise in a noisy chunk.

    Args:
        weights: without the prefix ``network.``; every one must be used.

    Raises:
        DsrlError: weights are missing or left over, or sizes do not fit a state and actions of these widths.
    """

    def __init__(self, weights: Weights, activation: str, state_dim: int, action_dim: int, where: str):
        self.weights, self.act = weights, _ACTIVATIONS[activation]
        self.residual = "mlp_mean.layers.0.weight" in weights
        self.trunk = self._numbered("mlp_mean.layers" if self.residual else "mlp_mean.moduleList")
        self.condition = self._numbered("cond_mlp.moduleList")
        expected = self._expected()
        wrong = sorted(expected ^ set(weights))
        if wrong or len(self.trunk) < 2:
            raise bad(where, "the weights of a DiffusionMLP", f"one that differs in {', '.join(wrong[:4]) or 'depth'}")
        self.time_dim = weights["time_embedding.3.weight"].shape[0]
        first, last = (self._linear_name(self.trunk[i], i) for i in (0, -1))
        flat = weights[f"{last}.weight"].shape[0]
        told = weights[f"{self.condition[-1]}.linear_1.weight"].shape[0] if self.condition else state_dim
        entering = weights[f"{self.condition[0]}.linear_1.weight"].shape[1] if self.condition else (
            weights[f"{first}.weight"].shape[1] - self.time_dim - flat
        )  # fmt: skip
        if entering != state_dim:
            raise bad(where, f"one observation of width {state_dim} (normalization.npz, cond_steps 1)", entering)
        if flat % action_dim or weights[f"{first}.weight"].shape[1] != self.time_dim + flat + told:
            raise bad(where, f"chunks of actions of width {action_dim} (normalization.npz)", f"{flat} outputs")
        self.horizon, self.feature_dim = flat // action_dim, told

    def _numbered(self, prefix: str) -> list[str]:
        """Names of the numbered parts that hold weights, in order."""
        depth = prefix.count(".") + 1
        found = {key.split(".")[depth] for key in self.weights if key.startswith(prefix + ".")}
        return [f"{prefix}.{number}" for number in sorted((n for n in found if n.isdigit()), key=int)]

    def _linear_name(self, part: str, index: int) -> str:
        return part if self.residual else f"{part}.linear_1"

    def _expected(self) -> set[str]:
        parts = ["time_embedding.1", "time_embedding.3"] + [f"{part}.linear_1" for part in self.condition]
        if self.residual:
            names = ("l1", "l2") + (("norm1", "norm2") if any(".norm1." in key for key in self.weights) else ())
            parts += self.trunk[:1] + self.trunk[-1:] + [f"{p}.{n}" for p in self.trunk[1:-1] for n in names]
        else:
            parts += [f"{part}.linear_1" for part in self.trunk]
            if any(".norm_1." in key for key in self.weights):
                parts += [f"{part}.norm_1" for part in self.trunk[:-1]]
        return {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
        if f"{name}.weight" not in self.weights:
            return x
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def _plain(self, x: torch.Tensor, parts: list[str]) -> torch.Tensor:
        for part in parts[:-1]:
            x = self.act(self._norm(self._linear(x, f"{part}.linear_1"), f"{part}.norm_1", 1e-5))
        return self._linear(x, f"{parts[-1]}.linear_1")

    def embed(self, state: torch.Tensor) -> torch.Tensor:
        """Normalised states (B, S) -> (B, feature_dim)."""
        return self._plain(state, self.condition) if self.condition else state

    def __call__(self, x: torch.Tensor, t: int, embedded: torch.Tensor) -> torch.Tensor:
        """Noisy chunks (N, H * A), the timestep, (N, feature_dim) -> noise (N, H * A)."""
        half = self.time_dim // 2
        angles = t * torch.exp(torch.arange(half, device=x.device) * (-math.log(10000) / (half - 1)))
        time = torch.cat([angles.sin(), angles.cos()])
        time = self._linear(F.mish(self._linear(time, "time_embedding.1")), "time_embedding.3")
        hidden = torch.cat([x, time.expand(len(x), -1), embedded], 1)
        if not self.residual:
            return self._plain(hidden, self.trunk)
        hidden = self._linear(hidden, self.trunk[0])
        for block in self.trunk[1:-1]:
            inner = self._linear(self.act(self._norm(hidden, f"{block}.norm1", 1e-6)), f"{block}.l1")
            hidden = hidden + self._linear(self.act(self._norm(inner, f"{block}.norm2", 1e-6)), f"{block}.l2")
        return self._linear(hidden, self.trunk[-1])


def cosine_alphas(steps: int) -> torch.Tensor:
    """Cumulative alphas, float32 (steps,), of DPPO's cosine schedule: a grid of steps + 1 points up to steps + 1."""
    grid = np.linspace(0, steps + 1, steps + 1) / (steps + 1)
    kept = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.clip(1 - kept[1:] / kept[:-1], 0, 0.999)
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), 0)


class DPPO(FrozenPolicy):
    """A frozen base of DPPO's.

    Args:
        limits: `obs_min`, `obs_max` (S,), `action_min`, `action_max` (A,), float32.
    """

    def __init__(self, network: DPPONetwork, limits: Weights, config: DPPOConfig, uri: str = "dppo:"):
        self.network, self.limits, self.config = network, limits, config
        self.action_dim = len(limits["action_min"])
        self.alphas = cosine_alphas(config.denoising_steps)
        self.spec = PolicySpec(
            uri=uri,
            adapter="dppo",
            noise=NoiseSpace(network.horizon, self.action_dim),
            observation=ObservationSpec(len(limits["obs_min"]), prompt=False),
            action_dim=self.action_dim,
            executed_steps=network.horizon,
            sampler_steps=config.ddim_steps,
            feature_dim=network.feature_dim,
            dtype="float32",
        )

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        state = torch.as_tensor(observations[STATE], dtype=torch.float32)
        low, high = self.limits["obs_min"], self.limits["obs_max"]
        return Encoding(batch, self.network.embed(2 * ((state - low) / (high - low + 1e-6) - 0.5)), None)

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        assert encoding.feature is not None
        embedded = encoding.feature.repeat_interleave(noise.shape[1], 0)
        x, stride = noise.flatten(0, 1).flatten(1), self.config.denoising_steps // self.config.ddim_steps
        for step in reversed(range(self.config.ddim_steps)):
            t = step * stride
            alpha = self.alphas[t]
            before = self.alphas[t - stride] if step else torch.tensor(1.0)
            guess = (x - (1 - alpha).sqrt() * self.network(x, t, embedded)) / alpha.sqrt()
            clean = guess.clamp(-1, 1)
            left = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            x = before.sqrt() * clean + (1 - before).sqrt() * left
        low, high = self.limits["action_min"], self.limits["action_max"]
        return (x.view(noise.shape) + 1) / 2 * (high - low) + low

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self.network.weights

    def processors(self) -> Mapping[str, Any]:
        known = {key: value for key, value in asdict(self.config).items() if key != "normalization"}
        return {"sampler": known, "normalization": {key: value.tolist() for key, value in self.limits.items()}}


def load(source: str, *, dtype: str = "float32", device: str = "cpu", uri: str = "") -> DPPO:
    """Load a checkpoint; see the head of this file.

    Raises:
        DsrlError: no such file, one that is not such a checkpoint, or options that do not fit.
    """
    path, _mark, query = source.partition("?")
    config = DPPOConfig.parse(query)
    if dtype != "float32" or device != "cpu":
        raise bad("base", "float32 on the cpu for 'dppo:'", f"{dtype} on {device}")
    checkpoint = _find_checkpoint(Path(path).expanduser())
    limits = _read_limits(_find_limits(checkpoint, config))
    widths = len(limits["obs_min"]), len(limits["action_min"])
    network = DPPONetwork(_read_weights(checkpoint, config.weights), config.activation, *widths, str(checkpoint))
    return DPPO(network, limits, config, uri or f"dppo:{source}")


def _find_checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    numbered = [p for f in (path, path / "checkpoint") for p in f.glob("state_*.pt") if p.stem[6:].isdigit()]
    if not numbered:
        raise bad("base 'dppo:'", "a checkpoint, or a folder with state_<n>.pt", f"'{path}'")
    return max(numbered, key=lambda p: int(p.stem[6:]))


def _find_limits(checkpoint: Path, config: DPPOConfig) -> Path:
    named = [Path(config.normalization).expanduser()] if config.normalization else []
    places = named or [folder / "normalization.npz" for folder in (checkpoint.parent, checkpoint.parent.parent)]
    for place in places:
        if place.is_file():
            return place
    fix = "Copy it there, or add '&normalization=<path>'. DPPO keeps it with the data, not with the checkpoint."
    raise bad("base 'dppo:'", f"a file {places[0]}", "none", fix)


def _read_limits(path: Path) -> Weights:
    try:
        with np.load(path, allow_pickle=False) as archive:
            limits = {key: torch.tensor(archive[key], dtype=torch.float32) for key in _LIMITS}
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise bad(str(path), f"an npz file with {', '.join(_LIMITS)}", f"an error ({error})") from error
    for name in ("obs", "action"):
        low, high = limits[f"{name}_min"], limits[f"{name}_max"]
        if low.ndim != 1 or low.shape != high.shape or not bool((low <= high).all() & (high - low).isfinite().all()):
            raise bad(f"{path}: {name}_min, {name}_max", "finite vectors, min no more than max", tuple(low.shape))
    return limits


def _read_weights(path: Path, which: str) -> Weights:
    """The network's weights, without their prefix."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a strange file makes torch raise errors of many kinds
        got = f"one that is not ({first_line(error)})"
        raise bad(str(path), "a torch checkpoint of tensors alone", got) from error
    if not isinstance(saved, dict) or not isinstance(saved.get(which), dict):
        keys = ", ".join(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise bad(str(path), f"a DPPO checkpoint, with 'epoch', 'model' and 'ema' ('{which}' is read)", keys)
    prefix = "network."
    found = {str(k)[len(prefix) :]: v for k, v in saved[which].items() if str(k).startswith(prefix)}
    if not found or not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in found.values()):
        some = ", ".join(sorted(map(str, saved[which]))[:3]) or "nothing"
        fix = "Fine-tuned checkpoints ('actor.', 'actor_ft.') are another layout."
        raise bad(f"{path}: {which}", "tensors named 'network.…', as pretraining saves them", some, fix)
    return {key: value.detach().float() for key, value in found.items()}
