"""Fast off-screen rendering of MuJoCo models: no shadows, no reflections, no multi-sampling."""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import os
import sys
import weakref
from typing import Any, ClassVar

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


class _Contexts:
    """GL contexts, one per size, for all models that look alike: they hold the meshes and textures, 40 to 120 MB."""

    def __init__(self, mujoco: Any, model: Any):
        self.mujoco, self.model = mujoco, model
        self.users = 0
        self.renderers: dict[int, Any] = {}

    def at(self, size: int) -> Any:
        """The renderer of pictures (size, size).

        Raises:
            DsrlError: no working off-screen renderer.
        """
        if size not in self.renderers:
            self.renderers[size] = self._make(size)
        return self.renderers[size]

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


class FastRenderer:
    """Pictures of one model, at any size. Models with the same meshes and textures share their GL contexts."""

    _shared: ClassVar[dict[str, _Contexts]] = {}

    def __init__(self, mujoco: Any, model: Any):
        self.mujoco, self.model = mujoco, model
        model.vis.quality.offsamples = 0  # 15 times faster than the default in software rendering
        model.vis.quality.shadowsize = 0
        self.option = mujoco.MjvOption()
        self._key = _looks(model)
        self._contexts: _Contexts | None = self._shared.setdefault(self._key, _Contexts(mujoco, model))
        self._contexts.users += 1

    def __call__(self, data: Any, camera: str, size: int) -> np.ndarray:
        """Render uint8 (size, size, 3).

        Raises:
            DsrlError: no working off-screen renderer, or it has been closed.
        """
        if self._contexts is None:
            raise bad("renderer", "one in use", "one that was closed")
        renderer = self._contexts.at(size)
        view = self.mujoco.MjvCamera()
        view.type, view.fixedcamid = self.mujoco.mjtCamera.mjCAMERA_FIXED, self.model.camera(camera).id
        everything = self.mujoco.mjtCatBit.mjCAT_ALL.value
        # This model's own colours and this data's own poses, whichever model the context was made for.
        self.mujoco.mjv_updateScene(self.model, data, self.option, None, view, everything, renderer.scene)
        flags = self.mujoco.mjtRndFlag
        renderer.scene.flags[flags.mjRND_SHADOW] = renderer.scene.flags[flags.mjRND_REFLECTION] = 0
        return renderer.render()

    def close(self) -> None:
        """Give up the GL contexts; the last user frees them."""
        contexts, self._contexts = self._contexts, None
        if contexts is None:
            return
        contexts.users -= 1
        if not contexts.users:
            contexts.close()
            del self._shared[self._key]


def _looks(model: Any) -> str:
    """Hash of what a GL context holds of a model."""
    digest = hashlib.sha256()
    parts = ("mesh_vert", "mesh_face", "mesh_normal", "mesh_texcoord", "tex_data", "hfield_data", "skin_vert")
    for name in parts:
        values = np.ascontiguousarray(getattr(model, name))
        digest.update(f"{name} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
