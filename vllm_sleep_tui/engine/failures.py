"""How a call to vLLM can fail, and how its three shapes of error are read."""

from __future__ import annotations

import msgspec

from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.text import clean

MESSAGE_LENGTH = 600
"""Characters of a server's own words that are passed on; they may be a whole traceback."""
ENGINE_DEAD = "EngineCore encountered an issue"
NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises; the last for brackets that are nested without an end."""


class EngineError(OperationError):
    """A call to a vLLM server did not succeed."""


class EngineUnreachable(EngineError):  # noqa: N818 - it says what happened
    """Nobody listens, or the connection broke; `sent` says whether the request may have arrived."""

    def __init__(self, what: str, cure: str = "", *, sent: bool = False) -> None:
        super().__init__(what, cure)
        self.sent = sent


class EngineTimeout(EngineError):  # noqa: N818 - it says what happened
    """No answer in time; the server may still do what was asked (vLLM 0.32, 06-frozen-engine.txt)."""


class EngineStranger(EngineError):  # noqa: N818 - it says what happened
    """Somebody else listens where the server should; nothing was sent to them."""


class EngineRefused(EngineError):  # noqa: N818 - it says what happened
    """The server answered with an error: its HTTP `status`, its own `message` and its `kind` of error."""

    def __init__(self, status: int, message: str, kind: str | None = None) -> None:
        super().__init__(f"vLLM answered {status}: {message}")
        self.status = status
        self.message = message
        self.kind = kind

    @property
    def engine_is_dead(self) -> bool:
        """Whether it tells of a dead engine; the process may still be there for some milliseconds.

        vLLM's `EngineDeadError` (0.24 to 0.32, 08-engine-dead.txt).
        """
        return self.message.startswith(ENGINE_DEAD)


class StillAsleep(EngineRefused):
    """The server took a wake well and sleeps on."""

    def __init__(self) -> None:
        super().__init__(200, "it answered 200 and still sleeps")


class EngineSilent(EngineError):  # noqa: N818 - it says what happened
    """A call got no answer, and what came of it cannot be known, or is nothing."""


def unreachable(where: str, request: str) -> EngineUnreachable:
    """The failure for a refused connection to `where`."""
    return EngineUnreachable(
        f"Nothing answers at {where} ({request}).", "Look whether the server is running, and at its log."
    )


def no_way_in(socket: str, request: str) -> EngineUnreachable:
    """The failure for a server whose `socket`, the panel's only way in, is no longer in the file system."""
    return EngineUnreachable(
        f"The panel's way into the server, {socket}, was removed ({request}).",
        "Something cleans that folder: stop the model with --force and start it again.",
    )


def broken_off(where: str, request: str) -> EngineUnreachable:
    """The failure for a connection to `where` that broke after the request had left."""
    return EngineUnreachable(
        f"vLLM at {where} closed the connection during {request}.",
        "Look at the server's log: its engine may have died.",
        sent=True,
    )


def timed_out(where: str, request: str, seconds: float) -> EngineTimeout:
    """The failure for an answer that did not come within `seconds`."""
    cure = "" if request.startswith("GET") else "vLLM may still do it: ask for its state before trying again."
    return EngineTimeout(f"vLLM at {where} did not answer {request} within {seconds:g} s.", cure)


def refused(status: int, body: bytes) -> EngineRefused:
    """The failure that an error answer tells of.

    vLLM's own errors are objects, a missing key is a string under ``error``, and unknown routes have
    ``detail`` (vLLM 0.32, 05-api-key.txt and 07-dev-mode-off.txt).
    """
    try:
        answer = msgspec.json.decode(body)
    except NOT_JSON:
        answer = None
    match answer:
        case {"error": {"message": message, "type": str(kind)}}:
            return EngineRefused(status, _shown(message), kind)
        case {"error": {"message": message}} | {"error": str(message)} | {"detail": message}:
            return EngineRefused(status, _shown(message))
        case _:
            return EngineRefused(status, _shown(body.decode(errors="replace")) or "no reason given")


def unreadable(request: str, body: bytes) -> EngineRefused:
    """The failure for a success whose body is not what vLLM sends."""
    start = _shown(body[:80].decode(errors="replace"))
    return EngineRefused(200, f"the answer to {request} is not vLLM's: {start!r}")


def _shown(message: object) -> str:
    return clean(str(message)).strip()[:MESSAGE_LENGTH]
