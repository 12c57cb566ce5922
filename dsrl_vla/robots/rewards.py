"""What a step on a robot is worth: by the operator's keys, by a function, by a reward model of LeRobot's."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DsrlError, bad, missing_extra
from ..observation import IMAGE_PREFIX, PROMPT, STATE
from ..plain import read_object

log = logging.getLogger(__name__)


class Reward(abc.ABC):
    """Judges every step. The operator's word goes before it."""

    range: tuple[float, float] = (-1.0, 0.0)
    """Least and greatest reward of a step."""

    @abc.abstractmethod
    def __call__(self, observation: Mapping[str, Any], action: np.ndarray) -> tuple[float, bool]:
        """Reward of the action (A,) that led to `observation`, and whether the task is done by it."""


class ByKey(Reward):
    """-1 a step until the operator says success, which gives 0."""

    def __call__(self, observation: Mapping[str, Any], action: np.ndarray) -> tuple[float, bool]:
        return -1.0, False


class ByFunction(Reward):
    """A function of (observation, action) that returns the reward, or reward and success.

    Raises:
        DsrlError: it returned something else, or a reward outside of its range.
    """

    def __init__(self, function: Callable[..., Any], reward_range: tuple[float, float] = (-1.0, 0.0)):
        self.function, self.range = function, reward_range

    def __call__(self, observation: Mapping[str, Any], action: np.ndarray) -> tuple[float, bool]:
        found = self.function(observation, action)
        reward, success = found if isinstance(found, tuple) else (found, False)
        if not self.range[0] <= float(reward) <= self.range[1]:
            raise bad("reward", f"a number within reward_range {list(self.range)}", reward)
        return float(reward), bool(success)


class ByRewardModel(Reward):
    """A LeRobot reward model: 0 and success where it gives `threshold` or more (a classifier: where the probability
    of success is above it), else -1.

    Args:
        model: has ``compute_reward(batch) -> (B,)``, a classifier ``predict_reward(batch, threshold) -> (B,)``, which
            is 0 or 1; images float (B, 3, H, W) in [0, 1].
        preprocess: LeRobot's pipeline for it.
    """

    def __init__(self, model: Any, preprocess: Callable[[dict], dict], threshold: float = 0.5):
        self.model, self.preprocess, self.threshold = model, preprocess, threshold

    def __call__(self, observation: Mapping[str, Any], action: np.ndarray) -> tuple[float, bool]:
        import torch

        batch: dict[str, Any] = {
            name: torch.as_tensor(value).permute(2, 0, 1).float().unsqueeze(0) / 255
            for name, value in observation.items()
            if name.startswith(IMAGE_PREFIX)
        }
        batch |= {STATE: torch.as_tensor(observation[STATE]).unsqueeze(0), PROMPT: [observation[PROMPT]]}
        batch["action"] = torch.as_tensor(action).unsqueeze(0)
        with torch.no_grad():
            success = self._succeeded(self.preprocess(batch))
        return (0.0 if success else -1.0), success

    def _succeeded(self, batch: Any) -> bool:
        if hasattr(self.model, "predict_reward"):
            return float(self.model.predict_reward(batch, self.threshold)) > 0
        return float(self.model.compute_reward(batch)) >= self.threshold


def load_reward_model(source: str, threshold: float) -> ByRewardModel:
    """Load a reward model from a folder or a Hub repository.

    Raises:
        MissingExtraError: `lerobot` is not installed. DsrlError: it cannot be loaded.
    """
    try:
        from lerobot.configs.rewards import RewardModelConfig
        from lerobot.rewards.factory import get_reward_model_class
        from lerobot.rewards.pretrained import PreTrainedRewardModel
    except ImportError as error:
        raise missing_extra("lerobot", "lerobot", "a reward model of LeRobot's") from error
    from ..adapters.lerobot.steps import no_code_of
    from ..adapters.lerobot.weights import check_loaded
    from ..adapters.transformers_pi0 import resolve

    folder, _, _ = resolve(source, "reward")
    try:
        with no_code_of(source):
            config = RewardModelConfig.from_pretrained(folder)
            kind = get_reward_model_class(config.type)
            model = kind.from_pretrained(folder, config=config)
            if kind.from_pretrained.__func__ is PreTrainedRewardModel.from_pretrained.__func__:  # others keep parts
                check_loaded(model, folder / "model.safetensors", source)
            preprocess = _preprocessor(folder, config)
    except DsrlError:
        raise
    except Exception as error:
        raise bad("reward", "a LeRobot reward model", f"'{source}' ({error})") from error
    return ByRewardModel(model.eval(), preprocess, threshold)


def _preprocessor(folder: Path, config: Any) -> Any:
    """The pipeline that training saved beside the model, with its statistics; where there is none, one without any."""
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.rewards.factory import make_reward_pre_post_processors

    from ..adapters.lerobot.steps import own_steps

    files = sorted(folder.glob("*preprocessor.json"))
    if not files:
        log.warning("reward: no *preprocessor.json in '%s': what the model sees is not normalised", folder)
        return make_reward_pre_post_processors(config)[0]
    own_steps(read_object(files[0]), f"{files[0]}")
    overrides = {"device_processor": {"device": config.device}}
    return PolicyProcessorPipeline.from_pretrained(folder, config_filename=files[0].name, overrides=overrides)
