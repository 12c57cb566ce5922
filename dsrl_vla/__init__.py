"""Steer frozen vision-language-action policies through the initial noise of their samplers.

    import dsrl_vla

    base = dsrl_vla.load_base("nano:")
    policy = dsrl_vla.SteeredPolicy(base, dsrl_vla.SteeringHead.from_pretrained("runs/demo/best"))
    chunk = policy.act(observation, seed=0)

Names are imported on first use, so that ``import dsrl_vla`` stays cheap and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "FrozenPolicy": "policy",
    "PolicySpec": "policy",
    "Encoding": "policy",
    "SteeredPolicy": "steered_policy",
    "FailSafe": "failsafe",
    "SteeringHead": "head",
    "HeadConfig": "head",
    "NoiseSpace": "noise",
    "NoiseLayout": "noise",
    "ObservationSpec": "observation",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "load_base": "bases",
    "make_task": "tasks",
    "TaskEnv": "tasks.base",
    "TaskInfo": "tasks.base",
    "TaskConfig": "rollout",
    "VectorTask": "rollout",
    "NoiseEnv": "noise_env",
    "probe": "probing",
    "preflight": "steerability",
    "train": "training",
    "evaluate": "evaluation",
    "DsrlError": "errors",
    "NotSteerableError": "errors",
    "MissingExtraError": "errors",
    "UnknownNameError": "errors",
    "MismatchError": "errors",
    "BaseFailedError": "errors",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dsrl_vla' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
