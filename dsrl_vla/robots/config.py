"""A robot's file: which robot, who stands beside it, what may be sent to it. YAML, checked when it is read.

.. code-block:: yaml

    robot: {type: so101_follower, port: /dev/ttyACM0, id: mine, cameras: {front: {type: opencv, index_or_path: 0,
            width: 640, height: 480, fps: 30}}}           # LeRobot's own configuration
    teleop: {type: so101_leader, port: /dev/ttyACM1, id: mine}
    prompt: put the cube into the box
    fps: 30
    operator: terminal
    guards:
      limits: {"*.pos": [-90, 90], gripper.pos: [0, 100]}
      max_step: {"*.pos": 5}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import bad
from ..plain import from_plain, read_sections
from .guards import GuardsConfig

OPERATORS = ("terminal", "teleop", "none")


@dataclass(frozen=True)
class RobotFile:
    """What a robot's file may hold."""

    robot: dict
    """LeRobot's configuration of a robot (``type``, …), or ``factory: package.module:function`` and its arguments."""
    prompt: str
    teleop: dict = field(default_factory=dict)
    """LeRobot's configuration of a teleoperator, or a factory; empty for none."""
    events: dict = field(default_factory=dict)
    """LeRobot's configuration of a device whose buttons are the operator's words (gamepad, keyboard_ee), or a factory;
    for `operator: teleop`, where the teleoperator itself has none, as leader arms."""
    imports: tuple[str, ...] = ()
    """Modules that register further robots and teleoperators."""
    fps: float = 30.0
    """Control steps per second."""
    cameras: dict = field(default_factory=dict)
    """Robot's camera -> the base's name for it; by default all of them, under the robot's names."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    operator: str = "terminal"
    """terminal, teleop (the buttons of `events`, or else of `teleop`), none, or ``package.module:function`` that makes
    an `Operator`."""
    script: tuple[dict, ...] = ()
    """What a scripted operator says instead; see `ScriptedOperator`."""
    reward: str = "keys"
    """keys, ``package.module:function`` of (observation, action), or ``lerobot:<folder or repository>``."""
    reward_range: tuple[float, ...] = (-1.0, 0.0)
    """Least and greatest reward of a step, of a function's."""
    threshold: float = 0.5
    """From which output on a LeRobot reward model's verdict is success."""
    reset: str = ""
    """``package.module:function`` of (robot, seed) that makes robot and scene ready, beside the operator."""
    keep_images: bool = True
    """Keep every step's images (lossless) in the run's journal, from where they can be exported."""
    dry_run: bool = False
    """Do everything but send."""

    def __post_init__(self) -> None:
        if len(self.reward_range) != 2 or not self.reward_range[0] < self.reward_range[1]:
            raise bad("reward_range", "[least, greatest]", list(self.reward_range))
        if self.fps > 0 and self.guards.hold_after_s <= 1 / self.fps:
            raise bad(
                "guards.hold_after_s", f"more than a control period, {1 / self.fps:g} s", self.guards.hold_after_s
            )
        if self.operator not in OPERATORS and ":" not in self.operator:
            raise bad("operator", f"{', '.join(OPERATORS)} or package.module:function", f"'{self.operator}'")


def read_robot_file(path: Path) -> RobotFile:
    """Read a robot's file.

    Raises:
        DsrlError: no such file, no YAML, an unknown key, a value of another type.
    """
    if not path.is_file():
        raise bad("task robot:", "the path of a robot's YAML file", f"'{path}'")
    tree = read_sections(path, f"{path}")
    for key in ("robot", "prompt"):
        if key not in tree:
            raise bad(f"{path}", f"a key '{key}'", ", ".join(tree))
    made: RobotFile = from_plain(RobotFile, tree, "", f"key of {path}:")
    return made
