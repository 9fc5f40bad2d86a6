"""Another user of this machine who takes the port of a server that is seen in the list of processes.

Run as root: ``python squatter.py NAME SECONDS PORT|-``. It becomes another user, waits for a process that
serves NAME (or takes PORT at once), listens on its port before it does, and answers each request as vLLM
would. Each line of its output is an event as JSON: {"port": N} once it listens, {"heard": TEXT} for what it
was sent on one connection, {"let go": N}. SECONDS is how long it keeps a port; 0 for as long as it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

UNUSED_UID = 64_913
ANSWER = b'{"is_sleeping":false,"closed":false,"in_flight":0,"data":[{"id":"a"}],"version":"0.32.0"}'
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can run a program as another user")


class Squatter:
    """The running squatter; what it tells is read as it comes."""

    def __init__(self, name: str = "-", *, port: int | None = None, seconds: float = 0.0) -> None:
        argv = [sys.executable, __file__, name, str(seconds), str(port or "-")]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.heard: list[str] = []
        self.ports: list[int] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                event = json.loads(line)
                if "port" in event:
                    self.ports.append(event["port"])
                if "heard" in event:
                    self.heard.append(event["heard"])

    def wait_for_port(self, count: int = 1) -> int:
        """Until it listens on its `count`-th port; that port."""
        deadline = time.monotonic() + 60
        while len(self.ports) < count:
            assert time.monotonic() < deadline, "nobody's port was taken"
            assert self.process.poll() is None, "the squatter ended"
            time.sleep(0.01)
        return self.ports[count - 1]

    def end(self) -> list[str]:
        """Stop it; all that it heard."""
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(30)
        return self.heard


@contextlib.contextmanager
def squatter(name: str = "-", *, port: int | None = None, seconds: float = 0.0) -> Iterator[Squatter]:
    """A squatter for the time of a block."""
    running = Squatter(name, port=port, seconds=seconds)
    try:
        yield running
    finally:
        running.end()


def tell(**event: Any) -> None:
    """One event, in one write."""
    os.write(1, json.dumps(event).encode() + b"\n")


def ports_of(name: str) -> Iterator[int]:
    """The ports of the processes that serve the name."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
                if "serve" in words and words[words.index("--served-model-name") + 1] == name:
                    yield int(words[words.index("--port") + 1])


def listen(port: int, seconds: float) -> None:
    """Take the port, and answer whoever comes."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError:
        return  # too late
    tell(port=port)
    until = time.monotonic() + seconds if seconds else float("inf")
    while time.monotonic() < until:
        if select.select([listener], [], [], 0.05)[0]:
            connection, _ = listener.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()
    listener.close()
    tell(**{"let go": port})


def answer(connection: socket.socket) -> None:
    """Answer everything as a server that is well would; tell all that came."""
    heard = b""
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(ANSWER)}\r\n\r\n"
    with contextlib.suppress(OSError), connection:
        while data := connection.recv(65536):
            heard += data
            tell(heard=data.decode(errors="replace"))
            connection.sendall(head.encode() + ANSWER)


def main() -> None:
    """Wait for a victim, again and again."""
    name, seconds, port = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    os.setgroups([])
    os.setgid(UNUSED_UID)
    os.setuid(UNUSED_UID)
    if port != "-":
        listen(int(port), seconds)
        return
    seen: set[int] = set()
    while True:
        for found in set(ports_of(name)) - seen:
            seen.add(found)
            threading.Thread(target=listen, args=(found, seconds), daemon=True).start()
        time.sleep(0.005)


if __name__ == "__main__":
    main()
