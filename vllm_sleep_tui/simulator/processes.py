"""Child processes that look like vLLM's: forked, titled, and tied by a socket with one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

Message = Mapping[str, Any]


class Channel:
    """A blocking end of a socket pair; `receive` returns None once the other side is gone."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self._buffer = b""

    def fileno(self) -> int:
        """For select."""
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        """Send, or drop it if the other side is gone, which the next `receive` tells."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Block until there is at least one whole message; all that came, or None at the end."""
        while b"\n" not in self._buffer:
            try:
                chunk = self.socket.recv(1 << 16)
            except ConnectionError:
                chunk = b""
            if not chunk:
                return None
            self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        return [json.loads(line) for line in lines]


def spawn(
    title: str, body: Callable[[Channel], None], *, close: tuple[socket.socket, ...]
) -> tuple[int, Channel]:
    """Fork a child that runs `body` under `title` and exits; returns its pid and our end.

    Call it only while this process has a single thread. `close` are our sockets that the child must not keep.
    """
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        for end in close:
            end.close()
        _run_child(title, body, Channel(theirs))
    theirs.close()
    return pid, Channel(ours)


def _run_child(title: str, body: Callable[[Channel], None], channel: Channel) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    set_title(title)
    try:
        body(channel)
    except SystemExit as leaving:
        os._exit(leaving.code if isinstance(leaving.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def set_title(title: str) -> None:
    """Overwrite the command line that /proc and ps show; the name is cut at 15 characters.

    As with the setproctitle of vLLM, the environment in /proc is lost too, which lies behind the arguments,
    unless SPT_NOENV forbids that (and VLLM_SIM_HIDES_LAUNCH does not want it all the same).
    """
    fields = Path("/proc/self/stat").read_bytes().rsplit(b")", 1)[1].split()
    start, end, environment_end = (int(fields[field - 3]) for field in (48, 49, 51))  # proc(5) counts from 1
    text = title.encode()[: end - start - 1]
    keeps = os.environ.get("SPT_NOENV") and not os.environ.get("VLLM_SIM_HIDES_LAUNCH")
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        memory.write(text.ljust((end if keeps else environment_end) - start, b"\0"))
    Path("/proc/self/comm").write_text(title)


def wait_for_ever() -> NoReturn:
    """Do nothing until a signal ends the process."""
    while True:
        signal.pause()
