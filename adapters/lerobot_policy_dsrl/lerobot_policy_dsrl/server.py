"""``dsrl-policy-server``: LeRobot's async policy server, with steered policies among those it serves.

It takes the options of LeRobot's own. It unpickles what its clients send: for trusted networks only.
"""

from __future__ import annotations

import lerobot_policy_dsrl  # noqa: F401  (registers the policy)


def allow() -> None:
    """Let LeRobot's async server serve policies of type 'dsrl'; it does not look for plugins itself."""
    from lerobot.async_inference import constants

    if "dsrl" not in constants.SUPPORTED_POLICIES:
        constants.SUPPORTED_POLICIES.append("dsrl")


def main() -> None:
    """Serve."""
    from lerobot.async_inference.policy_server import serve

    allow()
    serve()


if __name__ == "__main__":
    main()
