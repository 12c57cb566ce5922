"""What the adapter has to know of one LeRobot policy: where its seam is, what its noise is, how it samples."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Mapping
from functools import reduce
from typing import Any, ClassVar

import torch
from dsrl_vla.errors import DsrlError, NotSteerableError, bad
from dsrl_vla.noise import NoiseSpace

from .seam import Prefix, arguments_at, injected

Batch = dict[str, Any]


class Split(abc.ABC):
    """One policy class, cut at its seam. A subclass is a handful of facts about it."""

    seam: ClassVar[str]
    """Dotted path, from the policy, of the method that only samples."""
    interface: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Parameters that methods of the installed class must have; the seam's first."""
    prompt: ClassVar[bool] = True
    resizes: ClassVar[bool] = True
    """Whether the policy takes images of any size."""
    spares: ClassVar[bool] = False
    """Whether the policy's own code does without cameras that are not in the batch, all but one."""
    entry: ClassVar[str] = "predict_action_chunk"
    """The policy's method that turns a batch into a chunk."""

    def __init__(self, policy: Any):
        self.policy, self.config = policy, policy.config
        self.refuse(self.config)
        self._check_interface()

    @property
    @abc.abstractmethod
    def noise(self) -> NoiseSpace:
        """Shape, prior and live columns."""

    @property
    @abc.abstractmethod
    def sampler_steps(self) -> int:
        """Evaluations of the network per chunk."""

    @property
    @abc.abstractmethod
    def feature_dim(self) -> int:
        """Width of what `feature` returns."""

    @abc.abstractmethod
    def feature(self, arguments: Mapping[str, Any]) -> torch.Tensor | None:
        """Pooled (B, F) from what the seam was handed; None where nothing is seen before sampling starts."""

    @abc.abstractmethod
    def denoise(self, arguments: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
        """Run the sampler on rows N from noise (N, H, D): normalised actions (N, C, A).

        The first row is the first to be executed; C may be less than the horizon.
        """

    @classmethod
    def refuse(cls, config: Any) -> None:
        """Raise NotSteerableError for a mode of this policy that cannot be steered; `config` is LeRobot's."""
        rtc = getattr(config, "rtc_config", None)
        if rtc is not None and rtc.enabled:
            raise NotSteerableError(
                f"policy '{config.type}': expected rtc_config to be off, got real-time chunking, which overwrites "
                "the noise of the steps that overlap with the last chunk. Load it with config={'rtc_config': None}."
            )

    def batch(self, batch: Batch) -> Batch:
        """The preprocessed batch as the policy's own call wants it."""
        return batch

    def encode(self, batch: Batch) -> tuple[torch.Tensor | None, Prefix]:
        """Run the policy up to its seam: pooled feature float32 (B, F), and what the sampler needs."""
        arguments = self.reach(self.batch(batch))
        feature = self.feature(arguments)
        assert feature is not None, "a split without a feature encodes for itself"
        return feature.float(), Prefix.of(arguments, len(feature))

    def reach(self, batch: Batch) -> dict[str, Any]:
        """The seam's arguments for a batch."""
        owner, name = self._find(self.seam)
        return arguments_at(owner, name, lambda: getattr(self.policy, self.entry)(dict(batch)))

    def cast(self, dtype: torch.dtype) -> None:
        """Serve in `dtype`; by default only in the one that LeRobot's class serves in, which goes by float32.

        Raises:
            DsrlError: not offered for this policy.
        """
        if dtype == torch.float32:
            return
        raise bad("base.dtype", f"float32 for a '{self.config.type}' policy", str(dtype).removeprefix("torch."))

    @property
    def executed_steps(self) -> int:
        """Steps of a chunk to execute, the policy's own setting."""
        return self.config.n_action_steps

    @property
    def state_dim(self) -> int:
        """Width of the robot's state."""
        state = self.config.robot_state_feature
        if state is None:
            raise bad(f"policy '{self.config.type}'", "observation.state among its input features", "none")
        return state.shape[0]

    @property
    def action_dim(self) -> int:
        """Real action columns."""
        return self.config.action_feature.shape[0]

    @property
    def chunk_width(self) -> int:
        """Columns of what `denoise` returns."""
        return self.action_dim

    def padded(self, horizon: int, width: int) -> NoiseSpace:
        """Normal noise whose first `action_dim` columns are the real ones."""
        return NoiseSpace(horizon, width, live=tuple(i < self.action_dim for i in range(width)))

    def call_seam(self, arguments: Mapping[str, Any]) -> Any:
        """Call the seam itself."""
        owner, name = self._find(self.seam)
        return getattr(owner, name)(**arguments)

    def draw(self, arguments: Mapping[str, Any], noise: torch.Tensor) -> Any:
        """Call the seam with its own draw answered by `noise`: for samplers that take no noise."""
        with injected(noise, f"policy '{self.config.type}'"):
            return self.call_seam(arguments)

    def default(self, parameter: str) -> Any:
        """The default of a parameter of the seam."""
        owner, name = self._find(self.seam)
        return inspect.signature(getattr(owner, name)).parameters[parameter].default

    def _find(self, path: str) -> tuple[Any, str]:
        *owners, name = path.split(".")
        return reduce(getattr, owners, self.policy), name

    def _check_interface(self) -> None:
        import lerobot

        for path, wanted in self.interface.items():
            try:
                owner, name = self._find(path)
                found = tuple(inspect.signature(getattr(owner, name)).parameters)
            except AttributeError as error:
                found = (f"no such method ({error})",)
            missing = [p for p in wanted if p not in found]
            if missing:
                raise DsrlError(
                    f"lerobot {lerobot.__version__}, {type(self.policy).__name__}.{path}: expected parameters "
                    f"{', '.join(wanted)}, got {', '.join(found)}. This adapter was written for lerobot 0.6; "
                    "install that, or a newer dsrl-vla."
                )
