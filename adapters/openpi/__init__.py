"""``openpi:<config>[@<checkpoint>]``: π0 and π0.5 as Physical Intelligence's openpi runs them, in JAX and PyTorch.

`OpenPi` wraps a ``Policy`` that openpi made; `load` makes one from a config name and a checkpoint, as openpi's own
``create_trained_policy`` does. Images, prompt, state and actions go through that policy's transforms, so what comes
out for a noise is what ``Policy.infer(noise=)`` gives for it.

openpi and LeRobot cannot share an environment. ``make openpi-env`` makes one for this adapter; from any other, steer
a served policy through ``remote:``.
"""

from .keys import ALOHA, ALOHA_SIM, DROID, LIBERO, KeyMap
from .loading import load
from .policy import OpenPi

__all__ = ["ALOHA", "ALOHA_SIM", "DROID", "LIBERO", "KeyMap", "OpenPi", "load"]
