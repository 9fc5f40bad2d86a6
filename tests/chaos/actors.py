"""Starts commands of the product in a few milliseconds: forks of one process that has it all imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


class Actors:
    """A process that forks one child for each command."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.actors"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )

    def begin(self, log: Path, *arguments: str) -> int:
        """Begin a command; its pid."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(log), *arguments]).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it; its children live on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)


def main() -> None:
    """Fork for each line: a log file and the arguments of a command."""
    # Imported once, here, for all children.
    from vllm_sleep_tui.cli import app, operations, orphans, serve, status  # noqa: F401
    from vllm_sleep_tui.engine import client  # noqa: F401
    from vllm_sleep_tui.fleet import fleet  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    for line in sys.stdin.buffer:
        log, *arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for target, source in ((0, null), (1, out), (2, out)):
                os.dup2(source, target)
            code = app.run(arguments)
            os.write(2, f"exit {code}\n".encode())
            os._exit(code)
        os.write(1, f"{pid}\n".encode())


if __name__ == "__main__":
    main()
