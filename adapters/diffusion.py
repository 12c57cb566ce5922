"""``diffusion:<folder>``: a state-conditioned diffusion policy, an MLP sampled by a scheduler of diffusers.

On disk: ``config.json``, ``model.safetensors`` and ``scheduler/scheduler_config.json`` as diffusers writes it. The
bases that ship with the package go by name, such as ``diffusion:hopper``. Sampling is DDIM with eta 0: what decides
the action is the initial noise alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dsrl_vla.errors import NotSteerableError, bad, missing_extra
from dsrl_vla.noise import NoiseSpace
from dsrl_vla.observation import STATE, Observations, ObservationSpec
from dsrl_vla.plain import from_plain, read_object
from dsrl_vla.policy import Encoding, FrozenPolicy, PolicySpec
from dsrl_vla.run_dir import write_tensors
from torch import nn

from .refusals import refuse_unsteerable

_SCHEDULER = "scheduler"
_DDIM_OPTIONS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "clip_sample"),
    *("clip_sample_range", "set_alpha_to_one", "steps_offset", "prediction_type", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "rescale_betas_zero_snr"),
)
_FREQUENCIES = 16


@dataclass(frozen=True)
class DiffusionMLPConfig:
    """Sizes; ``config.json`` beside ``model.safetensors``."""

    state_dim: int
    action_dim: int
    chunk: int = 4
    """Actions of a chunk, all of them executed."""
    width: int = 128
    layers: int = 3
    sampler_steps: int = 5
    type: str = "diffusion_mlp"


class DiffusionMLPModel(nn.Module):
    """Predicts the noise in a noisy chunk. Chunks live in [-1, 1], between the least and the greatest action seen."""

    state_mean: torch.Tensor
    state_std: torch.Tensor
    action_low: torch.Tensor
    action_high: torch.Tensor
    frequencies: torch.Tensor

    def __init__(self, config: DiffusionMLPConfig):
        super().__init__()
        self.config = config
        flat, width = config.chunk * config.action_dim, config.width
        self.embed = nn.Sequential(nn.Linear(config.state_dim, width), nn.LayerNorm(width), nn.SiLU())
        self.time = nn.Linear(2 * _FREQUENCIES, width)
        self.enter = nn.Linear(width + flat, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(config.layers)
        )
        self.leave = nn.Linear(width, flat)
        self.register_buffer("state_mean", torch.zeros(config.state_dim))
        self.register_buffer("state_std", torch.ones(config.state_dim))
        self.register_buffer("action_low", -torch.ones(config.action_dim))
        self.register_buffer("action_high", torch.ones(config.action_dim))
        scale = torch.exp(torch.linspace(0, -math.log(1000), _FREQUENCIES))
        self.register_buffer("frequencies", scale, persistent=False)

    def embed_state(self, state: torch.Tensor) -> torch.Tensor:
        """(B, S) in environment units -> (B, width)."""
        return self.embed(((state - self.state_mean) / self.state_std).clamp(-10, 10))

    def forward(self, embedded: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(N, width), chunks (N, H, A) in [-1, 1] plus noise, timesteps (N,) or () -> (N, H, A)."""
        angles = t.float().reshape(-1, 1) * self.frequencies
        hidden = self.enter(torch.cat([embedded, x.flatten(1)], 1))
        hidden = hidden + self.time(torch.cat([angles.sin(), angles.cos()], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden).view_as(x)

    def to_unit(self, actions: torch.Tensor) -> torch.Tensor:
        """Actions (…, A) in environment units to [-1, 1]."""
        return (actions - self.action_low) / (self.action_high - self.action_low) * 2 - 1

    def to_actions(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `to_unit`."""
        return (x + 1) / 2 * (self.action_high - self.action_low) + self.action_low


class DiffusionMLP(FrozenPolicy):
    """A frozen diffusion MLP.

    Args:
        scheduler: diffusers' ``DDIMScheduler``.
    """

    def __init__(self, model: DiffusionMLPModel, scheduler: Any, uri: str = "diffusion:"):
        self.model, self.scheduler = model.eval().requires_grad_(False), scheduler
        config = model.config
        scheduler.set_timesteps(config.sampler_steps)
        self.spec = PolicySpec(
            uri=uri,
            adapter="diffusion",
            noise=NoiseSpace(config.chunk, config.action_dim),
            observation=ObservationSpec(config.state_dim, prompt=False),
            action_dim=config.action_dim,
            executed_steps=config.chunk,
            sampler_steps=config.sampler_steps,
            feature_dim=config.width,
            dtype="float32",
        )

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        embedded = self.model.embed_state(torch.as_tensor(observations[STATE], dtype=torch.float32))
        return Encoding(batch, embedded, None)

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        batch, count = noise.shape[:2]
        assert encoding.feature is not None
        embedded = encoding.feature.repeat_interleave(count, 0)
        x = noise.flatten(0, 1)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.model(embedded, x, t), t, x, eta=0.0, return_dict=False)[0]
        return self.model.to_actions(x).view(batch, count, *x.shape[1:])

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()

    def processors(self) -> Mapping[str, Any]:
        """What the scheduler samples by; not where that came from, nor what a later diffusers may add."""
        found = {option: self.scheduler.config[option] for option in _DDIM_OPTIONS if option in self.scheduler.config}
        return {"scheduler": found | {"_class_name": "DDIMScheduler"}}

    def save_pretrained(self, folder: Path | str) -> None:
        """Write config, weights and scheduler."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.model.config), indent=2) + "\n")
        write_tensors(folder / "model.safetensors", self.model.state_dict())
        self.scheduler.save_pretrained(folder / _SCHEDULER)


def ddim(**options: Any) -> Any:
    """Diffusers' DDIM scheduler as these policies are trained with: 100 steps, cosine, x0 kept to [-1, 1].

    Raises:
        MissingExtraError: diffusers is not installed.
    """
    return _ddim_scheduler()(**{"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"} | options)


def _ddim_scheduler() -> Any:
    try:
        from diffusers import DDIMScheduler
    except ImportError as error:
        raise missing_extra("diffusers", "diffusion", "the adapter 'diffusion:'") from error
    return DDIMScheduler


def shipped_bases() -> dict[str, Path]:
    """The bases that ship with the package, by name."""
    shelf = Path(str(resources.files("dsrl_vla.data").joinpath("bases")))
    return {path.parent.name: path.parent for path in sorted(shelf.glob("*/config.json"))}


def load(source: str, *, dtype: str = "float32", device: str = "cpu", uri: str = "") -> DiffusionMLP:
    """Load a folder written by `DiffusionMLP.save_pretrained`, or a shipped base by name.

    Raises:
        DsrlError: no such folder, or a dtype or device this little base does not come in.
        NotSteerableError: its scheduler draws more noise on the way. MissingExtraError: diffusers is not installed.
    """
    from safetensors.torch import load_file

    shipped = shipped_bases()
    folder = shipped.get(source, Path(source).expanduser())
    if not (folder / "config.json").exists():
        known = ", ".join(shipped)
        raise bad("base 'diffusion:'", f"a folder with a config.json, or one of {known}", f"'{source}'")
    if dtype != "float32" or device != "cpu":
        raise bad("base", "float32 on the cpu for 'diffusion:'", f"{dtype} on {device}")
    raw = read_object(folder / "config.json")
    refuse_unsteerable(source, raw)
    scheduler = _load_scheduler(source, folder / _SCHEDULER / "scheduler_config.json")
    model = DiffusionMLPModel(from_plain(DiffusionMLPConfig, raw, "", "key of config.json"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return DiffusionMLP(model, scheduler, uri or f"diffusion:{source}")


def _load_scheduler(source: str, path: Path) -> Any:
    """The scheduler whose config lies at `path`, unless it is not DDIM."""
    if not path.exists():
        raise bad(f"base 'diffusion:{source}'", "a scheduler/scheduler_config.json, as diffusers writes it", "none")
    raw = read_object(path)
    kind = str(raw.get("_class_name", ""))
    refuse_unsteerable(source, {"scheduler": kind})
    if kind != "DDIMScheduler":
        raise NotSteerableError(
            f"{source}: expected a DDIMScheduler, whose initial noise decides the action, got '{kind}'. A model "
            "trained on the same noise schedule can be sampled with it: put its name in the file, and measure it."
        )
    return _ddim_scheduler().from_config(raw)


def clone_diffusion(
    episodes: Sequence[tuple[np.ndarray, np.ndarray]],
    config: DiffusionMLPConfig,
    steps: int = 20_000,
    batch: int = 256,
    seed: int = 0,
) -> DiffusionMLP:
    """Behaviour-clone episodes of (states (T, S), actions (T, A)) by predicting the noise added to their chunks.

    Chunks that reach beyond the end of an episode are left out.
    """
    torch.manual_seed(seed)
    model, scheduler = DiffusionMLPModel(config), ddim()
    state, chunk = _windows(episodes, config.chunk)
    model.state_mean.copy_(state.mean(0)), model.state_std.copy_(state.std(0) + 1e-3)
    model.action_low.copy_(chunk.amin((0, 1))), model.action_high.copy_(chunk.amax((0, 1)))
    target = model.to_unit(chunk)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(state), (batch,))
        noise, t = torch.randn(batch, config.chunk, config.action_dim), torch.randint(100, (batch,))
        noisy = scheduler.add_noise(target[rows], noise, t)
        loss = (model(model.embed_state(state[rows]), noisy, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return DiffusionMLP(model, scheduler)


def _windows(episodes: Sequence[tuple[np.ndarray, np.ndarray]], chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States (N, S) and the chunks (N, H, A) that follow them."""
    states, chunks = [], []
    for seen, done in episodes:
        starts = np.arange(len(seen) - chunk + 1)
        states.append(seen[starts])
        chunks.append(done[starts[:, None] + np.arange(chunk)])
    return torch.from_numpy(np.concatenate(states)), torch.from_numpy(np.concatenate(chunks))
