"""Fast off-screen rendering of MuJoCo models: no shadows, no reflections, no multi-sampling."""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import itertools
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
    os.environ.setdefault(
        "LP_NUM_THREADS", "0"
    )  # software rendering of small pictures: threads cost more than they do


_HIDDEN = 5
"""A geom group that is not drawn by default."""
_MARGIN = 1e-3
"""Metres by which a geom has to be out of sight."""


class Canvas:
    """A GL context holding the meshes and textures of a model, for every model with the same ones.

    Uploading them takes a quarter of a second; the environments of a vector share one canvas.
    """

    _open: weakref.WeakValueDictionary[bytes, Canvas] = weakref.WeakValueDictionary()

    @classmethod
    def of(cls, mujoco: Any, model: Any, size: int) -> Canvas:
        """The canvas for pictures of `model`, uint8 (size, size, 3).

        Raises:
            DsrlError: no working off-screen renderer.
        """
        key = _assets(mujoco, model, size)
        canvas = cls._open.get(key)
        if canvas is None:
            canvas = cls._open[key] = cls(mujoco, model, size)
        return canvas

    def __init__(self, mujoco: Any, model: Any, size: int):
        frame = model.vis.global_
        frame.offwidth, frame.offheight = max(frame.offwidth, size), max(frame.offheight, size)
        try:
            self.renderer = mujoco.Renderer(model, size, size)
        except Exception as error:
            raise bad(
                "MUJOCO_GL",
                "a working off-screen renderer",
                f"'{os.environ.get('MUJOCO_GL', '')}' ({error})",
                "On Debian: apt-get install libegl1 libgl1 libosmesa6, then set MUJOCO_GL to egl or osmesa before "
                "mujoco is first imported.",
            ) from error
        # A GL context has to go before mujoco ends its display, in an exit handler it has just registered.
        closing = weakref.WeakMethod(self.renderer.close)
        atexit.register(lambda: (close := closing()) and close())

    def draw(self, scene: Any) -> np.ndarray:
        """The scene of any model with these meshes and textures, uint8 (size, size, 3)."""
        self.renderer._scene = scene
        return self.renderer.render()


_UPLOADED = (
    *("mesh_vert", "mesh_normal", "mesh_face", "mesh_texcoord", "mesh_vertadr", "mesh_faceadr", "mesh_texcoordadr"),
    *("tex_data", "tex_type", "tex_height", "tex_width", "tex_adr", "mat_texid", "mat_texrepeat", "mat_texuniform"),
    *("hfield_data", "hfield_size", "skin_vert"),
)
"""What MuJoCo's rendering context takes over from a model, once."""


def _assets(mujoco: Any, model: Any, size: int) -> bytes:
    """What a canvas depends on, as a digest."""
    digest = hashlib.sha1(f"{size} {model.vis.quality} {model.nmesh} {model.ntex}".encode(), usedforsecurity=False)
    for name in _UPLOADED:
        digest.update(getattr(model, name).tobytes())
    planes = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    digest.update(model.geom_size[planes].tobytes() + model.geom_matid[planes].tobytes())
    return digest.digest()


class FastRenderer:
    """Pictures of one model, at any size."""

    def __init__(self, mujoco: Any, model: Any):
        self.mujoco, self.model = mujoco, model
        model.vis.quality.offsamples = 0  # 15 times faster than the default in software rendering
        model.vis.quality.shadowsize = 0
        self.canvases: dict[int, Canvas] = {}
        self.scene = mujoco.MjvScene(model, maxgeom=2000)
        self.option, self.camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        centre, half = model.geom_aabb[:, None, :3], model.geom_aabb[:, None, 3:]
        self.corners = centre + half * np.array(list(itertools.product((-1, 1), repeat=3)))  # (geoms, 8, 3)
        self.endless = (model.geom_rbound == 0) | (half.max((1, 2)) == 0)

    def __call__(self, data: Any, camera: str, size: int) -> np.ndarray:
        """Render uint8 (size, size, 3).

        Raises:
            DsrlError: no working off-screen renderer.
        """
        if size not in self.canvases:
            self.canvases[size] = Canvas.of(self.mujoco, self.model, size)
        flags = self.mujoco.mjtRndFlag
        self.camera.fixedcamid = self.model.camera(camera).id
        groups = self.model.geom_group.copy()
        self.model.geom_group[self._out_of_sight(data)] = _HIDDEN
        self.mujoco.mjv_updateScene(
            self.model, data, self.option, None, self.camera, self.mujoco.mjtCatBit.mjCAT_ALL, self.scene
        )
        self.model.geom_group[:] = groups
        self.scene.flags[flags.mjRND_SHADOW] = self.scene.flags[flags.mjRND_REFLECTION] = 0
        return self.canvases[size].draw(self.scene)

    def _out_of_sight(self, data: Any) -> np.ndarray:
        """Which geoms lie wholly beyond one side of what the camera sees, or behind it: (geoms,).

        Nothing of them is in the picture, and transforming the vertices of a robot's links takes a third of its time.
        """
        number = self.camera.fixedcamid
        if self.model.cam_orthographic[number] or self.model.cam_sensorsize[number].any():
            return np.zeros(self.model.ngeom, dtype=bool)
        rotation, slope = data.cam_xmat[number].reshape(3, 3), np.tan(np.deg2rad(self.model.cam_fovy[number]) / 2)
        world = self.corners @ data.geom_xmat.reshape(-1, 3, 3).transpose(0, 2, 1) + data.geom_xpos[:, None]
        x, y, z = np.moveaxis((world - data.cam_xpos[number]) @ rotation, -1, 0)
        reach = -z * slope + _MARGIN
        beyond = [side.all(1) for side in (x > reach, -x > reach, y > reach, -y > reach, z > 0)]
        return np.logical_or.reduce(beyond) & ~self.endless

    def close(self) -> None:
        """Let go of the canvases."""
        self.canvases.clear()
