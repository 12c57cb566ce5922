"""One kind of error for everything a user can get wrong.

Every message is one line that says which field is wrong, what was expected, what was found and,
where there is one, the remedy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class DsrlError(ValueError):
    """Bad input, refused by name."""


class NotSteerableError(DsrlError):
    """The base policy cannot be steered through its initial noise."""


class MissingExtraError(DsrlError, ImportError):
    """An optional dependency is not installed."""


class BaseFailedError(DsrlError, RuntimeError):
    """The frozen base itself failed, or its actions are not finite. No noise can mend that."""


class WorkerLostError(DsrlError, RuntimeError):
    """A rollout worker has died, and is not to be replaced."""


class TeamLostError(DsrlError, RuntimeError):
    """Another process of those that share the updates is gone."""


class MismatchError(DsrlError):
    """A head meets a base it was not trained on."""


class UnknownNameError(DsrlError):
    """A task, adapter, recipe or recipe key that does not exist."""


def bad(field: str, expected: str, got: object, fix: str = "") -> DsrlError:
    """Build the standard message: ``field: expected …, got …. fix``."""
    return DsrlError(f"{field}: expected {expected}, got {got}." + (f" {fix}" if fix else ""))


def at_least(least: float, config: object, where: str, *names: str) -> None:
    """Refuse a config of the section `where` that has less than `least` in one of these fields."""
    for name in names:
        value = getattr(config, name)
        if not math.isfinite(value):  # NaN would pass for any number
            raise bad(f"{where}.{name}", f"a finite number, {least} or more", value)
        if value < least:
            raise bad(f"{where}.{name}", f"{least} or more", value)


def first_line(error: BaseException) -> str:
    """What an exception says, for a message of one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the message for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return UnknownNameError(f"unknown {kind} '{name}'.{hint} Known: {shown}.")


def missing_extra(package: str, extra: str, what: str) -> MissingExtraError:
    """Build the message for an optional dependency, with the command that installs it."""
    return MissingExtraError(
        f"{what} needs the package '{package}', which is not installed. "
        f"Install it with: pip install 'dsrl-vla[{extra}]'"
    )
