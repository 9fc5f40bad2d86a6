"""Who may hear what the panel sends: each fresh connection is looked at before a byte goes over it.

A port is anybody's: another user may listen on one before its server does, or after it ended.
"""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.failures import EngineStranger
from vllm_sleep_tui.telemetry.peers import is_here, user_at_other_end
from vllm_sleep_tui.telemetry.processes import user_name

ANYBODY = "*"


def check_own(connection: socket.socket) -> None:
    """Raises EngineStranger unless this very user has the other end, OSError if it is gone."""
    user = user_at_other_end(connection)
    if user != os.getuid():
        raise EngineStranger(
            f"{_who(user)} has the place of this server; nothing was sent there.",
            "Stop the model and start it again; if the port is in its config, choose another.",
        )


def check_for_key(model: ModelConfig) -> Callable[[socket.socket], None] | None:
    """The look before an attached server's key goes out; None where there is none to guard.

    Over TLS the certificate says whose server it is, and another machine's users are not seen from here.
    """
    parts = urlsplit(model.url or "")
    if model.api_key is None or parts.scheme == "https" or model.url_user == ANYBODY:
        return None

    def check(connection: socket.socket) -> None:
        if not is_here(connection):
            return
        user = user_at_other_end(connection)
        if user is None or user not in (os.getuid(), 0, _number_of(model.url_user)):
            name = "NAME" if user is None else user_name(user)
            raise EngineStranger(
                f"{_who(user)} answers at {parts.netloc}, so its API key was not sent.",
                f"If that is the right server, write `url_user: {ANYBODY if user is None else name}` there.",
            )

    return check


def _who(user: int | None) -> str:
    return "Somebody who cannot be seen" if user is None else f"User {user_name(user)}"


def _number_of(name: str | None) -> int | None:
    """The user's number; None if there is no such user."""
    try:
        return None if name is None else int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        return None
