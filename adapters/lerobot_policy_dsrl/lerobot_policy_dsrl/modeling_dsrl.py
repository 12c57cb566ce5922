"""A steered policy with the interface of LeRobot's policies.

Its folder holds the head (``head.safetensors``, ``head_config.json``), LeRobot's ``config.json`` and the processors.
The base is loaded by its URI, keeps its own processors, and is no part of this module's state.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from dsrl_vla import SteeringHead
from dsrl_vla.adapters.lerobot.policy import camera_of
from dsrl_vla.bases import check_named
from dsrl_vla.errors import DsrlError, bad
from dsrl_vla.hub import fetch
from dsrl_vla.noise import generators
from dsrl_vla.observation import IMAGE_PREFIX, PROMPT, STATE, Observations
from dsrl_vla.policy import FrozenPolicy
from dsrl_vla.recipe import BaseConfig
from dsrl_vla.sources import NoiseSource, PriorNoise, SteeredNoise
from dsrl_vla.steered_policy import SteeredPolicy
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from .configuration_dsrl import DsrlConfig

FILES = ["config.json", "policy_*.json", "policy_*.safetensors"]
"""Beside the head's."""
_HUB = ("token", "cache_dir", "local_files_only", "force_download")


class DsrlPolicy(PreTrainedPolicy):
    """A base and a head; what it returns is in environment units.

    Args:
        base, head: by default those that the config names; the head has to come from `from_pretrained`.

    Raises:
        DsrlError: the head is not for this base; no head.
    """

    config_class = DsrlConfig
    name = "dsrl"

    def __init__(
        self, config: DsrlConfig, *, head: SteeringHead | None = None, base: FrozenPolicy | None = None, **_: Any
    ):
        super().__init__(config)
        if head is None:
            raise bad("policy 'dsrl'", "a saved one (--policy.path=DIR, from `dsrl-vla export-policy`)", "a new one")
        self.head, base = head, base or self._load()
        self._steer(base)
        if config.n_action_steps != base.spec.executed_steps:
            raise bad("policy.n_action_steps", f"{base.spec.executed_steps}, as in training", config.n_action_steps)
        unseen = set(head.config.cameras) - set(map(camera_of, config.image_features))
        if unseen:
            raise bad("policy.input_features", f"the head's cameras {', '.join(head.config.cameras)}", "fewer",
                      "Export it again: dsrl-vla export-policy")  # fmt: skip
        self._episodes = 0
        self.reset()

    def _load(self) -> FrozenPolicy:
        config = self.config
        return BaseConfig(config.base, config.base_dtype, config.device or "cpu", config.base_options).load()

    def _steer(self, base: FrozenPolicy) -> None:
        """Put the head on this base."""
        policy, config = SteeredPolicy(base, self.head), self.config
        self.__dict__["base"] = base  # no submodule: neither saved nor moved with the head
        self.source: NoiseSource = PriorNoise(base.spec.noise)
        if config.steer:
            self.source = SteeredNoise(policy, deterministic=not config.stochastic)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> DsrlPolicy:
        """Load from a folder or a Hub repository, with the options that LeRobot's policies take.

        Raises:
            DsrlError: no steered policy there.
        """
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            name, options = str(pretrained_name_or_path), {k: kwargs[k] for k in _HUB if k in kwargs}
            found = fetch(name, revision, **options).name  # which looks at their sizes first
            folder = Path(snapshot_download(name, revision=found, allow_patterns=FILES, **options))
        config = config or PreTrainedConfig.from_pretrained(folder)
        if not isinstance(config, DsrlConfig):
            raise bad(f"policy '{pretrained_name_or_path}'", "a policy of type 'dsrl'", f"'{config.type}'")
        if not Path(pretrained_name_or_path).is_dir():
            fix = "download it, and give --policy.path=<its folder>"
            check_named(config.base, f"policy '{pretrained_name_or_path}'", fix)
        made = {name: value for name, value in kwargs.items() if name == "base"}
        return cls(config, head=SteeringHead.from_pretrained(folder), **made)

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        self.config._save_pretrained(save_directory)
        self.head.save_pretrained(save_directory)

    def to(self, *args: Any, **kwargs: Any) -> DsrlPolicy:
        """Move the base, which is loaded anew there: LeRobot's server asks for its device only after loading.

        The head goes with it, and stays in float32.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        now = torch.device(self.config.device or "cpu")
        if device is not None and (device.type, device.index or 0) != (now.type, now.index or 0):
            self.config.device = str(device)
            self._steer(self._load())
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> DsrlPolicy:
        """As `to` says, whatever else torch may want to do with every tensor."""
        return self

    def reset(self) -> None:
        """A new episode in every environment."""
        self._queue: deque[Tensor] = deque()
        self._streams: list[torch.Generator] = []

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """float32 (B, A); asks for a new chunk when the last one has been executed."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch, **kwargs).unbind(1))
        return self._queue.popleft()

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """float32 (B, executed steps, A).

        Raises:
            DsrlError: an observation that does not fit the base; real-time chunking, which overwrites the noise.
        """
        if any(kwargs.get(name) is not None for name in ("inference_delay", "prev_chunk_left_over")):
            raise DsrlError(
                "policy 'dsrl': expected plain chunks, got real-time chunking, that overwrites the noise of the steps "
                "that overlap with the last chunk. Run it with sync inference."
            )
        observations = self.observations(batch)
        encoding = self.base.encode(observations)
        actions = self.source.actions(self.base, observations, encoding, self._generators(encoding.batch))
        return actions[:, 0, : self.base.spec.executed_steps]

    def drop_queued_actions(self) -> None:
        """Forget what is left of the present chunk."""
        self._queue.clear()

    def observations(self, batch: dict[str, Any]) -> Observations:
        """LeRobot's batch, images float (B, 3, H, W) in [0, 1], as the base's own observations."""
        found: Observations = {STATE: batch[STATE].detach().float().cpu().numpy()}
        for key in self.config.image_features:
            if key not in batch:
                raise bad(key, "to be in the observation", ", ".join(sorted(batch)), "See --rename_map.")
            pixels = (batch[key].detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
            found[IMAGE_PREFIX + camera_of(key)] = pixels.permute(0, 2, 3, 1).cpu().numpy()
        prompts = batch.get(PROMPT)
        if prompts is not None:
            found[PROMPT] = [prompts] if isinstance(prompts, str) else list(prompts)
        return found

    def _generators(self, count: int) -> list[torch.Generator]:
        if len(self._streams) != count:
            first = (self.config.seed << 20) + self._episodes
            self._streams = generators(list(range(first, first + count)))
            self._episodes += count
        return self._streams

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict | None]:
        """Raises: a head is trained by `dsrl-vla train`."""
        raise DsrlError(
            "policy 'dsrl': expected to be run, got trained on a dataset. Train heads by `dsrl-vla train`."
        )

    def get_optim_params(self) -> Any:
        """The head's."""
        return self.head.parameters()
