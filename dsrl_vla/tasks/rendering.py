"""Fast off-screen rendering of MuJoCo models: no shadows, no reflections, no multi-sampling."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
import sys
import weakref
from typing import Any

import numpy as np

from ..errors import bad


def choose_backend() -> None:
    """Before mujoco is imported: on Linux without a display, render through EGL unless the user says otherwise.

    Software rendering brings an LLVM of its own. Triton, which torch's CUDA builds bring and transformers loads,
    brings another, and crashes the process when it is loaded second; so it is loaded first.
    """
    if importlib.util.find_spec("triton"):
        importlib.import_module("triton")
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


class FastRenderer:
    """Pictures of one model, at any size; one GL context per size."""

    def __init__(self, mujoco: Any, model: Any):
        self.mujoco, self.model = mujoco, model
        model.vis.quality.offsamples = 0  # 15 times faster than the default in software rendering
        model.vis.quality.shadowsize = 0
        self.renderers: dict[int, Any] = {}

    def __call__(self, data: Any, camera: str, size: int) -> np.ndarray:
        """Render uint8 (size, size, 3).

        Raises:
            DsrlError: no working off-screen renderer.
        """
        flags = self.mujoco.mjtRndFlag
        if size not in self.renderers:
            self.renderers[size] = self._make(size)
        renderer = self.renderers[size]
        renderer.update_scene(data, camera=camera)
        renderer.scene.flags[flags.mjRND_SHADOW] = renderer.scene.flags[flags.mjRND_REFLECTION] = 0
        return renderer.render()

    def _make(self, size: int) -> Any:
        frame = self.model.vis.global_
        frame.offwidth, frame.offheight = max(frame.offwidth, size), max(frame.offheight, size)
        try:
            made = self.mujoco.Renderer(self.model, size, size)
        except Exception as error:
            raise bad(
                "MUJOCO_GL",
                "a working off-screen renderer",
                f"'{os.environ.get('MUJOCO_GL', '')}' ({error})",
                "On Debian: apt-get install libegl1 libgl1 libosmesa6, then set MUJOCO_GL to egl or osmesa before "
                "mujoco is first imported.",
            ) from error
        if not self.renderers:
            # A GL context has to go before mujoco ends its display, in an exit handler it has just registered.
            closing = weakref.WeakMethod(self.close)
            atexit.register(lambda: (close := closing()) and close())
        return made

    def close(self) -> None:
        """Free the GL contexts."""
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers.clear()
