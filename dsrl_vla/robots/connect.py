"""``robot:<file.yaml>``: from a robot's file to a connected task.

Training holds two tasks of one robot, one to learn on and one to be measured on; they share one connection.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..entry_points import imported
from ..errors import bad, missing_extra
from .config import RobotFile, read_robot_file
from .operators import Operator, ScriptedOperator, TeleopOperator, Unattended
from .pacing import Pacer
from .rewards import ByFunction, ByKey, Reward, load_reward_model
from .rig import Rig
from .task import RobotTask


@dataclass
class _Connection:
    rig: Rig
    operator: Operator
    reward: Reward
    pacer: Pacer
    users: int = 0


_open: dict[Path, _Connection] = {}


def make(name: str, *, max_episode_steps: int = 300, uri: str = "") -> RobotTask:
    """Connect the robot that the file `name` describes, and make a task of it.

    Raises:
        DsrlError: the file, the robot, or the guards are not as they should be.
        MissingExtraError: `lerobot` is not installed, and the file names a robot of LeRobot's.
    """
    path = Path(name).expanduser().resolve()
    config = read_robot_file(path)
    reset = imported(config.reset, "reset") if config.reset else None
    if path not in _open:
        _open[path] = _connect(config)
    connection = _open[path]
    connection.users += 1
    return RobotTask(
        uri or f"robot:{name}",
        config.prompt,
        max_episode_steps,
        connection.rig,
        connection.operator,
        connection.reward,
        connection.pacer,
        reset,
        config.keep_images,
        partial(_release, path),
    )


def _release(path: Path) -> None:
    """The last task to close disconnects."""
    connection = _open.get(path)
    if connection is None:
        return
    connection.users -= 1
    if connection.users <= 0:
        del _open[path]
        try:
            connection.operator.close()
        finally:
            connection.rig.close()


def _connect(config: RobotFile) -> _Connection:
    pacer, reward = Pacer(config.fps), _reward(config)
    for module in config.imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise bad("imports", "modules that can be imported", f"'{module}' ({error})") from error
    robot = _device(config.robot, "robot")
    teleop = _device(config.teleop, "teleop") if config.teleop else None
    rig = Rig(robot, config.guards, teleop, config.cameras, config.dry_run)
    try:
        return _Connection(rig, _operator(config, teleop), reward, pacer)
    except BaseException:
        rig.close()
        raise


def _reward(config: RobotFile) -> Reward:
    if config.reward == "keys":
        return ByKey()
    if config.reward.startswith("lerobot:"):
        return load_reward_model(config.reward.removeprefix("lerobot:"), config.threshold)
    low, high = config.reward_range
    return ByFunction(imported(config.reward, "reward"), (low, high))


def _operator(config: RobotFile, teleop: Any) -> Operator:
    from .terminal import TerminalOperator

    if config.script:
        return ScriptedOperator(config.script)
    if ":" in config.operator:
        made: Operator = imported(config.operator, "operator")()
        return made
    kinds: dict[str, Callable[[], Operator]] = {
        "terminal": TerminalOperator,
        "teleop": lambda: TeleopOperator(
            _device(config.events, "events") if config.events else teleop, TerminalOperator
        ),
        "none": Unattended,
    }
    return kinds[config.operator]()


def _device(tree: Mapping[str, Any], kind: str) -> Any:
    """A robot or a teleoperator from its configuration: a factory's, or LeRobot's."""
    tree = dict(tree)
    if "factory" in tree:
        return imported(tree.pop("factory"), f"{kind}.factory")(**tree)
    try:
        import draccus
        import lerobot.robots
        import lerobot.teleoperators
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise missing_extra("lerobot", "lerobot", f"{kind} '{tree.get('type')}'") from error
    register_third_party_plugins()
    if kind == "robot":
        package, base = lerobot.robots, lerobot.robots.RobotConfig
        build: Callable[[Any], Any] = lerobot.robots.make_robot_from_config
    else:
        package, base = lerobot.teleoperators, lerobot.teleoperators.TeleoperatorConfig
        build = lerobot.teleoperators.make_teleoperator_from_config
    _register_shipped(package)
    try:
        return build(draccus.decode(base, tree))
    except Exception as error:
        known = ", ".join(sorted(base.get_known_choices()))
        raise bad(kind, f"LeRobot's configuration of a {kind}; types: {known}", f"{error}") from error


def _register_shipped(package: Any) -> None:
    """Import LeRobot's own devices, so that their names are known; those whose drivers are missing are passed over."""
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            try:
                importlib.import_module(f"{package.__name__}.{module.name}")
            except Exception:
                continue
