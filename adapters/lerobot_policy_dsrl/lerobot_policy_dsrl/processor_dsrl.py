"""The processors of a steered policy: next to nothing, for the base brings its own, normalisation included."""

from __future__ import annotations

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from .configuration_dsrl import DsrlConfig


def make_dsrl_pre_post_processors(config: DsrlConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Rename, add a batch dimension, move: in. Move to the CPU: out."""
    device = config.device or "cpu"
    before: PolicyProcessorPipeline = PolicyProcessorPipeline(
        steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=device),
        ],
        name=POLICY_PREPROCESSOR_DEFAULT_NAME,
    )
    after: PolicyProcessorPipeline = PolicyProcessorPipeline(
        steps=[DeviceProcessorStep(device="cpu")],
        name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
