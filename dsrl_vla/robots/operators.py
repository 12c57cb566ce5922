"""Who stands beside the robot: what an operator says, and where it comes from."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import bad
from ..tasks.live import Ending

TAKE_OVER = "take-over"
WORDS: tuple[str, ...] = (*(str(ending) for ending in Ending), TAKE_OVER)


@dataclass(frozen=True)
class Said:
    """What was said since it was last asked, and whether a person is driving now."""

    ending: Ending | None = None
    human: bool = False


class Operator(abc.ABC):
    """Says how an episode goes. Asked once per control step: it must not block."""

    @abc.abstractmethod
    def hear(self) -> Said:
        """What was said since the last call."""

    @abc.abstractmethod
    def ready(self, message: str) -> None:
        """Wait until the scene is ready for an episode. What was said before is forgotten."""

    def close(self) -> None:  # noqa: B027
        """Give back what is held, such as the terminal; nothing by default."""


class Unattended(Operator):
    """Nobody: episodes end by their reward or by the limit, and a function resets the scene."""

    def hear(self) -> Said:
        return Said()

    def ready(self, message: str) -> None:
        pass


class ScriptedOperator(Operator):
    """Says what a script says, for tests and rehearsals.

    Args:
        script: ``{"episode": i, "step": j, "say": word}`` each: after j steps of the i-th episode that was begun
            (from 0, those played again included), one of `WORDS`. ``take-over`` said again gives control back.

    Raises:
        DsrlError: a line of another form, or an unknown word.
    """

    def __init__(self, script: Sequence[Mapping[str, Any]]):
        self.script: dict[tuple[int, int], str] = {}
        for line in script:
            if set(line) != {"episode", "step", "say"} or line["say"] not in WORDS:
                raise bad("operator.script", f"lines with episode, step, say: one of {', '.join(WORDS)}", dict(line))
            self.script[line["episode"], line["step"]] = line["say"]
        self.episode, self.step, self.human = -1, 0, False

    def ready(self, message: str) -> None:
        self.episode, self.step, self.human = self.episode + 1, 0, False

    def hear(self) -> Said:
        word = self.script.pop((self.episode, self.step), None)
        self.step += 1
        if word == TAKE_OVER:
            self.human = not self.human
            word = None
        return Said(Ending(word) if word else None, self.human)


class TeleopOperator(Operator):
    """Takes the words from a LeRobot teleoperator that has them (`get_teleop_events`: gamepad, keyboard_ee).

    Args:
        teleop: the one that drives the robot, or one for its buttons alone; connected here, if it is not.
        scene: makes who says that the scene is ready.

    Raises:
        DsrlError: the teleoperator has no events, or cannot be connected.
    """

    _ENDINGS = {"rerecord_episode": Ending.REDO, "success": Ending.SUCCESS, "terminate_episode": Ending.FAILURE}

    def __init__(self, teleop: Any, scene: Callable[[], Operator]):
        if not hasattr(teleop, "get_teleop_events"):
            fix = "Name one under events:."
            known = "a teleoperator with get_teleop_events (gamepad, keyboard_ee)"
            raise bad("operator: teleop", known, type(teleop).__name__, fix)
        self.teleop, self.own = teleop, not teleop.is_connected
        if self.own:
            try:
                teleop.connect()
            except Exception as error:
                raise bad("events", "a device that can be connected", f"{type(error).__name__}: {error}") from error
        try:
            self.scene = scene()
        except BaseException:
            self._disconnect()
            raise

    def hear(self) -> Said:
        events = {getattr(key, "value", key): value for key, value in self.teleop.get_teleop_events().items()}
        ending = next((word for name, word in self._ENDINGS.items() if events.get(name)), None)
        return Said(ending, bool(events.get("is_intervention")))

    def ready(self, message: str) -> None:
        self.scene.ready(message)
        self.teleop.get_teleop_events()

    def close(self) -> None:
        try:
            self.scene.close()
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        if self.own:
            self.teleop.disconnect()
