"""For those who run openpi's own server: a policy around theirs that takes noise from the wire, and says so.

>>> from openpi.serving.websocket_policy_server import WebsocketPolicyServer
>>> def translate(one):  # LeRobot's names to those that this policy's transforms read; here LIBERO's
...     return {
...         "observation/image": one["observation.images.image"],
...         "observation/wrist_image": one["observation.images.wrist_image"],
...         "observation/state": one["observation.state"],
...         "prompt": one["task"],
...     }
>>> policy = SteerablePolicy(policy, spec, translate)                          # an openpi Policy
>>> WebsocketPolicyServer(policy, metadata=policy.metadata).serve_forever()    # remote:ws://… can steer it

Their server keeps no encodings, so a client of ours sends the observation again for every noise, and there is no
feature. ``dsrl-vla serve openpi:<config>`` has neither limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import bad
from . import protocol as p

if TYPE_CHECKING:
    from ..policy import PolicySpec


class SteerablePolicy:
    """Anything with openpi's ``infer(obs, *, noise=None) -> {"actions": (H, A), …}``.

    Requests without noise go through unchanged.

    Args:
        spec: what clients are told of the policy.
        translate: from our observation (LeRobot's dictionary, single) to the policy's; by default as it is, which
            openpi's own policies cannot read.
    """

    def __init__(self, policy: Any, spec: PolicySpec, translate: Any = dict):
        self._policy, self._spec, self._translate = policy, spec, translate

    @property
    def metadata(self) -> dict[str, Any]:
        """The policy's own, and that it can be steered."""
        return dict(getattr(self._policy, "metadata", {})) | p.metadata(self._spec, handles=False)

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one observation; with ``dsrl/noise`` in it, from that noise, or with ``dsrl/error``."""
        plain = {key: value for key, value in obs.items() if not key.startswith("dsrl/")}
        if "observation.state" in plain:
            plain = self._translate(plain)
        if p.NOISE not in obs:
            return self._policy.infer(plain)
        noise, shape = np.asarray(obs[p.NOISE]), self._spec.noise.shape
        if noise.shape != shape or noise.dtype.kind not in "fiu" or not np.isfinite(noise).all():
            words = str(bad(p.NOISE, f"finite numbers of shape {shape}", f"{noise.dtype} {noise.shape}"))
            return {p.ERROR: {"kind": "invalid", "message": words}}
        noise = np.array(noise, dtype=np.float32, order="C")  # off the wire it is read-only; torch policies mind
        return {**self._policy.infer(plain, noise=noise), p.SOURCE: "request"}

    def reset(self) -> None:
        """As the policy has it."""
        getattr(self._policy, "reset", lambda: None)()
