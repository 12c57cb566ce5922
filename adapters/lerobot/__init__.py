"""``lerobot:<folder or repo>[@revision]``: LeRobot's flow and diffusion policies, each cut where sampling begins."""

from .loading import load

__all__ = ["load"]
