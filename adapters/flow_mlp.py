"""``flow-mlp:<folder>``: a plain state-conditioned flow-matching policy, for small tasks and fast tests.

It has no image, no prompt and no prefix worth caching, and yet fulfils the same contract: `encode` embeds the
state once, `denoise` runs the sampler from any number of noises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from dsrl_vla.errors import bad
from dsrl_vla.noise import NoiseSpace
from dsrl_vla.observation import STATE, Observations, ObservationSpec
from dsrl_vla.plain import from_plain, read_object
from dsrl_vla.policy import Encoding, FrozenPolicy, PolicySpec
from dsrl_vla.run_dir import write_tensors
from torch import nn

from .refusals import refuse_unsteerable


@dataclass(frozen=True)
class FlowMLPConfig:
    """Sizes of a flow MLP; ``config.json`` beside ``model.safetensors``."""

    state_dim: int
    action_dim: int
    chunk: int = 4
    width: int = 64
    layers: int = 2
    sampler_steps: int = 5
    type: str = "flow_mlp"


class FlowMLPModel(nn.Module):
    """Velocity field v(x_t, t | state); t runs from 1 (noise) to 0 (actions), as in π0."""

    def __init__(self, config: FlowMLPConfig):
        super().__init__()
        self.config = config
        flat = config.chunk * config.action_dim
        self.embed = nn.Sequential(nn.Linear(config.state_dim, config.width), nn.LayerNorm(config.width), nn.SiLU())
        self.enter = nn.Linear(config.width + flat + 1, config.width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(config.width),
                nn.Linear(config.width, 2 * config.width),
                nn.SiLU(),
                nn.Linear(2 * config.width, config.width),
            )
            for _ in range(config.layers)
        )
        self.leave = nn.Linear(config.width, flat)
        for name, size in (("state", config.state_dim), ("action", config.action_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def velocity(self, embedded: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """(N, width), (N, H, A), (N, 1) -> (N, H, A)."""
        hidden = self.enter(torch.cat([embedded, x.flatten(1), t], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden).view_as(x)

    def embed_state(self, state: torch.Tensor) -> torch.Tensor:
        """(B, S) in environment units -> (B, width)."""
        return self.embed((state - self.state_mean) / self.state_std)


class FlowMLP(FrozenPolicy):
    """A frozen flow MLP."""

    def __init__(self, model: FlowMLPModel, uri: str = "flow-mlp:"):
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.spec = PolicySpec(
            uri=uri,
            adapter="flow-mlp",
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
        x, steps = noise.flatten(0, 1), self.spec.sampler_steps
        for step in range(steps):
            t = torch.full((len(x), 1), 1.0 - step / steps)
            x = x - self.model.velocity(embedded, x, t) / steps
        return (x * self.model.action_std + self.model.action_mean).view(batch, count, *x.shape[1:])

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(self.model.config), indent=2) + "\n")
        write_tensors(folder / "model.safetensors", self.model.state_dict())


def load(source: str, *, dtype: str = "float32", device: str = "cpu", uri: str = "") -> FlowMLP:
    """Load a folder written by `FlowMLP.save_pretrained`.

    Raises:
        DsrlError: no such folder, or a dtype or device this little base does not come in.
    """
    from safetensors.torch import load_file

    folder = Path(source).expanduser()
    if not (folder / "config.json").exists():
        raise bad("base 'flow-mlp:'", "a folder with config.json and model.safetensors", f"'{source}' in {Path.cwd()}")
    if dtype != "float32" or device != "cpu":
        raise bad("base", "float32 on the cpu for 'flow-mlp:'", f"{dtype} on {device}")
    raw = read_object(folder / "config.json")
    refuse_unsteerable(source, raw)
    model = FlowMLPModel(from_plain(FlowMLPConfig, raw, "", "key of config.json"))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return FlowMLP(model, uri or f"flow-mlp:{source}")


def clone_flow_mlp(
    episodes: list[tuple[np.ndarray, np.ndarray]],
    config: FlowMLPConfig,
    steps: int = 2000,
    batch: int = 256,
    seed: int = 0,
) -> FlowMLPModel:
    """Behaviour-clone episodes of (states (T, S), actions (T, A)) by flow matching."""
    torch.manual_seed(seed)
    model = FlowMLPModel(config)
    states, chunks = [], []
    for seen, done in episodes:
        ahead = np.minimum(np.arange(len(seen))[:, None] + np.arange(config.chunk), len(seen) - 1)
        states.append(seen)
        chunks.append(done[ahead])
    state, chunk = torch.from_numpy(np.concatenate(states)), torch.from_numpy(np.concatenate(chunks))
    model.state_mean.copy_(state.mean(0)), model.state_std.copy_(state.std(0) + 1e-3)  # type: ignore[operator]
    model.action_mean.copy_(chunk.mean((0, 1))), model.action_std.copy_(chunk.std((0, 1)) + 1e-3)  # type: ignore[operator]
    target = (chunk - model.action_mean) / model.action_std
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(state), (batch,))
        noise, t = torch.randn(batch, config.chunk, config.action_dim), torch.rand(batch, 1)
        x = t[..., None] * noise + (1 - t[..., None]) * target[rows]
        loss = (model.velocity(model.embed_state(state[rows]), x, t) - (noise - target[rows])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model
