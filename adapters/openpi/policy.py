"""`OpenPi`: a ``Policy`` that openpi made, as a frozen base."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dsrl_vla.errors import DsrlError, MissingExtraError, NotSteerableError, bad
from dsrl_vla.noise import NoiseSpace
from dsrl_vla.observation import Observations
from dsrl_vla.policy import Encoding, FrozenPolicy, PolicySpec

from .keys import FAMILIES, KeyMap, keys_for
from .sampling import Pool, Sampler


@dataclass(frozen=True)
class _Context:
    prefix: Any
    states: np.ndarray


class OpenPi(FrozenPolicy):
    """A frozen π0 or π0.5 behind openpi's own transforms.

    One prefix pass per decision, any number of noises behind it; one noise behind one observation is bit-equal to
    ``policy.infer(observation, noise=noise)["actions"]``, in float32.

    Args:
        policy: an ``openpi.policies.policy.Policy``, for instance from ``create_trained_policy``.
        keys: how it names its inputs; by default known from its input transform (LIBERO, DROID, ALOHA).
        executed_steps: by default what openpi's example for that robot executes, at most the horizon.
        num_steps: of the sampler; by default the policy's ``sample_kwargs``, else the model's.
        pool: "mean" or "last_pad"; see `sampling.Pool`.

    Raises:
        NotSteerableError: π0-FAST, or another model without a flow. DsrlError: not a ``Policy``, unknown keys, a
            value out of range. MissingExtraError: openpi is not installed.
    """

    def __init__(
        self,
        policy: Any,
        *,
        keys: KeyMap | None = None,
        executed_steps: int | None = None,
        num_steps: int | None = None,
        pool: Pool = "mean",
        config: str = "",
        uri: str = "",
    ):
        if pool not in ("mean", "last_pad"):
            raise bad("openpi pool", "mean or last_pad", f"'{pool}'")
        uri = uri or f"openpi:{config}"
        self.policy, self._pool = policy, pool
        self.sampler = _sampler(policy, num_steps, pool, uri)
        self.keys = keys or keys_for(config, policy._input_transform.transforms)
        horizon, dim = self.sampler.horizon, self.sampler.dim
        actions = self._width_of_actions(uri)
        executed = min(self.keys.executed_steps, horizon) if executed_steps is None else executed_steps
        self.spec = PolicySpec(
            uri=uri,
            adapter="openpi",
            noise=NoiseSpace(horizon, dim, live=tuple(column < actions for column in range(dim))),
            observation=self.keys.spec,
            action_dim=actions,
            executed_steps=executed,
            sampler_steps=self.sampler.steps,
            feature_dim=self.sampler.feature_dim,
            dtype=self.sampler.dtype,
        )

    @property
    def model(self) -> Any:
        """openpi's model."""
        return self.sampler.model

    def _encode(self, observations: Observations, batch: int) -> Encoding:
        rows = [self.policy._input_transform(row) for row in self.keys.translate(observations, batch)]
        feature, prefix = self.sampler.prefix(rows)
        return Encoding(batch, feature, _Context(prefix, self.sampler.states(prefix, batch)))

    def _denoise(self, encoding: Encoding, noise: torch.Tensor) -> torch.Tensor:
        context: _Context = encoding.context
        chunks = self.sampler.denoise(context.prefix, noise.cpu().numpy())
        pairs = zip(context.states, chunks, strict=True)
        return torch.from_numpy(np.stack([[self._finish(state, one) for one in many] for state, many in pairs]))

    def pack(self, encoding: Encoding) -> dict[str, torch.Tensor]:
        return self.sampler.pack(encoding.context.prefix, encoding.batch)

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> Encoding:
        prefix, batch = self.sampler.unpack(tensors), len(tensors["state"])
        return Encoding(batch, None, _Context(prefix, self.sampler.states(prefix, batch)))

    def state_dict(self) -> Mapping[str, torch.Tensor]:
        return self.sampler.state_dict()

    def processors(self) -> dict[str, Any]:
        """openpi's transforms in their order, each with its settings (statistics, form of the prompt, deltas); how the
        feature is pooled, unless in the usual way; and where openpi finds what, unless as for its own robots."""
        sides = {"input": self.policy._input_transform, "output": self.policy._output_transform}
        own: dict[str, Any] = {} if self._pool == "mean" else {"pool": self._pool}
        if self.keys not in FAMILIES:
            own["keys"] = {"cameras": dict(self.keys.cameras), "state": list(self.keys.state.items())}
        return own | {
            f"{side}.{index}.{type(transform).__name__}": _plain(transform)
            for side, composed in sides.items()
            for index, transform in enumerate(composed.transforms)
        }

    def _finish(self, state: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Normalised (H, D) to float32 (H, A) in environment units. Transforms may write into what they get."""
        done = self.policy._output_transform({"state": state.copy(), "actions": actions.copy()})
        return np.asarray(done["actions"], dtype=np.float32)

    def _width_of_actions(self, uri: str) -> int:
        horizon, dim = self.sampler.horizon, self.sampler.dim
        shape = self._finish(np.zeros(dim, np.float32), np.zeros((horizon, dim), np.float32)).shape
        if len(shape) != 2 or shape[0] != horizon or not 1 <= shape[1] <= dim:
            raise bad(f"{uri}: actions after its output transforms", f"shape ({horizon}, 1 to {dim})", shape)
        return shape[1]


def _plain(value: Any) -> Any:
    """Settings as JSON has them; of what has no such form, the name of its type."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, np.generic)):
        return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value.tolist()
    return value if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def missing_openpi(error: ImportError) -> MissingExtraError:
    """The message for an environment without openpi, which no extra of this package can install."""
    return MissingExtraError(
        f"the adapter 'openpi:' needs Physical Intelligence's openpi, which is not whole here ({error}). The name "
        "'openpi' on PyPI is an empty placeholder: do not install that. `make openpi-env` makes an environment "
        "with openpi in it (.venv-openpi); from any other, serve the policy there and use remote:ws://<host>:<port>."
    )


def _sampler(policy: Any, num_steps: int | None, pool: Pool, uri: str) -> Sampler:
    try:
        from openpi.models.pi0 import Pi0
        from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
        from openpi.policies.policy import Policy
    except ImportError as error:
        raise missing_openpi(error) from error
    if not isinstance(policy, Policy):
        raise bad(
            uri,
            "an openpi.policies.policy.Policy",
            type(policy).__name__,
            "Give the policy itself, without recorder or broker; a client's server is used through remote:ws://….",
        )
    model = policy._model
    if not isinstance(model, (Pi0, PI0Pytorch)):
        raise not_a_flow(uri, type(model).__name__)
    steps = _steps(policy, type(model), num_steps, uri)
    if isinstance(model, PI0Pytorch):
        from .torch_sampler import TorchSampler

        return TorchSampler(model, steps, pool, policy._pytorch_device)
    from .jax_sampler import JaxSampler

    return JaxSampler(model, steps, pool)


def not_a_flow(uri: str, name: str) -> NotSteerableError:
    """The message for π0-FAST and its kin."""
    return NotSteerableError(
        f"{uri}: expected a flow model, π0 or π0.5, got '{name}', which is autoregressive: it picks tokens and has no "
        "initial noise to steer. Use a flow config for the same robot, such as pi0_droid in place of pi0_fast_droid."
    )


def _steps(policy: Any, model: type, asked: int | None, uri: str) -> int:
    """The sampler's steps: as asked, as the policy was built with, or as the model has by default."""
    chosen = dict(policy._sample_kwargs)
    default = inspect.signature(model.sample_actions).parameters["num_steps"].default  # type: ignore[attr-defined]
    built_with = int(chosen.pop("num_steps", default))
    steps = built_with if asked is None else asked
    if chosen:
        raise DsrlError(
            f"{uri}: expected a policy whose sample_kwargs hold num_steps alone, got {', '.join(sorted(chosen))} too. "
            "Build it without: the noise is what is steered, and nothing else may vary."
        )
    if steps < 1:
        raise bad("openpi num_steps", "1 or more", steps)
    return steps
