"""Environments by URI: ``metaworld:drawer-open-v3``, ``point:fork``.

A family registers under the entry-point group ``dsrl_vla.tasks``; its target is a callable
``make(name, *, max_episode_steps=…, uri=…) -> TaskEnv``.
"""

from .base import ChunkEnv, TaskEnv, TaskInfo
from .registry import make_task, task_families

__all__ = ["ChunkEnv", "TaskEnv", "TaskInfo", "make_task", "task_families"]
