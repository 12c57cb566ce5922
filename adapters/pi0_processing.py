"""Observations to π0's inputs and π0's outputs to actions, as `PI0Processor` does it, from its own files.

`transformers.PI0Processor` needs torchvision and fixes 256 image tokens; this reads the same
``processor_config.json`` and tokenizer, works at any image size, and stays on tensors.
Reference: transformers/models/pi0, processing_pi0.py and image_processing_pi0.py (prompt, normalisation, padding).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from dsrl_vla.errors import bad, unknown
from dsrl_vla.observation import IMAGE_PREFIX, PROMPT, STATE, Observations
from dsrl_vla.plain import read_object

FILE = "processor_config.json"
IMAGE = "<image>"
_PROMPTS = 64  # whose tokens are kept: a server's clients may send any number


@dataclass(frozen=True)
class Pi0Statistics:
    """What turns environment units into the model's and back; `PI0Processor`'s own keys."""

    cameras: tuple[str, ...]
    """Camera names, in the order the model was trained with."""
    image_size: int
    image_seq_length: int
    """Image tokens per camera."""
    state_mean: tuple[float, ...]
    state_std: tuple[float, ...]
    actions_mean: tuple[float, ...]
    actions_std: tuple[float, ...]
    max_length: int = 48
    """Prompt tokens, image tokens not counted."""
    image_mean: float = 0.5
    image_std: float = 0.5
    executed_steps: int | None = None
    """Steps of a chunk to execute before the next decision; None: all."""
    padding: Literal["corner", "center"] = "corner"
    """Where a picture that is not square lies: in the upper left of mid-grey, as `PI0Processor` has it; or in the
    middle of black, as openpi has it."""

    def __post_init__(self) -> None:
        if self.padding not in ("corner", "center"):
            raise bad("statistics.padding", "corner or center", f"'{self.padding}'")
        for what in ("state", "actions"):
            mean, std = (len(getattr(self, f"{what}_{which}")) for which in ("mean", "std"))
            if mean != std:
                raise bad(f"statistics.{what}_std", f"{mean} numbers, as in {what}_mean", std)

    def facts(self) -> dict[str, Any]:
        """What tells one processing from another, by name. Padding came later: heads know nothing of the usual one."""
        found = asdict(self)
        return found if self.padding == "center" else {k: v for k, v in found.items() if k != "padding"}

    def save(self, folder: Path) -> None:
        """Write ``processor_config.json``."""
        own = asdict(self)
        image = {key: own.pop(key) for key in ("image_size", "image_mean", "image_std", "image_seq_length")}
        own |= {"processor_class": "PI0Processor", "image_processor": image}
        (folder / FILE).write_text(json.dumps(own, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, overrides: dict[str, Any] | None = None) -> Pi0Statistics:
        """Read ``processor_config.json``; refuse one that lacks what is needed, and `overrides` of anything else."""
        path, fields = folder / FILE, cls.__dataclass_fields__
        for key in overrides or {}:
            if key not in fields:
                raise unknown("key of `statistics`", key, fields)
        raw: dict[str, Any] = read_object(path) if path.exists() else {}
        image = raw.pop("image_processor", {})
        size = image.pop("size", None)
        if isinstance(size, dict):
            image.setdefault("image_size", size.get("max_height") or size.get("height"))
        raw |= image | (overrides or {})
        for key in ("image_mean", "image_std"):
            if isinstance(raw.get(key), list):
                if len(set(raw[key])) != 1:
                    raise bad(f"{path}: {key}", "the same number for every channel", raw[key])
                raw[key] = raw[key][0]
        known = {key: value for key, value in raw.items() if key in fields and value is not None}
        required = (
            "cameras",
            "image_size",
            "image_seq_length",
            "state_mean",
            "state_std",
            "actions_mean",
            "actions_std",
        )
        missing = [key for key in required if key not in known]
        if missing:
            raise bad(
                f"{path}",
                "cameras, image size and the normalisation statistics the checkpoint was trained with",
                f"no {', '.join(missing)}",
                "Add them to the file, or pass them as `statistics={...}` when loading.",
            )
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})


class Pi0Processing:
    """Batches of observations in, model inputs out; normalised chunks in, environment actions out."""

    def __init__(self, statistics: Pi0Statistics, tokenizer: Any, max_state_dim: int):
        if len(statistics.state_mean) > max_state_dim:
            most = f"at most the model's {max_state_dim} numbers"
            raise bad("statistics.state_mean", most, len(statistics.state_mean))
        self.statistics, self.tokenizer, self.max_state_dim = statistics, tokenizer, max_state_dim
        self._prompts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self, observations: Observations, device: torch.device, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Return the keyword arguments of ``PI0ForConditionalGeneration.sample_actions`` (noise excepted)."""
        images = [self._image(observations[IMAGE_PREFIX + name], device) for name in self.statistics.cameras]
        ids, mask = zip(*(self._tokens(prompt) for prompt in observations[PROMPT]), strict=True)
        pixels = torch.stack(images, 1).to(dtype)
        return {
            "input_ids": torch.stack(ids).to(device),
            "attention_mask": torch.stack(mask).to(device),
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.bool, device=device),
            "state": self.state(torch.as_tensor(observations[STATE], dtype=torch.float32, device=device)).to(dtype),
        }

    def _image(self, image: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, S, S), resized with its aspect kept and padded."""
        stats, size = self.statistics, self.statistics.image_size
        pixels = torch.as_tensor(image, device=device).permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[-2:]
        if (height, width) != (size, size):
            scale = size / max(height, width)
            height, width = max(1, int(height * scale)), max(1, int(width * scale))
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
            pixels = pixels.clamp(0, 1)
        pixels = (pixels - stats.image_mean) / stats.image_std
        if stats.padding == "corner":
            return F.pad(pixels, (0, size - width, 0, size - height))
        left, top = (size - width) // 2, (size - height) // 2
        edges = (left, size - width - left, top, size - height - top)
        return F.pad(pixels, edges, value=-stats.image_mean / stats.image_std)

    def _tokens(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        if prompt not in self._prompts:
            count = self.statistics.image_seq_length * len(self.statistics.cameras)
            if IMAGE in prompt:
                raise bad(PROMPT, f"words without '{IMAGE}', which stands for a part of an image", f"'{prompt}'"[:80])
            text = f"{IMAGE * count}{self.tokenizer.bos_token}{prompt}\n"
            tokens = self.tokenizer(
                text,
                padding="max_length",
                padding_side="right",
                max_length=count + self.statistics.max_length,
                return_tensors="pt",
            )
            if tokens["input_ids"].shape[1] > count + self.statistics.max_length:
                raise bad(
                    PROMPT, f"at most {self.statistics.max_length} tokens", f"{tokens['input_ids'].shape[1] - count}"
                )
            if (tokens["input_ids"][0, :count] != self.tokenizer.convert_tokens_to_ids(IMAGE)).any():
                raise bad("tokenizer", f"{count} tokens '{IMAGE}' before the prompt", "others among them")
            while len(self._prompts) >= _PROMPTS:
                self._prompts.pop(next(iter(self._prompts)))
            self._prompts[prompt] = tokens["input_ids"][0], tokens["attention_mask"][0]
        return self._prompts[prompt]

    def state(self, state: torch.Tensor) -> torch.Tensor:
        """(B, S) in environment units -> (B, max_state_dim) normalised and zero-padded."""
        mean, std = self.statistics.state_mean, self.statistics.state_std
        state = (state - state.new_tensor(mean)) / (state.new_tensor(std) + 1e-8)
        return F.pad(state, (0, self.max_state_dim - state.shape[-1]))

    def actions(self, chunk: torch.Tensor) -> torch.Tensor:
        """(…, D) normalised and padded -> (…, A) float32 in environment units."""
        mean, std = self.statistics.actions_mean, self.statistics.actions_std
        chunk = chunk[..., : len(mean)].float()
        return chunk * (chunk.new_tensor(std) + 1e-8) + chunk.new_tensor(mean)

    def normalise_actions(self, actions: torch.Tensor, width: int) -> torch.Tensor:
        """The inverse of `actions`, zero-padded to `width` columns: what a clone is trained on."""
        mean, std = self.statistics.actions_mean, self.statistics.actions_std
        normal = (actions - actions.new_tensor(mean)) / (actions.new_tensor(std) + 1e-8)
        return F.pad(normal, (0, width - normal.shape[-1]))
