"""Recipes: YAML, data only, one per task. ``nano-*`` are for pretraining, the others for steering."""

from __future__ import annotations

from pathlib import Path


def shipped() -> dict[str, Path]:
    """Recipes in the package: name -> file."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
