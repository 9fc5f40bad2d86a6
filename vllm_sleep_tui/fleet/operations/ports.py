"""The port of a server: chosen, and who else is on it, by name; nobody else's listener is ever used."""

from __future__ import annotations

import socket

from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.telemetry.processes import holder_of_port

CURE = "End it, choose another `port:`, or use that server with `url:`; it is not touched."


def port_is_free(port: int) -> bool:
    """Whether nobody listens on the port; vLLM itself would share it with a stranger (SO_REUSEPORT)."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def taken(port: int, name: str) -> str:
    """That the port of `name` is somebody else's, and whose."""
    holder = holder_of_port(port)
    if holder is None:
        return f"Port {port} of {name} is taken."
    pid = f"pid {holder.process.pid}, " if holder.process else ""
    return (
        f"Port {port} of {name} is taken by {pid}user {holder.user}: {holder.command or 'command unknown'}."
    )


def choose_port(model: Model) -> int:
    """The configured port, or a free one; raises RefusedError that names who has the configured one."""
    wanted = model.config.port
    if wanted is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    if port_is_free(wanted):
        return wanted
    raise RefusedError(taken(wanted, model.name), CURE)
